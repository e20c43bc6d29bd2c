"""The Trust page, and what else the admin, the metrics and the checks say of expiry and of missing signatures."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.checks import run_checks
from django.core.management import CommandError, call_command
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families

from fleet.devices.models import Device
from fleet.releases.models import Release
from fleet.trust import keystore, standing
from fleet.trust.models import DeviceView, PendingRole, RoleMetadata
from tests.browser import world
from tests.server.test_admin import text

pytestmark = pytest.mark.django_db
PAGE = "/admin/trust/rolemetadata/overview/"
COMMAND = "fleet-publish sign --model keyword --server http://127.0.0.1:8000 --key YOUR-KEY.pem --role-key CI.pub.json"
AsUser = Callable[[str], Client]


@pytest.fixture
def fleet() -> world.World:
    return world.build(timezone.now())


@pytest.fixture
def proposed(fleet: world.World) -> Release:
    return world.propose(fleet.now)


@pytest.fixture
def as_user(client: Client) -> AsUser:
    def sign_in(name: str) -> Client:
        client.force_login(User.objects.get(username=name))
        return client

    return sign_in


def test_a_viewer_may_look_a_stranger_must_log_in_and_staff_without_the_right_may_not(
    fleet: world.World, client: Client, as_user: AsUser
) -> None:
    assert (client.get(PAGE).status_code, client.get(PAGE).headers["Location"]) == (302, f"/admin/login/?next={PAGE}")
    assert as_user("outsider").get(PAGE).status_code == 302
    assert as_user("otto").get(PAGE).status_code == 403
    assert 'href="/admin/trust/rolemetadata/overview/"' not in as_user("otto").get("/admin/").content.decode()
    assert as_user("victor").get(PAGE).status_code == 200
    assert f'href="{PAGE}"' in as_user("victor").get("/admin/").content.decode()
    assert reverse("admin:trust_overview") == PAGE


def test_each_role_says_its_version_keys_time_left_who_acts_and_how(fleet: world.World, as_user: AsUser) -> None:
    page = text(as_user("victor").get(PAGE))
    for part in (
        "root version 1 in force",
        "2 holders of root keys, offline",
        "python manage.py ceremony renew STICK root",
        "targets version 4",
        "detector version 7",
        "Expires in 5 months",
        "Keys (1 of 1 must sign)",
        "fleet-publish renew --model detector --server http://127.0.0.1:8000 --key CI-KEY.pem",
        "vibration version 3 expires soon",
        "Keys (2 of 2 must sign)",
        "CI, then 1 more by fleet-publish sign",
    ):
        assert part in page


def test_the_standing_of_each_role_is_a_value(fleet: world.World) -> None:
    now = timezone.now()
    found = {role.role: role for role in standing.roles(now)}
    assert list(found) == ["root", "targets", "detector", "keyword", "vibration"]
    assert {name: (role.tone, len(role.keys), role.threshold) for name, role in found.items()} == {
        "root": ("good", 3, 2),
        "targets": ("good", 2, 1),
        "detector": ("good", 1, 1),
        "keyword": ("good", 2, 2),
        "vibration": ("warn", 1, 1),
    }
    assert found["vibration"].left == pytest.approx(100 * 16 / 180, abs=1)
    assert [key.signed for key in found["targets"].keys] in ([True, False], [False, True])
    RoleMetadata.objects.filter(role="detector").update(expires_at=now)
    assert {role.tone for role in standing.roles(now) if role.role == "detector"} == {"bad"}


def test_a_model_without_a_role_and_one_that_is_not_delegated_any_more_are_shown(fleet: world.World) -> None:
    targets = RoleMetadata.objects.get(role="targets", version=4)
    RoleMetadata.objects.filter(role="detector").delete()
    found = {role.role: role for role in standing.roles(timezone.now())}
    assert (found["detector"].said, found["detector"].command, found["detector"].left) == ("nothing signed yet", "", 0)
    older = RoleMetadata.objects.get(role="targets", version=1)
    RoleMetadata.objects.filter(pk=targets.pk).update(content=older.content)
    found = {role.role: role for role in standing.roles(timezone.now())}
    assert found["keyword"].who == "nobody: no key may sign it any more"


def test_without_a_trust_root_the_page_says_what_to_run(as_user: AsUser) -> None:
    world.people()
    assert "run python manage.py trust_init" in text(as_user("victor").get(PAGE))


def test_times_stand_in_the_viewers_zone(fleet: world.World, as_user: AsUser) -> None:
    client = as_user("victor")
    client.cookies["fleet-zone"] = "Asia%2FTokyo"
    page = text(client.get(PAGE))
    assert "Times are in Asia/Tokyo" in page
    assert " JST" in page


def test_views_are_counted_by_when_they_expire(fleet: world.World, as_user: AsUser) -> None:
    now = timezone.now()
    active = list(Device.objects.filter(state=Device.State.ACTIVE)[:5])
    gone = Device.objects.filter(state=Device.State.REVOKED)[0]
    for device, hours in zip([*active, gone], [20, 13, 5, -1, -50, -900], strict=True):
        DeviceView.objects.create(device=device, version=1, expires_at=now + timedelta(hours=hours))
    found = standing.views(now)
    assert (found.total, found.within_a_day, found.due, found.expired) == (5, 3, 1, 2)
    assert found.oldest == now - timedelta(hours=50)
    assert not found.is_worrying
    page = text(as_user("victor").get(PAGE))
    assert (
        "Expire within 24 h 3 Signed anew at the next poll 1 Expired, device is silent 2 Oldest expires 2 days ago"
        in page
    )
    DeviceView.objects.update(expires_at=now - timedelta(hours=1))
    assert standing.views(now).is_worrying


# --- what waits for signatures ---


def test_the_page_shows_what_waits_whose_signature_is_missing_and_the_command(
    proposed: Release, as_user: AsUser
) -> None:
    page = text(as_user("victor").get(PAGE))
    missing = world.SECOND.public_key.keyid[:16]
    assert "keyword version 5: add 2.2.0" in page
    assert "1 of 2 signatures" in page
    assert f"Missing: 1 of {missing}" in page
    assert COMMAND in page
    assert "the second person, on their own machine" in page


@pytest.mark.parametrize("where", ["the release", "the list", "the first page", "the proposal"])
def test_it_is_told_wherever_somebody_would_look(proposed: Release, as_user: AsUser, where: str) -> None:
    address = {
        "the release": f"/admin/releases/release/{proposed.pk}/change/",
        "the list": "/admin/releases/release/",
        "the first page": "/admin/",
        "the proposal": f"/admin/trust/pendingrole/{PendingRole.objects.get().pk}/change/",
    }[where]
    page = text(as_user("victor").get(address))
    assert "1 of 2 signatures" in page
    assert (COMMAND in page) == (where != "the list")
    assert "('pending'" not in page


def test_a_release_that_waits_for_nobody_says_nothing_of_it(proposed: Release, as_user: AsUser) -> None:
    other = Release.objects.get(version="2.0.0")
    assert "signatures" not in text(as_user("victor").get(f"/admin/releases/release/{other.pk}/change/"))


def test_a_release_that_is_not_signed_is_not_rolled_out_by_any_door(proposed: Release, as_user: AsUser) -> None:
    client = as_user("olga")
    assert "keyword 2.2.0" not in text(client.get("/admin/rollouts/rollout/add/"))
    body = {"release": proposed.pk, "stages": [{"percent": 100}]}
    answer = client.post("/api/v1/rollouts/", body, content_type="application/json")
    assert (answer.status_code, answer.json()["code"]) == (422, "release_not_valid")
    reason = "keyword 2.2.0 has 1 of 2 signatures; missing: " + world.SECOND.public_key.keyid[:16]
    assert reason in answer.json()["message"]
    with pytest.raises(CommandError, match=r"keyword 2\.2\.0 has 1 of 2 signatures"):
        call_command("rollout", "create", "keyword", "2.2.0", "--user", "olga")
    device = Device.objects.filter(state=Device.State.ACTIVE)[0]
    pin = client.post(
        f"/api/v1/devices/{device.pk}/pin/", {"model": "keyword", "version": "2.2.0"}, content_type="application/json"
    )
    assert reason in pin.json()["message"]


def withdraw(client: Client, comment: str) -> Any:
    pk = PendingRole.objects.get().pk
    fields = {"_form_submitted": "True", "comment": comment}
    return client.post(f"/admin/trust/pendingrole/{pk}/withdraw/", fields, follow=True)


def test_an_operator_withdraws_a_proposal_with_a_comment(proposed: Release, as_user: AsUser) -> None:
    client = as_user("olga")
    assert "Withdraw" in text(client.get(f"/admin/trust/pendingrole/{PendingRole.objects.get().pk}/change/"))
    assert "This field is required" in text(withdraw(client, ""))
    assert PendingRole.objects.exists()
    assert "The proposal for keyword is withdrawn." in text(withdraw(client, "trained on the wrong set"))
    proposed.refresh_from_db()
    assert (proposed.state, proposed.reason) == ("withdrawn", "withdrawn by olga: trained on the wrong set")
    assert not PendingRole.objects.exists()


def test_a_viewer_withdraws_nothing(proposed: Release, as_user: AsUser) -> None:
    client = as_user("victor")
    page = text(client.get(f"/admin/trust/pendingrole/{PendingRole.objects.get().pk}/change/"))
    assert "Withdraw" not in page
    assert withdraw(client, "no").status_code in {403, 302}
    assert PendingRole.objects.exists()


# --- metrics and checks ---


def test_the_metrics_tell_time_left_missing_signatures_and_views(
    proposed: Release, client: Client, settings: Any
) -> None:
    settings.METRICS_TOKEN = "geheim"
    now = timezone.now()
    for device, hours in zip(Device.objects.filter(state=Device.State.ACTIVE)[:3], [20, 5, -1], strict=True):
        DeviceView.objects.create(device=device, version=1, expires_at=now + timedelta(hours=hours))
    page = client.get("/metrics", headers={"authorization": "Bearer geheim"}).content.decode()
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert values["fleet_role_missing_signatures", "keyword"] == 1
    assert values["fleet_role_expiry_seconds", "vibration"] == pytest.approx(16 * 86_400, abs=120)
    assert [values["fleet_device_views", state] for state in ("fresh", "due", "expired")] == [1, 1, 1]


def test_the_checks_say_who_must_act(fleet: world.World) -> None:
    RoleMetadata.objects.filter(role="root").update(expires_at=timezone.now())
    RoleMetadata.objects.filter(role="detector").update(expires_at=timezone.now())
    said = {(item.id, item.msg.split("'")[1]): item for item in run_checks(databases=["default"]) if "Role" in item.msg}
    assert set(said) == {("fleet.W005", "vibration"), ("fleet.W006", "root"), ("fleet.W006", "detector")}
    assert "ceremony renew STICK root" in str(said["fleet.W006", "root"].hint)
    assert "fleet-publish renew --model detector" in str(said["fleet.W006", "detector"].hint)
    assert "no device updates this model" in said["fleet.W006", "detector"].msg


def test_the_commands_that_are_shown_exist() -> None:
    from device_sdk import publish
    from fleet.trust import selectors

    for line in (selectors.sign_command("digits"), standing.renewal_command("digits")):
        program, *arguments = line.split()
        assert (program, publish._parser().parse_args(arguments).model) == ("fleet-publish", "digits")


def test_offline_roles_are_renewed_at_a_ceremony_but_for_the_embedded_keystore(own_folder: Path) -> None:
    from fleet.trust.management.commands.ceremony import Command

    program, script, command, *arguments = standing.renewal_command("root").split()
    assert (program, script, command) == ("python", "manage.py", "ceremony")
    assert Command().create_parser("manage.py", "ceremony").parse_args(arguments).role == keystore.ROOT
    keystore.at(None).make(keystore.TARGETS_KEYS[0])
    assert standing.renewal_command("root") == "python manage.py trust_renew root"
