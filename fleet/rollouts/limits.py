"""How much of a stage may be admitted by now, where its updates in flight or its starts a minute are limited. Pure.

The limit is a percentage that the engine widens at its ticks, up to the stage's own: `desired` stays a pure function of
one number more, and a poll writes nothing. What is limited is therefore who is *admitted*: devices that were offline
when they were admitted may all come back in one minute.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from device_sdk.protocol.cohorts import COHORTS

BURST = 60.0  # seconds of starts that may be caught up with, after a pause or an outage


@dataclass(frozen=True, slots=True)
class Limits:
    """0: no limit."""

    in_flight: int = 0
    per_minute: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """`heard`: devices that have reported, `updating` of them are not done. `seconds`: since the last widening.

    `settled`: so long since then that whoever is online has been heard of.
    """

    heard: int
    updating: int
    seconds: float
    settled: bool


def room(limits: Limits, load: Load, granted: int) -> float:
    """How many more devices may be admitted now; infinite without limits."""
    rooms = [float("inf")]
    if limits.per_minute:
        patience = max(BURST, BURST / limits.per_minute)
        rooms.append(limits.per_minute * min(load.seconds, patience) / 60)
    if limits.in_flight:
        unheard = 0 if load.settled else max(granted - load.heard, 0)
        rooms.append(limits.in_flight - load.updating - unheard)
    return max(min(rooms), 0.0)


def granted(cohorts: Sequence[int], reach: float) -> int:
    """How many of the sorted cohorts a percentage admits."""
    return bisect_left(cohorts, reach * COHORTS / 100)


def wider(reach: float, ceiling: float, more: float, cohorts: Sequence[int]) -> float:
    """The percentage that admits `more` devices than `reach`, at most `ceiling`. `cohorts`: the group's, sorted.

    Devices that share a cohort come together, so one too many may be let in where there is room for one.
    """
    before = granted(cohorts, reach)
    wanted = before + more
    if wanted >= granted(cohorts, ceiling):
        return ceiling
    last = int(wanted)
    if last <= before:
        return reach
    edge = cohorts[last] if cohorts[last] > cohorts[before] else cohorts[last] + 1
    return min((edge - 0.5) * 100 / COHORTS, ceiling)  # between two cohorts: no rounding lets one more in
