"""`manage.py group list | save`: saved groups, and the mirror that a site's devices are told of, in a shell."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from fleet.devices import services
from fleet.devices.models import Group
from fleet.errors import FleetError


class Command(BaseCommand):
    help = "List groups of devices; make or change one."

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True)
        commands.add_parser("list", help="every group, by name")
        save = commands.add_parser("save", help="make or change a group; what is left out stays as it is")
        save.add_argument("name")
        save.add_argument("--selector", help="'site in (a, b), !lab'; a new group without one holds every device")
        save.add_argument("--description")
        save.add_argument("--mirror", help="http(s)://host[:port] of a cache that its devices ask first; '': none")

    def handle(self, *_: Any, command: str, **options: Any) -> None:
        try:
            rows = [self._save(**options)] if command == "save" else list(Group.objects.all())
        except FleetError as error:
            raise CommandError(error.message) from error
        for row in rows:
            self.stdout.write(f"{row.name}  {row.selector or 'every device'}  {row.mirror}".rstrip())

    def _save(self, *, name: str, **options: Any) -> Group:
        row = Group.objects.filter(name=name).first()
        kept = {term: getattr(row, term) if row else "" for term in ("selector", "description", "mirror")}
        given = {term: options[term] for term in kept if options[term] is not None}
        return services.save_group(group=row, name=name, **kept | given)
