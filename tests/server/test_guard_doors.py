"""Guards as people meet them: the API, the command, the form and the metrics say the same."""

import math
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone

from fleet.errors import Invalid
from fleet.operations.metrics import FleetCollector
from fleet.rollouts import evidence, services
from fleet.rollouts.forms import RolloutForm
from fleet.rollouts.models import GuardReading, Rollout
from tests.fleet_world import AT_ONCE, api_token, operator, outsider, refusal, release
from tests.server.guard_world import GuardedFleet

pytestmark = pytest.mark.django_db
GIVEN = {"errors": {"limit": 0.05}, "latency": {"effect": 0.2, "test": True}, "false_alarm": 0.001, "devices": 20}
KEPT = {
    "false_alarm": 0.001, "devices": 20, "calls": 50, "limit_devices": 5,
    "errors": {"limit": 0.05, "test": True}, "latency": {"effect": 0.2, "test": True},
}  # fmt: skip


def draft(client: Client, guards: Any, user: Any = None) -> Any:
    body = {"release": release().pk, "stages": [{"percent": 100}], "guards": guards}
    headers = {"Authorization": f"Bearer {api_token(user or operator(), 'operate')}"}
    return client.post("/api/v1/rollouts/", body, content_type="application/json", headers=headers)


def test_the_api_takes_the_guards_and_shows_them(client: Client) -> None:
    answer = draft(client, GIVEN)
    assert (answer.status_code, answer.json()["guards"]) == (201, KEPT)
    assert answer.json()["readings"] == []


@pytest.mark.parametrize("malformed", [{"errors": {"effect": 7}}, {"errors": {"test": False}}, {"devices": -1}])
def test_the_api_refuses_guards_out_of_bounds(client: Client, malformed: Any) -> None:
    assert refusal(draft(client, {"errors": {}, **malformed})) == (422, "guards_malformed")
    assert not Rollout.objects.exists()


def test_a_stranger_sets_no_guards(client: Client) -> None:
    assert draft(client, GIVEN, outsider()).status_code == 403


def test_what_no_guard_uses_is_not_kept_and_what_nobody_knows_is_refused() -> None:
    target = release()
    made = services.create(release=target, group=None, stages=AT_ONCE, actor="ann", guards={"false_alarm": 0.1})
    assert made.guards == {}
    with pytest.raises(Invalid, match="unknown: mood"):
        services.create(release=target, group=None, stages=AT_ONCE, actor="ann", guards={"mood": {}})


def test_the_command_takes_the_same_and_shows_what_the_guards_see(client: Client, capsys: Any) -> None:
    release("2.0.0")
    guards = ["--guard", "errors limit=0.05, latency effect=0.2", "--false-alarm", "0.001", "--guard-devices", "20"]
    call_command("rollout", "create", "digits", "2.0.0", *guards)
    assert Rollout.objects.get().guards == KEPT
    with pytest.raises(CommandError, match="expected some of failures, errors"):
        call_command("rollout", "create", "digits", "2.0.0", "--guard", "mood")
    with pytest.raises(CommandError, match="of no use without --guard"):
        call_command("rollout", "create", "digits", "2.0.0", "--guard-devices", "2")
    Rollout.objects.all().delete()
    fleet = GuardedFleet(client, 4).live()
    evidence.ask(fleet.rollout, timezone.now())
    call_command("rollout", "list")
    assert "inference errors: 0 % on " in capsys.readouterr().out


def test_the_form_reads_guards_as_the_command_does_and_says_what_it_expected() -> None:
    given = {
        "release": release().pk, "percents": "100", "soak_minutes": 0, "success_percent": 90, "min_reports": 1,
        "failure_budget": 0, "on_failure": "hold", "guards": "errors limit=0.05, latency effect=0.2",
        "false_alarm_percent": 0.1, "guard_devices": 20,
    }  # fmt: skip
    form = RolloutForm(given)
    assert form.is_valid(), form.errors
    assert evidence.checked(form.terms()["guards"]) == KEPT
    wrong = RolloutForm({**given, "guards": "errors limit=lots"})
    assert "expected NAME=NUMBER" in str(wrong.errors["guards"])
    assert RolloutForm({**given, "guards": ""}).is_valid()


def test_metrics_have_the_evidence_and_the_bound_of_running_rollouts(client: Client) -> None:
    fleet = GuardedFleet(client, 4).live(errors=50)
    evidence.ask(fleet.rollout, timezone.now())
    found = {family.name: family.samples for family in FleetCollector().collect()}
    (seen,), (bound,) = found["fleet_guard_evidence"], found["fleet_guard_bound"]
    assert seen.labels == bound.labels == {"rollout": str(fleet.rollout.pk), "guard": "errors"}
    assert bound.value == pytest.approx(0.523, abs=0.001)
    assert seen.value == pytest.approx(GuardReading.objects.get().evidence / math.log(10))
