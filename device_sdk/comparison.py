"""Compare a release on trial with the one before it, by what both did on this device. Pure.

A difference counts only as far as chance cannot have made it. The bounds hold however often one looks (a normal mixture
boundary for means of bounded values, Robbins 1970), at one false alarm in a thousand trials for each comparison. They
are for independent answers. A camera's are not: for classes and confidence we estimate from the previous release how
long a class stays, and count an answer for that much less; of latencies nothing is estimated.
"""

from collections.abc import Mapping
from dataclasses import field
from math import inf, log, sqrt

from device_sdk.counts import OTHER, Counts, quantile
from device_sdk.protocol.assignment import Probation
from device_sdk.protocol.frozen import frozen

MIN_LOOKED = 100  # calls (or answers) looked at, on both sides: with fewer nothing is compared
MOST_LOOKED = 1_600  # calls after which nobody waits for scores any more
FALSE_ALARMS = 1e-3  # of one comparison, over the whole of a trial
_TUNED = 200.0  # answers for which the boundary is tightest
_KINDS = 8  # classes told apart; the rest are one


@frozen
class Compared:
    """`reason`: what went too far, "" if nothing did. `detail`: for the event, also where nothing could be compared."""

    reason: str = ""
    detail: Mapping[str, float | str] = field(default_factory=dict)


def is_asked(rules: Probation) -> bool:
    return any(value is not None for value in (rules.max_slowdown, rules.max_confidence_drop, rules.max_class_shift))


def is_worth_waiting(rules: Probation, counts: Counts, baseline: Counts) -> bool:
    """Whether a trial that has all its calls should go on, because what was asked cannot be compared yet.

    Not where it never can be: the previous release was called too rarely, or gives no scores.
    """
    scores_asked = rules.max_confidence_drop is not None or rules.max_class_shift is not None
    waits = rules.max_slowdown is not None and counts.checked < MIN_LOOKED <= baseline.checked
    if scores_asked and baseline.scored >= MIN_LOOKED > counts.scored:
        waits = waits or counts.checked < (MOST_LOOKED if counts.scored else MIN_LOOKED)
    return waits


def compare(rules: Probation, counts: Counts, baseline: Counts) -> Compared:
    """What was asked for, worst first: classes, confidence, latency."""
    told: dict[str, float | str] = {}
    reasons = [
        _look_at_classes(rules.max_class_shift, counts, baseline, told),
        _look_at_confidence(rules.max_confidence_drop, counts, baseline, told),
        _look_at_latency(rules.max_slowdown, counts, baseline, told),
    ]
    return Compared(next(filter(None, reasons), ""), told)


def _look_at_latency(allowed: float | None, counts: Counts, baseline: Counts, told: dict[str, float | str]) -> str:
    if allowed is None:
        return ""
    if problem := _too_few(counts.checked, baseline.checked):
        told["slowdown"] = problem
        return ""
    now, before = counts.p50, baseline.p50
    told["slowdown"] = round(now / before, 3) if before else "no baseline"
    least = quantile(counts.times, 0.5 - moving_margin(counts.checked))
    most = quantile(baseline.times, 0.5 + fixed_margin(baseline.checked))
    if not before or least <= allowed * most:
        return ""
    return f"slowdown: median {now:.0f} us, before {before:.0f} us, allowed {allowed:g} times"


def _look_at_confidence(allowed: float | None, counts: Counts, baseline: Counts, told: dict[str, float | str]) -> str:
    if allowed is None:
        return ""
    if problem := _too_few(counts.scored, baseline.scored) or _without(counts, baseline):
        told["confidence_drop"] = problem
        return ""
    drop = baseline.mean_confidence - counts.mean_confidence
    told["confidence_drop"] = round(drop, 4)
    if drop - _margin(counts, baseline) <= allowed:
        return ""
    means = f"{counts.mean_confidence:.3f} in {counts.scored} answers, before {baseline.mean_confidence:.3f}"
    return f"confidence_drop: {means}, allowed {allowed:g}"


def _look_at_classes(allowed: float | None, counts: Counts, baseline: Counts, told: dict[str, float | str]) -> str:
    if allowed is None:
        return ""
    if problem := _too_few(counts.scored, baseline.scored):
        told["class_shift"] = problem
        return ""
    kinds = _kinds(baseline)
    now, before = _mix(counts, kinds), _mix(baseline, kinds)
    shift = sum(abs(now[kind] - before[kind]) for kind in now) / 2
    told["class_shift"] = round(shift, 4)
    # The distance is the largest difference over all sets of classes: the bound must hold for each of them at once.
    if shift - _margin(counts, baseline, sets=len(kinds)) <= allowed:
        return ""
    return f"class_shift: {shift:.3f} in {counts.scored} answers, allowed {allowed:g}"


def _too_few(now: int, before: int) -> str:
    if before < MIN_LOOKED:
        return f"not compared: {before} looked at before, {MIN_LOOKED} needed"
    return f"not compared: {now} looked at, {MIN_LOOKED} needed" if now < MIN_LOOKED else ""


def _without(counts: Counts, baseline: Counts) -> str:
    return "" if counts.confidence and baseline.confidence else "not compared: labels have no confidence"


def _kinds(baseline: Counts) -> list[int]:
    """The classes that are told apart: the most frequent before. Chosen by the past alone, or chance could choose."""
    ranked = sorted((pair for pair in baseline.classes if pair[0] != OTHER), key=lambda pair: (-pair[1], pair[0]))
    return [kind for kind, _ in ranked[:_KINDS]]


def _mix(counts: Counts, kinds: list[int]) -> dict[int, float]:
    found = dict(counts.classes)
    mix = {kind: found.get(kind, 0) / counts.scored for kind in kinds}
    return mix | {OTHER: max(0.0, 1.0 - sum(mix.values()))}


def _margin(counts: Counts, baseline: Counts, *, sets: int = 1) -> float:
    """How far two means may differ by chance. `sets`: the bound holds for 2 ** sets of them at once."""
    weight = independence(baseline)
    return moving_margin(counts.scored * weight, sets=sets) + fixed_margin(baseline.scored * weight, sets=sets)


def independence(counts: Counts) -> float:
    """What one answer is worth, 1 for independent ones, by how rarely the class changes from one to the next.

    If it changed as among independent answers, so often as two drawn at random differ, they are independent. A stream
    that stays is worth (1 - r) / (1 + r) of them, where r is how much rarer it changes.
    """
    differ = 1 - sum((count / counts.scored) ** 2 for _, count in counts.classes) if counts.scored else 0.0
    expected = differ * counts.scored
    if expected < 1:
        return 1.0  # one class only, so far: nothing to estimate from
    stays = 1 - min(max(counts.changes, 1) / expected, 1.0)
    return (1 - stays) / (1 + stays)


def moving_margin(number: float, *, sets: int = 1, alarms: float = FALSE_ALARMS) -> float:
    """Bound of the error of a mean of `number` values from 0 to 1, that holds at every number at once."""
    if number <= 0:
        return inf
    spread = log((number + _TUNED) / _TUNED) + 2 * (log(2 / alarms) + sets * log(2))
    return sqrt(0.25 * (number + _TUNED) * spread) / number


def fixed_margin(number: float, *, sets: int = 1, alarms: float = FALSE_ALARMS) -> float:
    """The same for one number fixed beforehand (Hoeffding): the previous release's, which counts no more."""
    return sqrt((log(2 / alarms) + sets * log(2)) / (2 * number)) if number > 0 else inf
