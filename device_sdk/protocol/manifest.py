"""The manifest: the signed description of one variant, and the TUF target that CI's signature covers.

Everything else hangs on it by sha256: a release is often `model.onnx` with `model.onnx.data`.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, field
from hashlib import sha256
from typing import Any

from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.names import ReleasePath, check_file_name, check_name, check_sha256
from device_sdk.protocol.scores import Scores

FORMAT = 1
MODEL_SIGNATURE, ML_BOM, PROVENANCE = "model-signature", "ml-bom", "provenance"
ATTACHMENT_KINDS = (MODEL_SIGNATURE, ML_BOM, PROVENANCE)  # those that a server knows; a device needs none of them
_PATH = ("model", "version", "variant")


@frozen
class FileEntry:
    """One file of a variant. `length` in bytes."""

    name: str
    length: int
    sha256: str

    @classmethod
    def parse(cls, value: object) -> "FileEntry":
        item = fields.as_object(value, "file")
        return cls(
            name=check_file_name(item.get("name")),
            length=fields.take_int(item, "length", high=limits.ARTIFACT),
            sha256=check_sha256(item.get("sha256")),
        )


@frozen
class Attachment:
    """What is said about a variant, in a file of its own. Covered by CI's signature, kept by the server only."""

    kind: str
    name: str
    length: int
    sha256: str

    @classmethod
    def parse(cls, value: object) -> "Attachment":
        item = fields.as_object(value, "attachment")
        return cls(
            kind=check_name(item.get("kind"), "attachment"),
            name=check_file_name(item.get("name")),
            length=fields.take_int(item, "length", high=limits.ATTACHMENT),
            sha256=check_sha256(item.get("sha256")),
        )


@frozen
class TensorSpec:
    """An input or output. `shape` holds a size, a symbolic name, or None where unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    @classmethod
    def parse(cls, value: object) -> "TensorSpec":
        item = fields.as_object(value, "tensor")
        shape = fields.take_list(item, "shape", limit=limits.RANK)
        for size in shape:
            if isinstance(size, bool) or not (size is None or isinstance(size, (int, str))):
                raise ProtocolError("malformed", f"shape: expected sizes, names or null; got {size!r:.60}")
        return cls(
            name=fields.take_text(item, "name", limit=256),
            dtype=fields.take_text(item, "dtype", limit=32),
            shape=tuple(shape),
        )

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@frozen
class Requirements:
    """Floors below which a device cannot run the variant. Empty text, 0 and none mean: no floor.

    `memory` in bytes. Of `arch` and `providers` one is enough. `release`: the version, or one after it, that a device
    must have run before this one: it is brought there first.
    """

    sdk: str = ""
    runtime: str = ""
    opset: int = 0
    memory: int = 0
    release: str = ""
    arch: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The last three came later: where they ask for nothing they are left out, and the bytes are as they were."""
        always = {"sdk": self.sdk, "runtime": self.runtime, "opset": self.opset, "memory": self.memory}
        later = {"release": self.release, "arch": list(self.arch), "providers": list(self.providers)}
        return always | {name: value for name, value in later.items() if value}

    @classmethod
    def parse(cls, value: object) -> "Requirements":
        item = fields.as_object(value, "requires")
        return cls(
            sdk=fields.take_text(item, "sdk", limit=32, default=""),
            runtime=fields.take_text(item, "runtime", limit=32, default=""),
            opset=fields.take_int(item, "opset", high=10_000, default=0),
            memory=fields.take_int(item, "memory", high=2**50, default=0),
            release=check_name(item["release"], "version") if item.get("release") else "",
            arch=fields.take_texts(item, "arch", limit=limits.PROVIDERS, chars=32),
            providers=fields.take_texts(item, "providers", limit=limits.PROVIDERS, chars=64),
        )


@frozen
class Manifest:
    """What CI signs of a variant: its files, what they take and give, and what they need of a device."""

    path: ReleasePath
    files: tuple[FileEntry, ...]
    entry: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    requires: Requirements = field(default_factory=Requirements)
    metadata: Mapping[str, str] = field(default_factory=dict)
    attachments: tuple[Attachment, ...] = ()
    scores: Scores | None = None
    acceptance: FileEntry | None = None  # what a device asks the release before it serves; no runtime loads it

    @property
    def length(self) -> int:
        """Bytes of the files that a runtime loads."""
        return sum(file.length for file in self.files)

    @property
    def fetched(self) -> tuple[FileEntry, ...]:
        """What a device downloads and keeps: the files, and the acceptance bundle."""
        return (*self.files, *filter(None, (self.acceptance,)))

    def to_bytes(self) -> bytes:
        """The exact bytes that are hashed, signed and stored."""
        content = {
            "format": FORMAT,
            "model": self.path.model,
            "version": self.path.version,
            "variant": self.path.variant,
            "files": [asdict(file) for file in self.files],
            "entry": self.entry,
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "requires": self.requires.to_json(),
            "metadata": dict(self.metadata),
        }
        attached = {"attachments": [asdict(item) for item in self.attachments]} if self.attachments else {}
        scored = {"scores": self.scores.to_json()} if self.scores else {}
        accepted = {"acceptance": asdict(self.acceptance)} if self.acceptance else {}
        return fields.canonical(content | attached | scored | accepted)

    @classmethod
    def parse(cls, data: bytes) -> "Manifest":
        source = fields.parse_object(data, limit=limits.MANIFEST, what="manifest")
        fields.take_int(source, "format", low=FORMAT, high=FORMAT)
        files = tuple(FileEntry.parse(f) for f in fields.take_list(source, "files", limit=limits.FILES_PER_VARIANT))
        entry = check_file_name(source.get("entry"))
        names = [file.name for file in files]
        if len(set(names)) != len(names):
            raise ProtocolError("malformed", "files: each name may stand once")
        if entry not in names:
            raise ProtocolError("malformed", f"entry: expected one of the files; got {entry!r}")
        return cls(
            path=ReleasePath.parse("/".join(fields.take_text(source, name, limit=64) for name in _PATH)),
            files=files,
            entry=entry,
            inputs=_specs(source, "inputs"),
            outputs=_specs(source, "outputs"),
            requires=Requirements.parse(source.get("requires")),
            metadata=_metadata(source),
            attachments=_attachments(source),
            scores=Scores.parse(source["scores"]) if "scores" in source else None,
            acceptance=_acceptance(source, names),
        )


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def _specs(source: fields.Json, name: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec.parse(item) for item in fields.take_list(source, name, limit=limits.TENSORS))


def _attachments(source: fields.Json) -> tuple[Attachment, ...]:
    if "attachments" not in source:
        return ()
    listed = fields.take_list(source, "attachments", limit=limits.ATTACHMENTS_PER_VARIANT)
    found = tuple(Attachment.parse(item) for item in listed)
    if len({item.name for item in found}) != len(found):
        raise ProtocolError("malformed", "attachments: each name may stand once")
    return found


def _acceptance(source: fields.Json, names: Collection[str]) -> FileEntry | None:
    if "acceptance" not in source:
        return None
    found = FileEntry.parse(source["acceptance"])
    if found.length > limits.ACCEPTANCE:
        raise ProtocolError("too_large", f"acceptance: expected at most {limits.ACCEPTANCE} bytes; got {found.length}")
    if found.name in names:
        raise ProtocolError("malformed", f"acceptance: {found.name!r} is one of the files")
    return found


def _metadata(source: fields.Json) -> dict[str, str]:
    raw = fields.as_object(source.get("metadata", {}), "metadata")
    if len(raw) > 64:
        raise ProtocolError("malformed", f"metadata: expected at most 64 entries; got {len(raw)}")
    return {key: fields.take_text(raw, key, limit=2_000) for key in raw}
