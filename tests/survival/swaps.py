"""A hundred swaps of a real model under load: the bench's measurement, judged."""

from collections.abc import Iterator
from pathlib import Path

from deploy.bench import plateau
from deploy.bench.plateau import Held, Plateau
from tests.survival.outcome import Line, Step, Table

SWAPS, LAYER = 100, 2_048
NOTE = (
    "Two threads call without a pause; weights as external data; the real installer, from hashing to freeing the old."
)


def tables(folder: Path, step: Step) -> Iterator[Table]:
    step(f"{SWAPS} swaps under load")
    yield table(plateau.run(folder / "swaps", LAYER, SWAPS))


def table(found: Plateau) -> Table:
    warm, most = found.warm, found.during
    moments = {"before": found.before, "after the warm-up": warm, "at most": most, "after": found.after}
    lines = [_line(name, held) for name, held in moments.items()]
    added = f"{found.added:.1f} MB added after the warm-up"
    lines.append(Line(("as flat as promised", "", added, "+0", "+0", "", "0 failed"), found.is_flat))
    columns = ("", "swaps", "resident", "threads", "open files", "calls", "failed")
    return Table(f"{found.after.swaps} swaps of a model of {found.model:.0f} MB under load", columns, lines, [NOTE])


def _line(name: str, held: Held) -> Line:
    counts = (str(held.threads), str(held.files), f"{held.calls:,}", str(held.failed))
    return Line((name, str(held.swaps), f"{held.resident:.1f} MB", *counts))
