"""Floats as integers that keep their order, differences, planes: both directions, on arrays. The only numpy of patches.

Imported when a patch is made or applied, not before: a device that never gets one does not pay for it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_sdk.protocol.patches.frames import Kind

Array = NDArray[Any]
QUARTERS, ABOVE = 4, 3  # values in a byte of two bits each; what stands for those that need more
_LIMITS = {Kind.U8: (0.0, 255.0), Kind.I8: (-128.0, 127.0)}


def values(data: bytes, kind: Kind) -> Array:
    """Bytes as unsigned integers of the kind's width."""
    return np.frombuffer(data, f"<u{kind.width}")


def subtract(new: Array, old: Array, kind: Kind) -> Array:
    return _zigzag(_ordered(new, kind) - _ordered(old, kind), kind)


def add(differences: Array, old: Array, kind: Kind) -> Array:
    """Uses up `differences`."""
    result = _unzigzag(differences)
    result += _ordered(old, kind)
    return _unordered(result, kind)


def turn(new: Array, kind: Kind) -> Array:
    """The sign to the lowest bit, so that a float32's exponent is a byte of its own."""
    return (new << 1) | (new >> _top(kind)) if kind.is_float else new


def unturn(turned: Array, kind: Kind) -> Array:
    return (turned >> 1) | (turned << _top(kind)) if kind.is_float else turned


def split(items: Array) -> list[bytes]:
    """One plane for each byte of a value, the lowest first."""
    width = items.dtype.itemsize
    grid = np.ascontiguousarray(items).view(np.uint8).reshape(-1, width)
    return [grid[:, place].tobytes() for place in range(width)]


def join(planes: Sequence[bytes], kind: Kind) -> Array:
    grid = np.empty((len(planes[0]), len(planes)), np.uint8)
    for place, plane in enumerate(planes):
        grid[:, place] = np.frombuffer(plane, np.uint8)
    return grid.reshape(-1).view(f"<u{kind.width}")


def quarter(plane: bytes) -> tuple[bytes, bytes]:
    """Values up to 2 in two bits each, four to a byte and the lowest bits first; and, in order, those above."""
    items = octets(plane)
    few = np.zeros((-(-len(items) // QUARTERS), QUARTERS), np.uint8)
    np.minimum(items, ABOVE, out=few.reshape(-1)[: len(items)])
    packed = few[:, 0] | (few[:, 1] << 2) | (few[:, 2] << 4) | (few[:, 3] << 6)
    return packed.tobytes(), items[items >= ABOVE].tobytes()


def unquarter(packed: bytes) -> Array:
    """Two bits of each value: 0 to 2, or ABOVE."""
    items = octets(packed)
    few = np.empty((len(items), QUARTERS), np.uint8)
    for place in range(QUARTERS):
        few[:, place] = (items >> (2 * place)) & 3
    return few.reshape(-1)


def octets(data: bytes) -> Array:
    return np.frombuffer(data, np.uint8)


def count(chosen: Array) -> int:
    return int(np.count_nonzero(chosen))


def half(old: bytes) -> Array:
    """float32 to float16 as both sides do it, as unsigned integers."""
    with np.errstate(all="ignore"):
        return np.frombuffer(old, "<f4").astype("<f2").view("<u2")


def quantise(old: bytes, kind: Kind, scales: Array, zeros: Array, *, first: int, stride: int) -> Array:
    """float32 to 8 bits as both sides do it. `first`: number of the first value in its tensor."""
    source = np.frombuffer(old, "<f4")
    low, high = _LIMITS[kind]
    channel = _channels(len(source), len(scales), first, stride)
    with np.errstate(all="ignore"):
        found: Array = source / scales[channel]
        np.rint(found, out=found)
        found += zeros[channel]
    np.clip(found, low, high, out=found)
    found[np.isnan(found)] = 0
    return found.astype(np.int16).astype(np.uint8)


def table(data: bytes) -> tuple[Array, Array]:
    """Scales and zero points."""
    both = np.frombuffer(data, "<f4")
    return both[: len(both) // 2], both[len(both) // 2 :]


def _channels(count: int, channels: int, first: int, stride: int) -> Any:
    if channels == 1:
        return slice(0, 1)
    numbers = np.arange(first, first + count, dtype=np.uint64)
    if stride > 1:
        numbers //= np.uint64(stride)
    numbers %= np.uint64(channels)
    return numbers.view(np.int64)


def _top(kind: Kind) -> int:
    return 8 * kind.width - 1


def _sign(items: Array, kind: Kind) -> Array:
    """All bits set where the highest is, else none."""
    result: Array = (items.view(f"<i{kind.width}") >> _top(kind)).view(items.dtype)
    return result


def _ordered(items: Array, kind: Kind) -> Array:
    if not kind.is_float:
        return items
    result = _sign(items, kind)
    result |= items.dtype.type(1 << _top(kind))
    result ^= items
    return result


def _unordered(items: Array, kind: Kind) -> Array:
    """In place."""
    if kind.is_float:
        mask = _sign(items, kind)
        np.invert(mask, out=mask)
        mask |= items.dtype.type(1 << _top(kind))
        items ^= mask
    return items


def _zigzag(items: Array, kind: Kind) -> Array:
    result: Array = (items << 1) ^ _sign(items, kind)
    return result


def _unzigzag(items: Array) -> Array:
    """In place."""
    sign = items & 1
    np.negative(sign, out=sign)
    items >>= 1
    items ^= sign
    return items
