"""Events: what happened on a device, each with an id, so that posting one twice is posting it once."""

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.names import ReleasePath

# A model's lifecycle on the device, in the words of the transition table.
WAITING, DOWNLOADING, VERIFYING, TESTING = "waiting", "downloading", "verifying", "testing"
ACTIVATING, PROBATION, COMMITTED = "activating", "probation", "committed"
FAILED, ROLLED_BACK = "failed", "rolled_back"
WITHDRAWN = "withdrawn"  # the view stopped naming the release before it was committed; nobody's fault
STOPPED = "stopped"  # nothing may run, and the policy is to run nothing; `release` is what served until then
REFUSED = "refused"  # a view or file that trust refused; `reason` is the error's code
ACCEPTED = "accepted"  # a view was accepted again: ends what `refused` began; `reason` is what had been refused
HEALTH = "health"  # periodic counters of a model: calls, errors, invalid
KINDS = frozenset(
    {WAITING, DOWNLOADING, VERIFYING, TESTING, ACTIVATING, PROBATION, COMMITTED, FAILED, ROLLED_BACK, WITHDRAWN}
    | {STOPPED, REFUSED, ACCEPTED, HEALTH}
)
DETAIL_KEYS = 32
DETAIL_CHARS = 200
LARGEST = 1e300

_ID = re.compile(r"[0-9a-f]{32}")


@frozen
class Event:
    """`at` in unix seconds by the device's clock; `release` None where the event is about no release."""

    id: str
    at: float
    kind: str
    model: str = ""
    release: ReleasePath | None = None
    rollout: str = ""
    reason: str = ""
    detail: Mapping[str, float | str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "at": self.at,
            "kind": self.kind,
            "model": self.model,
            "release": str(self.release) if self.release else None,
            "rollout": self.rollout,
            "reason": fields.plain(self.reason)[: limits.REASON_CHARS],
            "detail": {key: _plain(value) for key, value in self.detail.items()},
        }

    @classmethod
    def parse(cls, value: object) -> "Event":
        item = fields.as_object(value, "event")
        identifier = fields.take_text(item, "id", limit=32)
        if not _ID.fullmatch(identifier):
            raise ProtocolError("malformed", f"id: expected 32 hex digits; got {identifier!r:.80}")
        kind = fields.take_text(item, "kind", limit=32)
        if kind not in KINDS:
            raise ProtocolError("unknown_kind", f"kind: expected one of {sorted(KINDS)}; got {kind!r:.80}")
        return cls(
            id=identifier,
            at=fields.take_number(item, "at", low=0, high=2**40),
            kind=kind,
            model=fields.take_text(item, "model", limit=64, default=""),
            release=None if item.get("release") is None else ReleasePath.parse(item["release"]),
            rollout=fields.take_text(item, "rollout", limit=64, default=""),
            reason=fields.take_text(item, "reason", limit=limits.REASON_CHARS, default=""),
            detail=_detail(item),
        )


def _plain(value: float | str) -> float | str:
    """What the other side accepts: reports of broken models hold broken numbers, and must arrive all the same."""
    if isinstance(value, str):
        return fields.plain(value)[:DETAIL_CHARS]
    return value if -LARGEST <= value <= LARGEST else str(value)[:DETAIL_CHARS]


def _detail(item: fields.Json) -> dict[str, float | str]:
    detail = fields.as_object(item.get("detail", {}), "detail")
    if len(detail) > DETAIL_KEYS:
        raise ProtocolError("malformed", f"detail: expected at most {DETAIL_KEYS} keys; got {len(detail)}")
    for key, value in detail.items():
        number = isinstance(value, (int, float)) and -LARGEST <= value <= LARGEST  # refuses 1e999, which is infinite
        if len(key) > 64 or not (number or (isinstance(value, str) and len(value) <= DETAIL_CHARS)):
            raise ProtocolError("malformed", f"detail: expected short text or numbers; got {key!r:.64}: {value!r:.60}")
    return detail
