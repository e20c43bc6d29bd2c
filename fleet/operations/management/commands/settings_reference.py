"""`manage.py settings_reference`: print the table of all settings, or write it to `deploy/SETTINGS.md`."""

from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from fleet.operations.reference import render, settings_of


class Command(BaseCommand):
    help = "Every setting of the server, with its type, default and meaning, as Markdown."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--write", action="store_true", help="write deploy/SETTINGS.md instead of printing")

    def handle(self, *args: Any, **options: Any) -> None:
        page = render(settings_of(settings.BASE_DIR / "fleet" / "settings.py"))
        if not options["write"]:
            self.stdout.write(page, ending="")
            return
        path = settings.BASE_DIR / "deploy" / "SETTINGS.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(page)
        self.stdout.write(f"wrote {path}")
