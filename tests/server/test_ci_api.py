"""What CI may and may not do, over HTTP. Refusals name status and code."""

import json
from datetime import timedelta
from hashlib import sha256

import pytest
from django.utils import timezone
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import TargetFile

from fleet.accounts.models import ApiToken
from fleet.accounts.services import create_token
from fleet.releases.models import Artifact, Release
from fleet.trust.models import RoleMetadata
from tests.registry import (
    MODEL,
    NOBODY,
    Registry,
    external_model,
    manifest_for,
    onnx_model,
    publish_token,
    refusal,
)


def publish_parts(registry, version="1.0.0", files=None):
    """A manifest whose files are uploaded."""
    files = files or {"model.onnx": onnx_model()}
    for data in files.values():
        registry.upload(data)
    return manifest_for(version, files)


# --- the good way ---


def test_a_release_is_published_validated_and_described(registry: Registry) -> None:
    answer = registry.publish("1.0.0")
    assert (answer.status_code, answer.json()["state"]) == (201, "validating")
    release = registry.release("1.0.0")
    variant = release["variants"]["default"]
    assert (release["state"], release["signed_by"]) == ("valid", [registry.signer.public_key.keyid])
    assert variant["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}]
    assert variant["outputs"] == [{"name": "y", "dtype": "float32", "shape": ["batch", 4]}]
    assert (variant["opset"], variant["size"]) == (17, len(onnx_model()))


def test_a_release_of_several_files_and_variants_is_one_release(registry: Registry) -> None:
    model, data = external_model()
    manifests = [
        publish_parts(registry),
        manifest_for("1.0.0", {"model.onnx": model, "model.onnx.data": data}, variant="external"),
    ]
    assert [registry.upload(item).status_code for item in (model, data)] == [201, 201]
    assert registry.post("1.0.0", manifests, registry.role(manifests)).status_code == 201
    release = registry.release("1.0.0")
    assert release["state"] == "valid", release
    assert sorted(release["variants"]) == ["default", "external"]


def test_pushing_the_same_twice_answers_200_and_changes_nothing(registry: Registry) -> None:
    manifest = publish_parts(registry)
    role = registry.role([manifest])
    assert registry.post("1.0.0", [manifest], role).status_code == 201
    again = registry.post("1.0.0", [manifest], role)
    assert (again.status_code, again.json()["state"]) == (200, "valid")
    assert RoleMetadata.objects.filter(role=MODEL).count() == 1
    assert Artifact.objects.count() == 1


def test_the_role_is_given_back_byte_for_byte(registry: Registry) -> None:
    manifest = publish_parts(registry)
    role = registry.role([manifest])
    registry.post("1.0.0", [manifest], role)
    assert registry.call("GET", f"/models/{MODEL}/role").content.decode() == role


def test_removing_a_release_from_the_role_revokes_it(registry: Registry) -> None:
    registry.publish("1.0.0")
    registry.publish("1.1.0", {"model.onnx": onnx_model(3.0)})
    role = registry.role([], edit=lambda role: role.targets.pop("digits/1.0.0/default"))
    answer = registry.call(
        "POST", f"/models/{MODEL}/role", data=json.dumps({"role": role}), content_type="application/json"
    )
    assert (answer.status_code, answer.json()["removed"]) == (201, ["digits/1.0.0/default"])
    assert {v: registry.release(v)["state"] for v in ("1.0.0", "1.1.0")} == {"1.0.0": "revoked", "1.1.0": "valid"}


def test_a_role_signed_anew_without_changes_is_taken(registry: Registry) -> None:
    registry.publish("1.0.0")
    data = json.dumps({"role": registry.role([])})
    answer = registry.call("POST", f"/models/{MODEL}/role", data=data, content_type="application/json")
    assert (answer.status_code, answer.json()["version"], answer.json()["removed"]) == (201, 2, [])
    assert registry.release("1.0.0")["state"] == "valid"


# --- who calls ---


def test_no_token_is_401(registry: Registry) -> None:
    answer = registry.client.get(f"/api/ci/v1/models/{MODEL}/role")
    assert refusal(answer) == (401, "not_authenticated")


def test_an_expired_token_is_401(registry: Registry) -> None:
    ApiToken.objects.update(expiry=timezone.now() - timedelta(seconds=1))
    assert refusal(registry.call("GET", f"/models/{MODEL}/role")) == (401, "authentication_failed")


@pytest.mark.parametrize("token", ["flt_" + "0" * 64, "caf\xe9", "x" * 5000])
def test_an_unknown_token_is_401(registry: Registry, token: str) -> None:
    assert refusal(registry.call("GET", f"/models/{MODEL}/role", token=token)) == (401, "authentication_failed")


@pytest.mark.parametrize("scope", ["read", "operate"])
def test_a_token_without_the_scope_is_403(registry: Registry, scope: str) -> None:
    _, token = create_token(name="reader", scopes=[scope], lifetime=timedelta(days=1))
    answers = [
        registry.call("GET", f"/models/{MODEL}/role", token=token),
        registry.upload(b"x", token=token),
        registry.post("1.0.0", [], "", token=token),
    ]
    assert [refusal(answer) for answer in answers] == [(403, "permission_denied")] * 3


def test_a_token_for_another_model_is_403(registry: Registry) -> None:
    token = publish_token("detector")
    manifest = publish_parts(registry)
    assert refusal(registry.post("1.0.0", [manifest], "", token=token)) == (403, "wrong_model")
    assert refusal(registry.call("GET", f"/models/{MODEL}/role", token=token)) == (403, "wrong_model")
    assert refusal(registry.call("GET", f"/models/{MODEL}/releases/1.0.0", token=token)) == (403, "wrong_model")


# --- names ---


def test_a_model_that_is_not_delegated_is_404(registry: Registry) -> None:
    token = publish_token()
    assert refusal(registry.call("GET", "/models/other/role", token=token)) == (404, "unknown_model")
    assert refusal(registry.call("GET", f"/models/{MODEL}/role")) == (404, "no_role_yet")
    assert refusal(registry.call("GET", f"/models/{MODEL}/releases/9")) == (404, "unknown_release")


@pytest.mark.parametrize(
    "name", ["assign", "director", "root", "targets", "..", "a..b", "UP", "a%00b", "a%20b", "-a", "x" * 65]
)
def test_hostile_model_names_are_400(registry: Registry, name: str) -> None:
    assert refusal(registry.call("GET", f"/models/{name}/role", token=publish_token())) == (400, "invalid_name")


@pytest.mark.parametrize("version", ["../1", "a/b", "", "1..0", "A", None, 7])
def test_hostile_versions_are_400(registry: Registry, version: object) -> None:
    answer = registry.post(version, [manifest_for("1.0.0", {"m.onnx": b"x"})], "")  # type: ignore[arg-type]
    assert refusal(answer) == (400, "invalid_name")


@pytest.mark.parametrize("name", ["../m.onnx", "/etc/passwd", "a/b.onnx", "..", ".hidden", "a\\b"])
def test_hostile_file_names_are_422(registry: Registry, name: str) -> None:
    data = onnx_model()
    registry.upload(data)
    manifest = manifest_for("1.0.0", {name: data})
    assert refusal(registry.post("1.0.0", [manifest], registry.role([manifest]))) == (422, "invalid_name")


def test_a_nul_in_any_name_is_malformed(registry: Registry) -> None:
    good = publish_parts(registry)
    odd_file = manifest_for("1.0.0", {"a\0b": onnx_model()})
    odd_variant = manifest_for("1.0.0", {"m.onnx": b"x"}, variant="\0")
    assert refusal(registry.post("\0", [good], "")) == (400, "malformed")
    assert refusal(registry.post("1.0.0", [odd_variant], "")) == (400, "malformed")
    assert refusal(registry.post("1.0.0", [odd_file], "")) == (422, "malformed")


@pytest.mark.parametrize("variant", ["../x", "a/b", ""])
def test_hostile_variant_names_are_400(registry: Registry, variant: str) -> None:
    manifest = manifest_for("1.0.0", {"m.onnx": b"x"}, variant=variant)
    assert refusal(registry.post("1.0.0", [manifest], "")) == (400, "invalid_name")


@pytest.mark.parametrize(
    "body", ["", "[]", "{", '{"version": "1"}', '{"version": "1", "manifests": [], "role": ""}', "null"]
)
def test_a_malformed_body_is_400(registry: Registry, body: str) -> None:
    answer = registry.call("POST", f"/models/{MODEL}/releases", data=body, content_type="application/json")
    status, code = refusal(answer)
    assert (status, code) in {(400, "malformed"), (400, "invalid_name")}


@pytest.mark.parametrize("text", ["\\ud800", "a\\u0000b"])
def test_text_that_no_database_can_keep_is_400(registry: Registry, text: str) -> None:
    for field in ('"manifests": {"default": "%s"}, "role": ""', '"manifests": {"default": "{}"}, "role": "%s"'):
        body = '{"version": "1", ' + field % text + "}"
        answer = registry.call("POST", f"/models/{MODEL}/releases", data=body, content_type="application/json")
        assert refusal(answer) == (400, "malformed")


def test_a_body_over_the_limit_is_413(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.api.parsers.ReleaseJSON.limit", 100)
    assert refusal(registry.post("1.0.0", [publish_parts(registry)], "")) == (413, "too_large")


def test_the_manifest_of_another_version_is_422(registry: Registry) -> None:
    manifest = publish_parts(registry)
    assert refusal(registry.post("1.0.1", [manifest], registry.role([manifest]))) == (422, "wrong_manifest")


# --- signatures ---


def test_an_unsigned_role_is_403(registry: Registry) -> None:
    manifest = publish_parts(registry)
    assert refusal(registry.post("1.0.0", [manifest], registry.role([manifest], signer=NOBODY))) == (
        403,
        "bad_signature",
    )
    assert not Release.objects.exists()


def test_a_role_signed_by_a_wrong_key_is_403(registry: Registry) -> None:
    manifest = publish_parts(registry)
    role = registry.role([manifest], signer=CryptoSigner.generate_ed25519())
    assert refusal(registry.post("1.0.0", [manifest], role)) == (403, "bad_signature")
    assert not Release.objects.exists()


def test_a_role_changed_after_signing_is_403(registry: Registry) -> None:
    manifest = publish_parts(registry)
    role = json.loads(registry.role([manifest]))
    role["signed"]["expires"] = "2099-01-01T00:00:00Z"
    assert refusal(registry.post("1.0.0", [manifest], json.dumps(role))) == (403, "bad_signature")


@pytest.mark.parametrize("role", ["", "{}", "[]", '{"signed": {}, "signatures": []}', "[" * 100_000])
def test_a_role_that_is_none_is_422(registry: Registry, role: str) -> None:
    assert refusal(registry.post("1.0.0", [publish_parts(registry)], role)) == (422, "malformed_role")


def test_metadata_of_another_kind_is_no_role(registry: Registry) -> None:
    root = RoleMetadata.objects.get(role="root").content
    assert refusal(registry.post("1.0.0", [publish_parts(registry)], root)) == (422, "malformed_role")


# --- what the role says ---


def test_a_stale_base_is_409_and_names_the_version_held(registry: Registry) -> None:
    first, second = publish_parts(registry), publish_parts(registry, "1.1.0", {"model.onnx": onnx_model(3.0)})
    stale = registry.role([second])
    registry.post("1.0.0", [first], registry.role([first]))
    answer = registry.post("1.1.0", [second], stale)
    assert refusal(answer) == (409, "stale_role")
    assert answer.json()["detail"] == {"current": 1}
    assert registry.post("1.1.0", [second], registry.role([second])).status_code == 201


def test_the_same_version_with_other_bytes_is_422(registry: Registry) -> None:
    registry.publish("1.0.0")
    other = publish_parts(registry, "1.0.0", {"model.onnx": onnx_model(9.0)})
    assert refusal(registry.post("1.0.0", [other], registry.role([other]))) == (422, "version_exists")
    assert registry.release("1.0.0")["variants"]["default"]["state"] == "valid"


def test_a_role_that_changes_an_older_release_is_refused(registry: Registry) -> None:
    registry.publish("1.0.0")
    new = publish_parts(registry, "1.1.0", {"model.onnx": onnx_model(3.0)})
    path = "digits/1.0.0/default"
    role = registry.role(
        [new], edit=lambda role: role.targets.update({path: TargetFile(1, {"sha256": "0" * 64}, path)})
    )
    assert refusal(registry.post("1.1.0", [new], role)) == (409, "target_changed")


@pytest.mark.parametrize("path", ["detector/1.0.0/default", "assign/cam-1/digits", "digits/1.0.0", "digits/a/b/c"])
def test_a_role_that_speaks_of_others_is_refused(registry: Registry, path: str) -> None:
    manifest = publish_parts(registry)
    role = registry.role(
        [manifest], edit=lambda role: role.targets.update({path: TargetFile(1, {"sha256": "0" * 64}, path)})
    )
    assert refusal(registry.post("1.0.0", [manifest], role)) == (422, "foreign_target")
    assert not RoleMetadata.objects.filter(role=MODEL).exists()


def test_a_role_that_adds_a_release_which_is_not_published_is_refused(registry: Registry) -> None:
    manifest, other = publish_parts(registry), manifest_for("6.6.6", {"model.onnx": b"evil"})
    assert refusal(registry.post("1.0.0", [manifest], registry.role([manifest, other]))) == (422, "foreign_target")


def test_a_role_without_the_release_is_refused(registry: Registry) -> None:
    assert refusal(registry.post("1.0.0", [publish_parts(registry)], registry.role([]))) == (422, "missing_target")


def test_a_role_with_another_hash_of_the_manifest_is_refused(registry: Registry) -> None:
    manifest = publish_parts(registry)
    other = manifest_for("1.0.0", {"model.onnx": b"other"})
    assert refusal(registry.post("1.0.0", [manifest], registry.role([other]))) == (422, "wrong_target")


def test_an_expired_role_is_refused(registry: Registry) -> None:
    manifest = publish_parts(registry)
    assert refusal(registry.post("1.0.0", [manifest], registry.role([manifest], days=-1))) == (422, "role_expired")


def test_a_revoked_release_cannot_come_back(registry: Registry) -> None:
    registry.publish("1.0.0")
    full = registry.role([manifest_for("1.0.0", {"model.onnx": onnx_model()})], version=3)
    gone = json.dumps({"role": registry.role([], edit=lambda role: role.targets.clear())})
    registry.call("POST", f"/models/{MODEL}/role", data=gone, content_type="application/json")
    back = registry.call(
        "POST", f"/models/{MODEL}/role", data=json.dumps({"role": full}), content_type="application/json"
    )
    assert refusal(back) == (422, "foreign_target")
    assert registry.release("1.0.0")["state"] == "revoked"


# --- files ---


def test_a_manifest_with_a_file_that_was_not_uploaded_is_422(registry: Registry) -> None:
    manifest = manifest_for("1.0.0", {"model.onnx": onnx_model()})
    answer = registry.post("1.0.0", [manifest], registry.role([manifest]))
    assert refusal(answer) == (422, "missing_blob")
    assert answer.json()["detail"] == {"sha256": sha256(onnx_model()).hexdigest()}


def test_an_upload_in_pieces_goes_on_where_it_stopped(registry: Registry) -> None:
    data = onnx_model()
    name = sha256(data).hexdigest()
    first = registry.upload(data[:50], length=len(data), name=name)
    assert (first.status_code, first["Upload-Offset"]) == (202, "50")
    head = registry.call("HEAD", f"/blobs/{name}")
    assert (head["Upload-Offset"], head["Upload-Complete"]) == ("50", "?0")
    second = registry.upload(data[50:], offset=50, length=len(data), name=name)
    assert (second.status_code, second["Upload-Complete"]) == (201, "?1")
    assert registry.call("HEAD", f"/blobs/{name}")["Upload-Complete"] == "?1"


def test_a_wrong_offset_is_409_and_tells_the_right_one(registry: Registry) -> None:
    data = onnx_model()
    name = sha256(data).hexdigest()
    registry.upload(data[:50], length=len(data), name=name)
    answer = registry.upload(data[40:], offset=40, length=len(data), name=name)
    assert refusal(answer) == (409, "wrong_offset")
    assert answer["Upload-Offset"] == "50"


def test_wrong_bytes_are_422_and_the_partial_is_gone(registry: Registry) -> None:
    name = sha256(b"right").hexdigest()
    assert refusal(registry.upload(b"wrong", name=name)) == (422, "hash_mismatch")
    assert registry.call("HEAD", f"/blobs/{name}")["Upload-Offset"] == "0"
    assert registry.upload(b"right", name=name).status_code == 201


def test_an_over_large_file_is_413_before_a_byte_is_kept(registry: Registry, settings, own_folder) -> None:
    settings.MAX_ARTIFACT_BYTES = 100
    assert refusal(registry.upload(b"x" * 101)) == (413, "too_large")
    assert not list(own_folder.glob("incoming/*"))


def test_a_body_longer_than_announced_is_413(registry: Registry) -> None:
    assert refusal(registry.upload(b"x" * 101, length=100)) == (413, "too_large")


@pytest.mark.parametrize("offset", ["-1", "", "1e3", "٣", "9" * 30])
def test_a_malformed_offset_is_400(registry: Registry, offset: str) -> None:
    headers = {"Upload-Offset": offset.encode().decode("latin-1"), "Upload-Length": "5"}
    where = f"/blobs/{sha256(b'right').hexdigest()}"
    answer = registry.call("PUT", where, data=b"right", content_type="application/octet-stream", headers=headers)
    assert refusal(answer) == (400, "malformed")


@pytest.mark.parametrize("name", ["abc", "A" * 64, "0" * 63 + "g", "..%2f..%2fetc%2fpasswd"])
def test_a_blob_name_that_is_no_hash_is_refused(registry: Registry, name: str) -> None:
    assert registry.upload(b"x", name=name).status_code in {400, 404}
    assert registry.call("HEAD", f"/blobs/{name}").status_code in {400, 404}


def test_an_empty_file_is_a_file(registry: Registry) -> None:
    assert registry.upload(b"").status_code == 201
