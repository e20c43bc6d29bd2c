"""`manage.py explain DEVICE [MODEL]`: why a device runs what it runs, rollout by rollout."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from fleet.devices.models import Device
from fleet.rollouts import selectors
from fleet.rollouts.explaining import Explanation


class Command(BaseCommand):
    help = "Tell why a device runs what it runs: every rollout, in the order in which they are asked, and its reason."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("device")
        parser.add_argument("model", nargs="?", help="only this one (default: each of the device's models)")

    def handle(self, *_: Any, device: str, model: str | None, **__: Any) -> None:
        row = Device.objects.select_related("runs").filter(name=device).first()
        if row is None:
            raise CommandError(f"there is no device {device!r}")
        told = selectors.explain(row, model)
        if model is not None and not told:
            raise CommandError(f"{device} does not run {model!r}; its models: {', '.join(row.model_names)}")
        if row.state != Device.State.ACTIVE:
            self.stdout.write(f"{device} is {row.get_state_display()}: it gets no answer at all; an active one would:")
        for explanation in told:
            self._tell(explanation)

    def _tell(self, told: Explanation) -> None:
        self.stdout.write(f"{told.model}: runs {told.runs or 'nothing yet'}; {told.verdict}")
        for each in told.considered:
            mark = ">" if each.decides else " "
            why = each.why.replace("_", " ")
            self.stdout.write(f"{mark} rollout {each.rollout}  {each.gives}  {each.state}  {why}: {each.detail}")
