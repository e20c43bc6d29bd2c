"""A real rollout as a scenario: its stages and salt, and the shape of the fleet that it is for. Reads the database."""

from datetime import timedelta

from django.utils import timezone

from fleet.devices.models import Device
from fleet.rollouts import evidence
from fleet.rollouts.counting import groups
from fleet.rollouts.counting import roster as rosters
from fleet.rollouts.guards import Terms
from fleet.rollouts.models import Rollout
from fleet.rollouts.simulation.scenario import Quality, Scenario, Stage, playable

DAY = 86_400 * 1_000_000  # microseconds
MONTH = 30


def of_rollout(rollout: Rollout, failing: float) -> Scenario:
    """`failing`: the fraction of devices on which its release is supposed to fail; nobody knows it beforehand.

    Devices that were silent for a day count as rare ones, and new ones arrive as they did in the last month. The names
    are virtual, so cohorts are as large as the real ones and hold others.
    """
    roster = rosters.load()
    places = groups.places_of(rollout, roster)
    silent = (roster.seen[places] < rosters.micros(timezone.now()) - DAY).mean() if len(places) else 0.0
    month_ago = timezone.now() - timedelta(days=MONTH)
    new = Device.objects.filter(enrolled_at__gte=month_ago, state=Device.State.ACTIVE).count()
    stages = [
        Stage(row.percent, row.soak_seconds / 3_600, row.min_reports, row.success_threshold, row.failure_budget)
        for row in rollout.stages.all()
    ]
    return Scenario(
        devices=len(places),
        releases=[Quality(rollout.release.version, failing)],
        stages=stages,
        on_failure=rollout.on_failure,
        arriving=min(1.0, new / max(len(roster.ids), 1)),
        rare=min(0.5, float(silent)),
        salt=rollout.salt,
        guards=playable(evidence.terms_of(rollout) or Terms()),
    )
