"""Decide whether a stage may pass. No IO, no clock: callers pass counts and the time.

What it refuses: to guess. A number that is none, a time without a zone, devices that were not counted: Hold.
"""

import math
from dataclasses import dataclass
from datetime import datetime

HOLD, PAUSE, ROLL_BACK = "hold", "pause", "roll_back"  # what a spent failure budget does


@dataclass(frozen=True, slots=True)
class StageRules:
    """A stage as its author wrote it, and when it began. `success_threshold` is a fraction of the admitted.

    Zero reports at a threshold of zero needs no device at all: for the first release of a model.
    """

    percent: float
    soak_seconds: float
    min_reports: int
    success_threshold: float
    failure_budget: int
    last: bool
    on_failure: str = ROLL_BACK
    since: datetime | None = None
    ring: bool = False  # it admits a ring, and no percentage of its own


@dataclass(frozen=True, slots=True)
class Tally:
    """`admitted`: devices of the stage that could know of it, None if not counted; the others are outcomes."""

    committed: int
    failed: int
    admitted: int | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    reason: str


@dataclass(frozen=True, slots=True)
class Advance:
    pass


@dataclass(frozen=True, slots=True)
class Complete:
    pass


@dataclass(frozen=True, slots=True)
class Pause:
    reason: str


@dataclass(frozen=True, slots=True)
class Halt:
    reason: str


Decision = Hold | Advance | Complete | Pause | Halt


def next_step(stage: StageRules, tally: Tally, now: datetime) -> Decision:
    """Errors before success; then soak, reports, share of success. Any doubt is Hold."""
    if not (_count(stage.failure_budget) and _count(tally.failed)):
        return Hold("the failure budget or the count of failures is malformed")
    if tally.failed > stage.failure_budget:
        return _on_failure(stage, tally)
    waits = _doubt(stage, tally, now) or _soak(stage, now) or _reports(stage, tally) or _share(stage, tally)
    if waits:
        return Hold(waits)
    return Complete() if stage.last else Advance()


def enough_reports(stage: StageRules, tally: Tally, now: datetime) -> bool:
    """Whether it is worth counting the admitted devices: everything cheaper already speaks for passing."""
    return not (_doubt(stage, tally, now) or _soak(stage, now) or _reports(stage, tally))


def _on_failure(stage: StageRules, tally: Tally) -> Decision:
    reason = f"failure budget spent: {tally.failed} failed, {stage.failure_budget} allowed"
    if stage.on_failure == HOLD:
        return Hold(reason)
    return Pause(reason) if stage.on_failure == PAUSE else Halt(reason)


def _doubt(stage: StageRules, tally: Tally, now: datetime) -> str:
    """Name the first thing that cannot be trusted, or nothing."""
    doubts = {
        "the stage's percentage is malformed": not _number(stage.percent, 0, 100)
        or (stage.percent == 0 and stage.ring is not True),
        "the stage's soak time is malformed": not _number(stage.soak_seconds, 0, math.inf),
        "the success threshold is malformed": not _number(stage.success_threshold, 0, 1),
        "the counts of reports are malformed": not (_count(stage.min_reports) and _count(tally.committed)),
        "the stage has no beginning": not (_moment(stage.since) and _moment(now)),
    }
    return next((reason for reason, doubtful in doubts.items() if doubtful), "")


def _soak(stage: StageRules, now: datetime) -> str:
    passed = (now - (stage.since or now)).total_seconds()
    return f"soaking for {stage.soak_seconds:g} s" if passed < stage.soak_seconds else ""


def _reports(stage: StageRules, tally: Tally) -> str:
    reports = tally.committed + tally.failed
    return f"waiting for reports: {reports} of {stage.min_reports}" if reports < stage.min_reports else ""


def _share(stage: StageRules, tally: Tally) -> str:
    if not _count(tally.admitted):
        return "the admitted devices are not counted"
    admitted = max(tally.admitted or 0, tally.committed + tally.failed)
    needed = math.ceil(stage.success_threshold * admitted - 1e-9)
    if tally.committed < needed:
        return f"waiting for success: {tally.committed} of {admitted} committed, {needed} needed"
    return ""


def _number(value: object, low: float, high: float) -> bool:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return good and low <= value <= high  # type: ignore[operator]  # checked in the line above


def _moment(value: object) -> bool:
    return isinstance(value, datetime) and value.utcoffset() is not None


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
