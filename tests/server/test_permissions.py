"""Who may do what over REST: an outsider nothing, a viewer looks, an operator operates, and a token narrows that."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.utils import timezone

from fleet.accounts.models import ApiToken
from fleet.devices.models import Device
from fleet.feedback.models import Campaign
from fleet.releases.models import Model
from fleet.rollouts.models import Rollout
from tests.fleet_world import api_token, device, group, operator, outsider, refusal, release, running, user, viewer

pytestmark = pytest.mark.django_db
LISTS = ["models", "releases", "devices", "groups", "events", "rollouts", "campaigns", "batches", "spread", "laggards"]
WRITES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "groups/", {"name": "paris", "selector": ""}),
    ("PATCH", "groups/{group}/", {"description": "x"}),
    ("PUT", "groups/{group}/", {"name": "paris", "selector": ""}),
    ("POST", "rollouts/", {"release": "{release}", "stages": [{"percent": 100}]}),
    ("POST", "rollouts/{rollout}/start/", {}),
    ("POST", "rollouts/{rollout}/pause/", {}),
    ("POST", "rollouts/{rollout}/resume/", {}),
    ("POST", "rollouts/{rollout}/roll_back/", {}),
    ("POST", "rollouts/{rollout}/cancel/", {}),
    ("POST", "devices/{device}/approve/", {}),
    ("POST", "devices/{device}/pin/", {"model": "digits", "version": "1.0.0"}),
    ("POST", "devices/{device}/labels/", {"labels": {}}),
    ("POST", "devices/{device}/revoke/", {}),
    ("POST", "campaigns/", {"name": "day", "model": "digits"}),
    ("PATCH", "campaigns/{campaign}/", {"rate": 0.5}),
]
every_list = pytest.mark.parametrize("name", LISTS)
every_write = pytest.mark.parametrize(("method", "path", "body"), WRITES, ids=[f"{m} {p}" for m, p, _ in WRITES])


@dataclass
class World:
    client: Client
    device: Device
    rollout: Rollout
    ids: dict[str, int]

    def read(self, name: str, *, token: str = "", method: str = "GET") -> Any:
        return self.client.generic(method, f"/api/v1/{name}/", headers=_bearer(token))

    def write(self, method: str, path: str, body: dict[str, Any], *, token: str = "") -> Any:
        filled = {key: self.ids["release"] if value == "{release}" else value for key, value in body.items()}
        call = {"POST": self.client.post, "PATCH": self.client.patch, "PUT": self.client.put}[method]
        where = f"/api/v1/{path.format(**self.ids)}"
        return call(where, filled, content_type="application/json", headers=_bearer(token))


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def campaign(model: Model) -> Campaign:
    return Campaign.objects.create(name="night", model=model, expires_at=timezone.now() + timedelta(days=1))


@pytest.fixture
def world(client: Client) -> World:
    entry, chosen, rollout = device(), group(), running(release("1.0.0"))
    ids = {
        "device": entry.pk, "group": chosen.pk, "rollout": rollout.pk, "release": rollout.release.pk,
        "campaign": campaign(rollout.release.model).pk,
    }  # fmt: skip
    return World(client, entry, rollout, ids)


# --- people ------------------------------------------------------------------------------------------------------


@every_list
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_stranger_and_an_outsider_see_nothing(world: World, name: str, method: str) -> None:
    assert world.read(name, method=method).status_code in {401, 403}
    world.client.force_login(outsider())
    assert world.read(name, method=method).status_code == 403


@every_list
def test_a_viewer_and_an_operator_see_everything(world: World, name: str) -> None:
    for person in (viewer(), operator()):
        world.client.force_login(person)
        assert world.read(name).status_code == 200


@every_write
def test_nobody_but_an_operator_changes_anything(world: World, method: str, path: str, body: dict[str, Any]) -> None:
    assert world.write(method, path, body).status_code in {401, 403}
    for person in (outsider(), viewer()):
        world.client.force_login(person)
        assert world.write(method, path, body).status_code == 403
    assert Device.objects.get().state == Device.State.ACTIVE
    assert Rollout.objects.get().state == Rollout.State.RUNNING


@every_write
def test_an_operator_may_do_all_of_it(world: World, method: str, path: str, body: dict[str, Any]) -> None:
    """Some of it is refused for the state of things: never for who asks."""
    world.client.force_login(operator())
    assert world.write(method, path, body).status_code in {200, 201, 409}


def test_operating_rollouts_is_a_right_of_its_own(world: World) -> None:
    drafter = user("dora")
    drafter.user_permissions.set(
        Permission.objects.filter(codename__in=["add_rollout", "change_rollout", "view_rollout"])
    )
    world.client.force_login(drafter)
    assert world.write("POST", "rollouts/", {"release": "{release}", "stages": [{"percent": 100}]}).status_code == 201
    assert refusal(world.write("POST", "rollouts/{rollout}/cancel/", {}))[0] == 403


def test_a_form_of_another_site_changes_nothing(world: World) -> None:
    """A session needs the CSRF token; an API token does not."""
    strict = Client(enforce_csrf_checks=True)
    person = operator()
    strict.force_login(person)
    assert strict.post(f"/api/v1/rollouts/{world.rollout.pk}/cancel/").status_code == 403
    token = api_token(person, "operate")
    where, headers = f"/api/v1/rollouts/{world.rollout.pk}/cancel/", {"Authorization": f"Bearer {token}"}
    answer = Client(enforce_csrf_checks=True).post(where, content_type="application/json", headers=headers)
    assert answer.status_code == 200


# --- tokens ------------------------------------------------------------------------------------------------------


@every_list
@pytest.mark.parametrize(("scope", "status"), [("read", 200), ("operate", 200), ("publish", 403)])
def test_a_token_reads_by_its_scope(world: World, name: str, scope: str, status: int) -> None:
    assert world.read(name, token=api_token(operator(), scope)).status_code == status


@every_write
@pytest.mark.parametrize("scope", ["read", "publish"])
def test_a_token_without_the_scope_changes_nothing(
    world: World, method: str, path: str, body: dict[str, Any], scope: str
) -> None:
    answer = world.write(method, path, body, token=api_token(operator(), scope))
    assert refusal(answer)[0] == 403


@every_write
def test_a_token_never_does_more_than_its_user_may(world: World, method: str, path: str, body: dict[str, Any]) -> None:
    answer = world.write(method, path, body, token=api_token(viewer(), "operate", "read", "publish"))
    assert refusal(answer)[0] == 403


def test_an_expired_unknown_or_orphaned_token_opens_nothing(world: World) -> None:
    person = operator()
    token = api_token(person, "operate")
    assert world.read("devices", token=token).status_code == 200
    assert world.read("devices", token=f"{token}x").status_code in {401, 403}
    User.objects.filter(pk=person.pk).update(is_active=False)
    assert world.read("devices", token=token).status_code in {401, 403}
    User.objects.filter(pk=person.pk).update(is_active=True)
    ApiToken.objects.update(expiry=timezone.now() - timedelta(seconds=1))
    assert world.read("devices", token=token).status_code in {401, 403}


def test_a_devices_credential_opens_nothing_here(world: World) -> None:
    from fleet.devices import credentials

    assert world.read("devices", token=credentials.credential_for(world.device)).status_code in {401, 403}


def test_an_api_token_is_no_devices_credential(world: World) -> None:
    answer = world.client.get("/api/device/v1/poll", headers=_bearer(api_token(operator(), "operate")))
    assert refusal(answer) == (401, "unauthorized")
