"""Whether a rollout will meet its objective, from the adoption so far. No IO, no clock. What it cannot say it does not.

The model is one number: the rate at which a device that has the release to come commits, from the recent past. What it
does not know, it names: stages to come, approvals, failures. Bounds are those of a Poisson count (90 %, normal
approximation), so few commits give wide bounds, and fewer than `ENOUGH` none.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from math import inf, log, sqrt

ENOUGH = 10  # commits in the window
Z = 1.645  # 90 % two-sided
MET, MISSED, LIKELY, UNLIKELY, OPEN, UNKNOWN = "met", "missed", "likely", "unlikely", "open", "unknown"
VERDICTS = (MET, MISSED, LIKELY, UNLIKELY, OPEN, UNKNOWN)


@dataclass(frozen=True, slots=True)
class Objective:
    """`percent` of the group within `days` of the start."""

    percent: float
    days: float


@dataclass(frozen=True, slots=True)
class Adoption:
    """Counts of devices. `window` in seconds, `recent` of the committed did so in it.

    `lost`: failed for good or pinned elsewhere, who will not commit as things stand. `reach`: percent admitted now.
    `soak_left`: seconds that the stages to come take at least. `moving`: running, and no person's word is waited for.
    """

    total: int
    committed: int
    recent: int
    window: float
    lost: int
    reach: float
    soak_left: float
    moving: bool


@dataclass(frozen=True, slots=True)
class Forecast:
    """`verdict` one of the words above, `why` for people. `earliest` and `latest` bound the day, where they can."""

    verdict: str
    why: str
    reached: float  # percent now
    deadline: datetime
    earliest: datetime | None = None
    latest: datetime | None = None


def forecast(objective: Objective, adoption: Adoption, *, started: datetime, now: datetime) -> Forecast:
    deadline = started + timedelta(days=objective.days)
    share = 100 * adoption.committed / adoption.total if adoption.total else 0.0
    settled = _settled(objective, adoption, share, deadline, now)
    if settled:
        return Forecast(*settled, share, deadline)
    doubt = _doubt(objective, adoption)
    if doubt:
        return Forecast(UNKNOWN, doubt, share, deadline)
    fast, slow = (_seconds_left(objective, adoption, rate) for rate in _rates(adoption))
    earliest = now + timedelta(seconds=fast)
    latest = now + timedelta(seconds=slow) if slow < inf else None
    verdict = LIKELY if latest and latest <= deadline else UNLIKELY if earliest > deadline else OPEN
    return Forecast(verdict, _said(adoption), share, deadline, earliest, latest)


def _settled(
    objective: Objective, adoption: Adoption, share: float, deadline: datetime, now: datetime
) -> tuple[str, str] | None:
    """What needs no forecast."""
    if adoption.total and share >= objective.percent:
        return MET, f"{adoption.committed} of {adoption.total} have it"
    if now >= deadline:
        return MISSED, f"{adoption.committed} of {adoption.total} had it in time or since"
    if now + timedelta(seconds=adoption.soak_left) > deadline:
        return UNLIKELY, "the stages to come alone take longer than is left"
    most = adoption.total - adoption.lost
    if adoption.total and most * 100 < objective.percent * adoption.total:
        return UNLIKELY, f"{adoption.lost} of {adoption.total} failed or are pinned elsewhere: too few are left"
    return None


def _doubt(objective: Objective, adoption: Adoption) -> str:
    """Why nothing can be said, or nothing."""
    if not adoption.total:
        return "no device of the group runs the model"
    if not adoption.moving:
        return "it does not move: that depends on people"
    if adoption.reach < objective.percent:
        return f"only {adoption.reach:g} % are admitted so far: it depends on the stages to come"
    if adoption.recent < ENOUGH:
        return f"too few to tell: {adoption.recent} committed lately, {ENOUGH} needed"
    return ""


def _rates(adoption: Adoption) -> tuple[float, float]:
    """Commits a second of one device to come: the highest and the lowest that fit what was seen."""
    around = Z * sqrt(adoption.recent)
    return tuple(_rate(adoption, adoption.recent + sign * around) for sign in (1, -1))  # type: ignore[return-value]


def _rate(adoption: Adoption, recent: float) -> float:
    before = _to_come(adoption) + adoption.recent
    left = max(before - max(recent, 0), 0.5)
    return log(before / left) / adoption.window


def _seconds_left(objective: Objective, adoption: Adoption, rate: float) -> float:
    """Until so many are left as the objective spares; half a device stands for the last one."""
    missing = objective.percent * adoption.total / 100 - adoption.committed
    spared = max(_to_come(adoption) - missing, 0.5)
    return log(_to_come(adoption) / spared) / rate if rate > 0 else inf


def _to_come(adoption: Adoption) -> float:
    return max(adoption.total - adoption.committed - adoption.lost, 0.5)


def _said(adoption: Adoption) -> str:
    hours, left = adoption.window / 3600, _to_come(adoption)
    return f"at this rate: {adoption.recent} committed in the last {hours:.1f} h, {left:.0f} are to come"
