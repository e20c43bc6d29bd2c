"""`manage.py trust_init`: a trust root for a first look, with all keys in the embedded keystore."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand

from fleet.trust import keystore


class Command(BaseCommand):
    help = "Make root (2 of 3), targets and online keys, and sign root and targets version 1. Repeating is harmless."
    requires_system_checks: list[str] = []  # it mends what the checks complain of

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--keystore", type=Path, help="where the keys go (default: FLEET_VAR/keystore)")

    def handle(self, **options: Any) -> None:
        store = keystore.at(options["keystore"])
        if not keystore.initialise(store):
            self.stdout.write("There is a trust root already; nothing was changed.")
            return
        self.stderr.write(self.style.WARNING(keystore.WARNING))
        self.stdout.write(f"Root and targets version 1 are signed. Keys: {store.folder}")
