from django.test import Client
import pytest

from fleet.rollouts.models import Finding, GuardReading, Rollout
from fleet.rollouts.services import StagePlan
from tests.server.guard_world import GuardedFleet

pytestmark = pytest.mark.django_db
State = Rollout.State
HALVES = (StagePlan(percent=50, success_threshold=1.0), StagePlan(percent=100, success_threshold=1.0))


def test_a_regression_of_20_percent_halts_by_the_guard_and_says_why(client: Client) -> None:
    fleet = GuardedFleet(client, 40, stages=HALVES)
    fleet.settled()
    exposed, others = fleet.split()
    for caller in others:
        fleet.stays(caller, errors=1)
    for caller in exposed:
        fleet.updates(caller, errors=20)
    rollout = fleet.tick()
    print(rollout.state, rollout.reason, [(r.guard, r.evidence, r.points) for r in GuardReading.objects.all()])
    assert rollout.state == State.HALTED
