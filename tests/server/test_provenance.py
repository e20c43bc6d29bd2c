"""What is attached to a release: taken in with it, or refused with it; shown, and kept from devices."""

import json
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from device_sdk.protocol.limits import ATTACHMENT
from device_sdk.protocol.manifest import Attachment, Manifest, digest
from fleet.devices import credentials
from fleet.releases import provenance
from fleet.releases.models import Artifact, Model, ProvenanceKey, Release
from tests.fleet_world import api_token, device, operator, user, viewer
from tests.registry import Registry, manifest_for, refusal
from tests.server.test_bom import BOM
from tests.server.test_model_signing import VECTORS, vector
from tests.test_architecture import ROOT

pytestmark = pytest.mark.django_db
FILES = {"model.onnx": b"not a real model\n", "model.onnx.data": b"not real weights\n"}  # those of the vectors
HOSTILE = "<script>alert(1)</script>"


def publish(
    registry: Registry, version: str = "1.0.0", files: dict[str, bytes] | None = None, **attached: bytes
) -> Any:
    """Push with attachments by kind, `model_signature=…` and so on."""
    files, listed = files or FILES, []
    for data in (*files.values(), *attached.values()):
        assert registry.upload(data).status_code in {201, 202}
    for kind, data in attached.items():
        listed.append(Attachment(kind.replace("_", "-"), f"{kind}.json", len(data), digest(data)))
    manifest = manifest_for(version, files, attachments=tuple(listed), metadata={"commit": "1f3c", "note": HOSTILE})
    return registry.post(version, [manifest], registry.role([manifest]))


def trust_key(name: str = "p256") -> ProvenanceKey:
    pem = (VECTORS / f"{name}.pub.pem").read_text()
    return provenance.add_key(model=Model.objects.get(name="digits"), name="research", pem=pem, actor="ann")


def verdict(registry: Registry) -> str:
    (item,) = registry.release("1.0.0")["variants"]["default"]["attachments"]
    return str(item["verdict"])


def test_a_model_signature_is_shown_as_verified_by_a_trusted_key(registry: Registry) -> None:
    trust_key()
    assert publish(registry, model_signature=vector("p256")).status_code == 201
    assert verdict(registry) == "verified by key research"


def test_a_model_signature_by_an_unknown_key_is_taken_in_as_unverified(registry: Registry) -> None:
    assert publish(registry, model_signature=vector("p256")).status_code == 201
    assert verdict(registry).startswith("not verified: signed by an unknown key")


def test_a_verdict_is_by_the_keys_of_today(registry: Registry) -> None:
    publish(registry, model_signature=vector("p256"))
    key = trust_key()
    assert verdict(registry) == "verified by key research"
    provenance.remove_key(key=key)
    assert verdict(registry).startswith("not verified")


@pytest.mark.parametrize("trusted", [True, False])
def test_a_signature_of_other_files_refuses_the_upload(registry: Registry, trusted: bool) -> None:
    if trusted:
        trust_key()
    other = {**FILES, "model.onnx": b"another model\n"}
    answer = publish(registry, files=other, model_signature=vector("p256"))
    assert refusal(answer) == (422, "model_signature_mismatch")
    assert "model.onnx" in answer.json()["message"]
    assert not Release.objects.exists()
    assert registry.call("GET", "/models/digits/role").status_code == 404  # nothing of it was kept, the role neither


def test_a_trusted_keys_forged_signature_refuses_the_upload(registry: Registry) -> None:
    trust_key()
    bundle = json.loads(vector("p256"))
    other = json.loads(vector("one-file"))["dsseEnvelope"]["signatures"]
    bundle["dsseEnvelope"]["signatures"] = other
    assert refusal(publish(registry, model_signature=json.dumps(bundle).encode())) == (422, "bad_model_signature")


def test_what_is_attached_is_covered_by_cis_signature(registry: Registry) -> None:
    publish(registry, ml_bom=json.dumps(BOM).encode())
    manifest = Manifest.parse(Release.objects.get().variants.get().manifest.encode())
    assert [item.sha256 for item in manifest.attachments] == [digest(json.dumps(BOM).encode())]
    assert registry.release("1.0.0")["variants"]["default"]["manifest"] == manifest.to_bytes().decode()


def test_a_manifest_without_attachments_says_nothing_of_them() -> None:
    assert b"attachments" not in manifest_for("1.0.0", FILES).to_bytes()


@pytest.mark.parametrize(
    ("kind", "content", "code"),
    [
        ("ml_bom", b"{}", "bad_bom"),
        ("ml_bom", b"[" * 100_000, "bad_bom"),
        ("model_signature", b"{}", "unsupported_model_signature"),
        ("model_signature", b"\xff", "bad_model_signature"),
        ("a_virus", b"x", "unknown_attachment"),
        ("provenance", b" " * (ATTACHMENT + 1), "malformed"),
    ],
)
def test_what_is_attached_wrongly_refuses_the_upload(registry: Registry, kind: str, content: bytes, code: str) -> None:
    answer = publish(registry, **{kind: content})
    assert answer.json()["code"] == code
    assert answer.status_code in {400, 422}
    assert not Release.objects.exists()


def test_an_attachment_that_was_not_uploaded_is_missed(registry: Registry) -> None:
    for data in FILES.values():
        registry.upload(data)
    manifest = manifest_for("1.0.0", FILES, attachments=(Attachment("ml-bom", "bom.json", 2, digest(b"{}")),))
    assert refusal(registry.post("1.0.0", [manifest], registry.role([manifest]))) == (422, "missing_blob")


def test_no_device_gets_what_is_attached(registry: Registry) -> None:
    bom = json.dumps(BOM).encode()
    publish(registry, ml_bom=bom)
    Release.objects.update(state="valid")
    entry = device()
    caller = Client(headers={"Authorization": f"Bearer {credentials.credential_for(entry)}"})
    allowed = caller.get(f"/api/device/v1/blobs/{digest(FILES['model.onnx'])}")
    allowed.close()
    assert allowed.status_code == 200
    assert caller.get(f"/api/device/v1/blobs/{digest(bom)}").status_code == 404


# --- people ------------------------------------------------------------------------------------------------------


def hostile_bom() -> bytes:
    about = {"name": HOSTILE, "version": HOSTILE, "licenses": [{"license": {"name": HOSTILE}}]}
    parts = [{"type": HOSTILE, "name": HOSTILE}, {"type": "data", "name": HOSTILE}]
    return json.dumps({**BOM, "metadata": {"component": about}, "components": parts}).encode()


def test_the_page_escapes_what_is_attached(registry: Registry, admin_client: Client) -> None:
    free = json.dumps({HOSTILE: HOSTILE}).encode()
    publish(registry, ml_bom=hostile_bom(), provenance=free, model_signature=vector("p256"))
    page = admin_client.get(f"/admin/releases/release/{Release.objects.get().pk}/change/").content.decode()
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8
    assert "not verified: signed by an unknown key" in page
    assert "1f3c" in page


def test_an_attachment_is_downloaded_as_it_came_and_never_shown_in_place(registry: Registry, client: Client) -> None:
    bom = hostile_bom()
    publish(registry, ml_bom=bom)
    where = f"/api/v1/releases/{Release.objects.get().pk}/attachments/{digest(bom)}/"
    client.force_login(viewer())
    answer = client.get(where)
    assert (answer.content, answer["Content-Type"]) == (bom, "application/octet-stream")
    assert answer["Content-Disposition"] == 'attachment; filename="ml_bom.json"'
    assert (answer["X-Content-Type-Options"], "sandbox" in answer["Content-Security-Policy"]) == ("nosniff", True)
    assert refusal(client.get(where.replace(digest(bom), "0" * 64))) == (404, "unknown_attachment")
    client.force_login(user("oscar"))
    assert client.get(where).status_code == 403


def test_a_models_own_file_is_no_attachment(registry: Registry, client: Client) -> None:
    publish(registry)
    client.force_login(viewer())
    where = f"/api/v1/releases/{Release.objects.get().pk}/attachments/{digest(FILES['model.onnx'])}/"
    assert refusal(client.get(where)) == (404, "unknown_attachment")


def test_operators_read_it_over_the_api(registry: Registry) -> None:
    publish(registry, ml_bom=json.dumps(BOM).encode())
    caller = Client(headers={"Authorization": f"Bearer {api_token(viewer(), 'read')}"})
    (variant,) = caller.get("/api/v1/releases/").json()["results"][0]["variants"]
    assert variant["metadata"]["commit"] == "1f3c"
    (item,) = variant["attachments"]
    assert (item["kind"], item["summary"]["datasets"]) == ("ml-bom", ["MNIST", "own-2026", "street numbers"])


# --- keys --------------------------------------------------------------------------------------------------------


def test_keys_are_added_listed_and_removed_by_command(registry: Registry, capsys: Any) -> None:
    file = VECTORS.relative_to(ROOT) / "p384.pub.pem"
    call_command("provenance_key", "add", "digits", "research", str(ROOT / file))
    with pytest.raises(CommandError, match="already"):
        call_command("provenance_key", "add", "digits", "again", str(ROOT / file))
    call_command("provenance_key", "list")
    key = ProvenanceKey.objects.get()
    assert f"digits  {key.fingerprint}  research" in capsys.readouterr().out
    call_command("provenance_key", "remove", "digits", key.fingerprint[:10])
    assert not ProvenanceKey.objects.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("add", "digits", "x", "/nonexistent"),
        ("add", "digits", "x", __file__),
        ("add", "nothing", "x", str(VECTORS / "p256.pub.pem")),
        ("remove", "digits", "abc"),
    ],
)
def test_the_command_says_what_is_wrong(registry: Registry, arguments: tuple[str, ...]) -> None:
    with pytest.raises(CommandError):
        call_command("provenance_key", *arguments)


def test_only_those_who_may_add_keys_in_the_admin(registry: Registry, client: Client, admin_client: Client) -> None:
    line = Model.objects.get()
    form = {"model": line.pk, "name": "research", "pem": (VECTORS / "p256.pub.pem").read_text()}
    client.force_login(operator())
    assert "/login/" in client.post("/admin/releases/provenancekey/add/", form)["Location"]
    assert not ProvenanceKey.objects.exists()
    wrong = admin_client.post("/admin/releases/provenancekey/add/", {**form, "pem": "not a key"})
    assert "expected a public key" in wrong.content.decode()
    assert admin_client.post("/admin/releases/provenancekey/add/", form).status_code == 302
    assert ProvenanceKey.objects.get().added_by == "admin"
    twice = admin_client.post("/admin/releases/provenancekey/add/", form)
    assert "trusts this key already" in twice.content.decode()
    where = f"/admin/releases/provenancekey/{ProvenanceKey.objects.get().pk}/delete/"
    assert admin_client.post(where, {"post": "yes"}).status_code == 302
    assert not ProvenanceKey.objects.exists()


def test_an_attachment_of_two_variants_is_one_artifact(registry: Registry) -> None:
    bom = json.dumps(BOM).encode()
    attached = (Attachment("ml-bom", "bom.json", len(bom), digest(bom)),)
    for data in (*FILES.values(), bom):
        registry.upload(data)
    both = [manifest_for("1.0.0", FILES, variant=name, attachments=attached) for name in ("fp32", "int8")]
    assert registry.post("1.0.0", both, registry.role(both)).status_code == 201
    assert Artifact.objects.get(sha256=digest(bom)).attachments.count() == 2
