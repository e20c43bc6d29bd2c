"""`manage.py audit head | verify | export`: pin the trail, check it, take it along."""

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fleet.audit import exports, selectors, services
from fleet.audit.chain import START, Broken, Head, Link, check
from fleet.audit.models import AuditSeal
from fleet.errors import FleetError

LONG = 2_000  # links; below it a progress bar is noise


class Command(BaseCommand):
    help = "The audit trail: print its head, verify its chain, export it. Entries are kept for good."

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True)
        commands.add_parser("head", help="print POSITION:HASH, to be written down elsewhere")
        verify = commands.add_parser("verify", help="walk the chain; ends with 1 and names the first broken position")
        verify.add_argument("--head", type=_head, metavar="POSITION:HASH", help="a head written down earlier")
        verify.add_argument("--file", type=Path, help="an export, instead of the database")
        export = commands.add_parser("export", help="one JSON object a line; `verify --file` checks it anywhere")
        export.add_argument("--since", type=_moment, metavar="DATE", help="ISO 8601; UTC where no zone is given")
        export.add_argument("--until", type=_moment, metavar="DATE", help="before it")
        export.add_argument("--format", choices=["jsonl"], default="jsonl")
        export.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")

    def handle(self, *args: Any, command: str, **options: Any) -> None:
        try:
            getattr(self, f"_{command}")(**options)
        except FleetError as error:
            raise CommandError(error.message) from error
        except OSError as error:
            raise CommandError(str(error)) from error

    def _head(self, **_: Any) -> None:
        services.seal()
        self.stdout.write(str(selectors.head()))

    def _verify(self, *, head: Head | None, file: Path | None, **_: Any) -> None:
        if file is not None:
            with file.open(encoding="utf-8") as lines:
                start, links = exports.read(lines)
                self._walk(links, start=start, known=head, total=None)
            return
        services.seal()
        self._walk(selectors.links(), start=START, known=head, total=AuditSeal.objects.count())

    def _walk(self, links: Iterable[Link], *, start: Head, known: Head | None, total: int | None) -> None:
        last: Head | Broken = start
        with _progress(total) as advance:
            for step in check(links, start=start, known=known):
                last = step
                advance()
        if isinstance(last, Broken):
            raise CommandError(f"the audit trail is broken at position {last.position}: {last.why}", returncode=1)
        if known is not None and known.position <= start.position:
            self.stderr.write(f"position {known.position} comes before this export: it could not be compared")
        self.stdout.write(f"the audit trail holds: {last.position - start.position} entries, head {last}")

    def _export(self, *, since: datetime | None, until: datetime | None, out: Path | None, **_: Any) -> None:
        services.seal()
        lines = exports.lines(selectors.links(since=since, until=until))
        if out is None:
            for line in lines:
                self.stdout.write(line, ending="")
            return
        with out.open("w", encoding="utf-8") as file:
            file.writelines(lines)
        self.stderr.write(f"{out} is written")


@contextmanager
def _progress(total: int | None) -> Iterator[Any]:
    console = Console(stderr=True)
    if total is None or total < LONG or not sys.stderr.isatty():
        yield lambda: None
        return
    columns = (TextColumn("verifying"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def _head(text: str) -> Head:
    try:
        return Head.parse(text)
    except FleetError as error:
        raise ArgumentTypeError(error.message) from error


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ArgumentTypeError(f"expected a date such as 2026-11-21 or 2026-11-21T09:30; got {text!r}") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
