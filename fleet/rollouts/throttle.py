"""Widen what a stage admits, at ticks, where its rollout limits updates in flight or starts a minute. See `limits`."""

from array import array
from collections.abc import Callable, Sequence
from datetime import datetime
from time import monotonic

import numpy as np
from django.conf import settings

from fleet.rollouts import limits, snapshots
from fleet.rollouts.counting import groups
from fleet.rollouts.counting.cohorts import OverBudgetError, Places
from fleet.rollouts.counting.roster import Roster
from fleet.rollouts.models import Outcome, Rollout

SETTLED_POLLS = 1.5  # intervals after which whoever is online has polled and reported
KEPT, KEPT_SECONDS = 32, 60.0  # groups whose cohorts are kept in this process, and for how long
BUDGET = 0.5  # seconds of a tick in which a rollout's devices are hashed; what is left over waits for the next one

_kept: dict[str, tuple[float, "array[int]"]] = {}  # by the rollout's salt
_places = Places(KEPT)


def beginning(rollout: Rollout) -> float | None:
    """The reach of a rollout that begins: nobody yet, or, without limits, the stage's own percentage."""
    return 0.0 if rollout.max_in_flight or rollout.starts_per_minute else None


def widen(
    rollout: Rollout, ceiling: float, now: datetime, *, said: dict[str, int], roster: Callable[[], Roster]
) -> None:
    """Admit as many more as there is room for. A claim: of two engines one does. `said`: devices by outcome."""
    if rollout.reach is None or rollout.reach >= ceiling:
        return
    try:
        cohorts = _cohorts(rollout, roster)
    except OverBudgetError:
        return  # a large group is hashed over several ticks; until then nobody more is admitted
    seconds = (now - (rollout.reach_at or rollout.stage_since or now)).total_seconds()
    rules = limits.Limits(rollout.max_in_flight, rollout.starts_per_minute)
    granted = limits.granted(cohorts, rollout.reach)
    more = limits.room(rules, _load(said, max(seconds, 0.0)), granted)
    reach = limits.wider(rollout.reach, ceiling, more, cohorts) if more else rollout.reach
    if reach == rollout.reach:
        return
    mine = Rollout.objects.filter(pk=rollout.pk, state=Rollout.State.RUNNING, stage_index=rollout.stage_index)
    if mine.filter(reach=rollout.reach).update(reach=reach, reach_at=now):
        snapshots.bump()
    rollout.reach = reach


def _cohorts(rollout: Rollout, roster: Callable[[], Roster]) -> Sequence[int]:
    """Of the devices that it is for, sorted; two bytes each, looked up once a minute, and hashed once."""
    kept = _kept.get(rollout.salt)
    if kept is None or monotonic() - kept[0] > KEPT_SECONDS:
        everyone = roster()
        ids = everyone.ids[groups.places_of(rollout, everyone)]
        found = np.sort(_places.of(rollout.salt, ids, until=monotonic() + BUDGET))
        kept = _kept[rollout.salt] = (monotonic(), array("H", found.tobytes()))
        for salt in [*_kept][:-KEPT]:
            _kept.pop(salt, None)
    return kept[1]


def _load(said: dict[str, int], seconds: float) -> limits.Load:
    return limits.Load(
        heard=sum(said.values()),
        updating=said[Outcome.State.UPDATING],
        seconds=seconds,
        settled=seconds >= SETTLED_POLLS * settings.POLL_INTERVAL,
    )


def unfinished(rollout: Rollout, ceiling: float) -> str:
    """Why a stage that has done well may not pass yet, or nothing."""
    if rollout.reach is None or rollout.reach >= ceiling:
        return ""
    return f"admitting as the limits allow: {rollout.reach:.3g} % of {ceiling:g} % so far"
