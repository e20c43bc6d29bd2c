"""What operators and scripts do over REST, as the demonstration does it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

import pytest
import yaml
from django.contrib.auth.models import User
from django.core.management import call_command
from django.test import Client
from django.utils import timezone

from fleet.devices.models import Device, Group
from fleet.feedback.models import Batch, Campaign
from fleet.releases.models import Model, Release
from fleet.rollouts import services as rollouts
from fleet.rollouts.models import Rollout, RolloutAction
from tests.fleet_world import (
    AT_ONCE,
    api_token,
    device,
    devices,
    event,
    group,
    operator,
    refusal,
    release,
    running,
)

pytestmark = pytest.mark.django_db
RUNS = {"digits": "1.0.0/default"}


@dataclass
class Api:
    client: Client
    token: str

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"}
        content = json.dumps(body or {})
        return self.client.generic(method, f"/api/v1/{path}", content, "application/json", headers=headers)

    def get(self, path: str) -> Any:
        answer = self.call("GET", path)
        assert answer.status_code == 200, answer.content
        return answer.json()

    def all(self, path: str) -> list[dict[str, Any]]:
        return list(self.get(path)["results"])

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self.call("POST", path, body)


@pytest.fixture
def api(client: Client) -> Api:
    return Api(client, api_token(operator(), "operate"))


# --- reading -----------------------------------------------------------------------------------------------------


def test_releases_are_found_by_model_and_version(api: Api) -> None:
    wanted = release("1.1.0", variants=["default", "int8"])
    release("1.0.0")
    release("1.1.0", model="wine")
    (row,) = api.all("releases/?model=digits&version=1.1.0")
    assert (row["id"], row["model"], row["state"]) == (wanted.pk, "digits", "valid")
    assert [variant["name"] for variant in row["variants"]] == ["default", "int8"]
    assert [row["name"] for row in api.all("models/")] == ["digits", "wine"]


def test_a_device_tells_what_it_runs_and_what_it_last_said(api: Api) -> None:
    entry = device(runs=RUNS, labels={"site": "berlin"})
    entry.statuses.create(model="digits", state="waiting", reason="metered", since=timezone.now())
    row = api.get(f"devices/{entry.pk}/")
    assert (row["name"], row["runs"], row["models"], row["labels"]) == ("cam-1", RUNS, ["digits"], {"site": "berlin"})
    assert (row["statuses"][0]["state"], row["statuses"][0]["reason"]) == ("waiting", "metered")
    assert "nonce" not in str(row)


def test_devices_are_found_by_name_state_and_group(api: Api) -> None:
    device("a", labels={"site": "berlin"})
    device("b", state=Device.State.PENDING)
    chosen = group(site=["berlin"])
    assert [row["name"] for row in api.all("devices/?name=b")] == ["b"]
    assert [row["name"] for row in api.all("devices/?state=pending")] == ["b"]
    assert [row["name"] for row in api.all(f"devices/?group={chosen.pk}")] == ["a"]


def test_events_are_found_by_device_and_kind(api: Api) -> None:
    for name in ("a", "b"):
        for kind in ("failed", "waiting"):
            told = event(kind)
            device_row = Device.objects.filter(name=name).first() or device(name)
            device_row.events.create(event_id=told.id, kind=kind, at=timezone.now(), reason=name)
    (row,) = api.all("events/?device=a&kind=failed")
    assert (row["device"], row["kind"], row["reason"]) == ("a", "failed", "a")


def test_batches_are_found_by_state(api: Api) -> None:
    entry, line = device(), Model.objects.create(name="digits")
    for number, state in enumerate([Batch.State.INGESTED, Batch.State.RECEIVED]):
        Batch.objects.create(
            batch_id=f"{number:032x}",
            device=entry,
            model=line,
            sha256=f"{number:064x}",
            length=1,
            samples=5,
            state=state,
        )
    (row,) = api.all("batches/?state=ingested")
    assert (row["device"], row["model"], row["samples"]) == ("cam-1", "digits", 5)


def test_the_spread_and_the_laggards_are_told(api: Api) -> None:
    device(runs=RUNS)
    running(release("1.1.0"))
    assert api.get("spread/") == {"digits": {"1.0.0": 1}}
    (row,) = api.all("laggards/?model=digits")
    assert (row["device"], row["runs"], row["target"], row["why"]) == ("cam-1", "1.0.0", "1.1.0", "not_polled")
    assert api.all("laggards/?model=wine") == []


@pytest.mark.parametrize("path", ["releases/", "devices/", "rollouts/", "events/", "batches/"])
def test_a_longer_list_takes_no_more_queries(api: Api, path: str, django_assert_max_num_queries: Any) -> None:
    for number in range(10):
        entry = device(f"d{number}", runs=RUNS)
        entry.statuses.create(model="digits", state="waiting", since=timezone.now())
        entry.events.create(event_id=f"{number:032x}", kind="waiting", at=timezone.now())
        made = running(release(f"1.{number}.0"))
        Batch.objects.create(
            batch_id=f"{number:032x}",
            device=entry,
            model=made.release.model,
            sha256=f"{number:064x}",
            length=1,
            samples=5,
        )
    with django_assert_max_num_queries(12):
        assert len(api.all(path)) == 10


# --- groups ------------------------------------------------------------------------------------------------------


def test_a_group_is_made_and_changed(api: Api) -> None:
    answer = api.post("groups/", {"name": "berlin", "selector": "site in (berlin)"})
    assert answer.status_code == 201
    path = f"groups/{answer.json()['id']}/"
    assert api.call("PATCH", path, {"description": "the capital"}).json()["selector"] == "site=berlin"
    assert api.call("PUT", path, {"name": "berlin", "selector": "!lab"}).json()["selector"] == "!lab"
    assert Group.objects.get().description in {"the capital", ""}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"name": "taken", "selector": ""}, 409, "group_exists"),
        ({"name": "../x", "selector": ""}, 422, "invalid_name"),
        ({"name": "x", "selector": "Site=a"}, 422, "selector_malformed"),
        ({"name": "x", "selector": []}, 400, "invalid"), ({"name": "x", "selector": {"a": ["b"]}}, 400, "invalid"),
        ({"selector": ""}, 400, "invalid"), ({"name": "x", "selector": "site in ()"}, 422, "selector_malformed"),
    ],
)  # fmt: skip
def test_a_group_that_makes_no_sense_is_refused(api: Api, body: dict[str, Any], status: int, code: str) -> None:
    group("taken")
    assert refusal(api.post("groups/", body)) == (status, code)
    assert Group.objects.count() == 1


def test_a_group_is_not_deleted_over_the_api(api: Api) -> None:
    assert refusal(api.call("DELETE", f"groups/{group().pk}/"))[0] in {403, 405}


# --- rollouts ----------------------------------------------------------------------------------------------------


def draft(api: Api, **more: Any) -> Any:
    target = Release.objects.first() or release("1.1.0")
    stages = [{"percent": 50, "min_reports": 1}, {"percent": 100, "success_threshold": 1.0}]
    return api.post("rollouts/", {"release": target.pk, "stages": stages, **more})


def test_a_rollout_says_what_its_devices_wait_for(api: Api) -> None:
    answer = draft(api, conditions={"charging": True, "unmetered": False, "rate": 50_000})
    assert (answer.status_code, answer.json()["conditions"]) == (201, {"charging": True, "rate": 50_000})
    assert draft(api).json()["conditions"] == {}


def test_a_rollout_is_drafted_started_watched_and_ended(api: Api) -> None:
    entries = devices(4)
    answer = draft(api, on_failure="roll_back", probation={"calls": 5}, window={"start": 0, "end": 60}, urgent=True)
    assert answer.status_code == 201
    row = answer.json()
    assert (row["state"], row["created_by"], [stage["percent"] for stage in row["stages"]]) == (
        "draft",
        "otto",
        [50, 100],
    )
    path = f"rollouts/{row['id']}/"
    assert api.post(f"{path}start/", {"comment": "go"}).json()["state"] == "running"
    for entry in entries:
        rollouts.note_events(entry, [event("committed", Release.objects.get(), rollout=str(row["id"]))])
    row = api.get(path)
    assert row["progress"]["committed"] == row["progress"]["admitted"] >= 1
    assert row["progress"]["total"] == 4
    for action, state in (("pause", "paused"), ("resume", "running"), ("roll_back", "halted"), ("cancel", "cancelled")):
        assert api.post(f"{path}{action}/").json()["state"] == state
    assert [action["action"] for action in api.get(path)["actions"]] == [
        "create", "start", "pause", "resume", "roll_back", "cancel",
    ]  # fmt: skip
    assert RolloutAction.objects.get(action="start").comment == "go"
    assert set(RolloutAction.objects.values_list("actor", flat=True)) == {"otto"}


def test_rollouts_are_found_by_state_and_model(api: Api) -> None:
    wanted = running(release("1.1.0"))
    rollouts.create(release=release("1.0.0", model="wine"), group=None, stages=AT_ONCE, actor="ann")
    assert [row["id"] for row in api.all("rollouts/?state=running&model=digits")] == [wanted.pk]
    assert api.all("rollouts/?state=paused") == []


def test_an_action_in_the_wrong_state_is_refused_with_a_code(api: Api) -> None:
    path = f"rollouts/{draft(api).json()['id']}/"
    assert refusal(api.post(f"{path}pause/")) == (409, "wrong_state")
    assert refusal(api.post(f"{path}start/", {"comment": "x" * 501})) == (400, "invalid")
    assert refusal(api.post("rollouts/999/start/")) == (404, "not_found")


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        ({"stages": []}, 422, "stages_malformed"), ({"stages": [{"percent": 50}]}, 422, "stages_malformed"),
        ({"stages": [{"percent": "nan"}]}, 400, "invalid"), ({"stages": "x"}, 400, "invalid"),
        ({"stages": [{}]}, 422, "stages_malformed"), ({"release": 999}, 400, "invalid"),
        ({"group": 999}, 400, "invalid"),
        ({"on_failure": "shrug"}, 400, "invalid"), ({"window": {"start": 0, "end": 1440}}, 400, "invalid"),
        ({"window": {"start": 0}}, 400, "invalid"), ({"probation": {"calls": -1}}, 400, "invalid"),
        ({"conditions": {"charging": "perhaps"}}, 400, "invalid"), ({"conditions": {"rate": -1}}, 400, "invalid"),
        ({"probation": {"calls": 10**12}}, 422, "malformed"), ({"probation": {"seconds": "nan"}}, 400, "invalid"),
    ],
)  # fmt: skip
def test_a_rollout_that_makes_no_sense_is_refused(api: Api, more: dict[str, Any], status: int, code: str) -> None:
    assert refusal(draft(api, **more)) == (status, code)
    assert not Rollout.objects.exists()


def test_a_release_that_is_not_valid_is_refused(api: Api) -> None:
    release("1.1.0", state=Release.State.INVALID)
    assert refusal(draft(api)) == (422, "release_not_valid")


# --- devices -----------------------------------------------------------------------------------------------------


def test_a_device_is_approved_pinned_labelled_and_revoked(api: Api) -> None:
    entry = device(state=Device.State.PENDING)
    release("1.0.0")
    path = f"devices/{entry.pk}/"
    assert api.post(f"{path}approve/").json()["state"] == "active"
    assert api.post(f"{path}pin/", {"model": "digits", "version": "1.0.0"}).json()["pins"] == {"digits": "1.0.0"}
    assert api.post(f"{path}pin/", {"model": "digits", "version": None}).json()["pins"] == {}
    assert api.post(f"{path}labels/", {"labels": {"site": "paris"}}).json()["labels"] == {"site": "paris"}
    assert api.post(f"{path}revoke/").json()["state"] == "revoked"
    assert refusal(api.post(f"{path}revoke/")) == (409, "wrong_state")
    assert refusal(api.post(f"{path}approve/")) == (409, "wrong_state")


@pytest.mark.parametrize(
    ("action", "body", "status", "code"),
    [
        ("pin", {"model": "digits", "version": "9"}, 422, "release_not_valid"),
        ("pin", {"model": "digits"}, 400, "invalid"),
        ("labels", {"labels": {"A": "b"}}, 422, "invalid_name"), ("labels", {}, 400, "invalid"),
    ],
)  # fmt: skip
def test_a_change_of_a_device_that_makes_no_sense_is_refused(
    api: Api, action: str, body: dict[str, Any], status: int, code: str
) -> None:
    assert refusal(api.post(f"devices/{device().pk}/{action}/", body)) == (status, code)


# --- campaigns ---------------------------------------------------------------------------------------------------


def test_a_campaign_is_made_and_its_window_pulled_forward(api: Api) -> None:
    Model.objects.create(name="digits")
    body = {"name": "night", "model": "digits", "rate": 0.1, "max_samples": 400, "days": 7, "window_start": 120}
    answer = api.post("campaigns/", body)
    assert answer.status_code == 201
    row = answer.json()
    assert (row["model"], row["rate"], row["active"]) == ("digits", 0.1, True)
    changed = api.call("PATCH", f"campaigns/{row['id']}/", {"window_start": 0, "window_end": 0, "jitter_seconds": 3})
    assert changed.status_code == 200
    assert (changed.json()["window_start"], changed.json()["jitter_seconds"]) == (0, 3)
    assert Campaign.objects.get().window_end == 0
    days_left = (Campaign.objects.get().expires_at - timezone.now()).total_seconds() / 86_400
    assert 6.99 < days_left < 7
    assert [row["name"] for row in api.all("campaigns/?active=true")] == ["night"]


@pytest.mark.parametrize(
    "more",
    [
        {"rate": 2},
        {"rate": "nan"},
        {"model": "nosuch"},
        {"window_start": 1440},
        {"days": 0},
        {"name": ""},
        {"max_samples": -1},
    ],
)
def test_a_campaign_that_makes_no_sense_is_refused(api: Api, more: dict[str, Any]) -> None:
    Model.objects.create(name="digits")
    answer = api.post("campaigns/", {"name": "night", "model": "digits", "rate": 0.1, "days": 7, **more})
    assert refusal(answer)[0] in {400, 422}
    assert not Campaign.objects.exists()


# --- the schema --------------------------------------------------------------------------------------------------


def test_the_schema_is_valid_and_leaves_nothing_to_guesswork() -> None:
    out = StringIO()
    call_command("spectacular", "--validate", "--fail-on-warn", stdout=out, skip_checks=True)
    schema = yaml.safe_load(out.getvalue())
    assert {"/api/v1/rollouts/{id}/roll_back/", "/api/v1/devices/{id}/pin/", "/api/v1/spread/"} <= schema[
        "paths"
    ].keys()
    states = schema["components"]["schemas"]["RolloutState"]["enum"]
    assert states == Rollout.State.values


def test_schema_and_its_page_are_for_those_who_are_known(client: Client, api: Api) -> None:
    assert client.get("/api/schema/").status_code in {401, 403}
    assert client.get("/api/docs/").status_code in {401, 403}
    client.force_login(User.objects.get(username="otto"))
    assert client.get("/api/schema/").status_code == 200
    page = client.get("/api/docs/")
    assert page.status_code == 200
    assert b"//cdn" not in page.content  # its scripts are ours
