"""Count what a loaded release does, thread by thread, so that no call waits for another."""

import sys
import threading
from dataclasses import replace
from itertools import count

from device_sdk.counts import CLASSES, OTHER, Counts, added, bucket, ordered

_CELLS = 64  # of threads that live, before those of ended ones are folded


class Cell:
    """One thread's counts. Only that thread writes it, so no update is lost; anyone may add the cells up."""

    __slots__ = (
        "changes", "checked", "classes", "confidence", "errors", "invalid", "last", "rejected", "scored", "thread",
        "times",
    )  # fmt: skip

    def __init__(self) -> None:
        self.errors = self.checked = self.invalid = self.rejected = 0
        self.times: dict[int, int] = {}
        self.scored = self.changes = 0
        self.confidence = 0.0
        self.classes: dict[int, int] = {}
        self.last: int | None = None
        self.thread = threading.get_ident()

    def took(self, nanoseconds: int) -> None:
        index, times = bucket(nanoseconds), self.times
        times[index] = times.get(index, 0) + 1

    def answered(self, kind: int, confidence: float) -> None:
        """One answer: the class on top, and its score."""
        if kind not in self.classes and len(self.classes) >= CLASSES:
            kind = OTHER
        self.classes[kind] = self.classes.get(kind, 0) + 1
        if self.last is not None and kind != self.last:
            self.changes += 1
        self.last = kind
        self.confidence += confidence
        self.scored += 1

    def counts(self) -> Counts:
        return Counts(
            errors=self.errors, checked=self.checked, invalid=self.invalid, rejected=self.rejected,
            times=ordered(self.times.copy()), scored=self.scored, confidence=self.confidence,
            classes=ordered(self.classes.copy()), changes=self.changes,
        )  # fmt: skip


class Stats:
    """What one loaded release did. Exact: each thread counts for itself; cells of ended threads are folded.

    `ended` counts one call that has ended, and returns which it was. A step of `itertools.count` cannot be interrupted
    by another thread, and costs a fifth of what finding the thread's own cell costs: it is paid for by each inference.
    """

    def __init__(self) -> None:
        self.ended = count(1).__next__
        self._reads = 0  # to read the counter takes one step of it
        self._local = threading.local()  # `cell`: the thread's own
        self._cells: list[Cell] = []
        self._folded = Counts()
        self._lock = threading.Lock()

    def cell(self) -> Cell:
        """The calling thread's own."""
        try:
            return self._local.cell  # type: ignore[no-any-return]
        except AttributeError:
            return self._register()

    def counts(self) -> Counts:
        with self._lock:
            self._reads += 1
            calls = self.ended() - self._reads
            return replace(added([self._folded, *(cell.counts() for cell in self._cells)]), calls=calls)

    def _register(self) -> Cell:
        cell = Cell()
        with self._lock:
            if len(self._cells) >= _CELLS:
                self._fold()
            self._cells.append(cell)
        self._local.cell = cell
        return cell

    def _fold(self) -> None:
        """Programs that start a thread for each call must not grow the list for ever."""
        alive = set(sys._current_frames()) - {threading.get_ident()}  # noqa: SLF001  documented, whatever its name
        ended = [cell for cell in self._cells if cell.thread not in alive]
        self._folded = added([self._folded, *(cell.counts() for cell in ended)])
        self._cells = [cell for cell in self._cells if cell.thread in alive]
