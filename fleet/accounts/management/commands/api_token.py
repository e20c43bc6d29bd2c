"""`manage.py api_token NAME --scope publish --model digits --days 90`: prints a new API token, once."""

from argparse import ArgumentParser
from datetime import timedelta
from typing import Any

from django.contrib.auth.models import User
from django.core.management.base import BaseCommand, CommandError

from device_sdk.protocol.errors import ProtocolError
from fleet.accounts import services
from fleet.accounts.models import SCOPES
from fleet.errors import FleetError


class Command(BaseCommand):
    help = "Make an API token and print it. It is shown this once: only its hash is stored."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name")
        parser.add_argument("--scope", action="append", required=True, choices=SCOPES)
        parser.add_argument("--model", action="append", default=[], help="may publish this one only; may be repeated")
        parser.add_argument("--days", type=float, default=90, help="until it expires (default: 90)")
        parser.add_argument("--user", help="whose it is (default: a service account of its own)")

    def handle(self, **options: Any) -> None:
        try:
            token, text = services.create_token(
                name=options["name"],
                scopes=options["scope"],
                models=options["model"],
                lifetime=timedelta(days=options["days"]),
                user=User.objects.get(username=options["user"]) if options["user"] else None,
            )
        except User.DoesNotExist as error:
            raise CommandError(f"there is no user {options['user']!r}") from error
        except (FleetError, ProtocolError) as error:
            raise CommandError(error.message) from error
        self.stderr.write(f"Token {token.name!r} expires {token.expiry:%F %H:%M} UTC. Keep it: it is shown only now.")
        self.stdout.write(text)
