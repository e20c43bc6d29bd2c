"""One array as the bytes of a `.npy` file, of plain numbers or text: nothing is ever pickled or unpickled.

The header is checked against the bytes that follow before an array is made, so that none costs more than its bytes.
"""

import math
import tokenize
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.lib import format as npy

from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = frozenset({"|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"})
_LAST_CHARACTER, _SURROGATES = 0x10FFFF, (0xD800, 0xDFFF)
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = 1024  # bytes; numpy writes 118 for a plain array
_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError, tokenize.TokenError)


def to_bytes(array: Array) -> bytes:
    """Text becomes fixed-width unicode."""
    plain = array.astype(np.str_) if array.dtype.kind == "O" else array
    buffer = BytesIO()
    npy.write_array(buffer, plain, allow_pickle=False)
    return buffer.getvalue()


def parse(data: bytes) -> Array:
    """A view of `data`, read-only. Version 1.0, which is what numpy writes. Raises ProtocolError `bad_tensor`."""
    start = len(_MAGIC) + 2 + int.from_bytes(data[8:10], "little")
    if not data.startswith(_MAGIC) or not len(_MAGIC) + 2 < start <= min(_HEADER, len(data)):
        raise ProtocolError("bad_tensor", "expected a .npy file of version 1.0")
    shape, fortran, dtype = _header(data[len(_MAGIC) : start])
    expected = math.prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        raise ProtocolError("bad_tensor", f"expected {expected} bytes for {shape} {dtype}; got {len(data) - start}")
    return _values(data, start, dtype).reshape(shape, order="F" if fortran else "C")


def is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether `parse` would take it: little-endian numbers, truth values, text."""
    return dtype.str in DTYPES or (dtype.str.startswith("<U") and dtype.itemsize > 0)


def _values(data: bytes, start: int, dtype: np.dtype[Any]) -> Array:
    """A view of the bytes, where every byte is a legal value."""
    if dtype.kind == "b":  # only 0 and 1 are booleans
        flags: Array = np.frombuffer(data, np.uint8, offset=start) != 0
        return flags
    if dtype.kind == "U":
        code = np.frombuffer(data, "<u4", offset=start)
        if ((code > _LAST_CHARACTER) | ((code >= _SURROGATES[0]) & (code <= _SURROGATES[1]))).any():
            raise ProtocolError("bad_tensor", "expected text; got numbers that are no characters")
    return np.frombuffer(data, dtype, offset=start)


@lru_cache(maxsize=256)  # the samples of a batch have a handful of headers between them
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if b"L" in data:  # as in Python 2's `3L`: numpy would read it, and warn
        raise ProtocolError("bad_tensor", "expected a header that numpy writes today")
    try:
        shape, fortran, dtype = npy.read_array_header_1_0(BytesIO(data))
    except _HEADER_ERRORS as error:
        raise ProtocolError("bad_tensor", f"expected the header of an array; {error!s:.200}") from error
    if not is_plain(dtype):
        raise ProtocolError("bad_tensor", f"expected text or one of {sorted(DTYPES)}; got {dtype.str!r:.40}")
    if len(shape) > limits.RANK or any(not 0 <= size < 2**40 for size in shape):
        raise ProtocolError("bad_tensor", f"expected up to {limits.RANK} sizes; got {shape!r:.80}")
    return shape, fortran, dtype
