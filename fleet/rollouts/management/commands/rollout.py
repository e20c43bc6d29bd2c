"""`manage.py rollout list | show | create | start | approve | pause | ...`: the admin's actions in a shell."""

from argparse import ArgumentParser, ArgumentTypeError
from datetime import datetime
from typing import Any

from django.contrib.auth.models import User
from django.core.management.base import BaseCommand, CommandError

from fleet.devices.models import Group
from fleet.errors import FleetError
from fleet.releases.models import Release
from fleet.rollouts import deciding, evidence, guards, objective, selectors, services, targeting
from fleet.rollouts.models import Rollout
from fleet.rollouts.terms import watch
from fleet.rollouts.terms.pace import NAMES as PACE
from fleet.rollouts.terms.pace import pace_of

ACTIONS = {
    "start": services.start,
    "pause": services.pause,
    "resume": services.resume,
    "cancel": services.cancel,
    "roll_back": services.roll_back,
    "approve": deciding.approve,
    "reject": deciding.reject,
    "approve_stage": deciding.approve_stage,
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
GUARD = f"{', '.join(guards.SCALES)}; with effect=, limit= or test=no; may be repeated, commas also separate"
GUARD_SETTINGS = {
    "false_alarm": (float, "chance that a healthy rollout is ever halted by its guards (0.01)"),
    "guard_devices": (int, "exposed devices each guard compares before a stage passes (1)"),
    "guard_calls": (int, "calls that make a device comparable (50)"),
}


class Command(BaseCommand):
    help = "List, create and operate rollouts."

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True)
        commands.add_parser("list", help="every rollout, the newest first")
        show = commands.add_parser("show", help="one rollout with its objective, and what was done and why")
        show.add_argument("rollout", type=int)
        create = commands.add_parser("create", help="draft a rollout of a valid release")
        create.add_argument("model")
        create.add_argument("version")
        create.add_argument("--group", help="name of the group (default: every device)")
        create.add_argument("--only", default="", metavar="SELECTOR", help="narrows the group: 'site in (a, b), !lab'")
        create.add_argument("--without", default="", metavar="SELECTOR", help="devices to leave out")
        create.add_argument("--without-group", metavar="GROUP", help="a group to leave out")
        create.add_argument(
            "--stage", action="append", help="percent, or a group that goes first; may be repeated (default: 100)"
        )
        create.add_argument("--soak", type=int, default=0, help="seconds that each stage lasts at least")
        create.add_argument("--min-reports", type=int, default=0, help="outcomes that each stage needs")
        create.add_argument("--success", type=float, default=0.9, help="fraction of the admitted that must commit")
        create.add_argument("--budget", type=int, default=0, help="failures that are tolerated in each stage")
        create.add_argument("--on-failure", choices=Rollout.OnFailure.values, default=Rollout.OnFailure.ROLL_BACK)
        create.add_argument("--urgent", action="store_true", help="devices wait for free disk and memory only")
        create.add_argument("--guard", action="append", default=[], metavar="NAME [SETTING=NUMBER ..]", help=GUARD)
        for name, (kind, what) in GUARD_SETTINGS.items():
            create.add_argument(f"--{name.replace('_', '-')}", type=kind, help=what)
        for name, what in CONDITIONS.items():
            create.add_argument(f"--{name}", action="store_true", help=what)
        for name, what in SIZES.items():
            create.add_argument(f"--{name.replace('_', '-')}", type=int, default=0, metavar="BYTES", help=what)
        watch.add_arguments(create)
        _add_pace(create)
        create.add_argument("--start", action="store_true", help="start it at once, or submit it for approval")
        _add_person(create)
        for name in ACTIONS:
            action = commands.add_parser(name)
            action.add_argument("rollout", type=int)
            _add_person(action)

    def handle(self, *_: Any, command: str, **options: Any) -> None:
        try:
            if command == "list":
                self._list()
            elif command == "show":
                self._show_all(options["rollout"])
            elif command == "create":
                self._create(**options)
            else:
                self._act(command, **options)
        except FleetError as error:
            raise CommandError(error.message) from error
        except Release.DoesNotExist as error:
            raise CommandError(f"there is no release {options['model']} {options['version']}") from error
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
            "needs_approval": options["approve_stages"],
        }
        actor = _actor(options["user"])
        rollout = services.create(
            release=Release.objects.get(model__name=model, version=version),
            group=_group(group),
            selector=options["only"],
            exclude=options["without"],
            exclude_group=_group(options["without_group"]),
            stages=[services.StagePlan(**targeting.read_stage(text), **plan) for text in options["stage"] or ["100"]],
            on_failure=options["on_failure"],
            urgent=options["urgent"],
            guards=_guards(options),
            conditions={name: options[name] for name in (*CONDITIONS, *SIZES)},
            **watch.from_options(options),
            actor=actor,
            pace=pace_of({name: options[name] for name in PACE if options[name] is not None}),
        )
        if start:
            rollout = services.start(rollout=rollout, actor=actor, comment=options["comment"])
        self._show(rollout)

    def _act(self, command: str, *, rollout: int, user: str | None, comment: str, **_: Any) -> None:
        self._show(ACTIONS[command](rollout=rollout, actor=_actor(user), comment=comment))

    def _show_all(self, pk: int) -> None:
        rollout = services.fetch(pk)
        self._show(rollout)
        found = objective.of(rollout)
        if found:
            aim = f"{rollout.objective_percent:g} % by {found.deadline:%Y-%m-%d %H:%M %Z}"
            self.stdout.write(f"objective: {aim}; {found.reached:.1f} % now; {found.verdict}: {found.why}")
        for act in rollout.actions.all():
            self.stdout.write(f"{act.at:%Y-%m-%d %H:%M} {act.action} by {act.actor}  {act.comment}")

    def _show(self, rollout: Rollout) -> None:
        progress = selectors.progress(rollout)
        self.stdout.write(
            f"{rollout}  {rollout.state}  {rollout.group or 'every device'}  stage {rollout.stage_index + 1}  "
            f"{progress.committed} committed, {progress.updating} updating, {progress.failed} failed  {rollout.reason}"
        )
        for reading in evidence.readings(rollout):
            self.stdout.write(f"    {reading.sentence}")


def _guards(options: dict[str, Any]) -> dict[str, Any]:
    try:
        named = guards.parse_text(", ".join(options["guard"]))
    except ValueError as error:
        raise CommandError(str(error)) from error
    given = {name.removeprefix("guard_"): options[name] for name in GUARD_SETTINGS if options[name] is not None}
    if given and not named:
        raise CommandError(f"{', '.join(given)}: of no use without --guard")
    return {**named, **given}


def _add_pace(parser: ArgumentParser) -> None:
    """None where nothing is said: then it is as usual."""
    add = parser.add_argument
    add("--start-at", type=_moment, help="begin by itself then: 2026-12-01T02:00+01:00")
    add("--needs-approval", action="store_true", help="somebody else must approve before it begins")
    add("--approve-stages", action="store_true", help="somebody else must approve before each stage passes")
    add("--timeout-seconds", type=int, help="then a device that was seen counts as failed; 0: never")
    add("--retries", type=int, help="for devices that failed for a passing reason")
    add("--retry-seconds", type=int, help="before the first retry; doubles each time")
    add("--max-in-flight", type=int, help="updates at a time; 0: no limit")
    add("--starts-per-minute", type=float, help="0: no limit")
    add("--objective-percent", type=float, help="of the group that shall have it ...")
    add("--objective-days", type=float, help="... so many days after the start")


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    if found.utcoffset() is None:
        raise ArgumentTypeError("expected a time with its zone, such as 2026-12-01T02:00+01:00")
    return found


def _add_person(parser: ArgumentParser) -> None:
    parser.add_argument("--user", help="who does it (default: the command line)")
    parser.add_argument("--comment", default="", help="why")


def _group(name: str | None) -> Group | None:
    try:
        return Group.objects.get(name=name) if name else None
    except Group.DoesNotExist as error:
        raise CommandError(f"there is no group {name!r}") from error


def _actor(name: str | None) -> User | str:
    if name is None:
        return "command line"
    try:
        return User.objects.get(username=name)
    except User.DoesNotExist as error:
        raise CommandError(f"there is no user {name!r}") from error
