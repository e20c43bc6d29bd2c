"""A rollout's objective and its forecast, from what the database knows. See `forecast` for what is made of it."""

from datetime import datetime, timedelta

from django.utils import timezone

from fleet.rollouts import approval, selectors
from fleet.rollouts.counting import summary
from fleet.rollouts.forecast import UNKNOWN, Adoption, Forecast, Objective, forecast
from fleet.rollouts.models import Outcome, Rollout

SHORTEST, LONGEST = timedelta(hours=1), timedelta(days=1)  # of the recent past that a forecast looks at


def of(rollout: Rollout, *, progress: selectors.Progress | None = None, now: datetime | None = None) -> Forecast | None:
    """None where nothing is aimed at, or it has not begun. Of a large fleet by the last count, see `summary`."""
    if rollout.objective_percent is None or rollout.objective_days is None or rollout.started_at is None:
        return None
    now = now or timezone.now()
    objective = Objective(rollout.objective_percent, rollout.objective_days)
    found = progress or summary.progress(rollout).progress
    if found is None:
        deadline = rollout.started_at + timedelta(days=objective.days)
        return Forecast(UNKNOWN, "the devices are being counted: look again in a minute", 0.0, deadline)
    return forecast(objective, _adoption(rollout, found, now), started=rollout.started_at, now=now)


def _adoption(rollout: Rollout, progress: selectors.Progress, now: datetime) -> Adoption:
    stages = list(rollout.stages.all())
    window = min(max((now - (rollout.stage_since or now)) / 2, SHORTEST), LONGEST)
    committed = Outcome.objects.filter(rollout=rollout, state=Outcome.State.COMMITTED, tried_at__gt=rollout.started_at)
    soaks = sum(stage.soak_seconds for stage in stages if stage.index > rollout.stage_index)
    current = next((stage.percent for stage in stages if stage.index == rollout.stage_index), 0.0)
    completed = rollout.state == Rollout.State.COMPLETED
    return Adoption(
        total=progress.total,
        committed=progress.committed,
        recent=committed.filter(changed_at__gte=now - window).count(),
        window=window.total_seconds(),
        lost=progress.failed - selectors.to_be_retried(rollout),
        reach=100.0 if completed else min(current, 100.0 if rollout.reach is None else rollout.reach),
        soak_left=0 if completed else soaks,
        moving=completed or (rollout.state == Rollout.State.RUNNING and not approval.stage_waits(rollout)),
    )
