"""Choose the codec of each plane: by its entropy, and by trying on a sample what similar planes will get too."""

import bz2
import lzma
import zlib
from collections.abc import Callable

import numpy as np

from device_sdk.protocol.patches import arithmetic, planes
from device_sdk.protocol.patches.planes import Codec

SAMPLE = 64 * 1024
WORTH, WORTH_QUARTERED = 0.9, 0.98  # bz2 and lzma are slow to read, and must be that much smaller than the others
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


def _lzma(mode: int, depth: int) -> _Packer:
    choice = {"lc": 0, "lp": 0, "pb": 0, "mode": mode, "mf": lzma.MF_HC4, "nice_len": 64, "depth": depth}
    filters = planes.lzma_filters(**choice)
    return lambda data: lzma.compress(data, lzma.FORMAT_RAW, filters=filters)


def _quartered(codec: Codec, pack: _Packer) -> tuple[Codec, _Packer]:
    def quarter(data: bytes) -> bytes:
        few, large = arithmetic.quarter(data)
        rest = (planes.pack(Codec.STORED, large), planes.pack(Codec.ZLIB, _HUFFMAN(large)))
        return planes.pack(codec, pack(few)) + min(rest, key=len)

    return Codec.QUARTERS, quarter


_DEFLATE, _HUFFMAN = _deflate(6, zlib.Z_DEFAULT_STRATEGY), _deflate(6, zlib.Z_HUFFMAN_ONLY)
_FAST = ((Codec.ZLIB, _DEFLATE), (Codec.ZLIB, _HUFFMAN), _quartered(Codec.ZLIB, _DEFLATE))
_QUARTERED = (_quartered(Codec.BZ2, bz2.compress), _quartered(Codec.LZMA, _lzma(lzma.MODE_NORMAL, 4)))
_SLOW = ((Codec.BZ2, bz2.compress), (Codec.LZMA, _lzma(lzma.MODE_FAST, 8)))
_CHOICES = [
    (choice, worth) for some, worth in ((_FAST, 1.0), (_QUARTERED, WORTH_QUARTERED), (_SLOW, WORTH)) for choice in some
]
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
    costs = [(len(choice[1](sample)) / worth, choice) for choice, worth in _CHOICES]
    return min([(len(sample) * 1.0, _STORE), *costs], key=lambda cost: cost[0])[1]
