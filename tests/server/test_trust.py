"""Roles and views: what is signed, when it is signed anew, and what the checks say."""

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from django.core.checks import run_checks
from django.core.management import CommandError, call_command
from django.utils import timezone
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.names import ReleasePath
from fleet.devices.models import Device
from fleet.errors import Denied, FleetError, Invalid, Unavailable
from fleet.releases.models import Model
from fleet.trust import checks, keys, keystore, repository, selectors, services
from fleet.trust.models import DeviceView, RoleMetadata
from tests.registry import MODEL, Registry, make_device, set_up_trust

IDLE = Assignment(MODEL)
SOME = Assignment(MODEL, ReleasePath(MODEL, "1.0.0", "default"), 100, "a" * 64, urgent=True)


@pytest.fixture
def device(db: None, own_folder: Any) -> Device:
    set_up_trust()
    return make_device()


def read(view: DeviceView) -> tuple[Targets, Snapshot, Timestamp]:
    director = Metadata[Targets].from_bytes(view.director.encode()).signed
    snapshot = Metadata[Snapshot].from_bytes(view.snapshot.encode()).signed
    return director, snapshot, Metadata[Timestamp].from_bytes(view.timestamp.encode()).signed


# --- views ---


def test_a_view_is_signed_as_the_root_and_targets_demand(device: Device) -> None:
    view = services.current_view(device, [SOME])
    root = Metadata[Root].from_bytes(selectors.root_text().encode()).signed
    for role, content in (("timestamp", view.timestamp), ("snapshot", view.snapshot)):
        metadata = Metadata[Any].from_bytes(content.encode())
        root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    director = Metadata[Targets].from_bytes(view.director.encode())
    selectors.delegator().verify_delegate("director", director.signed_bytes, director.signatures)


def test_a_view_carries_binding_one_version_lengths_and_hashes(device: Device) -> None:
    view = services.current_view(device, [SOME])
    director, snapshot, timestamp = read(view)
    assert timestamp.unrecognized_fields == {"x-device": "cam-1"}
    assert director.version == snapshot.version == timestamp.version == view.version
    timestamp.snapshot_meta.verify_length_and_hashes(view.snapshot.encode())
    snapshot.meta["director.json"].verify_length_and_hashes(view.director.encode())
    targets = selectors.newest("targets")
    assert targets is not None
    snapshot.meta["targets.json"].verify_length_and_hashes(targets.content.encode())
    assert snapshot.meta.keys() == {"director.json", "targets.json"}
    target = director.targets["assign/cam-1/digits"]
    assert (target.length, target.hashes) == (100, {"sha256": "a" * 64})
    assert Assignment.parse(MODEL, target.length, target.hashes["sha256"], target.custom) == SOME


def test_a_model_without_a_release_is_listed_all_the_same(device: Device) -> None:
    director, _, _ = read(services.current_view(device, [IDLE]))
    target = director.targets["assign/cam-1/digits"]
    assert (target.length, target.hashes["sha256"]) == (0, repository.EMPTY_SHA256)
    assert target.custom["release"] is None


def test_an_empty_view_is_never_signed(device: Device) -> None:
    with pytest.raises(Invalid) as caught:
        services.current_view(device, [])
    assert caught.value.code == "empty_view"
    assert not DeviceView.objects.exclude(version=0).exists()


def test_an_unchanged_view_is_not_signed_again_nor_written(device: Device, django_assert_num_queries: Any) -> None:
    first = services.current_view(device, [SOME])
    with django_assert_num_queries(2) as captured:
        assert services.current_view(device, [SOME]).timestamp == first.timestamp
    assert all(query["sql"].split()[0] == "SELECT" for query in captured.captured_queries)


@pytest.mark.parametrize(
    "changed", [replace(SOME, urgent=False), replace(SOME, rollout="7"), replace(SOME, length=99), IDLE]
)
def test_any_change_is_a_new_version(device: Device, changed: Assignment) -> None:
    first = services.current_view(device, [SOME])
    second = services.current_view(device, [changed])
    assert second.version > first.version
    assert second.snapshot != first.snapshot


def test_the_version_is_the_time_and_never_goes_back(device: Device) -> None:
    before = int(timezone.now().timestamp())
    first = services.current_view(device, [SOME])
    assert before <= first.version <= timezone.now().timestamp()
    DeviceView.objects.update(version=2**33)
    assert services.current_view(device, [IDLE]).version == 2**33 + 1


def test_a_view_is_renewed_when_half_its_life_is_over(device: Device, settings: Any) -> None:
    first = services.current_view(device, [SOME])
    DeviceView.objects.update(expires_at=timezone.now() + settings.VIEW_RENEW_BEFORE + timedelta(minutes=1))
    assert services.current_view(device, [SOME]).version == first.version
    DeviceView.objects.update(expires_at=timezone.now() + settings.VIEW_RENEW_BEFORE - timedelta(minutes=1))
    renewed = services.current_view(device, [SOME])
    assert renewed.version > first.version
    assert renewed.expires_at is not None
    assert renewed.expires_at > timezone.now() + timedelta(hours=23)


def test_a_new_role_of_any_model_gives_a_new_view(registry: Registry) -> None:
    device = make_device()
    first = services.current_view(device, [IDLE])
    registry.publish("1.0.0")
    second = services.current_view(device, [IDLE])
    assert second.version > first.version
    _, snapshot, _ = read(second)
    role = selectors.newest(MODEL)
    assert role is not None
    snapshot.meta["digits.json"].verify_length_and_hashes(role.content.encode())


def test_a_role_once_listed_stays_in_the_snapshot(registry: Registry) -> None:
    device = make_device()
    registry.publish("1.0.0")
    keystore.add_model(keystore.at(None), model="other", public_keys=[registry.signer.public_key])
    _, snapshot, _ = read(services.current_view(device, [IDLE]))
    assert snapshot.meta.keys() == {"director.json", "targets.json", "digits.json"}


def test_two_devices_have_views_of_their_own(device: Device) -> None:
    other = make_device("cam-2")
    services.current_view(device, [SOME])
    director, _, timestamp = read(services.current_view(other, [SOME]))
    assert timestamp.unrecognized_fields["x-device"] == "cam-2"
    assert list(director.targets) == ["assign/cam-2/digits"]


def test_an_online_key_that_the_root_does_not_name_signs_nothing(device: Device, own_folder: Any) -> None:
    folder = own_folder / "keystore"
    for path in folder.glob("online*"):
        path.unlink()
    keystore.at(None).make("online")
    with pytest.raises(Unavailable) as caught:
        services.current_view(device, [SOME])
    assert caught.value.code == "bad_online_key"


def test_without_a_trust_root_there_is_no_view(db: None, own_folder: Any) -> None:
    with pytest.raises(Unavailable) as caught:
        services.current_view(make_device(), [SOME])
    assert caught.value.code == "no_trust_root"


def test_a_bundle_holds_what_the_snapshot_names_and_the_roots_that_are_missing(registry: Registry) -> None:
    device = make_device()
    registry.publish("1.0.0")
    view = services.current_view(device, [IDLE])
    keystore.renew(keystore.at(None), "root")
    registry.publish("1.0.1")  # newer than the view: not in its bundle
    bundle = selectors.bundle_for(view, device, root_version=1, manifests={"a" * 64: "{}"})
    names = {"2.root.json", "timestamp.json", "2.targets.json", "1.digits.json"}
    assert bundle.metadata.keys() == names | {f"{view.version}.snapshot.json", f"{view.version}.director.json"}
    assert bundle.manifests == {"a" * 64: "{}"}
    assert "1.root.json" in selectors.bundle_for(view, device, root_version=0, manifests={}).metadata


# --- keys and roles ---


def test_root_needs_two_of_three_keys(device: Device) -> None:
    root = Metadata[Root].from_bytes(selectors.root_text().encode())
    role = root.signed.roles["root"]
    assert (role.threshold, len(role.keyids), root.signed.consistent_snapshot) == (2, 3, True)
    for keyid in list(root.signatures)[:2]:
        del root.signatures[keyid]
    with pytest.raises(UnsignedMetadataError):
        root.verify_delegate("root", root)


def test_the_director_stands_first_and_terminates(device: Device) -> None:
    delegations = selectors.delegator().delegations
    assert delegations is not None
    assert delegations.roles is not None
    assert [(role.name, role.terminating, role.paths) for role in delegations.roles.values()] == [
        ("director", True, ["assign/*/*"]),
        ("digits", True, ["digits/*/*"]),
    ]


def test_one_key_under_two_ids_does_not_make_two_signatures(device: Device) -> None:
    one = CryptoSigner.generate_ed25519()
    twin = CryptoSigner.generate_ed25519(keyid="other").public_key
    twin.keyval = one.public_key.keyval
    with pytest.raises(Invalid) as caught:
        keystore.add_model(keystore.at(None), model="safe", public_keys=[one.public_key, twin], threshold=2)
    assert caught.value.code == "wrong_threshold"


def test_below_the_threshold_a_role_is_refused(db: None, own_folder: Any) -> None:
    keystore.initialise(keystore.at(None))
    signers = [CryptoSigner.generate_ed25519() for _ in range(3)]
    public = [signer.public_key for signer in signers]
    keystore.add_model(keystore.at(None), model="safe", public_keys=public, threshold=2)
    role = Metadata(Targets(expires=(timezone.now() + timedelta(days=1)).replace(microsecond=0)))
    role.sign(signers[0])
    with pytest.raises(Denied) as caught:
        services.accept_role("safe", role.to_bytes())
    assert caught.value.detail["threshold"] == 2
    role.sign(signers[2], append=True)
    assert services.accept_role("safe", role.to_bytes()).version == 1


def test_a_model_gets_new_keys_by_a_new_targets_version(device: Device) -> None:
    new = CryptoSigner.generate_ed25519().public_key
    row = keystore.add_model(keystore.at(None), model=MODEL, public_keys=[new])
    assert row is not None
    assert row.version == 3
    assert selectors.delegated_keys(selectors.delegator(), MODEL) == (1, {new.keyid})
    assert keystore.add_model(keystore.at(None), model=MODEL, public_keys=[new]) is None


@pytest.mark.parametrize("name", ["director", "assign", "root", "targets", "../x", "a/b", ""])
def test_reserved_and_hostile_models_are_not_delegated(device: Device, name: str) -> None:
    with pytest.raises(CommandError):
        call_command("trust_add_model", name)
    assert selectors.delegated_models() == [MODEL]


# --- commands ---


def test_trust_init_warns_loudly_and_says_when_there_is_a_root(db: None, own_folder: Any, capsys: Any) -> None:
    call_command("trust_init")
    first = capsys.readouterr()
    assert "WARNING: this is the EMBEDDED KEYSTORE" in first.err
    before = RoleMetadata.objects.count(), sorted((own_folder / "keystore").iterdir())
    call_command("trust_init")
    assert "There is a trust root already" in capsys.readouterr().out
    assert (RoleMetadata.objects.count(), sorted((own_folder / "keystore").iterdir())) == before


def test_private_keys_are_readable_by_their_owner_alone(db: None, own_folder: Any) -> None:
    call_command("trust_init")
    call_command("trust_add_model", MODEL, ci_key_out=own_folder / "ci.key")
    private = [*(own_folder / "keystore").glob("*.pem"), own_folder / "ci.key"]
    assert len(private) == 7
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    assert (own_folder / "keystore").stat().st_mode & 0o777 == 0o700


def test_trust_add_model_makes_the_model_once(db: None, own_folder: Any, capsys: Any) -> None:
    call_command("trust_init")
    for _ in range(2):
        call_command("trust_add_model", MODEL, ci_key_out=own_folder / "ci.key")
    assert "delegated to this key already" in capsys.readouterr().out
    assert Model.objects.get().name == MODEL
    assert selectors.newest("targets").version == 2  # type: ignore[union-attr]


def test_trust_add_model_takes_public_keys(db: None, own_folder: Any) -> None:
    call_command("trust_init")
    public = CryptoSigner.generate_ed25519().public_key
    (own_folder / "ci.pub.json").write_text(keys.public_to_json(public))
    call_command("trust_add_model", MODEL, "--ci-public", str(own_folder / "ci.pub.json"))
    assert selectors.delegated_keys(selectors.delegator(), MODEL) == (1, {public.keyid})


def test_trust_add_model_without_a_root_says_what_to_do(db: None, own_folder: Any) -> None:
    with pytest.raises(CommandError, match="run trust_init first"):
        call_command("trust_add_model", MODEL)


@pytest.mark.parametrize("role", ["root", "targets"])
def test_offline_roles_are_renewed_for_a_year(device: Device, role: str) -> None:
    old = selectors.newest(role)
    call_command("trust_renew", role)
    new = selectors.newest(role)
    assert old is not None
    assert new is not None
    assert new.version == old.version + 1
    signed = [json.loads(row.content)["signed"] for row in (old, new)]
    for item in signed:
        del item["version"], item["expires"]
    assert signed[0] == signed[1]


def test_a_renewed_root_is_signed_by_the_old_roots_keys(device: Device) -> None:
    old = Metadata[Root].from_bytes(selectors.root_text().encode()).signed
    keystore.renew(keystore.at(None), "root")
    new = Metadata[Root].from_bytes(selectors.root_text().encode())
    old.verify_delegate("root", new.signed_bytes, new.signatures)


# --- checks ---


def found(**extra: Any) -> set[str | None]:
    return {message.id for message in run_checks(**extra) if (message.id or "").startswith("fleet.")}


def test_a_missing_online_key_is_a_warning_because_the_first_migration_comes_before_it(
    db: None, own_folder: Any, settings: Any
) -> None:
    assert "fleet.W002" in found()
    settings.PRODUCTION = True
    assert {"fleet.E001", "fleet.W002"} <= found()
    assert all(message.hint for message in run_checks() if (message.id or "").startswith("fleet."))


def test_own_secrets_are_no_demonstration(db: None, own_folder: Any, settings: Any) -> None:
    settings.PRODUCTION, settings.SECRET_KEY, settings.DEVICE_SECRETS = True, "x" * 60, ["a:" + "17" * 32]
    assert checks.check_secrets() == []
    settings.DEVICE_SECRETS = ["a:" + "17" * 32, "old:" + "00" * 32]
    assert [message.id for message in checks.check_secrets()] == ["fleet.E001"]


def test_a_key_that_cannot_be_used_is_an_error(device: Device, own_folder: Any) -> None:
    assert "fleet.E003" not in found()
    (own_folder / "keystore" / "online.pub.json").write_text("{}")
    assert "fleet.E003" in found()


def test_offline_keys_on_a_production_server_are_an_error(device: Device, settings: Any) -> None:
    assert "fleet.E004" not in found()
    settings.PRODUCTION = True
    assert "fleet.E004" in found()


def test_roles_that_run_out_are_told(device: Device) -> None:
    assert selectors.expiring(timezone.now()) == []
    assert not found(databases=["default"]) & {"fleet.W005", "fleet.W006"}
    RoleMetadata.objects.filter(role="root").update(expires_at=timezone.now() + timedelta(days=80))
    assert [item.role for item in selectors.expiring(timezone.now())] == ["root"]
    assert "fleet.W005" in found(databases=["default"])
    RoleMetadata.objects.filter(role="root").update(expires_at=timezone.now())
    assert "fleet.W006" in found(databases=["default"])


def test_a_key_service_that_fails_is_named_without_its_secrets(device: Device, settings: Any) -> None:
    settings.ONLINE_KEY_URI = "nokms://host/key?token=hush"
    with pytest.raises(FleetError) as caught:
        keys.online_signer()
    assert caught.value.code == "bad_online_key"
    assert "hush" not in caught.value.message
