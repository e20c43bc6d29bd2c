"""`manage.py device list | show | approve | revoke | pin | unpin | labels | reissue`: as over REST, in a shell.

Re-issuing stands here alone: whoever holds a credential is the device, so it passes through no browser and no token.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from fleet.devices import selection, services
from fleet.devices.matching import where
from fleet.devices.models import Device
from fleet.errors import FleetError
from fleet.rollouts.services import pin

SHOWN = 100


class Command(BaseCommand):
    help = "List devices; approve, revoke, pin, label them, and re-issue a credential."

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True)
        listed = commands.add_parser("list", help=f"devices by name, at most {SHOWN}")
        listed.add_argument("--only", default="", metavar="SELECTOR", help="'site in (a, b), !lab'")
        listed.add_argument("--state", choices=Device.State.values)
        commands.add_parser("show", help="one device").add_argument("device")
        _action(commands, "approve", "let a pending device work")
        _action(commands, "revoke", "refuse its credential from now on")
        _action(commands, "reissue", "print a new credential, which voids the old one; also for a revoked device")
        pinned = _action(commands, "pin", "fix a model to a version, whatever rollouts say")
        pinned.add_argument("model")
        pinned.add_argument("version")
        _action(commands, "unpin", "let rollouts decide again").add_argument("model")
        labels = _action(commands, "labels", "replace its labels")
        labels.add_argument("labels", nargs="*", metavar="KEY=VALUE", help="none: it has no labels any more")

    def handle(self, *_: Any, command: str, **options: Any) -> None:
        try:
            if command == "list":
                self._list(**options)
            else:
                self._act(command, **options)
        except FleetError as error:
            raise CommandError(error.message) from error

    def _list(self, *, only: str, state: str | None, **_: Any) -> None:
        rows = Device.objects.filter(where(selection.parse(only))).select_related("runs").order_by("name")
        rows = rows.filter(state=state) if state else rows
        for row in rows[:SHOWN]:
            self._show(row)
        total = rows.count()
        if total > SHOWN:
            self.stdout.write(f"and {total - SHOWN} more")

    def _act(self, command: str, *, device: str, **options: Any) -> None:
        row = Device.objects.filter(name=device).first()
        if row is None:
            raise CommandError(f"there is no device {device!r}")
        if command != "show":
            by = {"device": row, "actor": "command line", "comment": options["comment"]}
            credential = ACTIONS[command](by, options)
            if credential:
                self.stdout.write(str(credential))
                return
        row.refresh_from_db()
        self._show(row)

    def _show(self, row: Device) -> None:
        runs = row.runs.runs if row.runs else {}
        seen = f"seen {row.last_seen:%Y-%m-%d %H:%M %Z}" if row.last_seen else "never seen"
        told = [f"{model} {running}" for model, running in sorted(runs.items())]
        told += [f"pinned {model} {version}" for model, version in sorted(row.pins.items())]
        labels = ", ".join(f"{key}={value}" for key, value in sorted(row.labels.items()))
        self.stdout.write(
            f"{row.name}  {row.state}  {seen}  {', '.join(told) or 'runs nothing yet'}  {labels}".rstrip()
        )


ACTIONS: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "approve": lambda by, _: services.approve(**by),
    "revoke": lambda by, _: services.revoke(**by),
    "reissue": lambda by, _: services.reissue(**by),
    "pin": lambda by, given: pin(**by, model=given["model"], version=given["version"]),
    "unpin": lambda by, given: pin(**by, model=given["model"], version=None),
    "labels": lambda by, given: services.set_labels(**by, labels=_pairs(given["labels"])),
}


def _action(commands: Any, name: str, what: str) -> ArgumentParser:
    parser: ArgumentParser = commands.add_parser(name, help=what)
    parser.add_argument("device", help="its name")
    parser.add_argument("--comment", default="", help="why; kept for ever")
    return parser


def _pairs(given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    wrong = [text for text, (key, sign, _) in zip(given, pairs, strict=True) if not key or not sign]
    if wrong:
        raise CommandError(f"labels: expected KEY=VALUE; got {', '.join(wrong):.200}")
    return {key: value for key, _, value in pairs}
