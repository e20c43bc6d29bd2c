"""What becomes of devices that take too long or failed: timed out, or given the assignment again.

1. A device that has reported and is not done within the timeout of its rollout counts as failed, "timed out". Should it
   report later that it committed after all, that counts.
2. One that polls and says nothing of the release gets a row when that is noticed, and from then on as much time.
   Noticing walks the devices a few thousand a tick, and only in stages older than the timeout. One that is silent
   altogether gets no row: it can know of nothing, and holds nobody up.
3. One that failed for a passing reason is out of the rollout until `retry_at`, then admitted again, `retries` times.
   Until then its failure is not final, and spends no failure budget.
"""

from datetime import datetime, timedelta
from typing import Any

import structlog
from django.db import transaction
from django.db.models import Exists, F, Min, OuterRef, Q, QuerySet
from django.utils import timezone

from fleet.devices.changes import device_changed
from fleet.devices.models import Device
from fleet.rollouts import engine_clock, retries, selectors, snapshots
from fleet.rollouts.engine_clock import Moment
from fleet.rollouts.models import Outcome, Rollout

TIMED_OUT, RETRY = "timed_out", "retry"  # steps of the engine's own
MUTE = "polls, and says nothing of it"
CHUNK = 5_000  # devices that one tick looks at
PAUSE = timedelta(minutes=1)  # between two walks of a rollout

State = Outcome.State
logger = structlog.get_logger(__name__)


# --- as devices report -------------------------------------------------------------------------------------------


def judged(outcome: Outcome, *, before: str, retry_before: datetime | None, rollout: Rollout) -> Outcome:
    """With the time of its next try, where its failure may pass."""
    if outcome.state != State.FAILED:
        outcome.retry_at = None
    elif before != State.FAILED or retry_before is not None:
        outcome.retry_at = _retry_at(outcome, retry_before, rollout)
    return outcome


def _retry_at(outcome: Outcome, retry_before: datetime | None, rollout: Rollout) -> datetime | None:
    if not retries.is_passing(outcome.step, outcome.reason):
        return None
    first, now = rollout.retry_seconds, timezone.now()
    return retry_before or retries.next_try(tries=outcome.tries, retries=rollout.retries, first=first, now=now)


def is_late_success(outcome: Outcome, state: str) -> bool:
    """It took too long, and made it: the device was right, and the clock was not its fault."""
    return outcome.state == State.FAILED and outcome.step == TIMED_OUT and state == State.COMMITTED


# --- at a tick ---------------------------------------------------------------------------------------------------


def look_after(moment: Moment) -> None:
    """Safe to repeat, and with two engines at once: each change claims the state that it starts from."""
    changed = _retry_due(moment.now) + _time_out(moment)
    if changed:
        snapshots.bump()
    _notice_mute(moment)


def _retry_due(now: datetime) -> int:
    in_force = (Rollout.State.RUNNING, Rollout.State.COMPLETED)
    farthest = now + retries.LONGEST + timedelta(hours=1)  # put off by a clock that ran ahead
    due = Outcome.objects.filter(state=State.FAILED, rollout__state__in=in_force)
    again = {"state": State.UPDATING, "step": RETRY, "tried_at": now, "retry_at": None, "changed_at": now}
    mine = due.filter(Q(retry_at__lte=now) | Q(retry_at__gt=farthest))
    number = _change(mine, **again, tries=F("tries") + 1)
    if number:
        logger.info("devices_retried", devices=number)
    return number


def _time_out(moment: Moment) -> int:
    under_way = Outcome.objects.filter(state=State.UPDATING)
    ahead = under_way.filter(tried_at__gt=moment.now + timedelta(seconds=engine_clock.longest_step()))
    ahead.update(tried_at=moment.now)
    running = Rollout.objects.filter(state=Rollout.State.RUNNING, timeout_seconds__gt=0)
    patience = {pk: timedelta(seconds=seconds) for pk, seconds in running.values_list("pk", "timeout_seconds")}
    patience = {pk: timeout for pk, timeout in patience.items() if engine_clock.may_time_out(moment, timeout)}
    if not patience:
        return 0
    old = under_way.filter(tried_at__lte=moment.now - min(patience.values())).order_by()
    oldest = dict(old.values_list("rollout_id").annotate(oldest=Min("tried_at")))  # one look for all rollouts
    late = {pk: timeout for pk, timeout in patience.items() if pk in oldest and oldest[pk] <= moment.now - timeout}
    return sum(_time_out_of(pk, timeout, moment) for pk, timeout in late.items())


def _time_out_of(rollout: int, timeout: timedelta, moment: Moment) -> int:
    late = Outcome.objects.filter(rollout=rollout, state=State.UPDATING, tried_at__lte=moment.now - timeout)
    reason = f"timed out: not done within {timeout.total_seconds():.0f} s"
    number = _change(late, state=State.FAILED, step=TIMED_OUT, reason=reason, retry_at=None, changed_at=moment.now)
    if number:
        logger.warning("devices_timed_out", rollout=rollout, devices=number)
    return number


@transaction.atomic
def _change(rows: QuerySet[Outcome], **values: Any) -> int:
    """Update these rows, and say whose they are: whoever answers polls from memory must hear of it."""
    devices = list(rows.select_for_update().order_by("pk").values_list("device_id", flat=True))
    number = rows.update(**values) if devices else 0
    device_changed(*devices)
    return number


def _notice_mute(moment: Moment) -> None:
    """One chunk of one rollout: whoever has waited longest for it."""
    rollout = _to_walk(moment.now)
    if rollout is None or rollout.stage_since is None:
        return
    chunk = list(_silent(rollout)[:CHUNK])
    last = chunk[-1].pk if len(chunk) == CHUNK else 0
    mine = Rollout.objects.filter(pk=rollout.pk, walked=rollout.walked, walked_at=rollout.walked_at)
    if mine.update(walked=last, walked_at=moment.now):
        rows = [
            Outcome(rollout=rollout, device=device, state=State.UPDATING, reason=MUTE, tried_at=moment.now)
            for device in selectors.assigned_among(rollout, chunk)
        ]
        Outcome.objects.bulk_create(rows, ignore_conflicts=True)


def _to_walk(now: datetime) -> Rollout | None:
    running = Rollout.objects.filter(state=Rollout.State.RUNNING, timeout_seconds__gt=0, stage_since__isnull=False)
    waited = running.order_by(F("walked_at").asc(nulls_first=True)).select_related("release__model", "group")
    for rollout in waited[:200]:
        rested = rollout.walked or rollout.walked_at is None or rollout.walked_at <= now - PAUSE
        if rested and rollout.stage_since and rollout.stage_since <= now - timedelta(seconds=rollout.timeout_seconds):
            return rollout
    return None


def _silent(rollout: Rollout) -> QuerySet[Device]:
    """Active devices that polled since the stage began, and have no row in the rollout."""
    said = Outcome.objects.filter(rollout=rollout, device=OuterRef("pk"))
    seen = Device.objects.filter(state=Device.State.ACTIVE, last_seen__gte=rollout.stage_since, pk__gt=rollout.walked)
    return seen.filter(~Exists(said)).select_related("runs").order_by("pk")
