"""The poll: one GET, answered 304 or with one bundle. The entity tag doubles as the version report."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from device_sdk.protocol import fields, limits
from device_sdk.protocol.abilities import UNSAID, Abilities
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import check_model, check_name, check_sha256

POLL = "/api/device/v1/poll"
ENROL = "/api/device/v1/enrol"
EVENTS = "/api/device/v1/events"
BLOBS = "/api/device/v1/blobs/"
BATCHES = "/api/device/v1/batches"

INTERVAL_HEADER = "Fleet-Poll-Interval"  # seconds, set by the server on every answer to a poll,
DEFAULT_INTERVAL = "300"  # but for a 304 where it is this
WANT_HEADER = "Fleet-Want"  # "runs": the server does not know this running set, post it with the next events
ROOT_PARAMETER = "root"  # the newest root version that the device trusts; later ones come in the bundle
BINDING = "x-device"  # signed in timestamp: whose view this is

_TAG = re.compile(r'(?:W/)?"([0-9]{1,19})-([0-9a-f]{16})"')
_METADATA_NAME = re.compile(r"(?:[0-9]{1,19}\.)?[a-z0-9][a-z0-9._-]{0,63}\.json")


def running_digest(runs: Mapping[str, str]) -> str:
    """Name a running set (model to `<version>/<variant>`) by 16 hex digits."""
    return blake2b(fields.canonical(dict(runs)), digest_size=8).hexdigest()


def check_runs(value: object) -> dict[str, str]:
    """Check a device-supplied running set: legal models, `<version>/<variant>` each."""
    runs = fields.as_object(value, "runs")
    if len(runs) > limits.MODELS_PER_DEVICE:
        raise ProtocolError("malformed", f"runs: expected at most {limits.MODELS_PER_DEVICE} models; got {len(runs)}")
    for model, running in runs.items():
        check_model(model)
        parts = running.split("/") if isinstance(running, str) else []
        if len(parts) != 2:
            raise ProtocolError("malformed", f"runs: expected version/variant; got {running!r:.80}")
        check_name(parts[0], "version")
        check_name(parts[1], "variant")
    return runs


@dataclass(frozen=True, slots=True)
class Tag:
    """What `If-None-Match` says: the version of the view the device holds (0: none), and what it runs."""

    view: int
    runs: str

    def __str__(self) -> str:
        return f'"{self.view}-{self.runs}"'

    @classmethod
    def parse(cls, value: str) -> "Tag":
        match = _TAG.fullmatch(value.strip())
        if not match:
            raise ProtocolError("malformed_tag", f'If-None-Match: expected "<view>-<16 hex>"; got {value!r:.80}')
        return cls(view=int(match[1]), runs=match[2])


@dataclass(frozen=True, slots=True)
class Bundle:
    """A changed view in one answer: TUF files by their plain names, manifests by sha256. Carries no trust itself."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    manifests: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return fields.canonical({"format": 1, "metadata": dict(self.metadata), "manifests": dict(self.manifests)})

    @classmethod
    def parse(cls, data: bytes) -> "Bundle":
        source = fields.parse_object(data, limit=limits.BUNDLE, what="bundle")
        fields.take_int(source, "format", low=1, high=1)
        metadata, manifests = fields.take_object(source, "metadata"), fields.take_object(source, "manifests")
        for name in metadata:
            if not _METADATA_NAME.fullmatch(name) or ".." in name:
                raise ProtocolError("invalid_name", f"bundle: not a metadata file name: {name!r:.80}")
            fields.take_text(metadata, name, limit=limits.METADATA)
        for name in manifests:
            check_sha256(name, "manifest")
            fields.take_text(manifests, name, limit=limits.MANIFEST)
        return cls(metadata=metadata, manifests=manifests)


@dataclass(frozen=True, slots=True)
class EnrolRequest:
    """`nonce` is made once by the device and kept: a repeated request with it is the same enrolment."""

    device: str
    nonce: str
    labels: Mapping[str, str]
    sdk: str
    abilities: Abilities = UNSAID

    def to_json(self) -> dict[str, Any]:
        said = {"abilities": self.abilities.to_json()} if self.abilities != UNSAID else {}
        return {"device": self.device, "nonce": self.nonce, "labels": dict(self.labels), "sdk": self.sdk} | said

    @classmethod
    def parse(cls, value: object) -> "EnrolRequest":
        item = fields.as_object(value, "enrolment")
        nonce = fields.take_text(item, "nonce", limit=64)
        if not re.fullmatch(r"[0-9a-f]{32,64}", nonce):
            raise ProtocolError("malformed", "nonce: expected 32 to 64 hex digits")
        return cls(
            device=check_name(item.get("device"), "device"),
            nonce=nonce,
            labels=check_labels(item.get("labels", {})),
            sdk=fields.take_text(item, "sdk", limit=32, default=""),
            abilities=Abilities.parse(item.get("abilities", {})),
        )


def check_labels(value: object) -> dict[str, str]:
    labels = fields.as_object(value, "labels")
    if len(labels) > limits.LABELS:
        raise ProtocolError("malformed", f"labels: expected at most {limits.LABELS}; got {len(labels)}")
    for key in labels:
        check_name(key, "label")
        fields.take_text(labels, key, limit=limits.LABEL_CHARS)
    return labels
