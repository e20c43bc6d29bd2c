"""What a device posts: its events, and what it runs and can run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from device_sdk.protocol import fields, limits
from device_sdk.protocol.abilities import UNSAID, Abilities
from device_sdk.protocol.events import Event
from device_sdk.protocol.polls import check_runs


@dataclass(frozen=True, slots=True)
class EventPost:
    """One post: new events, what the device runs and can run now, and what it had to drop since the last accepted."""

    events: tuple[Event, ...]
    runs: Mapping[str, str]
    sdk: str
    dropped: int = 0
    abilities: Abilities = UNSAID

    def to_json(self) -> dict[str, Any]:
        said = {"abilities": self.abilities.to_json()} if self.abilities != UNSAID else {}
        return {
            "events": [event.to_json() for event in self.events],
            "runs": dict(self.runs),
            "sdk": self.sdk,
            "dropped": self.dropped,
        } | said

    @classmethod
    def parse(cls, data: bytes) -> "EventPost":
        item = fields.parse_object(data, limit=limits.EVENT_BODY, what="events")
        return cls(
            events=tuple(Event.parse(e) for e in fields.take_list(item, "events", limit=limits.EVENTS_PER_POST)),
            runs=check_runs(item.get("runs")),
            sdk=fields.take_text(item, "sdk", limit=32, default=""),
            dropped=fields.take_int(item, "dropped", high=2**40, default=0),
            abilities=Abilities.parse(item.get("abilities", {})),
        )
