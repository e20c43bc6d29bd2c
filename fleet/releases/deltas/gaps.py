"""Find what lies between tensors (nodes, names, other formats) again in the base: the longest runs of equal bytes."""

from collections.abc import Iterator

import numpy as np

from fleet.releases.deltas.layout import Source

BLOCK = 32  # bytes that must agree for two places to be compared; a frame's head is 24
INDEXED = 8 * 1024 * 1024  # bytes of the base that are looked through; beyond, only the same place is tried
STEPS = 400_000  # places of the target at which a block is looked up, in all
Piece = tuple[int, int, int | None]  # start, length, place in the base


class Matcher:
    def __init__(self, base: Source, between: list[tuple[int, int]]) -> None:
        self._base, self._steps = base, STEPS
        self._runs: list[tuple[int, bytes]] = []
        self._index: dict[bytes, tuple[int, int]] = {}
        self._load(between)

    def split(self, new: bytes, at: int) -> Iterator[Piece]:
        """`new`, which lies at `at` of the target, as copies and literals."""
        same = self._base.read(at, len(new))
        if same == new:
            yield 0, len(new), at
            return
        start = place = 0
        while place + BLOCK <= len(new) and self._steps > 0:
            hit = self._index.get(new[place : place + BLOCK])
            if hit is None:
                place += 1
                self._steps -= 1
                continue
            run, offset = hit
            back, length = self._extend(new, place, self._runs[run][1], offset, place - start)
            if place - back > start:
                yield start, place - back - start, None
            yield place - back, length, self._runs[run][0] + offset - back
            start = place = place - back + length
        if start < len(new):
            yield start, len(new) - start, None

    def _load(self, between: list[tuple[int, int]]) -> None:
        left = INDEXED
        for start, end in between:
            data = self._base.read(start, min(end - start, left))
            left -= len(data)
            for at in range(0, len(data) - BLOCK + 1, BLOCK // 2):
                self._index.setdefault(data[at : at + BLOCK], (len(self._runs), at))
            self._runs.append((start, data))
            if left <= 0:
                break

    @staticmethod
    def _extend(new: bytes, place: int, old: bytes, offset: int, room: int) -> tuple[int, int]:
        """Bytes that agree before the block, and the length of the whole run."""
        back = 0
        while back < min(room, offset, BLOCK) and new[place - back - 1] == old[offset - back - 1]:
            back += 1
        forward = _common(new, place, old, offset)
        return back, back + forward


def _common(new: bytes, place: int, old: bytes, offset: int) -> int:
    size = min(len(new) - place, len(old) - offset)
    differ = np.frombuffer(new, np.uint8, size, place) != np.frombuffer(old, np.uint8, size, offset)
    return int(differ.argmax()) if differ.any() else size
