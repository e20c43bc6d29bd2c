"""`manage.py rollout`: the same moves as in the admin, by the same services."""

from io import StringIO

import pytest
from django.core.management import CommandError, call_command

from fleet.rollouts.models import Rollout, RolloutAction
from tests.fleet_world import device, operator, release

pytestmark = pytest.mark.django_db


def rollout(*arguments: str) -> str:
    out = StringIO()
    call_command("rollout", *arguments, stdout=out)
    return out.getvalue()


def test_a_rollout_is_created_with_its_stages_and_started_at_once() -> None:
    device()
    release("1.1.0")
    said = rollout("create", "digits", "1.1.0", "--stage", "20", "--stage", "100", "--budget", "2", "--start")
    made = Rollout.objects.get()
    assert made.state == Rollout.State.RUNNING
    assert list(made.stages.values_list("percent", "failure_budget")) == [(20.0, 2), (100.0, 2)]
    assert "digits 1.1.0  running  every device  stage 1" in said


def test_a_rollout_says_what_its_devices_wait_for() -> None:
    release("1.1.0")
    rollout("create", "digits", "1.1.0", "--urgent", "--idle", "--free-disk", "1000000", "--rate", "5000")
    made = Rollout.objects.get()
    assert (made.urgent, made.conditions) == (True, {"idle": True, "free_disk": 1_000_000, "rate": 5000})


def test_each_move_is_recorded_with_who_and_why() -> None:
    release("1.1.0")
    name = operator().username
    rollout("create", "digits", "1.1.0", "--start")
    number = str(Rollout.objects.get().pk)
    for action, state in (("pause", "paused"), ("resume", "running"), ("roll_back", "halted"), ("cancel", "cancelled")):
        assert f"  {state}  " in rollout(action, number, "--user", name, "--comment", f"to {action}")
        row = RolloutAction.objects.order_by("pk").last()
        assert (row.action, row.actor, row.comment) == (action, name, f"to {action}")
    assert f"#{number} digits 1.1.0  cancelled" in rollout("list")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["create", "digits", "9.9.9"], "no release digits 9.9.9"),
        (["create", "digits", "1.1.0", "--group", "nowhere"], "no group 'nowhere'"),
        (["create", "digits", "1.1.0", "--stage", "0"], "percent"),
        (["create", "digits", "1.1.0", "--user", "nobody"], "no user 'nobody'"),
        (["pause", "4711"], "no rollout 4711"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments: list[str], told: str) -> None:
    release("1.1.0")
    with pytest.raises(CommandError, match=told):
        rollout(*arguments)
    assert not Rollout.objects.exists()


def test_a_move_from_the_wrong_state_is_refused() -> None:
    release("1.1.0")
    rollout("create", "digits", "1.1.0")
    with pytest.raises(CommandError, match="is Draft: cannot pause"):
        rollout("pause", str(Rollout.objects.get().pk))
