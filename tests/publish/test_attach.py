"""What CI attaches to a release by `fleet-publish push --attach`, against a live server."""

import json
from hashlib import sha256
from typing import Any

import pytest

from device_sdk import publish
from device_sdk.protocol.limits import ATTACHMENT
from fleet.releases import provenance
from fleet.releases.models import Attachment, Model, Release, Variant
from tests.publish.test_publish import Runner, ci, states  # noqa: F401
from tests.registry import onnx_model
from tests.server.test_bom import BOM
from tests.server.test_model_signing import OURS, pem, signed

pytestmark = pytest.mark.django_db(transaction=True)


def signature_of(**files: bytes) -> bytes:
    """A model.sig as the tool makes it, of these files (an underscore stands for a dot)."""
    digests = {name.replace("_", "."): sha256(data).digest() for name, data in files.items()}

    def statement(body: dict[str, Any]) -> None:
        body["predicate"]["resources"] = [
            {"name": name, "algorithm": "sha256", "digest": digest.hex()} for name, digest in digests.items()
        ]
        body["subject"][0]["digest"]["sha256"] = sha256(b"".join(digests.values())).hexdigest()

    return signed(statement)


def test_push_attaches_files_of_each_kind(ci: Runner, capsys: Any) -> None:  # noqa: F811
    model = Model.objects.get()
    provenance.add_key(model=model, name="research", pem=pem(OURS).decode(), actor="ann")
    attached = {
        "ml-bom": ci.write("bom.json", json.dumps(BOM).encode()),
        "model-signature": ci.write("model.sig", signature_of(model_onnx=onnx_model())),
        "provenance": ci.write("run.json", b'{"run": 4711}'),
    }
    flags = [text for kind, path in attached.items() for text in ("--attach", f"{kind}={path}")]
    assert ci.push("1.0.0", *flags, "--metadata", "commit=1f3c", "--wait") == publish.OK
    said = capsys.readouterr().err
    assert "default: model.sig is verified by key research" in said
    assert sorted(Attachment.objects.values_list("kind", "name")) == [
        ("ml-bom", "bom.json"), ("model-signature", "model.sig"), ("provenance", "run.json"),
    ]  # fmt: skip
    assert states() == {"1.0.0": "valid"}


def test_pushing_again_with_the_model_signed_anew_is_harmless(ci: Runner) -> None:  # noqa: F811
    flags = ["--attach", f"model-signature={ci.folder / 'model.sig'}"]
    for _ in range(2):
        ci.write("model.sig", signature_of(model_onnx=onnx_model()))
        assert ci.push("1.0.0", *flags) == publish.OK
    assert Release.objects.count() == 1


def test_pushing_again_with_another_bill_of_materials_is_refused(ci: Runner) -> None:  # noqa: F811
    flags = ["--attach", f"ml-bom={ci.folder / 'bom.json'}"]
    ci.write("bom.json", json.dumps(BOM).encode())
    assert ci.push("1.0.0", *flags) == publish.OK
    ci.write("bom.json", json.dumps({**BOM, "version": 2}).encode())
    assert ci.push("1.0.0", *flags) == publish.REFUSED


def test_a_signature_of_another_model_refuses_the_push(ci: Runner, capsys: Any) -> None:  # noqa: F811
    ci.write("model.sig", signature_of(model_onnx=b"another"))
    assert ci.push("1.0.0", "--attach", f"model-signature={ci.folder / 'model.sig'}") == publish.REFUSED
    assert "does not match: file 'model.onnx'" in capsys.readouterr().err
    assert states() == {}


def test_each_variant_may_have_a_signature_of_its_own(ci: Runner) -> None:  # noqa: F811
    specs, flags = [], []
    for name, factor in (("fp32", 2.0), ("int8", 3.0)):
        data = onnx_model(factor)
        specs += ["--variant", f"{name}={ci.write(f'{name}/model.onnx', data)}"]
        flags += ["--attach", f"{name}:model-signature={ci.write(f'{name}/model.sig', signature_of(model_onnx=data))}"]
    assert ci("push", *specs, *flags, version="1.0.0") == publish.OK
    assert {variant.attachments.count() for variant in Variant.objects.all()} == {1}


@pytest.mark.parametrize("spec", ["ml-bom", "virus=bom.json", "fp32:ml-bom=bom.json", "ml-bom=missing.json", "=x"])
def test_a_wrong_attachment_is_named_before_anything_is_sent(ci: Runner, capsys: Any, spec: str) -> None:  # noqa: F811
    assert ci.push("1.0.0", "--attach", spec) == publish.USAGE
    assert spec.rpartition("=")[2] in capsys.readouterr().err
    assert states() == {}


def test_a_huge_attachment_is_not_sent(ci: Runner, capsys: Any) -> None:  # noqa: F811
    path = ci.write("bom.json", b" " * (ATTACHMENT + 1))
    assert ci.push("1.0.0", "--attach", f"ml-bom={path}") == publish.USAGE
    assert "expected at most" in capsys.readouterr().err


def test_a_revoked_version_is_not_pushed_again(ci: Runner, capsys: Any) -> None:  # noqa: F811
    assert ci.push("1.0.0") == publish.OK
    assert ci("revoke", version="1.0.0") == publish.OK
    assert states() == {"1.0.0": "revoked"}
    assert ci.push("1.0.0") == publish.INVALID
    assert "revoked: CI removed it from its role in version 2" in capsys.readouterr().err
