"""`manage.py trust_renew root|targets`: another year for an offline role, before devices refuse it."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from fleet.errors import FleetError
from fleet.trust import keystore


class Command(BaseCommand):
    help = "Sign root or targets anew with another expiry and nothing else changed."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("role", choices=[keystore.ROOT, keystore.TARGETS])
        parser.add_argument("--keystore", type=Path, help="where the keys are (default: FLEET_VAR/keystore)")

    def handle(self, **options: Any) -> None:
        try:
            row = keystore.renew(keystore.at(options["keystore"]), options["role"])
        except FleetError as error:
            raise CommandError(error.message) from error
        self.stdout.write(f"{row.role} version {row.version} is signed and expires {row.expires_at:%F}.")
