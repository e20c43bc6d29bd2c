"""Which tensor of the base each of the target was made from: by content, else by name. Guesses, never promises."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from device_sdk.protocol.patches import arithmetic
from device_sdk.protocol.patches.arithmetic import Array
from device_sdk.protocol.patches.frames import MAX_FRAME, TABLE_ENTRY, Kind, Operation
from fleet.releases.deltas.layout import Source, Tensor

BLOCKS, BLOCK = 8, 64  # values that are compared: so many at so many places
CANDIDATES = 64  # tensors of the base that one of the target is compared with
ALIKE = 0.95  # correlation from which 8 bits are taken for a quantised float
Scales = Mapping[str, Sequence[float]]  # small float32 tensors of the target's release, by name


@dataclass(frozen=True, slots=True)
class Match:
    """Where in the base, and how. `table`, `stride`: of a quantised tensor, see the format."""

    operation: Operation
    offset: int
    table: bytes = b""
    stride: int = 1


def find(
    old: Source, base: Sequence[Tensor], new: Source, target: Sequence[Tensor], scales: Scales
) -> dict[int, Match]:
    """A match by the target tensor's offset, for those that have one."""
    return _Finder(old, base, new, scales).find(target)


class _Finder:
    def __init__(self, old: Source, base: Sequence[Tensor], new: Source, scales: Scales) -> None:
        self._old, self._new, self._scales = old, new, scales
        self._groups: dict[tuple[Kind, int], list[Tensor]] = defaultdict(list)
        for tensor in base:
            self._groups[tensor.kind, tensor.length // tensor.kind.width].append(tensor)
        self._samples: dict[int, Array] = {}

    def find(self, target: Sequence[Tensor]) -> dict[int, Match]:
        found = {tensor.offset: self._match(tensor) for tensor in target}
        return {offset: match for offset, match in found.items() if match}

    def _match(self, tensor: Tensor) -> Match | None:
        count = tensor.length // tensor.kind.width
        if same := self._likeliest(tensor, self._groups.get((tensor.kind, count), ())):
            return Match(Operation.SUBTRACT, same.offset)
        floats = self._groups.get((Kind.F32, count), ())
        if tensor.kind is Kind.F16 and floats:
            return self._half(tensor, floats)
        if tensor.kind in {Kind.U8, Kind.I8} and floats:
            return self._quantised(tensor, floats)
        return None

    def _likeliest(self, tensor: Tensor, group: Sequence[Tensor]) -> Tensor | None:
        """Of the same kind and size: the one whose values are nearest; of equally near ones that of the same name."""
        if len(group) <= 1:
            return group[0] if group else None
        sample = _sample(self._new, tensor)
        return min(
            self._nominees(tensor.name, group),
            key=lambda each: (_distance(sample, self._sample(each), tensor.kind), each.name != tensor.name),
        )

    def _half(self, tensor: Tensor, group: Sequence[Tensor]) -> Match:
        sample = _sample(self._new, tensor)
        nearest = min(
            self._nominees(tensor.name, group),
            key=lambda each: _distance(sample, arithmetic.half(self._sample(each).tobytes()), Kind.F16),
        )
        return Match(Operation.HALF, nearest.offset)

    def _quantised(self, tensor: Tensor, group: Sequence[Tensor]) -> Match | None:
        """The float that the 8 bits follow, and the scales by which they do."""
        sample = _numbers(_sample(self._new, tensor), tensor.kind)
        nominees = self._nominees(tensor.name.removesuffix("_quantized"), group)
        likeness = {each: _correlation(sample, self._sample(each).view("<f4")) for each in nominees}
        source = max(nominees, key=lambda each: likeness[each])
        if likeness[source] < ALIKE:
            return None
        tables = list(self._tables(tensor, source))
        errors = [self._error(tensor, source, table, stride) for table, stride in tables]
        table, stride = tables[int(np.argmin(errors))]
        return Match(Operation.QUANTISE, source.offset, table, stride)

    def _tables(self, tensor: Tensor, source: Tensor) -> Iterator[tuple[bytes, int]]:
        """Scales as the release names them, and as the usual rule makes them; for the whole tensor or each axis."""
        whole = np.frombuffer(self._old.read(source.offset, source.length), "<f4").reshape(source.shape or (1,))
        stem = tensor.name.removesuffix("_quantized")
        named = np.asarray(self._scales.get(f"{stem}_scale", ()), np.float32)
        given = np.frombuffer(self._new.read(tensor.offset, tensor.length), np.uint8)
        numbers = _numbers(given, tensor.kind).reshape(whole.shape)
        for axis in (None, *range(whole.ndim)):
            others = tuple(other for other in range(whole.ndim) if other != axis) if axis is not None else None
            count = 1 if axis is None else whole.shape[axis]
            if count * TABLE_ENTRY > MAX_FRAME // 4 or (axis is not None and count == 1):
                continue
            stride = int(np.prod(whole.shape[axis + 1 :])) if axis is not None else max(whole.size, 1)
            top = np.abs(whole).max(axis=others).reshape(-1)
            width = np.maximum(whole.max(axis=others), 0) - np.minimum(whole.min(axis=others), 0)
            usual = [top / np.float32(127), width.reshape(-1) / np.float32(255)]
            for scale in ([named] if len(named) == count else []) + usual:
                zeros = _zeros(whole, numbers, scale, others, count)
                yield np.concatenate([scale, zeros]).astype("<f4").tobytes(), stride

    def _error(self, tensor: Tensor, source: Tensor, table: bytes, stride: int) -> float:
        """How often the beginning of the tensor would come out otherwise."""
        count = min(tensor.length, MAX_FRAME // 4)
        guess = arithmetic.quantise(
            self._old.read(source.offset, 4 * count), tensor.kind, *arithmetic.table(table), first=0, stride=stride
        )
        given = np.frombuffer(self._new.read(tensor.offset, count), np.uint8)
        return float((guess != given).mean())

    def _nominees(self, name: str, group: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(group) <= CANDIDATES:
            return group
        return [each for each in group if each.name == name] or group[:CANDIDATES]

    def _sample(self, tensor: Tensor) -> Array:
        if tensor.offset not in self._samples:
            self._samples[tensor.offset] = _sample(self._old, tensor)
        return self._samples[tensor.offset]


def _sample(source: Source, tensor: Tensor) -> Array:
    """Values at places spread over the tensor, the same for tensors of the same number of values."""
    width, count = tensor.kind.width, tensor.length // tensor.kind.width
    if count <= BLOCKS * BLOCK:
        return arithmetic.values(source.read(tensor.offset, tensor.length), tensor.kind)
    starts = [(count - BLOCK) * number // (BLOCKS - 1) for number in range(BLOCKS)]
    pieces = [source.read(tensor.offset + start * width, BLOCK * width) for start in starts]
    return arithmetic.values(b"".join(pieces), tensor.kind)


def _distance(new: Array, old: Array, kind: Kind) -> float:
    """Mean bits of the differences."""
    return float(np.log2(1.0 + arithmetic.subtract(new, old, kind)).mean())


def _numbers(items: Array, kind: Kind) -> Array:
    return (items.view(np.int8) if kind is Kind.I8 else items).astype(np.float32)


def _correlation(one: Array, other: Array) -> float:
    """From -1 to 1; -1 where one of them does not vary."""
    one, other = one - one.mean(), np.nan_to_num(other.astype(np.float64))
    other = other - other.mean()
    size = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / size) if size > 0 else -1.0


def _zeros(whole: Array, numbers: Array, scale: Array, others: tuple[int, ...] | None, count: int) -> Array:
    """Zero points: the mean of what the values lie off, which is a whole number if the scale is right."""
    shape = [1] * whole.ndim
    if count > 1 and others is not None:
        shape[next(axis for axis in range(whole.ndim) if axis not in others)] = count
    with np.errstate(all="ignore"):
        off = numbers - whole / scale.reshape(shape if count > 1 else (1,) * whole.ndim)
    return np.rint(np.nan_to_num(np.median(off, axis=others))).reshape(-1).astype(np.float32)
