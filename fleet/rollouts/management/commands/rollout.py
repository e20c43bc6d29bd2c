"""`manage.py rollout list | create | start | pause | resume | cancel | roll_back`: the admin's actions in a shell."""

from argparse import ArgumentParser
from typing import Any

from django.contrib.auth.models import User
from django.core.management.base import BaseCommand, CommandError

from fleet.devices.models import Group
from fleet.errors import FleetError
from fleet.releases.models import Release
from fleet.rollouts import selectors, services
from fleet.rollouts.models import Rollout

ACTIONS = {
    "start": services.start,
    "pause": services.pause,
    "resume": services.resume,
    "cancel": services.cancel,
    "roll_back": services.roll_back,
}


CONDITIONS = {
    "unmetered": "wait for a network that is not paid for by the byte",
    "charging": "wait until the device charges, or is on mains",
    "idle": "wait until the host has little else to do",
}
SIZES = {
    "free_disk": "that must be free when the release is there",
    "free_memory": "that must be free when it begins",
    "rate": "a second of downloads",
    "daily": "a day of downloads",
}


class Command(BaseCommand):
    help = "List, create and operate rollouts."

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True)
        commands.add_parser("list", help="every rollout, the newest first")
        create = commands.add_parser("create", help="draft a rollout of a valid release")
        create.add_argument("model")
        create.add_argument("version")
        create.add_argument("--group", help="name of the group (default: every device)")
        create.add_argument("--stage", type=float, action="append", help="percent; may be repeated (default: 100)")
        create.add_argument("--soak", type=int, default=0, help="seconds that each stage lasts at least")
        create.add_argument("--min-reports", type=int, default=0, help="outcomes that each stage needs")
        create.add_argument("--success", type=float, default=0.9, help="fraction of the admitted that must commit")
        create.add_argument("--budget", type=int, default=0, help="failures that are tolerated in each stage")
        create.add_argument("--on-failure", choices=Rollout.OnFailure.values, default=Rollout.OnFailure.ROLL_BACK)
        create.add_argument("--urgent", action="store_true", help="devices wait for free disk and memory only")
        for name, what in CONDITIONS.items():
            create.add_argument(f"--{name}", action="store_true", help=what)
        for name, what in SIZES.items():
            create.add_argument(f"--{name.replace('_', '-')}", type=int, default=0, metavar="BYTES", help=what)
        create.add_argument("--start", action="store_true", help="start it at once")
        _add_person(create)
        for name in ACTIONS:
            action = commands.add_parser(name)
            action.add_argument("rollout", type=int)
            _add_person(action)

    def handle(self, *_: Any, command: str, **options: Any) -> None:
        try:
            if command == "list":
                self._list()
            elif command == "create":
                self._create(**options)
            else:
                self._act(command, **options)
        except FleetError as error:
            raise CommandError(error.message) from error
        except Release.DoesNotExist as error:
            raise CommandError(f"there is no release {options['model']} {options['version']}") from error
        except Group.DoesNotExist as error:
            raise CommandError(f"there is no group {options['group']!r}") from error
        except Rollout.DoesNotExist as error:
            raise CommandError(f"there is no rollout {options['rollout']}; see `rollout list`") from error

    def _list(self) -> None:
        for rollout in Rollout.objects.select_related("release__model", "group"):
            self._show(rollout)

    def _create(self, *, model: str, version: str, group: str | None, start: bool, **options: Any) -> None:
        plan = {
            "soak_seconds": options["soak"],
            "min_reports": options["min_reports"],
            "success_threshold": options["success"],
            "failure_budget": options["budget"],
        }
        actor = _actor(options["user"])
        rollout = services.create(
            release=Release.objects.get(model__name=model, version=version),
            group=Group.objects.get(name=group) if group else None,
            stages=[services.StagePlan(percent=percent, **plan) for percent in options["stage"] or [100.0]],
            on_failure=options["on_failure"],
            urgent=options["urgent"],
            conditions={name: options[name] for name in (*CONDITIONS, *SIZES)},
            actor=actor,
        )
        if start:
            rollout = services.start(rollout=rollout, actor=actor, comment=options["comment"])
        self._show(rollout)

    def _act(self, command: str, *, rollout: int, user: str | None, comment: str, **_: Any) -> None:
        self._show(ACTIONS[command](rollout=rollout, actor=_actor(user), comment=comment))

    def _show(self, rollout: Rollout) -> None:
        progress = selectors.progress(rollout)
        self.stdout.write(
            f"{rollout}  {rollout.state}  {rollout.group or 'every device'}  stage {rollout.stage_index + 1}  "
            f"{progress.committed} committed, {progress.updating} updating, {progress.failed} failed  {rollout.reason}"
        )


def _add_person(parser: ArgumentParser) -> None:
    parser.add_argument("--user", help="who does it (default: the command line)")
    parser.add_argument("--comment", default="", help="why")


def _actor(name: str | None) -> User | str:
    if name is None:
        return "command line"
    try:
        return User.objects.get(username=name)
    except User.DoesNotExist as error:
        raise CommandError(f"there is no user {name!r}") from error
