"""Time as the engine counts it: a clock that jumps, and hours in which no engine ran, are no time at all.

Soaking and timeouts are about what could be observed. The engine's time is the wall's, less `lost`: steps between two
ticks that are longer than `longest_step`, or that go back so far. Two engines whose clocks differ by less do no harm;
where they differ by more, time stands still, which is Hold.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from django.conf import settings
from django.utils import timezone

from fleet.rollouts.models import EngineClock, Rollout

LONGEST_STEP = 300.0  # seconds between ticks that still count

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Moment:
    """`gap_at`: when the last time that does not count ended."""

    now: datetime
    lost: float = 0.0
    gap_at: datetime | None = None


def look() -> Moment:
    """The time at a tick, noted for the next one."""
    now = timezone.now()
    row, _ = EngineClock.objects.get_or_create(pk=1, defaults={"at": now})
    step = (now - row.at).total_seconds()
    if abs(step) > longest_step():
        seen = EngineClock.objects.filter(pk=1, at=row.at)
        if seen.update(at=now, lost=row.lost + step, gap_at=now):
            logger.warning("engine_time_gap", seconds=step)
        row.refresh_from_db()
    elif step > 0:
        EngineClock.objects.filter(pk=1, at=row.at).update(at=now)
    return Moment(now, row.lost, row.gap_at)


def lost() -> float:
    """Seconds not counted so far: noted where something begins."""
    return EngineClock.objects.filter(pk=1).values_list("lost", flat=True).first() or 0.0


def longest_step() -> float:
    return max(LONGEST_STEP, 10 * settings.TICK_SECONDS)


def counted_since(rollout: Rollout, moment: Moment) -> datetime | None:
    """When the stage in force would have begun, had all the time since been counted."""
    if rollout.stage_since is None:
        return None
    since = rollout.stage_since + timedelta(seconds=moment.lost - rollout.stage_lost)
    if since <= moment.now + timedelta(seconds=longest_step()):
        return since
    begun_anew = Rollout.objects.filter(pk=rollout.pk, stage_since=rollout.stage_since)
    begun_anew.update(stage_since=moment.now, stage_lost=moment.lost)  # it began by a clock that ran ahead
    return moment.now


def may_time_out(moment: Moment, timeout: timedelta) -> bool:
    """After a gap every device gets its whole time anew: while the server was away, none could report."""
    return moment.gap_at is None or moment.gap_at <= moment.now - timeout
