"""Choose the codec of each plane: by its entropy, and by trying on a sample what similar planes will get too."""

import bz2
import lzma
import zlib
from collections.abc import Callable

import numpy as np

from device_sdk.protocol.patches import planes
from device_sdk.protocol.patches.planes import Codec

SAMPLE = 64 * 1024
WORTH = 0.95  # a codec that is slow to read must be that much smaller
NOISE = 7.99  # bits a byte, above which nothing is tried
_Packer = Callable[[bytes], bytes]


def entropy(plane: bytes) -> float:
    """Bits a byte, if each byte were drawn for itself."""
    counts = np.bincount(np.frombuffer(plane, np.uint8), minlength=256)
    shares = counts[counts > 0] / len(plane)
    return float(-(shares * np.log2(shares)).sum())


def _deflate(level: int, strategy: int) -> _Packer:
    def pack(data: bytes) -> bytes:
        compressor = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
        return compressor.compress(data) + compressor.flush()

    return pack


def _lzma(data: bytes) -> bytes:
    choice = {"lc": 0, "lp": 0, "pb": 0, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC4, "nice_len": 64, "depth": 8}
    filters = planes.lzma_filters(**choice)
    return lzma.compress(data, lzma.FORMAT_RAW, filters=filters)


_FAST = ((Codec.ZLIB, _deflate(6, zlib.Z_DEFAULT_STRATEGY)), (Codec.ZLIB, _deflate(6, zlib.Z_HUFFMAN_ONLY)))
_SLOW = ((Codec.BZ2, bz2.compress), (Codec.LZMA, _lzma))
_STORE: tuple[Codec, _Packer] = (Codec.STORED, bytes)


class Packer:
    """Remembers what suited planes of the same place and entropy."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[object, int], tuple[Codec, _Packer]] = {}

    def pack(self, plane: bytes, like: object) -> bytes:
        """One plane as it goes on the wire. `like`: equal for planes that may be treated alike."""
        if not plane.strip(b"\0"):
            return planes.pack(Codec.ZEROS, b"")
        codec, pack = self._choose(plane, like)
        data = pack(plane)
        return planes.pack(codec, data) if len(data) < len(plane) else planes.pack(Codec.STORED, plane)

    def _choose(self, plane: bytes, like: object) -> tuple[Codec, _Packer]:
        if len(plane) <= 4096:
            return _try(plane)
        bits = entropy(plane)
        key = (like, round(bits * 8))
        if key not in self._chosen:
            self._chosen[key] = _STORE if bits > NOISE else _try(_middle(plane))
        return self._chosen[key]


def _middle(plane: bytes) -> bytes:
    start = max((len(plane) - SAMPLE) // 2, 0)
    return plane[start : start + SAMPLE]


def _try(sample: bytes) -> tuple[Codec, _Packer]:
    best, least = _STORE, len(sample) * 1.0
    for choices, worth in ((_FAST, 1.0), (_SLOW, WORTH)):
        for codec, pack in choices:
            size = len(pack(sample))
            if size < least * worth:
                best, least = (codec, pack), size
    return best
