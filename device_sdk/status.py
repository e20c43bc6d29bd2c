"""What an application is told of its device."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from device_sdk.counts import Counts

if TYPE_CHECKING:
    from device_sdk.worker import PollState


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model. `release` serves now; `state` and `reason` say where an update to `target` stands.

    `providers`: what it runs on; `missing_providers`: execution providers that were asked for and are not among them.
    """

    release: str
    state: str
    reason: str
    target: str
    counts: Counts
    providers: tuple[str, ...] = ()
    missing_providers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """A device at a moment. `poll` None: this process does not update the directory, another may."""

    device: str
    server: str
    sdk: str
    updates: bool
    poll: "PollState | None"
    models: Mapping[str, ModelStatus]
    events_waiting: int = 0
    samples_waiting: Mapping[str, int] = field(default_factory=dict)
    samples_dropped: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        models = {name: {**asdict(each), "counts": each.counts.shown()} for name, each in self.models.items()}
        return {**asdict(self), "models": models}
