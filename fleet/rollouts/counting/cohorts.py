"""Who is in a cohort, for many devices at once. A device's place never changes, so it is hashed once and kept.

One bit a device says that it was hashed and one that it is in: 250 kB for a million devices and one percentage.
Small crowds are hashed each time: that is quicker than to keep anything.
"""

import time
from collections import OrderedDict

import numpy as np

from device_sdk.protocol.cohorts import cohort
from fleet.devices.bulk import Flags, Numbers, names
from fleet.rollouts import policy

KEPT_FROM = 1_000  # devices
CHUNK = 50_000  # devices whose names are in memory at a time
SALTS_KEPT = 256  # at a million devices 64 MB; the least used goes first

UNKNOWN = 65_535  # no cohort

Bits = np.ndarray[tuple[int], np.dtype[np.uint8]]
Shorts = np.ndarray[tuple[int], np.dtype[np.uint16]]


class OverBudgetError(Exception):
    """There was no time left. What was hashed is kept, so the next try gets further."""


class Cohorts:
    """Kept for the life of a process. `ids` are keys of devices, distinct; `until`, a moment of `time.monotonic`."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, float], tuple[Bits, Bits]] = OrderedDict()

    def inside(self, salt: str, percent: float, ids: Numbers, *, until: float) -> Flags:
        if percent >= 100:
            return np.ones(len(ids), dtype=np.bool_)
        if len(ids) < KEPT_FROM:
            return self._small(salt, percent, ids)
        known, inside = self._kept.get((salt, percent)) or (_no_bits(0), _no_bits(0))
        size = int(ids.max()) // 8 + 1
        known, inside = _grown(known, size), _grown(inside, size)
        missing = np.sort(ids[~_read(known, ids)])
        try:
            for start in range(0, len(missing), CHUNK):
                self._hash(salt, percent, missing[start : start + CHUNK], known, inside)
                if time.monotonic() > until:
                    raise OverBudgetError
        finally:
            self._keep((salt, percent), (known, inside))
        return _read(inside, ids)

    def _small(self, salt: str, percent: float, ids: Numbers) -> Flags:
        if not len(ids):
            return np.zeros(0, dtype=np.bool_)
        chosen = {pk for pk, name in names(np.sort(ids)) if policy.in_cohort(salt, name, percent)}
        return np.fromiter((pk in chosen for pk in ids.tolist()), dtype=np.bool_, count=len(ids))

    def _hash(self, salt: str, percent: float, ids: Numbers, known: Bits, inside: Bits) -> None:
        chosen = [pk for pk, name in names(ids) if policy.in_cohort(salt, name, percent)]
        _mark(known, ids)
        _mark(inside, np.array(chosen, dtype=np.int64))

    def _keep(self, key: tuple[str, float], bits: tuple[Bits, Bits]) -> None:
        self._kept[key] = bits
        self._kept.move_to_end(key)
        while len(self._kept) > SALTS_KEPT:
            self._kept.popitem(last=False)


class Places:
    """Cohorts themselves, where more than one percentage is asked: two bytes a device for each salt that is kept."""

    def __init__(self, salts: int) -> None:
        self._salts = salts
        self._kept: OrderedDict[str, Shorts] = OrderedDict()

    def of(self, salt: str, ids: Numbers, *, until: float) -> Shorts:
        """Of these devices, in their order. Hashed are those that are new."""
        size = int(ids.max(initial=0)) + 1
        kept = self._kept.pop(salt, _no_places(0))
        kept = self._kept[salt] = np.concatenate([kept, _no_places(max(size - len(kept), 0))])
        while len(self._kept) > self._salts:
            self._kept.popitem(last=False)
        missing = np.sort(ids[kept[ids] == UNKNOWN])
        for start in range(0, len(missing), CHUNK):
            for pk, name in names(missing[start : start + CHUNK]):
                kept[pk] = cohort(salt, name)
            if time.monotonic() > until:
                raise OverBudgetError
        known: Shorts = kept[ids[kept[ids] != UNKNOWN]]  # without who was deleted meanwhile
        return known


def _no_places(size: int) -> Shorts:
    return np.full(size, UNKNOWN, dtype=np.uint16)


def _no_bits(size: int) -> Bits:
    return np.zeros(size, dtype=np.uint8)


def _grown(bits: Bits, size: int) -> Bits:
    return np.concatenate([bits, _no_bits(size - len(bits))]) if len(bits) < size else bits


def _read(bits: Bits, ids: Numbers) -> Flags:
    found: Flags = (bits[ids >> 3] >> (ids & 7).astype(np.uint8)) & 1 == 1
    return found


def _mark(bits: Bits, ids: Numbers) -> None:
    np.bitwise_or.at(bits, ids >> 3, (1 << (ids & 7)).astype(np.uint8))
