"""`manage.py dataset list | export | compact`: the data scientist's door."""

from argparse import ArgumentParser
from datetime import date
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db.models import Count, Max, Min, Sum
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fleet.feedback import compaction, datasets, exports, selectors
from fleet.releases.models import Model


class Command(BaseCommand):
    help = "List the data sets, export one as Parquet files, or compact received batches now."

    def add_arguments(self, parser: CommandParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True)
        listing = commands.add_parser("list", help="what there is, by model and version")
        listing.add_argument("model", nargs="?", default="")
        export = commands.add_parser("export", help="copy Parquet files to a folder", description=datasets.__doc__)
        export.add_argument("model")
        export.add_argument("--out", type=Path, required=True, metavar="DIR")
        _add_filters(export)
        commands.add_parser("compact", help="do not wait for the sweep")

    def handle(self, *args: Any, command: str, **options: Any) -> None:
        self.console = Console(file=self.stdout, soft_wrap=True)  # type: ignore[arg-type]  # it has write and flush
        getattr(self, f"_{command}")(**options)

    def _list(self, *, model: str, **_: Any) -> None:
        rows = selectors.dataset_parts(model=model).order_by().values("model__name", "version")
        totals = rows.annotate(n=Count("pk"), rows=Sum("rows"), size=Sum("length"), first=Min("day"), last=Max("day"))
        table = Table("model", "version", "first day", "last day", "files", "samples", "MB")
        for row in totals.order_by("model__name", "version"):
            days = (str(row["first"]), str(row["last"]))
            counts = (str(row["n"]), str(row["rows"]), f"{row['size'] / 1e6:.1f}")
            table.add_row(row["model__name"], row["version"], *days, *counts)
        self.console.print(table)

    def _export(self, *, model: str, version: str, since: date | None, until: date | None, out: Path, **_: Any) -> None:
        if not Model.objects.filter(name=model).exists():
            raise CommandError(f"there is no model {model!r}")
        parts = list(selectors.dataset_parts(model=model, version=version, since=since, until=until))
        out.mkdir(parents=True, exist_ok=True)
        with self._progress() as progress:
            bar = progress.add_task(f"{model} to {out}", total=sum(part.length for part in parts))
            summary = exports.export(parts, out, on_progress=lambda size: progress.advance(bar, size))
        there = f" ({summary.skipped} were there)" if summary.skipped else ""
        size = f"{summary.length / 1e6:.1f} MB"
        self.console.print(f"{summary.rows} samples in {summary.files} files{there}, {size}, under {out}")

    def _compact(self, **_: Any) -> None:
        parts = [part for model in Model.objects.order_by("name") for part in compaction.compact(model=model)]
        self.console.print(f"{sum(part.rows for part in parts)} samples in {len(parts)} new parts")

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        return Progress(*columns, console=self.console, transient=True)


def _add_filters(parser: ArgumentParser) -> None:
    parser.add_argument("--version", dest="version", default="", help="of the release that was running")
    parser.add_argument("--since", type=date.fromisoformat, metavar="YYYY-MM-DD", help="first day (UTC)")
    parser.add_argument("--until", type=date.fromisoformat, metavar="YYYY-MM-DD", help="last day, included")
