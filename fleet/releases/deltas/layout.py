"""Where the tensors of an ONNX model lie in its files: a walk over the protobuf's fields, without reading any weight.

The bytes are hostile: every length is checked against its parent, depth and number are bounded, and what does not parse
is no tensor. Files of other formats have no tensors.
"""

import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path

from device_sdk.protocol.patches.frames import Kind

MAX_TENSORS = 100_000
SMALL_FLOATS = 64 * 1024
_WINDOW = 64 * 1024
_DEPTH = 16
_PARTS = 256  # fields of one tensor that are looked at
_NAME = 1024

# Field numbers of onnx.proto.
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER, _NODE_ATTRIBUTE = 7, 1, 5, 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH = 5, 6
_DIMS, _DATA_TYPE, _NAME_FIELD, _EXTERNAL = 1, 2, 8, 13
_DATA = frozenset({4, 9, 10})  # float_data, raw_data, double_data: all three are the values' bytes
_KINDS = {
    1: Kind.F32, 2: Kind.U8, 3: Kind.I8, 4: Kind.I16, 5: Kind.I16, 6: Kind.I32, 7: Kind.I64, 9: Kind.U8, 10: Kind.F16,
    11: Kind.F64, 12: Kind.I32, 13: Kind.I64, 16: Kind.F16,
}  # fmt: skip


class MalformedError(Exception):
    """Not the protobuf that it should be."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor's bytes: `length` of them at `offset` of the file called `file`."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Source:
    """A file that is read by place."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.length = os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        pieces = []
        while length > 0 and (piece := os.pread(self._descriptor, length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        os.close(self._descriptor)


def tensors(folder: Path) -> list[Tensor]:
    """Every tensor of every model in a release's folder, by file and place, none overlapping another."""
    found: list[Tensor] = []
    for path in sorted(folder.iterdir()):
        with closing(Source(path)) as source:
            walk = _Walk(source, path.name, folder)
            try:
                found.extend(walk.model())
            except MalformedError:
                continue
    return _apart(found)


def _apart(found: list[Tensor]) -> list[Tensor]:
    """Sorted; of tensors that share bytes the first one stays."""
    kept: list[Tensor] = []
    for tensor in sorted(found, key=lambda each: (each.file, each.offset, -each.length)):
        if tensor.length and (not kept or kept[-1].file != tensor.file or kept[-1].end <= tensor.offset):
            kept.append(tensor)
    return kept


@dataclass(frozen=True, slots=True)
class _Field:
    number: int
    value: int  # of a varint; else where the content begins
    end: int  # of the content; -1 for a varint


class _Walk:
    def __init__(self, source: Source, name: str, folder: Path) -> None:
        self._source, self._name, self._folder = source, name, folder
        self._window, self._at = b"", 0
        self._count = 0

    def model(self) -> list[Tensor]:
        graphs = [f for f in self._fields(0, self._source.length) if f.number == _MODEL_GRAPH and f.end >= 0]
        return [tensor for graph in graphs for tensor in self._graph(graph, 0)]

    def _graph(self, field: _Field, depth: int) -> Iterator[Tensor]:
        if depth > _DEPTH:
            raise MalformedError("too deep")
        for part in self._fields(field.value, field.end):
            if part.end < 0:
                continue
            if part.number == _GRAPH_INITIALIZER:
                yield from self._tensor(part, "")
            elif part.number == _GRAPH_NODE:
                yield from self._node(part, depth)

    def _node(self, field: _Field, depth: int) -> Iterator[Tensor]:
        output = ""
        for part in self._fields(field.value, field.end):
            if part.number == 2 and not output:
                output = self._text(part)
            if part.number != _NODE_ATTRIBUTE or part.end < 0:
                continue
            for inner in self._fields(part.value, part.end):
                if inner.end >= 0 and inner.number == _ATTRIBUTE_TENSOR:
                    yield from self._tensor(inner, output)
                elif inner.end >= 0 and inner.number == _ATTRIBUTE_GRAPH:
                    yield from self._graph(inner, depth + 1)

    def _tensor(self, field: _Field, name: str) -> Iterator[Tensor]:
        self._count += 1
        if self._count > MAX_TENSORS:
            raise MalformedError("too many tensors")
        parts = list(itertools.islice(self._fields(field.value, field.end), _PARTS))
        kind = next((_KINDS.get(part.value) for part in parts if part.number == _DATA_TYPE and part.end < 0), None)
        if kind is None:
            return
        name = next((self._text(part) for part in parts if part.number == _NAME_FIELD), "") or name
        shape = tuple(size for part in parts if part.number == _DIMS for size in self._sizes(part))
        length = prod(shape) * kind.width
        external = dict(self._entry(part) for part in parts if part.number == _EXTERNAL and part.end >= 0)
        if external:
            yield from self._elsewhere(name, kind, shape, length, external)
            return
        for part in parts:
            if part.number in _DATA and part.end - part.value == length:
                yield Tensor(name, kind, shape, self._name, part.value, length)

    def _sizes(self, part: _Field) -> Iterator[int]:
        if part.end < 0:
            yield part.value
        else:
            yield from self._varints(part)

    def _elsewhere(
        self, name: str, kind: Kind, shape: tuple[int, ...], length: int, external: dict[str, str]
    ) -> Iterator[Tensor]:
        file, offset = external.get("location", ""), external.get("offset", "0")
        path = self._folder / file
        if "/" in file or not file or not offset.isdecimal() or len(offset) > 18 or not path.is_file():
            return
        if int(offset) + length <= path.stat().st_size:
            yield Tensor(name, kind, shape, file, int(offset), length)

    # Protobuf

    def _fields(self, start: int, end: int) -> Iterator[_Field]:
        at = start
        while at < end:
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                value, at = self._varint(at, end)
                yield _Field(number, value, -1)
                continue
            if wire == 2:
                size, at = self._varint(at, end)
            elif wire in {1, 5}:
                size = 8 if wire == 1 else 4
            else:
                raise MalformedError(f"wire type {wire}")
            if at + size > end:
                raise MalformedError("a field ends outside of its message")
            if wire == 2:
                yield _Field(number, at, at + size)
            at += size

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._byte(at)
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise MalformedError("a number does not end")

    def _byte(self, at: int) -> int:
        place = at - self._at
        if not 0 <= place < len(self._window):
            self._window, self._at, place = self._source.read(at, _WINDOW), at, 0
            if not self._window:
                raise MalformedError("it ends too early")
        return self._window[place]

    def _varints(self, field: _Field) -> Iterator[int]:
        at = field.value
        while at < field.end:
            value, at = self._varint(at, field.end)
            yield value

    def _text(self, field: _Field) -> str:
        if field.end < 0 or field.end - field.value > _NAME:
            return ""
        return self._source.read(field.value, field.end - field.value).decode(errors="replace")

    def _entry(self, field: _Field) -> tuple[str, str]:
        parts = {part.number: self._text(part) for part in self._fields(field.value, field.end)}
        return parts.get(1, ""), parts.get(2, "")


def small_floats(folder: Path, found: Sequence[Tensor]) -> dict[str, tuple[float, ...]]:
    """Float tensors of up to `SMALL_FLOATS` bytes by name: the scales of quantised ones are among them."""
    small: dict[str, tuple[float, ...]] = {}
    for tensor in found:
        if tensor.kind is Kind.F32 and tensor.length <= SMALL_FLOATS:
            with closing(Source(folder / tensor.file)) as source:
                data = source.read(tensor.offset, tensor.length)
            small[tensor.name] = struct.unpack(f"<{len(data) // 4}f", data)
    return small
