"""What a release did, in numbers that add up: over threads, over processes, and over restarts. Pure.

Latencies are kept as a histogram, so that those of several processes can be added as calls are; its buckets are at most
6 % wide.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from device_sdk.protocol import fields
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.frozen import frozen

Tally = tuple[tuple[int, int], ...]  # (what, how often), in order of the first

OTHER = -1  # the class of all that find no place of their own
CLASSES = 256  # kept apart; a model with more of them has the rest in OTHER
SHOWN = 8  # classes that an event names
_MOST = 2.0**62
_PLAIN = ("calls", "errors", "checked", "invalid", "rejected", "scored", "changes")


@frozen
class Counts:
    """What a release did. `checked`: calls whose outputs were looked at; `invalid`: those with NaN, inf or nothing.

    `rejected` calls had wrong inputs, which is the caller's fault and no evidence. `times`: calls looked at, by bucket
    of their latency. `scored`: answers whose scores were looked at (a call with a batch gives several); `confidence`:
    the sum of their top scores; `classes`: how often each class came out on top; `changes`: how often it was another
    than in the answer before.
    """

    calls: int = 0
    errors: int = 0
    checked: int = 0
    invalid: int = 0
    rejected: int = 0
    times: Tally = ()
    scored: int = 0
    confidence: float = 0.0
    classes: Tally = ()
    changes: int = 0

    @property
    def p50(self) -> float:
        """Median latency in microseconds; 0: not known."""
        return quantile(self.times, 0.50)

    @property
    def p95(self) -> float:
        return quantile(self.times, 0.95)

    @property
    def mean_confidence(self) -> float:
        return self.confidence / self.scored if self.scored else 0.0

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in (*_PLAIN, "confidence")}
        return plain | {name: [list(pair) for pair in getattr(self, name)] for name in ("times", "classes")}

    @classmethod
    def parse(cls, value: object) -> "Counts":
        """What `to_json` gave, from a file of ours. Raises ProtocolError."""
        item = fields.as_object(value, "counts")
        plain = {name: fields.take_int(item, name, high=2**62, default=0) for name in _PLAIN}
        confidence = fields.take_number(item, "confidence", low=0, high=_MOST, default=0)
        times, classes = _tally(item, "times", 0, _SLOWEST), _tally(item, "classes", OTHER, 2**62)
        return cls(**plain, confidence=confidence, times=times, classes=classes)

    def shown(self) -> dict[str, float]:
        """For a status page: without the histograms."""
        names = ("calls", "errors", "checked", "invalid", "rejected", "p50", "p95")
        return {name: getattr(self, name) for name in names}


def bucket(nanoseconds: int) -> int:
    """Where a latency is counted: sixteen buckets to an octave."""
    shift = nanoseconds.bit_length() - 5
    return (shift << 4) + (nanoseconds >> shift) if shift > 0 else nanoseconds


def quantile(times: Tally, share: float) -> float:
    """The latency in microseconds that this share of the calls stayed within; between the bounds of its bucket."""
    total = sum(count for _, count in times)
    left = share * total
    for index, count in times:
        if left <= count:
            low, width = _bounds(index)
            return (low + width * max(left, 0.0) / count) / 1e3
        left -= count
    return 0.0


def added(every: Iterable[Counts]) -> Counts:
    """The sum. Of latencies and classes too: each call and each answer weighs the same, whoever made it."""
    parts = list(every)
    sums = {name: sum(getattr(each, name) for each in parts) for name in (*_PLAIN, "confidence")}
    return Counts(
        **sums,
        times=_merged(each.times for each in parts),
        classes=_merged(each.classes for each in parts),
    )


def detail(counts: Counts, *, load: str = "", seconds: float = 0.0) -> dict[str, float | str]:
    """The numbers of an event: of one release since it was loaded in that process, by the name `load`."""
    told: dict[str, float | str] = {
        name: getattr(counts, name) for name in ("calls", "errors", "checked", "invalid", "rejected")
    }
    told |= {"p50_us": round(counts.p50, 2), "p95_us": round(counts.p95, 2), "seconds": round(seconds, 1)}
    if load:
        told["load"] = load
    if counts.scored:
        told |= {"scored": counts.scored, "classes": classes_text(counts.classes)}
        if counts.confidence:
            told["confidence"] = round(counts.mean_confidence, 6)
    return told


def classes_text(classes: Tally) -> str:
    """The most frequent classes as `index:count`, the rest as `other:count`; at most 200 characters."""
    ranked = sorted((pair for pair in classes if pair[0] != OTHER), key=lambda pair: (-pair[1], pair[0]))
    rest = sum(count for _, count in classes) - sum(count for _, count in ranked[:SHOWN])
    shown = [f"{index}:{count}" for index, count in ranked[:SHOWN]]
    return " ".join([*shown, f"other:{rest}"] if rest else shown)[:200]


_SLOWEST = bucket(2**62)  # nanoseconds, more than a century


def _bounds(index: int) -> tuple[int, int]:
    shift = max((index >> 4) - 1, 0)
    return (index - (shift << 4)) << shift, 1 << shift


def _merged(tallies: Iterable[Tally]) -> Tally:
    total: Counter[int] = Counter()
    for tally in tallies:
        for what, count in tally:
            total[what] += count
    return ordered(total)


def ordered(counts: Mapping[int, int]) -> Tally:
    return tuple(sorted(counts.items()))


def _tally(item: fields.Json, name: str, low: int, high: int) -> Tally:
    """Of what is from `low` to `high`, each seen at least once."""
    pairs = fields.take_list({name: item.get(name, [])}, name, limit=4_096)
    for pair in pairs:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)
        if not (whole and low <= pair[0] <= high and 0 < pair[1] < 2**62):
            raise ProtocolError("malformed", f"{name}: expected pairs of whole numbers; got {pair!r:.60}")
    return ordered(dict(pairs))
