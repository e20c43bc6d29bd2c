"""A registry with a trust root and a model `digits`, for tests of what CI does. Import the fixture by name."""

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
import pytest
from django.test import Client
from django.utils import timezone
from onnx import TensorProto, helper
from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.metadata import Metadata, TargetFile, Targets

from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.manifest import FileEntry, Manifest, digest
from device_sdk.protocol.names import ReleasePath
from fleet.accounts.services import create_token
from fleet.devices.models import Device
from fleet.releases import services
from fleet.trust import keystore

MODEL = "digits"


def onnx_model(factor: float = 2.0) -> bytes:
    """y = factor * x, on [batch, 4] floats."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    constant = helper.make_tensor("k", TensorProto.FLOAT, [1], [factor])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "k"], ["y"])], "times", [x], [y], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def external_model(location: str = "model.onnx.data") -> tuple[bytes, bytes]:
    """The same with its one weight as external data: the model's bytes, and the data's."""
    model = onnx.load_model_from_string(onnx_model())
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return bytes(model.SerializeToString()), bytes.fromhex("00000040")


def manifest_for(version: str, files: Mapping[str, bytes], *, variant: str = "default", **extra: Any) -> Manifest:
    entries = tuple(FileEntry(name, len(data), digest(data)) for name, data in files.items())
    return Manifest(ReleasePath(MODEL, version, variant), entries, entries[0].name, **extra)


class Registry:
    """Plays CI over HTTP."""

    def __init__(self, client: Client, signer: Signer, token: str, run_on_commit: Callable[..., Any]) -> None:
        self.client, self.signer, self.token = client, signer, token
        self.run_on_commit = run_on_commit

    def call(self, method: str, where: str, *, token: str | None = None, **extra: Any) -> Any:
        headers = {"Authorization": f"Bearer {token or self.token}", **extra.pop("headers", {})}
        return self.client.generic(method, f"/api/ci/v1{where}", headers=headers, **extra)

    def upload(self, data: bytes, *, offset: int = 0, length: int | None = None, name: str = "", **extra: Any) -> Any:
        headers = {"Upload-Offset": str(offset), "Upload-Length": str(len(data) if length is None else length)}
        where = f"/blobs/{name or sha256(data).hexdigest()}"
        kind = "application/octet-stream"
        return self.call("PUT", where, data=data, content_type=kind, headers=headers, **extra)

    def role(
        self,
        manifests: list[Manifest],
        *,
        signer: Signer | None = None,
        version: int | None = None,
        edit: Callable[[Targets], None] = lambda _: None,
        days: int = 180,
    ) -> str:
        """The next version of the role, with these added."""
        answer = self.call("GET", f"/models/{MODEL}/role")
        fresh = answer.status_code == 404
        role = Targets(version=1) if fresh else Metadata[Targets].from_bytes(answer.content).signed
        role.version = version or role.version + (not fresh)
        role.expires = (timezone.now() + timedelta(days=days)).replace(microsecond=0)
        for manifest in manifests:
            content = manifest.to_bytes()
            role.targets[str(manifest.path)] = TargetFile(len(content), {"sha256": digest(content)}, str(manifest.path))
        edit(role)
        metadata = Metadata(role)
        if signer is not NOBODY:
            metadata.sign(signer or self.signer)
        return metadata.to_bytes().decode()

    def post(self, version: str, manifests: list[Manifest], role: str, *, model: str = MODEL, **extra: Any) -> Any:
        texts = {item.path.variant: item.to_bytes().decode() for item in manifests}
        body = json.dumps({"version": version, "manifests": texts, "role": role})
        with self.run_on_commit(execute=True):
            return self.call("POST", f"/models/{model}/releases", data=body, content_type="application/json", **extra)

    def publish(self, version: str, files: Mapping[str, bytes] | None = None, **extra: Any) -> Any:
        """All of what a push does."""
        files = files or {"model.onnx": onnx_model()}
        for data in files.values():
            assert self.upload(data).status_code == 201
        manifest = manifest_for(version, files, **extra)
        return self.post(version, [manifest], self.role([manifest]))

    def release(self, version: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.call("GET", f"/models/{MODEL}/releases/{version}").json()
        return answer


class _Nobody(CryptoSigner):
    def __init__(self) -> None:
        pass


NOBODY = _Nobody()  # leaves a role unsigned


def refusal(answer: Any) -> tuple[int, str]:
    """Status and code, which is what callers act upon."""
    body = answer.json()
    assert body.keys() == {"code", "message", "detail"}
    return answer.status_code, body["code"]


def make_device(name: str = "cam-1", models: tuple[str, ...] = (MODEL,)) -> Device:
    return Device.objects.create(name=name, model_names=list(models), nonce_digest="0" * 64)


def assignment_of(manifest: Manifest) -> Assignment:
    content = manifest.to_bytes()
    return Assignment(MODEL, manifest.path, len(content), digest(content))


@pytest.fixture
def own_folder(settings: Any, tmp_path: Path) -> Path:
    """Keys, uploads and objects of this test alone."""
    settings.VAR, settings.INCOMING = tmp_path, tmp_path / "incoming"
    settings.ONLINE_KEY_URI = f"file2:{tmp_path / 'keystore' / 'online.pem'}"
    settings.ONLINE_KEY_PUBLIC = tmp_path / "keystore" / "online.pub.json"
    options = {"location": str(tmp_path / "objects"), "allow_overwrite": True}
    backend = {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": options}
    settings.STORAGES = {**settings.STORAGES, "default": backend, "objects": backend}
    return tmp_path


def set_up_trust(threshold: int = 1) -> CryptoSigner:
    """A root, and `digits` delegated to a new CI key, which is returned."""
    store, signer = keystore.at(None), CryptoSigner.generate_ed25519()
    keystore.initialise(store)
    keystore.add_model(store, model=MODEL, public_keys=[signer.public_key], threshold=threshold)
    services.create_model(name=MODEL)
    return signer


def publish_token(*models: str, days: float = 1) -> str:
    _, text = create_token(name="ci", scopes=["publish"], models=models, lifetime=timedelta(days=days))
    return text


@pytest.fixture
def registry(db: None, own_folder: Path, client: Client, django_capture_on_commit_callbacks: Any) -> Registry:
    return Registry(client, set_up_trust(), publish_token(MODEL), django_capture_on_commit_callbacks)
