"""`manage.py provision`: write the file that lets devices in. It is out-of-band trust: hand it out with care.

It lives in this room because it pins the root; devices know nothing of trust.
"""

import os
from argparse import ArgumentParser
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from fleet.devices import services
from fleet.errors import FleetError, Invalid
from fleet.trust import provisioning, selectors


class Command(BaseCommand):
    help = "Make an enrolment token and write it, with the server's address and the pinned root, to a file (0600)."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--name", required=True, help="of the token, as operators see it")
        parser.add_argument("--model", action="append", required=True, help="that the devices run; may be repeated")
        parser.add_argument("--uses", type=int, default=1, help="devices that may enrol by it (default: 1)")
        parser.add_argument("--days", type=float, default=7, help="that it is good for (default: 7)")
        parser.add_argument("--label", action="append", default=[], metavar="NAME=VALUE", help="set on every device")
        parser.add_argument("--approval", action="store_true", help="each device waits for an operator's approval")
        parser.add_argument("--server", default=settings.PUBLIC_URL, help="address that devices reach")
        parser.add_argument("--mirror", default="", help="address of a cache that the devices ask for files first")
        parser.add_argument("--out", type=Path, required=True, metavar="FILE")

    def handle(self, **options: Any) -> None:
        try:
            content = self._content(options)
        except FleetError as error:
            raise CommandError(error.message) from error
        write_private(options["out"], content)
        self.stdout.write(f"{options['out']}: good for {options['uses']} devices and {options['days']:g} days; secret")

    def _content(self, options: dict[str, Any]) -> bytes:
        selectors.root_text()  # before the token: without trust there is nothing to hand out
        models = list(dict.fromkeys(options["model"]))
        unknown = [model for model in models if not selectors.is_delegated(model)]
        if unknown:
            raise Invalid("unknown_model", f"no such model: {', '.join(unknown)}; add it by trust_add_model")
        _, secret = services.create_token(
            name=options["name"],
            model_names=models,
            max_uses=options["uses"],
            lifetime=timedelta(days=options["days"]),
            labels=_labels(options["label"]),
            needs_approval=options["approval"],
        )
        return provisioning.provision(secret=secret, models=models, server=options["server"], mirror=options["mirror"])


def write_private(path: Path, content: bytes) -> None:
    """For its owner's eyes from the first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)
        file.write(content)


def _labels(pairs: list[str]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    if not all(name and value for name, _, value in split):
        raise Invalid("malformed", "--label: expected NAME=VALUE")
    return {name: value for name, _, value in split}
