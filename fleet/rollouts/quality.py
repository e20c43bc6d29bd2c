"""What one device's numbers say about a release: how it changed against its own past. Pure.

Each device is its own yardstick: what counts is the change from its numbers before (on the release that it ran) to its
numbers now. So a slow board or a dark site is compared with itself, and a ring of old hardware is no evidence of
anything. Devices that stayed behind show in the same way what changed for everybody meanwhile.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ERRORS, INVALID, LATENCY = "errors", "invalid", "latency"
CONFIDENCE, CLASSES = "confidence", "classes"
_COUNTS = ("calls", "errors", "checked", "invalid", "scored")
MOST = 2**53


@dataclass(frozen=True, slots=True)
class Numbers:
    """Counts of a release since it was loaded (`load` names the loading), or of a span of that. p95 in microseconds."""

    load: str = ""
    calls: float = 0
    errors: float = 0
    checked: float = 0
    invalid: float = 0
    scored: float = 0
    p95_us: float = 0
    confidence: float = 0
    classes: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, detail: Mapping[str, Any]) -> "Numbers | None":
        """From an event's `detail`; None where the device does not say which load it counts, or counts nonsense."""
        load = detail.get("load")
        if not isinstance(load, str) or not load:
            return None
        counts = {name: _number(detail.get(name, 0)) for name in (*_COUNTS, "p95_us", "confidence")}
        classes = _classes(detail.get("classes", ""))
        if classes is None or any(value is None for value in counts.values()):
            return None
        numbers = cls(load=load[:32], classes=classes, **{name: value or 0.0 for name, value in counts.items()})
        sound = numbers.errors <= numbers.calls and numbers.invalid <= numbers.checked and numbers.confidence <= 1
        return numbers if sound else None

    def since(self, base: "Numbers") -> "Numbers":
        """The span from `base` to now of one load; all of it where `base` is of another. p95 is of recent calls."""
        if base.load != self.load or any(getattr(self, name) < getattr(base, name) for name in _COUNTS):
            return self
        counts = {name: getattr(self, name) - getattr(base, name) for name in _COUNTS}
        total = self.scored * self.confidence - base.scored * base.confidence
        confidence = min(max(total / counts["scored"], 0.0), 1.0) if counts["scored"] else 0.0
        classes = {name: max(count - base.classes.get(name, 0), 0) for name, count in self.classes.items()}
        return Numbers(load=self.load, p95_us=self.p95_us, confidence=confidence, classes=classes, **counts)

    def to_json(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in (*_COUNTS, "p95_us", "confidence")}
        return {**kept, "load": self.load, "classes": dict(self.classes)}

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> "Numbers":
        return cls(**stored)


@dataclass(frozen=True, slots=True)
class Change:
    """`now` in the guard's own unit; `change` since before, in the unit of its scale."""

    now: float
    change: float


def changes(before: Numbers, now: Numbers) -> dict[str, Change]:
    """Of each guard for which both spans have numbers."""
    found = {
        ERRORS: _rates(before.errors, before.calls, now.errors, now.calls),
        INVALID: _rates(before.invalid, before.checked, now.invalid, now.checked),
    }
    if before.p95_us > 0 and now.p95_us > 0:
        found[LATENCY] = Change(now.p95_us / 1e3, math.log(now.p95_us / before.p95_us))
    if before.scored and now.scored:
        found[CONFIDENCE] = Change(now.confidence, before.confidence - now.confidence)
        found[CLASSES] = _shift(before.classes, now.classes)
    return {name: change for name, change in found.items() if change is not None}


def _rates(bad_before: float, before: float, bad_now: float, now: float) -> Change | None:
    if not before or not now:
        return None
    return Change(bad_now / now, bad_now / now - bad_before / before)


def _shift(before: Mapping[str, float], now: Mapping[str, float]) -> Change | None:
    """Total variation distance of two class mixes; the change is what exceeds the distance that chance alone makes.

    Classes that only one of them names are among the other's `other`, and go there. By chance the shares of one mix,
    counted n and k times, differ by sqrt(2/pi * p(1-p) (1/n + 1/k)) on average (a normal's mean absolute value).
    """
    size_before, size_now = sum(before.values()), sum(now.values())
    if not size_before or not size_now:
        return None
    shared = sorted((before.keys() & now.keys()) - {"other"})
    distance = chance = 0.0
    for p, q in (*_shares(shared, before, size_before, now, size_now),):
        pooled = (p * size_before + q * size_now) / (size_before + size_now)
        distance += abs(p - q) / 2
        spread = pooled * (1 - pooled) * (1 / size_before + 1 / size_now)
        chance += math.sqrt(2 / math.pi * max(spread, 0.0)) / 2
    return Change(distance, distance - chance)


def _shares(
    shared: list[str], before: Mapping[str, float], size_before: float, now: Mapping[str, float], size_now: float
) -> list[tuple[float, float]]:
    pairs = [(before[name] / size_before, now[name] / size_now) for name in shared]
    return [*pairs, (1 - sum(p for p, _ in pairs), 1 - sum(q for _, q in pairs))]


def _classes(text: object) -> dict[str, float] | None:
    """`3:120 7:44 other:9` as a mapping; None where it reads otherwise."""
    if not isinstance(text, str):
        return None
    found: dict[str, float] = {}
    for part in text.split():
        name, _, count = part.rpartition(":")
        if not name or not (count.isascii() and count.isdecimal()) or len(count) > 15:
            return None
        found[name] = float(count)
    return found


def _number(value: object) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST
    return float(value) if good else None  # type: ignore[arg-type]  # checked in the line above
