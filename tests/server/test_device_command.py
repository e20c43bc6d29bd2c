"""`manage.py device`, REST and the admin do the same with a device, by the same services, in the same audit trail."""

from collections.abc import Callable
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from fleet.audit.models import AuditEntry
from fleet.devices import services
from fleet.devices.models import Device
from fleet.errors import Unauthorized
from tests.fleet_world import api_token, operator, release, superuser
from tests.fleet_world import device as enrolled

pytestmark = pytest.mark.django_db


def device(*arguments: str) -> str:
    out = StringIO()
    call_command("device", *arguments, stdout=out)
    return out.getvalue()


def over_rest(row: Device, action: str, **body: object) -> None:
    client = Client(headers={"Authorization": f"Bearer {api_token(operator(), 'operate')}"})
    answer = client.post(f"/api/v1/devices/{row.pk}/{action}/", body, content_type="application/json")
    assert answer.status_code == 200, answer.content


def in_the_admin(row: Device, action: str, **body: str) -> None:
    client = Client()
    client.force_login(superuser())
    posted = {"_form_submitted": "on", "comment": "why", **body}
    answer = client.post(f"/admin/devices/device/{row.pk}/{action}/", posted)
    assert answer.status_code == 302, answer.content.decode()[:2000]


IN_THE_ADMIN: dict[str, tuple[str, dict[str, str]]] = {
    "approve": ("approve", {}),
    "revoke": ("revoke", {}),
    "pin": ("pin", {"model": "digits", "version": "1.0.0"}),
    "unpin": ("pin", {"model": "digits", "version": ""}),
    "labels": ("labels", {"labels": "site=graz, lab=yes"}),
}
DOORS: dict[str, tuple[Callable[[], str], Callable[[Device], None]]] = {
    "approve": (
        lambda: device("approve", "cam-1", "--comment", "why"),
        lambda row: over_rest(row, "approve", comment="why"),
    ),
    "revoke": (
        lambda: device("revoke", "cam-1", "--comment", "why"),
        lambda row: over_rest(row, "revoke", comment="why"),
    ),
    "pin": (
        lambda: device("pin", "cam-1", "digits", "1.0.0", "--comment", "why"),
        lambda row: over_rest(row, "pin", model="digits", version="1.0.0", comment="why"),
    ),
    "unpin": (
        lambda: device("unpin", "cam-1", "digits", "--comment", "why"),
        lambda row: over_rest(row, "pin", model="digits", version=None, comment="why"),
    ),
    "labels": (
        lambda: device("labels", "cam-1", "site=graz", "lab=yes", "--comment", "why"),
        lambda row: over_rest(row, "labels", labels={"site": "graz", "lab": "yes"}, comment="why"),
    ),
}


@pytest.mark.parametrize("action", DOORS)
def test_command_rest_and_admin_do_the_same_and_the_trail_says_the_same(action: str) -> None:
    release("1.0.0")
    found = []
    for door in range(3):
        pins = {"digits": "1.0.0"} if action == "unpin" else {}
        row = enrolled(state="pending" if action == "approve" else "active", pins=pins)
        if door == 0:
            DOORS[action][0]()
        elif door == 1:
            DOORS[action][1](row)
        else:
            path, body = IN_THE_ADMIN[action]
            in_the_admin(row, path, **body)
        row.refresh_from_db()
        entry = AuditEntry.objects.filter(target="cam-1").latest("pk")
        told = (entry.action, entry.comment, entry.detail, row.state, row.epoch, row.pins, row.labels)
        found.append((told, entry.actor_kind))
        row.delete()
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][0][1] == "why"
    assert [who for _, who in found] == ["command", "token", "user"]


def test_reissue_prints_a_credential_that_works_where_the_old_one_does_not() -> None:
    row = enrolled()
    old = services.reissue(device=row, actor="ann")
    new = device("reissue", "cam-1", "--comment", "its disk died").strip()
    assert services.authenticate(f"Bearer {new}") == row
    with pytest.raises(Unauthorized):
        services.authenticate(f"Bearer {old}")
    assert AuditEntry.objects.latest("pk").comment == "its disk died"


def test_devices_are_listed_by_selector_and_state() -> None:
    enrolled("a", labels={"site": "graz"}, last_seen=None, runs={"digits": "1.0.0/default"})
    enrolled("b", labels={"site": "graz"}, state="revoked")
    enrolled("c", labels={"site": "linz"})
    assert device("list", "--only", "site=graz", "--state", "active").split() == [
        "a", "active", "never", "seen", "digits", "1.0.0/default", "site=graz",
    ]  # fmt: skip
    assert [line.split()[0] for line in device("list").splitlines()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("revoke", "nobody"), "there is no device 'nobody'"),
        (("labels", "cam-1", "site"), "expected KEY=VALUE; got site"),
        (("pin", "cam-1", "digits", "9"), "digits 9: there is no such release"),
        (("approve", "cam-1"), "not waiting for approval"),
        (("list", "--only", "site="), "expected a value"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: tuple[str, ...], said: str) -> None:
    enrolled()
    with pytest.raises(CommandError, match=said):
        device(*arguments)


def test_a_server_that_asks_for_comments_asks_the_command_line_too(settings: object) -> None:
    settings.COMMENTS = ["device.*"]  # type: ignore[attr-defined]
    row = enrolled()
    with pytest.raises(CommandError, match="say why"):
        device("revoke", "cam-1")
    row.refresh_from_db()
    assert row.state == "active"
