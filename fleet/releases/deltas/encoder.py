"""Make a patch: for each tensor of the target find what it resembles in the base, for each frame what is smallest.

Pure but for the two files that are read. Whatever it chooses, the decoder's result is checked before it is offered: a
bad match costs bytes, never correctness.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from device_sdk.protocol.patches import arithmetic
from device_sdk.protocol.patches.arithmetic import Array
from device_sdk.protocol.patches.frames import FIRST, MAX_FRAME, Frame, Head, Kind, Operation
from fleet.releases.deltas import gaps, matching
from fleet.releases.deltas.layout import Source, Tensor
from fleet.releases.deltas.matching import Match
from fleet.releases.deltas.packing import Packer, entropy

SMALL = 512  # bytes; a tensor below it is no different from what lies around it


@dataclass(frozen=True, slots=True)
class Side:
    """One file, and the tensors in it."""

    source: Source
    sha256: str
    tensors: Sequence[Tensor] = ()


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes of the target that are treated alike; `match` None: not a tensor, or like nothing in the base."""

    offset: int
    length: int
    kind: Kind | None = None
    match: Match | None = None

    @property
    def end(self) -> int:
        return self.offset + self.length


def encode(base: Side, target: Side, scales: matching.Scales) -> Iterator[bytes]:
    """The patch, piece by piece. Deterministic for equal files and libraries."""
    yield Head(base.sha256, base.source.length, target.sha256, target.source.length).to_bytes()
    encoder = _Encoder(base, target)
    pending: Frame | None = None  # copies that follow on each other are one
    for frame, payload in encoder.frames(regions(base, target, scales)):
        if frame.operation is Operation.COPY and pending and pending.offset + pending.length == frame.offset:
            pending = replace(pending, length=pending.length + frame.length)
            continue
        if pending:
            yield pending.to_bytes()
        pending = None
        if frame.operation is Operation.COPY:
            pending = frame
        else:
            yield frame.to_bytes() + payload
    if pending:
        yield pending.to_bytes()


def regions(base: Side, target: Side, scales: matching.Scales) -> list[Region]:
    """The whole target, in order: tensors that lie side by side as in the base are one region."""
    large = [tensor for tensor in target.tensors if tensor.length >= SMALL]
    matches = matching.find(base.source, base.tensors, target.source, large, scales)
    found: list[Region] = []
    at = 0
    for tensor in large:
        if tensor.offset > at:
            found.append(Region(at, tensor.offset - at))
        _append(found, Region(tensor.offset, tensor.length, tensor.kind, matches.get(tensor.offset)))
        at = tensor.end
    if at < target.source.length:
        found.append(Region(at, target.source.length - at))
    return found


def _append(found: list[Region], region: Region) -> None:
    last = found[-1] if found else None
    if last and last.end == region.offset and last.kind is region.kind and _continues(last, region):
        found[-1] = replace(last, length=last.length + region.length)
    else:
        found.append(region)


def _continues(last: Region, region: Region) -> bool:
    if last.match is None or region.match is None:
        return last.match is region.match
    plain = last.match.operation is region.match.operation is Operation.SUBTRACT
    return plain and last.match.offset - last.offset == region.match.offset - region.offset


class _Encoder:
    def __init__(self, base: Side, target: Side) -> None:
        self._base, self._target = base.source, target.source
        self._packer = Packer()
        self._table = b""  # the last one sent
        self._gaps = gaps.Matcher(base.source, _between(base))

    def frames(self, found: Sequence[Region]) -> Iterator[tuple[Frame, bytes]]:
        for region in found:
            if region.kind is None:
                yield from self._gap(region)
            elif region.match and region.match.operation is not Operation.SUBTRACT:
                yield from self._converted(region, region.kind, region.match)
            else:
                yield from self._tensor(region, region.kind)

    def _gap(self, region: Region) -> Iterator[tuple[Frame, bytes]]:
        for at in range(region.offset, region.end, MAX_FRAME):
            new = self._target.read(at, min(MAX_FRAME, region.end - at))
            for start, length, old in self._gaps.split(new, at):
                if old is None:
                    yield self._literal(new[start : start + length])
                else:
                    yield Frame(Operation.COPY, Kind.U8, 0, length, old), b""

    def _literal(self, data: bytes) -> tuple[Frame, bytes]:
        payload = self._packer.pack(data, Operation.LITERAL)
        return Frame(Operation.LITERAL, Kind.U8, len(payload), len(data), 0), payload

    def _tensor(self, region: Region, kind: Kind) -> Iterator[tuple[Frame, bytes]]:
        """Copied where equal, else differences or the values themselves, whichever has less in it."""
        for at in range(0, region.length, MAX_FRAME):
            new = self._target.read(region.offset + at, min(MAX_FRAME, region.length - at))
            offset = region.match.offset + at if region.match else 0
            old = self._base.read(offset, len(new)) if region.match else None
            if old == new:
                yield Frame(Operation.COPY, Kind.U8, 0, len(new), offset), b""
                continue
            if self._table.startswith(new):  # scales come right after what they scale
                yield Frame(Operation.SCALES, Kind.U8, 0, len(new), 0), b""
                continue
            items = arithmetic.values(new, kind)
            choices = [(Operation.PLANES, 0, arithmetic.split(arithmetic.turn(items, kind)))]
            if old is not None:
                differences = arithmetic.subtract(items, arithmetic.values(old, kind), kind)
                choices.append((Operation.SUBTRACT, offset, arithmetic.split(differences)))
            operation, place, split = min(choices, key=lambda choice: sum(map(entropy, choice[2])))
            payload = self._planes(operation, split)
            yield Frame(operation, kind, len(payload), len(new), place), payload

    def _converted(self, region: Region, kind: Kind, match: Match) -> Iterator[tuple[Frame, bytes]]:
        """float16 or 8 bits of a float32 that the device has."""
        ratio = 4 // kind.width
        if match.table:
            self._table = match.table
            payload = self._packer.pack(match.table, Operation.TABLE)
            yield Frame(Operation.TABLE, Kind.U8, len(payload), len(match.table), match.stride), payload
        for at in range(0, region.length, MAX_FRAME // ratio):
            new = self._target.read(region.offset + at, min(MAX_FRAME // ratio, region.length - at))
            offset = match.offset + at * ratio
            old = self._base.read(offset, len(new) * ratio)
            guess = guessed(old, kind, match, first=at // kind.width)
            differences = arithmetic.subtract(arithmetic.values(new, kind), guess, kind)
            payload = self._planes(match.operation, arithmetic.split(differences))
            if match.operation is Operation.QUANTISE:
                payload = FIRST.pack(at // kind.width) + payload
            yield Frame(match.operation, kind, len(payload), len(new), offset), payload

    def _planes(self, operation: Operation, split: Sequence[bytes]) -> bytes:
        return b"".join(self._packer.pack(plane, (operation, place)) for place, plane in enumerate(split))


def guessed(old: bytes, kind: Kind, match: Match, *, first: int) -> Array:
    """What the decoder will compute from the base."""
    if match.operation is Operation.HALF:
        return arithmetic.half(old)
    return arithmetic.quantise(old, kind, *arithmetic.table(match.table), first=first, stride=match.stride)


def _between(side: Side) -> list[tuple[int, int]]:
    """(offset, end) of what is no large tensor."""
    found, at = [], 0
    for tensor in (each for each in side.tensors if each.length >= SMALL):
        found.append((at, tensor.offset))
        at = tensor.end
    found.append((at, side.source.length))
    return [(start, end) for start, end in found if start < end]
