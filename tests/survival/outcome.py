"""What a drill found: rows that say how often each outcome came, and whether that is what was promised."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

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


def thinned(points: Iterable[int], every: int) -> list[int]:
    """The first and the last of `points`, and every so many of those between."""
    listed = list(points)
    return sorted({*listed[::every], *listed[-1:]})
