"""Read an uploaded batch. The bytes come from a device, which may be broken or hostile: they are refused or understood.

What makes this safe: the zip and its arrays are read as `device_sdk.protocol.arrays` does, and each member is used
once, so that a small file cannot stand for many samples. No IO.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from device_sdk.protocol import limits
from device_sdk.protocol.arrays import npy
from device_sdk.protocol.arrays.archive import Archive, opened
from device_sdk.protocol.arrays.npy import Array
from device_sdk.protocol.batches import INDEX, BatchIndex, SampleEntry
from device_sdk.protocol.errors import ProtocolError
from fleet.errors import Invalid


@dataclass(frozen=True, slots=True)
class Expected:
    """What was announced: the index has to say the same."""

    id: str
    device: str
    model: str
    samples: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One inference with its tensors, C-ordered or not, read-only."""

    entry: SampleEntry
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


def parse(data: bytes, expected: Expected) -> list[Sample]:
    """Return the samples of a batch, or raise `Invalid`: bad_zip, bad_index, wrong_batch or bad_tensor."""
    try:
        with opened(data) as archive:
            return _samples(archive, expected)
    except ProtocolError as error:
        raise Invalid(error.code, error.message) from error


def _samples(archive: Archive, expected: Expected) -> list[Sample]:
    if INDEX not in archive.sizes:
        raise Invalid("bad_index", f"expected a member {INDEX}")
    if archive.sizes[INDEX] > limits.BATCH_INDEX:
        raise Invalid("bad_index", f"expected at most {limits.BATCH_INDEX} bytes of {INDEX}")
    index = _index(archive.read(INDEX), expected)
    _check_references(index, archive.sizes.keys() - {INDEX})
    return [_sample(archive, entry) for entry in index.samples]


def _index(data: bytes, expected: Expected) -> BatchIndex:
    try:
        index = BatchIndex.parse(data)
    except ProtocolError as error:
        raise Invalid("bad_index", error.message) from error
    got = Expected(index.id, index.device, index.model, len(index.samples))
    if got != expected:
        raise Invalid("wrong_batch", f"announced was {expected}; the index says {got}")
    if len({entry.id for entry in index.samples}) != len(index.samples):
        raise Invalid("bad_index", "expected each sample id once")
    return index


def _check_references(index: BatchIndex, stored: set[str]) -> None:
    """Every tensor of every sample is a member of its own, and no member is left over."""
    used: set[str] = set()
    for entry in index.samples:
        for member in _references(entry):
            if member in used:
                raise Invalid("bad_index", f"expected each member to be used once; {member} comes twice")
            used.add(member)
    if used != stored:
        raise Invalid("bad_index", f"members and index differ: {sorted(used ^ stored)[:5]!r:.200}")


def _references(entry: SampleEntry) -> Iterator[str]:
    for tensors in (entry.inputs, entry.outputs):
        for name in tensors:
            if not name or not name.isprintable() or f"{name}.shape" in tensors:  # where its shape will stand
                raise Invalid("bad_index", f"expected a printable tensor name of its own; got {name!r:.80}")
        yield from tensors.values()


def _sample(archive: Archive, entry: SampleEntry) -> Sample:
    def load(tensors: Mapping[str, str]) -> dict[str, Array]:
        return {name: _named(archive.read(member), member) for name, member in tensors.items()}

    return Sample(entry, inputs=load(entry.inputs), outputs=load(entry.outputs))


def _named(data: bytes, member: str) -> Array:
    try:
        return npy.parse(data)
    except ProtocolError as error:
        raise Invalid(error.code, f"{member}: {error.message}") from error
