"""What a drill found: rows that say how often each outcome came, and whether that is what was promised."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

Step = Callable[[str], None]  # told of each thing that is tried, before it is


@dataclass
class Tried:
    """One row. `outcomes`: how often each good outcome came; `broken`: what came instead of one, and where."""

    what: str
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(self.outcomes.values()) + len(self.broken)

    def note(self, where: str, outcome: str) -> None:
        """An outcome in capitals is a broken promise."""
        if outcome.isupper():
            self.broken.append(f"{where}: {outcome}")
        else:
            self.outcomes[outcome] += 1


@dataclass(frozen=True)
class Line:
    """A row for the eye. `met`: whether it is as promised; None: nothing was."""

    cells: tuple[str, ...]
    met: bool | None = None
    why: tuple[str, ...] = ()  # it is not


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    lines: Sequence[Line]
    notes: Sequence[str] = ()


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder that no disk is behind, where there is one: thousands of small files are made and removed."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(prefix="fleet-drill-", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def thinned(points: Iterable[int], every: int) -> list[int]:
    """The first and the last of `points`, and every so many of those between."""
    listed = list(points)
    return sorted({*listed[::every], *listed[-1:]})
