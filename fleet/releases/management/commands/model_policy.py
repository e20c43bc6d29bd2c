"""`manage.py model_policy NAME keep | stop`: what devices do when nothing of a model may run."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from fleet.errors import FleetError
from fleet.releases import services
from fleet.releases.models import Model


class Command(BaseCommand):
    help = "Say what devices do when nothing of a model may run, such as after a revocation. Without a word: show it."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name")
        parser.add_argument("policy", nargs="?", choices=Model.WhenNothing.values)

    def handle(self, *, name: str, policy: str | None, **_: Any) -> None:
        model = Model.objects.filter(name=name).first()
        if model is None:
            raise CommandError(f"there is no model {name!r}")
        if policy is not None:
            try:
                services.set_when_nothing(model=model, policy=policy)
            except FleetError as error:
                raise CommandError(error.message) from error
        self.stdout.write(f"When nothing of {name} may run, devices {Model.WhenNothing(model.when_nothing).label}.")
