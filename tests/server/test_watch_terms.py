"""What devices do with a release once they have it: asked for in the form, the API and the command, and signed."""

import json
import re
from html import unescape
from io import StringIO
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.test import Client

from device_sdk.protocol.assignment import LONGEST_HOLD, MAX_HOLD, Assignment, Probation
from fleet.audit.models import AuditEntry
from fleet.errors import Invalid
from fleet.rollouts import selectors, services
from fleet.rollouts.models import Rollout
from fleet.rollouts.terms import watch
from tests.fleet_world import AT_ONCE, api_token, device, operator, release, running

pytestmark = pytest.mark.django_db
ASKED = {"max_slowdown": 1.5, "max_confidence_drop": 0.1, "max_class_shift": 0.25}


def test_terms_reach_the_device_in_its_signed_assignment() -> None:
    running(release(), probation={"calls": 200, **ASKED}, max_hold=600, forgive=True)
    (assignment,) = selectors.assignments_for(device())
    assert assignment.probation == Probation(calls=200, **ASKED)
    assert (assignment.max_hold, assignment.forgive) == (600, True)
    custom = json.loads(json.dumps(assignment.to_custom()))
    assert Assignment.parse("digits", assignment.length, assignment.sha256, custom) == assignment


def test_what_nobody_asked_for_leaves_the_assignment_as_it_was() -> None:
    running(release())
    (assignment,) = selectors.assignments_for(device())
    custom = assignment.to_custom()
    assert not {"max_hold", "forgive"} & custom.keys()
    assert set(custom["probation"]) == {"calls", "seconds", "max_error_rate", "max_invalid_rate"}


def test_who_forgives_is_kept_in_the_audit() -> None:
    running(release(), forgive=True, max_hold=60)
    created = json.loads(AuditEntry.objects.get(action="rollout.create").detail)
    assert (created["forgive"], created["max_hold"]) == (True, 60)


@pytest.mark.parametrize(
    "more",
    [
        {"max_hold": -1}, {"max_hold": LONGEST_HOLD + 1}, {"max_hold": 1.5}, {"max_hold": True},
        {"probation": {"max_slowdown": 0.5}}, {"probation": {"max_class_shift": 1.5}},
        {"probation": {"max_confidence_drop": "much"}}, {"probation": {"max_slowness": 2}},
    ],
)  # fmt: skip
def test_terms_that_make_no_sense_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        services.create(release=release(), group=None, stages=AT_ONCE, actor="ann", **more)
    assert not Rollout.objects.exists()


def test_terms_are_set_and_shown_over_rest(client: Client) -> None:
    body = {"release": release().pk, "stages": [{"percent": 100}], "probation": ASKED, "max_hold": 60, "forgive": True}
    token = api_token(operator(), "operate", "read")
    answer = post(client, token, body)
    assert answer.status_code == 201
    row = answer.json()
    assert (row["max_hold"], row["forgive"]) == (60, True)
    assert row["probation"] == {"calls": 20, "seconds": 10.0, "max_error_rate": 0.0, "max_invalid_rate": 0.0, **ASKED}
    assert post(client, token, {**body, "max_hold": -1}).status_code == 400
    assert post(client, token, {**body, "probation": {"max_slowdown": 0.1}}).status_code == 400


def post(client: Client, token: str, body: dict[str, Any]) -> Any:
    headers = {"Authorization": f"Bearer {token}"}
    return client.post("/api/v1/rollouts/", json.dumps(body), "application/json", headers=headers)


def test_terms_are_set_on_the_command_line() -> None:
    release("1.1.0")
    call_command(
        "rollout", "create", "digits", "1.1.0", "--calls", "300", "--max-slowdown", "2", "--max-class-shift", "0.3",
        "--max-hold", "0", "--forgive", stdout=StringIO(),
    )  # fmt: skip
    made = Rollout.objects.get()
    assert (made.probation["calls"], made.probation["max_slowdown"], made.max_hold, made.forgive) == (300, 2.0, 0, True)
    assert "max_confidence_drop" not in made.probation
    with pytest.raises(CommandError, match="max_slowdown"):
        call_command("rollout", "create", "digits", "1.1.0", "--max-slowdown", "0.5", stdout=StringIO())


def test_terms_are_set_in_the_form_and_shown_on_the_page(client: Client) -> None:
    target = release("1.1.0")
    client.force_login(User.objects.create_superuser("olga"))
    form = {
        "release": target.pk, "group": "", "percents": "100", "soak_minutes": 1, "success_percent": 90,
        "min_reports": 1, "failure_budget": 0, "on_failure": "roll_back", "calls": "250", "max_slowdown": "1.5",
        "max_class_shift": "0.25", "max_hold_hours": "2", "forgive": "on",
    }  # fmt: skip
    assert client.post("/admin/rollouts/rollout/add/", form).status_code == 302
    made = Rollout.objects.get()
    assert (made.probation["calls"], made.probation["max_slowdown"], made.max_hold) == (250, 1.5, 7_200)
    page = client.get(f"/admin/rollouts/rollout/{made.pk}/change/").content.decode()
    shown = " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())
    assert "max slowdown 1.5" in shown
    assert "put off for 2 h at most tried again where it was quarantined" in shown
    refused = client.post("/admin/rollouts/rollout/add/", {**form, "max_class_shift": "1.5"})
    assert "less than or equal to 1" in refused.content.decode()


def test_form_left_empty_asks_for_nothing() -> None:
    fields = watch.WatchFields({})
    assert fields.is_valid()
    assert fields.watch_terms() == {"probation": {}, "max_hold": MAX_HOLD, "forgive": False}
    assert watch.texts({}, MAX_HOLD, forgive=False) == []
