"""`manage.py trust_import STICK`: take what a key ceremony signed, make the rows of new models, end those taken out.

It lives in this room because trust knows nothing of releases.
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import transaction

from fleet.errors import FleetError
from fleet.releases import services
from fleet.trust import transfer
from fleet.trust.stick import Stick


class Command(BaseCommand):
    help = "Verify what lies on the stick against what the server holds, and store it: all or nothing."
    requires_system_checks: list[str] = []  # it mends what the checks complain of

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("stick", type=Path, metavar="STICK")
        parser.add_argument(
            "--first-root", default="", metavar="MARK", help="as `ceremony show` said it at the ceremony"
        )

    def handle(self, *, stick: Path, first_root: str, **_: Any) -> None:
        try:
            with transaction.atomic():
                done = transfer.import_stick(Stick(stick), first_root=first_root)
                for model in done.models:
                    services.create_model(name=model)
                ended = services.end_undelegated(delegated=done.models)
        except FleetError as error:
            raise CommandError(f"{error.message} [{error.code}]; nothing was changed") from error
        for line in done.changes or ("Nothing new: the server holds all of this.",):
            self.stdout.write(line)
        for release in ended:
            self.stdout.write(f"{release} is revoked: its model is delegated to nobody any more.")
        for line in done.todo:
            self.stdout.write(self.style.WARNING(line))
