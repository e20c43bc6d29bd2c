"""The files of the spool: a sample as a little zip of its own, and many of them packed into one batch."""

import contextlib
import io
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from device_sdk.intake import Sample
from device_sdk.protocol import fields, limits
from device_sdk.protocol.arrays import npy
from device_sdk.protocol.batches import INDEX, BatchIndex, SampleEntry

log = logging.getLogger("device_sdk")

_SAMPLE_INDEX = "sample.json"
BATCH_BYTES = limits.BATCH - limits.BATCH_INDEX  # of tensors; the index has its own allowance
_INDEX_BYTES = limits.BATCH_INDEX // 2


@dataclass(frozen=True, slots=True)
class Cover:
    """What stands on a batch."""

    id: str
    device: str
    model: str
    probability: float


@dataclass
class Packed:
    entries: list[SampleEntry] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def pack(target: Path, cover: Cover, samples: Mapping[Path, int], *, limit: int = BATCH_BYTES) -> Packed:
    """Write as many samples (files, with their sizes in bytes) as one batch takes, at least one, and sync it.

    The index comes last, when it is known what could be read.
    """
    packed, size, index_size, number = Packed(), 0, 0, 0
    with target.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path, length in samples.items():
            if packed.entries and (size + length > limit or index_size > _INDEX_BYTES):
                break
            if len(packed.entries) == limits.SAMPLES_PER_BATCH:
                break
            try:
                entry, tensors = decode(path)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                log.warning("a sample of %s was lost: %s", cover.model, error)
                packed.broken.append(path.stem)
                continue
            members = {old: f"t{number + at}.npy" for at, old in enumerate(tensors)}
            number += len(tensors)
            for old, new in members.items():
                archive.writestr(zipfile.ZipInfo(new), tensors[old])
            packed.entries.append(_renamed(entry, path.stem, members, cover.probability))
            size += length
            index_size += len(fields.canonical(packed.entries[-1].to_json()))
        index = BatchIndex(cover.id, cover.device, cover.model, tuple(packed.entries))
        archive.writestr(zipfile.ZipInfo(INDEX), index.to_bytes())
        archive.close()
        file.flush()
        os.fsync(file.fileno())
    return packed


def _renamed(entry: SampleEntry, name: str, members: Mapping[str, str], probability: float) -> SampleEntry:
    return replace(
        entry,
        id=name,
        probability=probability,
        inputs={tensor: members[old] for tensor, old in entry.inputs.items()},
        outputs={tensor: members[old] for tensor, old in entry.outputs.items()},
    )


def encode(identifier: str, sample: Sample, rate: float) -> bytes:
    """One sample as a little batch of its own: the same members, one entry."""
    buffer, number = io.BytesIO(), 0
    names: dict[str, dict[str, str]] = {"inputs": {}, "outputs": {}}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for part, tensors in (("inputs", sample.inputs), ("outputs", sample.outputs)):
            for name, tensor in tensors.items():
                member = f"t{number}.npy"
                number += 1
                archive.writestr(zipfile.ZipInfo(member), npy.to_bytes(tensor))
                names[part][name] = member
        entry = SampleEntry(identifier, sample.at, sample.release, max(rate, 1e-12), names["inputs"], names["outputs"])
        archive.writestr(zipfile.ZipInfo(_SAMPLE_INDEX), fields.canonical(entry.to_json()))
    return buffer.getvalue()


def decode(path: Path) -> tuple[SampleEntry, dict[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        data = archive.read(_SAMPLE_INDEX)
        entry = SampleEntry.parse(fields.parse_object(data, limit=limits.BATCH_INDEX, what=_SAMPLE_INDEX))
        return entry, {name: archive.read(name) for name in (*entry.inputs.values(), *entry.outputs.values())}


def sample_ids(path: Path) -> Iterator[str]:
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        yield from (entry.id for entry in BatchIndex.parse(archive.read(INDEX)).samples)
