"""What the feedback tests share: two devices, two models, and batches as the SDK makes them, or as an attacker does."""

import hashlib
import io
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from device_sdk.protocol.batches import INDEX, BatchHead, BatchIndex, SampleEntry
from device_sdk.protocol.names import ReleasePath
from fleet.devices import credentials
from fleet.devices.models import Device
from fleet.feedback import services
from fleet.feedback.models import Batch
from fleet.releases.models import Model, Release

NOON = 1_750_075_200.0  # 2025-06-16 12:00 UTC
URL = "/api/device/v1/batches"


@dataclass(frozen=True)
class World:
    digits: Model
    wine: Model
    device: Device
    other: Device


@pytest.fixture
def local_objects(settings, tmp_path) -> Path:
    """The embedded object store and upload folder, in a folder of their own."""
    folder = tmp_path / "feedback"
    options = {"location": str(folder / "objects"), "allow_overwrite": True}
    local = {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": options}
    settings.STORAGES = {**settings.STORAGES, "objects": local}
    settings.INCOMING = folder / "incoming"
    settings.INCOMING.mkdir(parents=True)
    return folder


@pytest.fixture
def feedback_world(db, local_objects) -> World:
    models = {name: Model.objects.create(name=name) for name in ("digits", "wine")}
    for model, versions in {"digits": ("1.0.0", "1.1.0", "2"), "wine": ("1.0.0",)}.items():
        for version in versions:
            Release.objects.create(model=models[model], version=version, state=Release.State.VALID)
    return World(
        models["digits"],
        models["wine"],
        Device.objects.create(name="cam-1", model_names=["digits"], nonce_digest="1"),
        Device.objects.create(name="cam-2", model_names=["digits", "wine"], nonce_digest="2"),
    )


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def sample(
    number: int,
    *,
    at: float = NOON,
    release: str = "digits/1.0.0/default",
    probability: float = 0.5,
    sample_id: str | None = None,
    members: Mapping[str, str] | None = None,
) -> SampleEntry:
    """Sample `number` has the members `t<2n>.npy` and `t<2n+1>.npy`."""
    return SampleEntry(
        id=sample_id or uuid4().hex,
        at=at,
        release=ReleasePath.parse(release),
        probability=probability,
        inputs=members or {"image": f"t{2 * number}.npy"},
        outputs={"label": f"t{2 * number + 1}.npy"},
    )


def image(number: int) -> np.ndarray:
    return np.full((1, 8, 8), number, np.float32)


def pack(
    samples: Iterable[SampleEntry],
    *,
    batch_id: str,
    device: str = "cam-1",
    model: str = "digits",
    members: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """A batch as the SDK packs it. `members` replaces or adds members."""
    samples = tuple(samples)
    index = BatchIndex(id=batch_id, device=device, model=model, samples=samples)
    stored: dict[str, bytes] = {INDEX: index.to_bytes()}
    for number, _ in enumerate(samples):
        stored[f"t{2 * number}.npy"] = npy(image(number))
        stored[f"t{2 * number + 1}.npy"] = npy(np.array([number], np.int64))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in (stored | dict(members or {})).items():
            archive.writestr(name, data)
    return file.getvalue()


def head(data: bytes, *, batch_id: str, model: str = "digits", samples: int = 1, campaign: str = "") -> BatchHead:
    digest = hashlib.sha256(data).hexdigest()
    return BatchHead(batch_id, model, digest, len(data), samples, dropped=0, campaign=campaign)


def received(device: Device, samples: Iterable[SampleEntry] | None = None, **options) -> Batch:
    """A batch that came in whole."""
    samples = list(samples) if samples is not None else [sample(0)]
    batch_id = uuid4().hex
    model = options.get("model", "digits")
    data = pack(samples, batch_id=batch_id, device=device.name, **options)
    return bring(device, data, head(data, batch_id=batch_id, model=model, samples=len(samples)))


def bring(device: Device, data: bytes, announced: BatchHead) -> Batch:
    batch, _ = services.announce(device=device, head=announced)
    services.receive_content(batch=batch, content=io.BytesIO(data))
    return services.complete(batch=services.find(device=device, batch_id=announced.id))


def bearer(device: Device) -> dict[str, str]:
    return {"Authorization": f"Bearer {credentials.credential_for(device)}"}


def files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
