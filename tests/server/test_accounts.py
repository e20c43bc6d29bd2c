"""API tokens and operator groups."""

from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.core.management import CommandError, call_command
from django.utils import timezone
from knox.crypto import hash_token

from fleet.accounts.models import ApiToken
from fleet.accounts.services import create_token
from fleet.errors import Invalid

pytestmark = pytest.mark.django_db


def test_the_command_prints_the_token_once_and_stores_its_hash(capsys: Any) -> None:
    call_command("api_token", "ci-digits", scope=["publish"], model=["digits"], days=30)
    text = capsys.readouterr().out.strip()
    token = ApiToken.objects.get()
    assert text.startswith("flt_")
    assert token.digest == hash_token(text)
    assert text not in str(ApiToken.objects.values().get())
    assert (token.name, token.scopes, token.models_allowed) == ("ci-digits", ["publish"], ["digits"])
    assert timedelta(days=29) < token.expiry - timezone.now() <= timedelta(days=30)


def test_a_service_account_cannot_log_in_and_may_no_more_than_its_token() -> None:
    for scope, groups in (("publish", []), ("read", ["Viewers"]), ("operate", ["Operators"])):
        token, _ = create_token(name=scope, scopes=[scope], lifetime=timedelta(days=1))
        assert not token.user.has_usable_password()
        assert not token.user.is_staff
        assert [group.name for group in token.user.groups.all()] == groups


def test_a_token_may_belong_to_a_person(capsys: Any) -> None:
    user = User.objects.create_user("ann")
    call_command("api_token", "mine", scope=["read"], user="ann")
    assert ApiToken.objects.get().user == user
    with pytest.raises(CommandError, match="no user 'bob'"):
        call_command("api_token", "his", scope=["read"], user="bob")


@pytest.mark.parametrize("days", [0, -1, 99_999])
def test_a_token_expires_within_reason(days: float) -> None:
    with pytest.raises(CommandError, match="lifetime"):
        call_command("api_token", "x", scope=["read"], days=days)


@pytest.mark.parametrize("scopes", [[], ["admin"], ["publish", "root"]])
def test_unknown_scopes_are_refused(scopes: list[str]) -> None:
    with pytest.raises(Invalid) as caught:
        create_token(name="x", scopes=scopes, lifetime=timedelta(days=1))
    assert caught.value.code == "unknown_scope"


def test_hostile_model_names_are_refused() -> None:
    with pytest.raises(CommandError, match="model"):
        call_command("api_token", "x", scope=["publish"], model=["../x"])


def test_viewers_look_and_operators_operate() -> None:
    held = {
        group.name: set(group.permissions.values_list("content_type__app_label", "codename"))
        for group in Group.objects.prefetch_related("permissions")
    }
    assert {"Viewers", "Operators"} <= held.keys()
    assert {("rollouts", "view_rollout"), ("releases", "view_release"), ("trust", "view_rolemetadata")} <= held[
        "Viewers"
    ]
    assert all(code.startswith("view_") for _, code in held["Viewers"])
    assert held["Viewers"] < held["Operators"]
    assert {("rollouts", "operate_rollout"), ("rollouts", "add_rollout"), ("devices", "change_device")} <= held[
        "Operators"
    ]
    forbidden = {("releases", "change_release"), ("trust", "change_rolemetadata"), ("accounts", "add_apitoken")}
    assert not forbidden & held["Operators"]
