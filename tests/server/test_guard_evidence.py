import pytest
from django.test import Client

from fleet.rollouts.models import Rollout
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
    assert rollout.state == State.HALTED
