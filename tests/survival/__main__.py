"""`make drill`: try all that can befall a device, print what came of it; exit 0 only where every row is as promised."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from tests.survival import field, store, swaps, week
from tests.survival.outcome import Step, Table

Section = Callable[[Path, Step], Iterator[Table]]
SECTIONS: dict[str, tuple[Section, str]] = {
    "store": (store.tables, "the store, killed, cut off and failing at each of its file operations"),
    "field": (field.tables, "a device before the real server: the network's faults, its own, and its sudden ends"),
    "week": (week.tables, "a week of virtual time"),
    "swaps": (swaps.tables, "a hundred swaps under load"),
}
WIDTH = 170  # where the output is no terminal


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    missed: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fleet-drill-", dir=options.folder) as folder, _progress(console) as bar:
        task = bar.add_task("", total=len(options.only))
        for name in options.only:
            section, about = SECTIONS[name]
            (place := Path(folder) / name).mkdir()
            for table in section(place, lambda what, about=about: bar.update(task, description=f"{about}: {what}")):  # type: ignore[misc]
                missed += _show(bar.console, table)
            bar.advance(task)
        bar.update(task, description="")
    _conclude(console, missed, time.monotonic() - began)
    return 1 if missed else 0


def _show(console: Console, table: Table) -> list[str]:
    """Print it; the rows that are not as promised, by name."""
    shown = RichTable(*table.columns, "", title=table.title, title_justify="left")
    for line in table.lines:
        verdict = {None: "", True: "as promised", False: "NOT AS PROMISED"}[line.met]
        shown.add_row(*line.cells, verdict, style="red" if line.met is False else "")
        for why in line.why:
            shown.add_row(f"  {why}", style="red")
    console.print(shown)
    for note in table.notes:
        console.print(note, style="dim")
    console.print()
    return [f"{table.title}: {line.cells[0]}" for line in table.lines if line.met is False]


def _conclude(console: Console, missed: list[str], seconds: float) -> None:
    console.print(f"{seconds:.0f} s; {len(missed)} rows not as promised")
    for each in missed:
        console.print(f"  {each}", style="red")


def _progress(console: Console) -> Progress:
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make drill", description=__doc__)
    about = "; ".join(f"{name}: {text}" for name, (_, text) in SECTIONS.items())
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help=about)
    parser.add_argument("--folder", type=Path, help="where to work; else where temporary files go")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
