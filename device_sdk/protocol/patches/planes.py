"""Planes: bytes of equal rank, compressed each by what suits it. Decompression is bounded before it begins."""

import bz2
import lzma
import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Protocol

from device_sdk.protocol.patches.frames import MAX_FRAME, bad

_PLANE = struct.Struct("<BI")
PLANE_BYTES = _PLANE.size


class Codec(IntEnum):
    STORED = 0
    ZLIB = 1
    BZ2 = 2
    LZMA = 3
    ZEROS = 4
    QUARTERS = 5


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def lzma_filters(**choice: int) -> list[dict[str, Any]]:
    """What raw LZMA2 is read and written with; the dictionary bounds the reader's memory."""
    return [{"id": lzma.FILTER_LZMA2, "dict_size": MAX_FRAME, **choice}]


def pack(codec: Codec, data: bytes) -> bytes:
    return _PLANE.pack(codec, len(data)) + data


def unpack(payload: memoryview, *, count: int, size: int) -> list[bytes]:
    """`count` planes of exactly `size` bytes each, and nothing after them. Raises `bad_patch`."""
    found = list(_read(payload, count, size))
    return [_decompress(codec, data, size) for codec, data in found]


def _read(payload: memoryview, count: int, size: int) -> Iterator[tuple[Codec, memoryview]]:
    at = 0
    for _ in range(count):
        if at + PLANE_BYTES > len(payload):
            raise bad("a plane is missing")
        number, length = _PLANE.unpack_from(payload, at)
        at += PLANE_BYTES + length
        if at > len(payload) or length > size:
            raise bad(f"plane: expected at most {size} bytes; got {length}")
        try:
            yield Codec(number), payload[at - length : at]
        except ValueError as error:
            raise bad(str(error)) from error
    if at != len(payload):
        raise bad(f"{len(payload) - at} bytes after the last plane")


def _decompress(codec: Codec, data: memoryview, size: int) -> bytes:
    if codec is Codec.QUARTERS:
        return _spread(data, size)
    if codec is Codec.ZEROS:
        if data:
            raise bad("a plane of zeros carries nothing")
        return bytes(size)
    out = bytes(data) if codec is Codec.STORED else _inflate(_decompressor(codec), bytes(data), size)
    if len(out) != size:
        raise bad(f"plane: expected {size} bytes; got {len(out)}")
    return out


def _spread(data: memoryview, size: int) -> bytes:
    """Two bits of every value, and the values that need more."""
    from device_sdk.protocol.patches import arithmetic

    (codec, quarters), (other, large) = _read(data, 2, size)
    if Codec.QUARTERS in {codec, other}:
        raise bad("quarters of quarters")
    values = arithmetic.unquarter(_decompress(codec, quarters, -(-size // arithmetic.QUARTERS)))
    if values[size:].any():
        raise bad(f"quarters: more than {size} values")
    values = values[:size]
    above = values == arithmetic.ABOVE
    values[above] = arithmetic.octets(_decompress(other, large, arithmetic.count(above)))
    return values.tobytes()


def _decompressor(codec: Codec) -> _Decompressor:
    if codec is Codec.ZLIB:
        return zlib.decompressobj(-zlib.MAX_WBITS)
    if codec is Codec.BZ2:
        return bz2.BZ2Decompressor()
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=lzma_filters())


def _inflate(decompressor: _Decompressor, data: bytes, size: int) -> bytes:
    """At most one byte more than there should be, whatever the data would unfold to."""
    try:
        out = decompressor.decompress(data, size + 1)
        while not decompressor.eof and len(out) <= size:  # some give less than they could; all end without input
            more = decompressor.decompress(_rest(decompressor), size + 1 - len(out))
            if not more:
                break
            out += more
    except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise bad(f"plane: {error}") from error
    if not decompressor.eof or decompressor.unused_data:
        raise bad(f"plane: expected it to end after {size} bytes")
    return out


def _rest(decompressor: _Decompressor) -> bytes:
    """zlib hands back what it did not take; the others keep it."""
    return getattr(decompressor, "unconsumed_tail", b"")
