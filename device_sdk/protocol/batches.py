"""A batch: samples of one model, in one uncompressed zip. `batch.json` is the index, each tensor one `.npy` member.

Uncompressed, so that its size bounds what opening it can cost; numpy and zipfile read it anywhere.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import ReleasePath, check_model, check_name, check_sha256

INDEX = "batch.json"
_ID = re.compile(r"[0-9a-f]{32}")
_MEMBER = re.compile(r"t\d{1,7}\.npy")


@dataclass(frozen=True, slots=True)
class BatchHead:
    """What the device announces before it uploads. `length` in bytes; `dropped`: samples lost to the spool's bound."""

    id: str
    model: str
    sha256: str
    length: int
    samples: int
    dropped: int
    campaign: str

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def parse(cls, value: object) -> "BatchHead":
        item = fields.as_object(value, "batch")
        return cls(
            id=_check_id(item),
            model=check_model(item.get("model")),
            sha256=check_sha256(item.get("sha256")),
            length=fields.take_int(item, "length", low=1, high=limits.BATCH),
            samples=fields.take_int(item, "samples", low=1, high=limits.SAMPLES_PER_BATCH),
            dropped=fields.take_int(item, "dropped", high=2**40, default=0),
            campaign=fields.take_text(item, "campaign", limit=64, default=""),
        )


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """One inference. `at` in unix seconds; `probability` of having been kept; tensors map a name to a zip member."""

    id: str
    at: float
    release: ReleasePath
    probability: float
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "at": self.at,
            "release": str(self.release),
            "probability": self.probability,
            "inputs": dict(self.inputs),
            "outputs": dict(self.outputs),
        }

    @classmethod
    def parse(cls, value: object) -> "SampleEntry":
        item = fields.as_object(value, "sample")
        return cls(
            id=_check_id(item),
            at=fields.take_number(item, "at", low=0, high=2**33),
            release=ReleasePath.parse(item.get("release")),
            probability=fields.take_number(item, "probability", low=1e-12, high=1),
            inputs=take_members(item, "inputs"),
            outputs=take_members(item, "outputs"),
        )


@dataclass(frozen=True, slots=True)
class BatchIndex:
    """The content of `batch.json`."""

    id: str
    device: str
    model: str
    samples: tuple[SampleEntry, ...]

    def to_bytes(self) -> bytes:
        samples = [sample.to_json() for sample in self.samples]
        return fields.canonical(
            {"format": 1, "id": self.id, "device": self.device, "model": self.model, "samples": samples}
        )

    @classmethod
    def parse(cls, data: bytes) -> "BatchIndex":
        item = fields.parse_object(data, limit=limits.BATCH_INDEX, what=INDEX)
        fields.take_int(item, "format", low=1, high=1)
        rows = fields.take_list(item, "samples", limit=limits.SAMPLES_PER_BATCH)
        index = cls(
            id=_check_id(item),
            device=check_name(item.get("device"), "device"),
            model=check_model(item.get("model")),
            samples=tuple(SampleEntry.parse(row) for row in rows),
        )
        if any(sample.release.model != index.model for sample in index.samples):
            raise ProtocolError("wrong_model", f"batch: every sample must be of {index.model!r}")
        return index


def _check_id(item: fields.Json) -> str:
    value = fields.take_text(item, "id", limit=32)
    if not _ID.fullmatch(value):
        raise ProtocolError("malformed", f"id: expected 32 hex digits; got {value!r:.80}")
    return value


def take_members(item: fields.Json, name: str) -> dict[str, str]:
    """Tensors by name, each a member `t<n>.npy` of the same zip."""
    members = fields.take_object(item, name)
    if len(members) > limits.TENSORS:
        raise ProtocolError("malformed", f"{name}: expected at most {limits.TENSORS} tensors; got {len(members)}")
    for tensor, member in members.items():
        if len(tensor) > 256 or not isinstance(member, str) or not _MEMBER.fullmatch(member):
            raise ProtocolError("malformed", f"{name}: expected tensor names and t<n>.npy members; got {member!r:.60}")
    return members
