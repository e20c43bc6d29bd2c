"""A role of two keys: what one has signed waits, binds nobody, and becomes the role when the other has signed."""

import json
from datetime import timedelta
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner, Key, Signer
from tuf.api.metadata import Metadata, Targets

from device_sdk.protocol.manifest import Manifest
from device_sdk.signing import essence
from fleet.accounts.services import create_token
from fleet.errors import Conflict, Denied, Invalid
from fleet.releases import services, tasks
from fleet.releases.models import Release
from fleet.rollouts import services as rollouts
from fleet.rollouts.services import StagePlan
from fleet.trust import keystore, repository, selectors
from fleet.trust import services as trust
from fleet.trust.models import PendingRole, RoleMetadata
from tests.registry import MODEL, Registry, manifest_for, onnx_model, refusal

CI, SECOND, THIRD = (CryptoSigner.generate_ed25519() for _ in range(3))


def delegate(*signers: CryptoSigner, threshold: int = 2) -> None:
    public = [signer.public_key for signer in signers]
    keystore.add_model(keystore.at(None), model=MODEL, public_keys=public, threshold=threshold)


@pytest.fixture
def two(registry: Registry) -> Registry:
    """`digits` needs CI's key and the second person's."""
    delegate(CI, SECOND)
    registry.signer = CI
    return registry


def offer(registry: Registry, version: str = "1.0.0", value: float = 2.0) -> tuple[Manifest, str]:
    data = onnx_model(value)
    registry.upload(data)
    manifest = manifest_for(version, {"model.onnx": data})
    return manifest, registry.role([manifest])


def propose(registry: Registry, version: str = "1.0.0", value: float = 2.0, **extra: Any) -> str:
    """Push what CI alone has signed; the role as it was posted."""
    manifest, role = offer(registry, version, value)
    answer = registry.post(version, [manifest], role, **extra)
    assert answer.status_code == 202, answer.content
    return role


def signed_too(role: str, signer: Signer = SECOND) -> str:
    metadata = Metadata[Targets].from_bytes(role.encode())
    metadata.sign(signer, append=True)
    return metadata.to_bytes(repository.COMPACT).decode()


def signed_by(role: str, signer: Signer) -> str:
    """The same bytes with this signature alone."""
    metadata = Metadata[Targets].from_bytes(role.encode())
    metadata.sign(signer)
    return metadata.to_bytes(repository.COMPACT).decode()


def post_role(registry: Registry, role: str, *, where: str = "role", **extra: Any) -> Any:
    body = json.dumps({"role": role})
    with registry.run_on_commit(execute=True):
        return registry.call("POST", f"/models/{MODEL}/{where}", data=body, content_type="application/json", **extra)


def add(registry: Registry, role: str, **extra: Any) -> Any:
    return post_role(registry, role, where="role/pending", **extra)


def state(version: str = "1.0.0") -> str:
    return Release.objects.get(version=version).state


def sign_token(*models: str) -> str:
    return create_token(name="erin", scopes=["sign"], models=models, lifetime=timedelta(days=1))[1]


# --- a proposal ---


def test_one_signature_of_two_is_202_and_says_who_is_missing(two: Registry) -> None:
    manifest, role = offer(two)
    answer = two.post("1.0.0", [manifest], role)
    body = answer.json()
    assert answer.status_code == 202
    assert {name: body[name] for name in ("pending", "version", "signed", "missing", "threshold")} == {
        "pending": True,
        "version": 1,
        "signed": [CI.public_key.keyid],
        "missing": [SECOND.public_key.keyid],
        "threshold": 2,
    }
    assert body["release"]["state"] == "pending"
    assert not RoleMetadata.objects.filter(role=MODEL).exists()


def test_the_second_signature_makes_it_the_role_and_the_release_valid(two: Registry) -> None:
    role = propose(two)
    answer = add(two, signed_too(role))
    assert (answer.status_code, answer.json()["pending"], answer.json()["version"]) == (201, False, 1)
    assert state() == "valid"
    assert Release.objects.get().signed_by == sorted([CI.public_key.keyid, SECOND.public_key.keyid])
    assert not PendingRole.objects.exists()
    held = selectors.newest(MODEL)
    assert held is not None
    assert (
        Metadata[Targets].from_bytes(held.content.encode()).signed_bytes
        == Metadata[Targets].from_bytes(role.encode()).signed_bytes
    )


@pytest.mark.parametrize("where", ["role", "role/pending"])
def test_the_second_signature_may_come_alone(two: Registry, where: str) -> None:
    role = propose(two)
    assert post_role(two, signed_by(role, SECOND), where=where).status_code == 201
    assert state() == "valid"


def test_the_second_signature_may_come_by_the_same_push(two: Registry) -> None:
    manifest, role = offer(two)
    assert two.post("1.0.0", [manifest], role).status_code == 202
    answer = two.post("1.0.0", [manifest], signed_by(role, SECOND))
    assert (answer.status_code, state()) == (200, "valid")


def test_both_signatures_at_once_wait_for_nobody(two: Registry) -> None:
    manifest, role = offer(two)
    assert two.post("1.0.0", [manifest], signed_too(role)).status_code == 201
    assert state() == "valid"


def test_devices_can_verify_the_role_that_was_put_together(two: Registry) -> None:
    add(two, signed_by(propose(two), SECOND))
    held = selectors.newest(MODEL)
    assert held is not None
    metadata = Metadata[Targets].from_bytes(held.content.encode())
    selectors.delegator().verify_delegate(MODEL, metadata.signed_bytes, metadata.signatures)
    assert len(metadata.signatures) == 2


def test_three_keys_sign_one_after_another(two: Registry) -> None:
    delegate(CI, SECOND, THIRD, threshold=3)
    role = propose(two)
    first = add(two, signed_by(role, THIRD))
    assert (first.status_code, first.json()["missing"]) == (202, [SECOND.public_key.keyid])
    assert add(two, signed_by(role, SECOND)).status_code == 201


# --- what does not count ---


def test_no_valid_signature_is_403_as_ever(two: Registry) -> None:
    manifest, role = offer(two)
    assert refusal(two.post("1.0.0", [manifest], signed_by(role, THIRD))) == (403, "bad_signature")
    assert (Release.objects.count(), PendingRole.objects.count()) == (0, 0)


def test_the_same_key_twice_counts_once(two: Registry) -> None:
    role = propose(two)
    answer = add(two, signed_too(role, CI))
    assert (answer.status_code, answer.json()["signed"]) == (202, [CI.public_key.keyid])
    assert state() == "pending"


@pytest.mark.parametrize("spelt", ["the same", "in capitals"])
def test_one_key_under_two_ids_counts_once(two: Registry, spelt: str) -> None:
    """`delegate` refuses such a role, a hand-made targets file would not."""
    row = selectors.newest("targets")
    assert row is not None
    targets = repository.read_targets(row.content.encode())
    twin = Key.from_dict("f" * 64, CI.public_key.to_dict())
    if spelt == "in capitals":
        twin.keyval["public"] = twin.keyval["public"].upper()
    targets.revoke_key(SECOND.public_key.keyid, MODEL)
    targets.add_key(twin, MODEL)
    targets.version += 1
    trust.store_role("targets", targets.version, repository.sign(targets, []), targets.expires)
    manifest, role = offer(two)
    metadata = Metadata[Targets].from_bytes(role.encode())
    own = metadata.sign(CI)
    metadata.signatures["f" * 64] = type(own)("f" * 64, own.signature)
    answer = two.post("1.0.0", [manifest], metadata.to_bytes().decode())
    assert answer.status_code == 202
    assert (len(answer.json()["signed"]), answer.json()["missing"]) == (1, [])


def test_a_key_in_another_wrapping_is_the_same_key() -> None:
    signer = CryptoSigner.generate_rsa(size=2048)
    public = signer.public_key.keyval["public"]
    other = Key.from_dict("0" * 64, signer.public_key.to_dict())
    other.keyval["public"] = public.replace("\n", "\r\n") + "\n"
    assert essence(other) == essence(signer.public_key)
    assert essence(CI.public_key) != essence(SECOND.public_key)


def test_a_bad_signature_is_not_kept_beside_the_good_ones(two: Registry) -> None:
    role = propose(two)
    metadata = Metadata[Targets].from_bytes(role.encode())
    metadata.signatures[SECOND.public_key.keyid] = type(metadata.sign(THIRD))(SECOND.public_key.keyid, "00" * 64)
    metadata.sign(CI, append=True)
    assert add(two, metadata.to_bytes().decode()).status_code == 202
    assert list(json.loads(PendingRole.objects.get().content)["signatures"]) != []
    kept = {item["keyid"] for item in json.loads(PendingRole.objects.get().content)["signatures"]}
    assert kept == {CI.public_key.keyid}


def test_a_bad_signature_does_not_push_a_good_one_of_the_same_key_aside(two: Registry) -> None:
    metadata = Metadata[Targets].from_bytes(propose(two).encode())
    metadata.sign(SECOND)
    metadata.signatures[CI.public_key.keyid] = type(metadata.sign(SECOND))(CI.public_key.keyid, "00" * 64)
    assert add(two, metadata.to_bytes().decode()).status_code == 201
    assert state() == "valid"


def test_other_bytes_by_the_second_key_are_no_signature_of_the_proposal(two: Registry) -> None:
    propose(two)
    other = two.role([manifest_for("1.0.0", {"model.onnx": onnx_model()})], days=90, signer=SECOND)
    assert refusal(add(two, other)) == (409, "pending_changed")
    assert state() == "pending"


def test_a_signature_by_a_key_that_has_been_replaced_counts_no_more(two: Registry) -> None:
    role = propose(two)
    delegate(SECOND, THIRD)
    found = selectors.proposal(MODEL)
    assert found is not None
    assert found.signatures.signed == ()
    answer = add(two, signed_by(role, SECOND))
    assert (answer.status_code, answer.json()["signed"]) == (202, [SECOND.public_key.keyid])
    assert add(two, signed_by(role, THIRD)).status_code == 201


# --- the base ---


def test_a_stale_base_is_409(two: Registry) -> None:
    add(two, signed_too(propose(two)))
    manifest = manifest_for("1.1.0", {"model.onnx": onnx_model()})
    assert refusal(two.post("1.1.0", [manifest], two.role([manifest], version=1))) == (409, "stale_role")


def test_a_proposal_that_was_overtaken_is_none(two: Registry) -> None:
    late = propose(two)
    manifest, role = offer(two, "1.1.0", 3.0)
    assert two.post("1.1.0", [manifest], signed_too(role)).status_code == 201
    assert (selectors.proposal(MODEL), selectors.proposals()) == (None, [])
    assert Release.objects.get(version="1.0.0").reason == "superseded by the signing of role version 1"
    assert refusal(add(two, signed_too(late))) == (409, "stale_role")
    assert (state("1.0.0"), state("1.1.0")) == ("withdrawn", "valid")


def test_a_newer_push_supersedes_and_the_old_release_says_so(two: Registry) -> None:
    old = propose(two)
    manifest, role = offer(two, "1.1.0", 3.0)
    answer = two.post("1.1.0", [manifest], role)
    assert (answer.status_code, answer.json()["superseded"]) == (202, ["1.0.0"])
    assert (state("1.0.0"), state("1.1.0")) == ("withdrawn", "pending")
    assert Release.objects.get(version="1.0.0").reason == "superseded by the proposal of role version 1"
    assert refusal(add(two, signed_too(old))) == (409, "pending_changed")


def test_a_superseded_release_may_be_proposed_again_with_the_same_bytes(two: Registry) -> None:
    propose(two)
    propose(two, "1.1.0", 3.0)
    role = propose(two)
    assert (state("1.0.0"), state("1.1.0")) == ("pending", "withdrawn")
    assert Release.objects.get(version="1.0.0").reason == ""
    assert add(two, signed_too(role)).status_code == 201
    assert state("1.0.0") == "valid"


def test_a_superseded_release_does_not_come_back_with_other_bytes(two: Registry) -> None:
    propose(two)
    propose(two, "1.1.0", 3.0)
    manifest, role = offer(two, "1.0.0", 4.0)
    assert refusal(two.post("1.0.0", [manifest], role)) == (422, "version_exists")


def test_a_mere_renewal_does_not_take_the_place_of_a_release(two: Registry) -> None:
    add(two, signed_too(propose(two)))
    propose(two, "1.1.0", 3.0)
    assert refusal(post_role(two, two.role([], days=170))) == (409, "proposal_waits")
    assert state("1.1.0") == "pending"


def test_a_renewal_takes_the_place_of_a_renewal_and_needs_two_as_well(two: Registry) -> None:
    add(two, signed_too(propose(two)))
    for days in (170, 175):
        role = two.role([], days=days)
        assert post_role(two, role).status_code == 202
    assert PendingRole.objects.count() == 1
    assert post_role(two, signed_by(role, SECOND)).json()["version"] == 2


def test_a_revocation_needs_two_as_well_and_revokes_nothing_before(two: Registry) -> None:
    add(two, signed_too(propose(two)))
    role = two.role([], edit=lambda role: role.targets.clear())
    answer = post_role(two, role)
    assert (answer.status_code, answer.json()["removed"]) == (202, ["digits/1.0.0/default"])
    assert state() == "valid"
    assert add(two, signed_by(role, SECOND)).status_code == 201
    assert state() == "revoked"


def test_a_revoked_release_cannot_come_back_by_a_role_of_two(two: Registry) -> None:
    first = propose(two)
    add(two, signed_too(first))
    add_role = two.role([], edit=lambda role: role.targets.clear())
    assert post_role(two, signed_too(add_role)).status_code == 201
    again = two.role([manifest_for("1.0.0", {"model.onnx": onnx_model()})])
    assert refusal(post_role(two, again)) == (422, "foreign_target")
    assert not PendingRole.objects.exists()


def test_a_proposal_of_what_was_never_published_is_refused(two: Registry) -> None:
    role = two.role([manifest_for("9.9.9", {"model.onnx": onnx_model()})])
    assert refusal(post_role(two, role)) == (422, "foreign_target")
    assert not PendingRole.objects.exists()


# --- validation and rollouts ---


def test_a_pending_release_is_validated_and_cannot_be_rolled_out(two: Registry) -> None:
    propose(two)
    release = Release.objects.get()
    assert release.variants.get().state == "valid"
    assert release.state == "pending"
    with pytest.raises(Invalid) as caught:
        rollouts.create(release=release, group=None, stages=[StagePlan(percent=100)], actor="ann")
    assert caught.value.code == "release_not_valid"
    assert "1 of 2 signatures" in caught.value.message


def test_whoever_signs_second_can_know_that_it_is_no_model(two: Registry) -> None:
    two.upload(b"no model")
    manifest = manifest_for("1.0.0", {"model.onnx": b"no model"})
    assert two.post("1.0.0", [manifest], two.role([manifest])).status_code == 202
    seen = two.call("GET", f"/models/{MODEL}/role/pending").json()["releases"]["1.0.0"]
    assert (seen["state"], "default" in seen["reason"]) == ("invalid", True)


def test_the_sweep_validates_a_pending_release_whose_task_was_lost_once(two: Registry, monkeypatch: Any) -> None:
    monkeypatch.setattr(tasks.validate, "delay", lambda _pk: None)
    propose(two)
    assert services.unvalidated() == [Release.objects.get().pk]
    services.validate_release(Release.objects.get().pk)
    assert services.unvalidated() == []
    assert state() == "pending"


# --- tokens ---


def test_a_token_to_sign_adds_signatures_and_nothing_else(two: Registry) -> None:
    role = propose(two)
    token = sign_token(MODEL)
    assert two.call("GET", f"/models/{MODEL}/role/pending", token=token).json()["role"] != ""
    for answer in (
        post_role(two, signed_too(role), token=token),
        two.post("1.0.0", [offer(two)[0]], signed_too(role), token=token),
        two.upload(b"x", token=token),
    ):
        assert answer.status_code == 403
    other = two.role([], days=30, signer=SECOND)
    assert refusal(add(two, other, token=token)) == (409, "pending_changed")
    assert add(two, signed_by(role, SECOND), token=token).status_code == 201


def test_a_token_to_sign_proposes_nothing(two: Registry) -> None:
    add(two, signed_too(propose(two)))
    role = two.role([], signer=SECOND)
    assert refusal(add(two, role, token=sign_token())) == (404, "no_pending_role")


def test_a_token_to_sign_for_another_model_is_refused(two: Registry) -> None:
    role = propose(two)
    assert refusal(add(two, signed_too(role), token=sign_token("wine"))) == (403, "wrong_model")


# --- withdrawing ---


def test_a_person_withdraws_a_proposal_with_a_comment(two: Registry) -> None:
    role = propose(two)
    digest = PendingRole.objects.get().signed_sha256
    services.withdraw_proposal(model=MODEL, signed_sha256=digest, by="olga", comment="wrong data set")
    release = Release.objects.get()
    assert (release.state, release.reason) == ("withdrawn", "withdrawn by olga: wrong data set")
    assert refusal(add(two, signed_too(role))) == (404, "no_pending_role")


def test_withdrawing_needs_a_comment_and_the_proposal_that_was_looked_at(two: Registry) -> None:
    propose(two)
    digest = PendingRole.objects.get().signed_sha256
    with pytest.raises(Invalid):
        services.withdraw_proposal(model=MODEL, signed_sha256=digest, by="olga", comment=" ")
    propose(two, "1.1.0", 3.0)
    with pytest.raises(Conflict):
        services.withdraw_proposal(model=MODEL, signed_sha256=digest, by="olga", comment="no")
    assert (state("1.0.0"), state("1.1.0")) == ("withdrawn", "pending")


# --- compare and set ---


def test_a_signature_that_came_meanwhile_is_not_lost(two: Registry, monkeypatch: Any) -> None:
    """Another writer changes the proposal after it was read: the write misses, and all is read again."""
    delegate(CI, SECOND, THIRD, threshold=3)
    role = propose(two)
    real, raced = repository.merge_signatures, []

    def race(held: bytes, come: bytes, **more: Any) -> bytes:
        merged = real(held, come, **more)
        if not raced:
            raced.append(1)
            assert trust.receive_role(MODEL, signed_by(role, THIRD).encode()).is_pending
        return merged

    monkeypatch.setattr(repository, "merge_signatures", race)
    assert not trust.receive_role(MODEL, signed_by(role, SECOND).encode()).is_pending


def test_without_all_signatures_nothing_is_accepted_strictly(two: Registry) -> None:
    with pytest.raises(Denied):
        trust.accept_role(MODEL, offer(two)[1].encode())
    assert not PendingRole.objects.exists()
