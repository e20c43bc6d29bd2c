"""Read an uploaded batch. The bytes come from a device, which may be broken or hostile: they are refused or understood.

What makes this safe: nothing is compressed, so the length that was announced bounds what opening can cost; the zip's
directory is measured before zipfile builds an object for each entry; each member is used once, so that a small file
cannot stand for many samples; array headers are checked against the bytes that follow before an array is made; and
arrays are of plain numbers or text, so that nothing is ever unpickled. No IO.
"""

import math
import struct
import tokenize
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.lib import format as npy

from device_sdk.protocol import limits
from device_sdk.protocol.batches import INDEX, BatchIndex, SampleEntry
from device_sdk.protocol.errors import ProtocolError
from fleet.errors import Invalid

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = frozenset({"|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"})
_LAST_CHARACTER, _SURROGATES = 0x10FFFF, (0xD800, 0xDFFF)
MEMBERS = 65_534  # what a zip without the 64-bit extension can hold
_DIRECTORY_ENTRY = 128  # bytes; 46 and the name is what ours take
_END = struct.Struct("<4s4H2LH")  # the end-of-central-directory record
_ZIP64_LOCATOR = 20
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = 1024  # bytes; numpy writes 118 for a plain array

_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError, struct.error, OSError)
_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError, tokenize.TokenError)


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
    _measure(data)
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            return _samples(archive, expected, len(data))
    except _ZIP_ERRORS as error:
        raise Invalid("bad_zip", f"expected a zip of stored members; {error}") from error


def _measure(data: bytes) -> None:
    """Refuse a directory that would be costly to read. zipfile would look for its end; ours is the very end."""
    if len(data) < _END.size or not data[-_END.size :].startswith(b"PK\x05\x06"):
        raise Invalid("bad_zip", "expected a whole zip without a comment: its end is missing")
    _, _, _, _, count, size, _, comment = _END.unpack(data[-_END.size :])
    locator = data[-_END.size - _ZIP64_LOCATOR : -_END.size]
    if comment or locator.startswith(b"PK\x06\x07") or not 0 < count <= MEMBERS:
        raise Invalid("bad_zip", f"expected 1 to {MEMBERS} members and no zip64; got {count}")
    if size > count * _DIRECTORY_ENTRY:
        raise Invalid(
            "bad_zip", f"expected at most {_DIRECTORY_ENTRY} bytes of directory a member; got {size / count:.0f}"
        )


def _samples(archive: zipfile.ZipFile, expected: Expected, length: int) -> list[Sample]:
    members = _members(archive, length)
    if INDEX not in members:
        raise Invalid("bad_index", f"expected a member {INDEX}")
    if members[INDEX].file_size > limits.BATCH_INDEX:
        raise Invalid("bad_index", f"expected at most {limits.BATCH_INDEX} bytes of {INDEX}")
    index = _index(archive.read(INDEX), expected)
    _check_references(index, members.keys() - {INDEX})
    return [_sample(archive, entry) for entry in index.samples]


def _members(archive: zipfile.ZipFile, length: int) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise Invalid("bad_zip", "expected each member once; some name comes twice")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise Invalid("bad_zip", f"expected stored members; {info.filename!r:.80} is compressed")
    total = sum(info.file_size for info in infos)
    if total > length:  # entries that overlap, so that the same bytes count many times
        raise Invalid("bad_zip", f"expected at most {length} bytes of members; got {total}")
    return members


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


def _sample(archive: zipfile.ZipFile, entry: SampleEntry) -> Sample:
    def load(tensors: Mapping[str, str]) -> dict[str, Array]:
        return {name: _named(archive.read(member), member) for name, member in tensors.items()}

    return Sample(entry, inputs=load(entry.inputs), outputs=load(entry.outputs))


def _named(data: bytes, member: str) -> Array:
    try:
        return tensor(data)
    except Invalid as error:
        raise Invalid(error.code, f"{member}: {error.message}") from error


def tensor(data: bytes) -> Array:
    """Read one `.npy` of plain numbers or text, of version 1.0, which is what numpy writes for them."""
    start = len(_MAGIC) + 2 + int.from_bytes(data[8:10], "little")
    if not data.startswith(_MAGIC) or not len(_MAGIC) + 2 < start <= min(_HEADER, len(data)):
        raise Invalid("bad_tensor", "expected a .npy file of version 1.0")
    shape, fortran, dtype = _header(data[len(_MAGIC) : start])
    expected = math.prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        raise Invalid("bad_tensor", f"expected {expected} bytes for {shape} {dtype}; got {len(data) - start}")
    return _values(data, start, dtype).reshape(shape, order="F" if fortran else "C")


def _values(data: bytes, start: int, dtype: np.dtype[Any]) -> Array:
    """A view of the bytes, where every byte is a legal value."""
    if dtype.kind == "b":  # only 0 and 1 are booleans
        flags: Array = np.frombuffer(data, np.uint8, offset=start) != 0
        return flags
    if dtype.kind == "U":
        code = np.frombuffer(data, "<u4", offset=start)
        if ((code > _LAST_CHARACTER) | ((code >= _SURROGATES[0]) & (code <= _SURROGATES[1]))).any():
            raise Invalid("bad_tensor", "expected text; got numbers that are no characters")
    return np.frombuffer(data, dtype, offset=start)


@lru_cache(maxsize=256)  # the samples of a batch have a handful of headers between them
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        shape, fortran, dtype = npy.read_array_header_1_0(BytesIO(data))
    except _HEADER_ERRORS as error:
        raise Invalid("bad_tensor", f"expected the header of an array; {error!s:.200}") from error
    if dtype.str not in DTYPES and not (dtype.str.startswith("<U") and dtype.itemsize):
        raise Invalid("bad_tensor", f"expected text or one of {sorted(DTYPES)}; got {dtype.str!r:.40}")
    if len(shape) > limits.RANK or any(not 0 <= size < 2**40 for size in shape):
        raise Invalid("bad_tensor", f"expected up to {limits.RANK} sizes; got {shape!r:.80}")
    return shape, fortran, dtype
