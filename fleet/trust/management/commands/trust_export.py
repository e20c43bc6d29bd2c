"""`manage.py trust_export STICK`: what the next ceremony needs. All of it is public."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from fleet.errors import FleetError
from fleet.trust import transfer
from fleet.trust.stick import Stick


class Command(BaseCommand):
    help = "Write every root, the newest targets and the public keys to a folder, for the next ceremony."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("stick", type=Path, metavar="STICK")

    def handle(self, *, stick: Path, **_: Any) -> None:
        try:
            written = transfer.export_stick(Stick(stick))
        except FleetError as error:
            raise CommandError(f"{error.message} [{error.code}]") from error
        self.stdout.write(f"Wrote {', '.join(written)}." if written else "The stick has all of it already.")
