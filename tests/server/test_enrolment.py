from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone

from device_sdk.protocol import polls
from device_sdk.protocol.polls import EnrolRequest
from fleet.devices import credentials, services
from fleet.devices.models import Device, EnrolmentToken
from fleet.errors import Conflict, Denied, FleetError, Invalid, Unauthorized
from tests.fleet_world import Caller, device, enrolment_token, refusal
from tests.registry import Registry

pytestmark = pytest.mark.django_db
NONCE = "ab" * 16


def enrol(client: Client, token: str, **changes: Any) -> Any:
    body = {"device": "cam-1", "nonce": NONCE, "labels": {}, "sdk": "0.1.0"} | changes
    headers = {"Authorization": f"Bearer {token}"}
    return client.post(polls.ENROL, body, content_type="application/json", headers=headers)


# --- coming in ---------------------------------------------------------------------------------------------------


def test_a_device_enrols_and_gets_a_credential_that_works(client: Client) -> None:
    _, secret = enrolment_token()
    answer = enrol(client, secret)
    assert answer.status_code == 201
    body = answer.json()
    assert (body["device"], body["models"], body["state"]) == ("cam-1", ["digits"], "active")
    assert services.authenticate(f"Bearer {body['credential']}").name == "cam-1"
    assert "no-store" in answer["Cache-Control"]


def test_asking_again_with_the_nonce_is_the_same_enrolment_and_spends_nothing(client: Client) -> None:
    token, secret = enrolment_token(max_uses=1)
    first, again = enrol(client, secret), enrol(client, secret)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    token.refresh_from_db()
    assert token.uses == 1


def test_asking_again_works_even_after_the_token_expired(client: Client) -> None:
    token, secret = enrolment_token()
    first = enrol(client, secret)
    EnrolmentToken.objects.filter(pk=token.pk).update(expires_at=timezone.now() - timedelta(days=1))
    assert enrol(client, secret).json() == first.json()


def test_a_name_that_is_taken_is_refused_to_everybody_else(client: Client) -> None:
    token, secret = enrolment_token()
    enrol(client, secret)
    assert refusal(enrol(client, secret, nonce="cd" * 16)) == (409, "device_exists")
    token.refresh_from_db()
    assert token.uses == 1


def test_an_unknown_token_is_refused(client: Client) -> None:
    enrolment_token()
    answer = enrol(client, "fle_wrong")
    assert refusal(answer) == (401, "enrolment_unknown")
    assert answer["WWW-Authenticate"] == "Bearer"
    assert not Device.objects.exists()


def test_a_revoked_token_is_refused(client: Client) -> None:
    token, secret = enrolment_token()
    services.revoke_token(token=token)
    assert refusal(enrol(client, secret)) == (401, "enrolment_unknown")


def test_an_expired_token_is_refused(client: Client) -> None:
    token, secret = enrolment_token()
    EnrolmentToken.objects.filter(pk=token.pk).update(expires_at=timezone.now())
    assert refusal(enrol(client, secret)) == (401, "enrolment_expired")


def test_a_token_that_is_used_up_is_refused(client: Client) -> None:
    _, secret = enrolment_token(max_uses=2)
    answers = [enrol(client, secret, device=f"cam-{n}").status_code for n in range(3)]
    assert answers == [201, 201, 401]
    assert refusal(enrol(client, secret, device="cam-9")) == (401, "enrolment_used_up")


def test_two_devices_at_the_same_moment_cannot_both_take_the_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes in after the first has read the token and before it claims its use."""
    token, secret = enrolment_token(max_uses=1)
    admit, nested = services._admit, []

    def admit_after_a_rival(entry: EnrolmentToken, request: EnrolRequest) -> Device:
        if not nested:
            nested.append("the rival is on its way, and comes through here too")
            nested.append(services.enrol(token=secret, request=EnrolRequest("rival", "cd" * 16, {}, "")))
        return admit(entry, request)

    monkeypatch.setattr(services, "_admit", admit_after_a_rival)
    with pytest.raises(Unauthorized) as caught:
        services.enrol(token=secret, request=EnrolRequest("cam-1", NONCE, {}, ""))
    assert caught.value.code == "enrolment_used_up"
    assert list(Device.objects.values_list("name", flat=True)) == ["rival"]
    token.refresh_from_db()
    assert token.uses == 1


@pytest.mark.parametrize(("nonce", "created"), [(NONCE, False), ("cd" * 16, None)])
def test_a_name_that_is_taken_in_between_gives_its_use_back(
    monkeypatch: pytest.MonkeyPatch, nonce: str, created: bool | None
) -> None:
    token, secret = enrolment_token(max_uses=5)
    admit, nested = services._admit, []

    def admit_after_a_twin(entry: EnrolmentToken, request: EnrolRequest) -> Device:
        if not nested:
            nested.append("the rival is on its way, and comes through here too")
            nested.append(services.enrol(token=secret, request=EnrolRequest("cam-1", nonce, {}, "")))
        return admit(entry, request)

    monkeypatch.setattr(services, "_admit", admit_after_a_twin)
    request = EnrolRequest("cam-1", NONCE, {}, "")
    if created is None:
        with pytest.raises(Conflict, match="another device"):
            services.enrol(token=secret, request=request)
    else:
        assert services.enrol(token=secret, request=request).credential == nested[1].credential
    token.refresh_from_db()
    assert token.uses == 1


def test_what_the_operator_said_about_labels_wins(client: Client) -> None:
    _, secret = enrolment_token(labels={"site": "berlin"})
    enrol(client, secret, labels={"site": "paris", "hw": "pi5"})
    assert Device.objects.get().labels == {"site": "berlin", "hw": "pi5"}


def test_only_hashes_of_token_and_nonce_are_stored(client: Client) -> None:
    token, secret = enrolment_token()
    enrol(client, secret)
    stored = [*EnrolmentToken.objects.values_list(), *Device.objects.values_list()]
    assert secret not in str(stored)
    assert NONCE not in str(stored)
    assert secret not in str(vars(token))


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed"), (b"[]", 400, "malformed"), (b"\xff", 400, "malformed"), (b"{}", 400, "malformed"),
        (b"[" * 10_000, 400, "malformed"), (b" " * 70_000, 413, "too_large"),
        (b'{"device": "../x", "nonce": "' + b"ab" * 16 + b'"}', 400, "invalid_name"),
    ],
    ids=range(7),
)  # fmt: skip
def test_a_malformed_enrolment_is_refused_with_a_code(client: Client, body: bytes, status: int, code: str) -> None:
    _, secret = enrolment_token()
    headers = {"Authorization": f"Bearer {secret}"}
    answer = client.post(polls.ENROL, body, content_type="application/json", headers=headers)
    assert refusal(answer) == (status, code)


def test_enrolling_by_get_is_refused(client: Client) -> None:
    answer = client.get(polls.ENROL)
    assert refusal(answer) == (405, "method_not_allowed")
    assert answer["Allow"] == "POST"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_uses": 0},
        {"lifetime": timedelta(0)},
        {"model_names": []},
        {"model_names": ["root"]},
        {"labels": {"A": "b"}},
    ],
)
def test_a_token_that_makes_no_sense_is_not_made(changes: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        enrolment_token(**changes)


# --- approval ----------------------------------------------------------------------------------------------------


def test_a_device_that_needs_approval_waits_for_it(client: Client) -> None:
    _, secret = enrolment_token(needs_approval=True)
    answer = enrol(client, secret)
    assert (answer.status_code, answer.json()["state"]) == (202, "pending")
    header = f"Bearer {answer.json()['credential']}"
    assert refusal(client.get(polls.POLL, headers={"Authorization": header})) == (403, "device_pending")
    assert enrol(client, secret).status_code == 202

    services.approve(device=Device.objects.get(), actor="ann")
    assert services.authenticate(header).name == "cam-1"
    assert enrol(client, secret).json()["state"] == "active"


def test_only_a_pending_device_can_be_approved() -> None:
    revoked = device()
    services.revoke(device=revoked, actor="ann")
    for entry in (revoked, device("cam-2")):
        with pytest.raises(Conflict) as caught:
            services.approve(device=entry, actor="ann")
        assert caught.value.code == "wrong_state"


# --- credentials -------------------------------------------------------------------------------------------------


def bearer(entry: Device) -> str:
    return f"Bearer {credentials.credential_for(entry)}"


def code_of(header: str | None) -> str:
    with pytest.raises(FleetError) as caught:
        services.authenticate(header)
    assert caught.value.status == 401
    return caught.value.code


def test_a_revoked_device_is_unauthorized_and_cannot_enrol_again(client: Client) -> None:
    _, secret = enrolment_token()
    enrol(client, secret)
    entry = Device.objects.get()
    old = bearer(entry)
    services.revoke(device=entry, actor="ann")
    assert code_of(old) == "unauthorized"
    assert code_of(bearer(entry)) == "unauthorized"  # not even with the new epoch
    assert refusal(enrol(client, secret)) == (403, "device_revoked")
    with pytest.raises(Conflict):
        services.revoke(device=entry, actor="ann")


def test_a_reissued_credential_voids_the_old_one_and_the_nonce(client: Client) -> None:
    _, secret = enrolment_token()
    enrol(client, secret)
    entry = Device.objects.get()
    old = bearer(entry)
    new = services.reissue(device=entry, actor="ann")
    assert code_of(old) == "unauthorized"
    assert services.authenticate(f"Bearer {new}") == entry
    assert refusal(enrol(client, secret)) == (409, "device_exists")


def test_a_reissue_brings_a_revoked_device_back() -> None:
    entry = device()
    services.revoke(device=entry, actor="ann")
    assert services.authenticate(f"Bearer {services.reissue(device=entry, actor='ann')}") == entry


def test_secrets_can_be_rotated_without_enrolling_anew(settings: Any) -> None:
    entry = device()
    old, old_key = bearer(entry), credentials.view_key(entry)
    settings.DEVICE_SECRETS = ["new:" + "11" * 32, *settings.DEVICE_SECRETS]
    assert services.authenticate(old) == entry
    assert credentials.check_view_key(entry, old_key)
    assert ".new." in bearer(entry)
    settings.DEVICE_SECRETS = settings.DEVICE_SECRETS[:1]
    assert code_of(old) == "unauthorized"
    assert not credentials.check_view_key(entry, old_key)


def test_a_view_key_is_the_devices_own_and_no_credential() -> None:
    one, two = device("cam-1"), device("cam-2")
    key = credentials.view_key(one)
    assert credentials.check_view_key(one, key)
    assert not credentials.check_view_key(two, key)
    assert not credentials.check_view_key(one, "ключ")
    head = credentials.credential_for(one).rpartition(".")[0]
    assert code_of(f"Bearer {head}.{key}") == "unauthorized"
    services.revoke(device=one, actor="ann")
    assert not credentials.check_view_key(one, key)


@pytest.mark.parametrize(
    "header",
    [
        None, "", "Bearer", "Bearer ", "Bearer x", "Basic {0}", "{0}", "Bearer {0}x", "Bearer {0} x",
        "Bearer 1.1.demo.", "Bearer 1.1.other.{1}", "Bearer 2.1.demo.{1}", "Bearer 1.2.demo.{1}",
        "Bearer \u0661.1.demo.{1}", "Bearer 1.1.demo.{1}.x", "Bearer -1.1.demo.{1}",
        "Bearer 9999999999999999999.1.demo.{1}",
        "Bearer " + "1" * 10_000,
    ],
)  # fmt: skip
def test_a_forged_credential_is_refused(header: str | None) -> None:
    entry = device(pk=1)
    device("cam-2", pk=2)
    whole = credentials.credential_for(entry)
    assert code_of(header and header.replace("{0}", whole).replace("{1}", whole.rpartition(".")[2])) == "unauthorized"


def test_a_pending_device_is_told_so() -> None:
    with pytest.raises(Denied) as caught:
        services.authenticate(bearer(device(state=Device.State.PENDING)))
    assert caught.value.code == "device_pending"


def test_a_refusal_has_the_shape_of_the_api(client: Client) -> None:
    answer = client.get(polls.POLL, headers={"Authorization": "Bearer nonsense"})
    assert refusal(answer) == (401, "unauthorized")
    assert answer["WWW-Authenticate"] == "Bearer"


# --- the provisioning file ---------------------------------------------------------------------------------------


def provision(out: Path, *more: str) -> None:
    call_command("provision", "--name", "line 3", "--model", "digits", "--uses", "30", "--days", "7",
                 "--label", "site=berlin", "--out", str(out), *more, verbosity=0)  # fmt: skip


def test_the_provisioning_file_lets_a_device_in(registry: Registry, tmp_path: Path, settings: Any) -> None:
    from device_sdk.config import Provision

    out = tmp_path / "provision.json"
    provision(out)
    assert out.stat().st_mode & 0o777 == 0o600
    parsed = Provision.parse(out.read_bytes())
    assert (parsed.server, parsed.models, parsed.blob_hosts) == (settings.PUBLIC_URL, ("digits",), ())
    assert '"root"' in parsed.root
    assert abs(parsed.clock_floor - timezone.now().timestamp()) < 60
    assert enrol(registry.client, parsed.token).status_code == 201
    assert Device.objects.get().labels == {"site": "berlin"}
    token = EnrolmentToken.objects.get()
    assert (token.name, token.max_uses) == ("line 3", 30)
    assert abs(token.expires_at - timezone.now() - timedelta(days=7)) < timedelta(minutes=1)
    assert Caller(registry.client, Device.objects.get()).poll().status_code == 200


def test_a_provisioning_file_that_is_there_already_becomes_private(registry: Registry, tmp_path: Path) -> None:
    out = tmp_path / "provision.json"
    out.touch(mode=0o644)
    provision(out)
    assert out.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("more", [("--model", "nosuch"), ("--label", "site"), ("--label", "Site=x"), ("--uses", "0")])
def test_a_provisioning_file_that_makes_no_sense_is_not_written(
    registry: Registry, tmp_path: Path, more: tuple[str, ...]
) -> None:
    with pytest.raises(CommandError):
        provision(tmp_path / "provision.json", *more)
    assert not (tmp_path / "provision.json").exists()
    assert not EnrolmentToken.objects.exists()


def test_there_is_nothing_to_provision_without_a_trust_root(own_folder: Path) -> None:
    with pytest.raises(CommandError, match="trust_init"):
        provision(own_folder / "provision.json")
    assert not EnrolmentToken.objects.exists()


def test_the_provisioning_file_names_the_hosts_of_the_object_store(
    registry: Registry, tmp_path: Path, settings: Any
) -> None:
    from fleet.trust.provisioning import blob_hosts

    options = {"endpoint_url": "https://s3.example.org:9000", "region_name": "eu-1", "addressing_style": "path"}
    settings.S3_BUCKET, settings.STORAGES = "fleet", {"objects": {"OPTIONS": options}}
    assert blob_hosts() == ["s3.example.org:9000"]
    options.update(endpoint_url=None, addressing_style="virtual")
    assert blob_hosts() == ["s3.eu-1.amazonaws.com", "fleet.s3.eu-1.amazonaws.com"]
