"""Widen what a stage admits, at ticks, where its rollout limits updates in flight or starts a minute. See `limits`."""

from array import array
from collections.abc import Sequence
from datetime import datetime
from time import monotonic

from django.conf import settings

from device_sdk.protocol.cohorts import cohort
from fleet.rollouts import limits, snapshots, targeting
from fleet.rollouts.models import Outcome, Rollout

SETTLED_POLLS = 1.5  # intervals after which whoever is online has polled and reported
KEPT, KEPT_SECONDS = 32, 60.0  # groups whose cohorts are kept in this process, and for how long

_kept: dict[str, tuple[float, "array[int]"]] = {}  # by the rollout's salt


def beginning(rollout: Rollout) -> float | None:
    """The reach of a rollout that begins: nobody yet, or, without limits, the stage's own percentage."""
    return 0.0 if rollout.max_in_flight or rollout.starts_per_minute else None


def widen(rollout: Rollout, ceiling: float, now: datetime) -> None:
    """Admit as many more as there is room for. A claim: of two engines one does."""
    if rollout.reach is None or rollout.reach >= ceiling:
        return
    cohorts = _cohorts(rollout)
    seconds = (now - (rollout.reach_at or rollout.stage_since or now)).total_seconds()
    rules = limits.Limits(rollout.max_in_flight, rollout.starts_per_minute)
    granted = limits.granted(cohorts, rollout.reach)
    more = limits.room(rules, _load(rollout, max(seconds, 0.0)), granted)
    reach = limits.wider(rollout.reach, ceiling, more, cohorts) if more else rollout.reach
    if reach == rollout.reach:
        return
    mine = Rollout.objects.filter(pk=rollout.pk, state=Rollout.State.RUNNING, stage_index=rollout.stage_index)
    if mine.filter(reach=rollout.reach).update(reach=reach, reach_at=now):
        snapshots.bump()
    rollout.reach = reach


def _cohorts(rollout: Rollout) -> Sequence[int]:
    """Of the devices that it is for, sorted; two bytes each, looked up once a minute."""
    kept = _kept.get(rollout.salt)
    if kept is None or monotonic() - kept[0] > KEPT_SECONDS:
        model = rollout.release.model.name
        found = (cohort(rollout.salt, row.name) for row in targeting.devices(rollout) if model in row.model_names)
        kept = _kept[rollout.salt] = (monotonic(), array("H", sorted(found)))
        for salt in [*_kept][:-KEPT]:
            _kept.pop(salt, None)
    return kept[1]


def _load(rollout: Rollout, seconds: float) -> limits.Load:
    rows = Outcome.objects.filter(rollout=rollout)
    return limits.Load(
        heard=rows.count(),
        updating=rows.filter(state=Outcome.State.UPDATING).count(),
        seconds=seconds,
        settled=seconds >= SETTLED_POLLS * settings.POLL_INTERVAL,
    )


def unfinished(rollout: Rollout, ceiling: float) -> str:
    """Why a stage that has done well may not pass yet, or nothing."""
    if rollout.reach is None or rollout.reach >= ceiling:
        return ""
    return f"admitting as the limits allow: {rollout.reach:.3g} % of {ceiling:g} % so far"
