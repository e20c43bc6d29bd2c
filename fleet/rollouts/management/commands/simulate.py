"""`manage.py simulate`: what a rollout would do to a fleet, by the server's own policy code, on virtual devices."""

import csv
import json
import time
from argparse import ArgumentParser
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fleet.rollouts.guards import FAILURES, Terms, parse_text
from fleet.rollouts.models import Rollout
from fleet.rollouts.preview import of_rollout
from fleet.rollouts.simulation import picture
from fleet.rollouts.simulation.play import play
from fleet.rollouts.simulation.scenario import Played, Quality, Scenario, Stage, playable

MOST = 10_000_000  # devices; about 60 bytes each


class Command(BaseCommand):
    help = "Play a rollout through on virtual devices: arrivals, offline devices, failures, retries."

    def add_arguments(self, parser: ArgumentParser) -> None:
        default = Scenario()
        parser.add_argument("--devices", type=int, help=f"virtual devices (default: {default.devices:,})")
        parser.add_argument("--days", type=float, default=default.days)
        parser.add_argument("--seed", type=int, default=default.seed, help="the same seed gives the same play")
        parser.add_argument("--step", type=int, default=default.step_minutes, metavar="MINUTES", help="between polls")
        parser.add_argument(
            "--release", action="append", metavar="VERSION:FAILING",
            help="rolled out in this order; FAILING is the fraction of devices on which it fails",
        )  # fmt: skip
        parser.add_argument("--stage", type=float, action="append", help="percent; may be repeated")
        parser.add_argument("--soak", type=float, default=24.0, help="hours that each stage lasts at least")
        parser.add_argument("--success", type=float, default=0.9, help="fraction of the admitted that must commit")
        parser.add_argument("--budget", type=float, default=0.005, help="failures allowed, as a fraction of the stage")
        parser.add_argument(
            "--guards", default=FAILURES, help="as a rollout has them: `failures effect=0.02`; empty: none"
        )
        parser.add_argument("--on-failure", choices=Rollout.OnFailure.values, default=Rollout.OnFailure.ROLL_BACK)
        parser.add_argument("--rollout", type=int, help="take group, stages and salt of this one from the database")
        parser.add_argument("--failing", type=float, default=0.001, help="with --rollout: how bad its release is")
        parser.add_argument("--out", type=Path, help="a folder for adoption.svg, adoption.csv and adoption.json")

    def handle(self, *_: Any, out: Path | None, **options: Any) -> None:
        scenario = _scenario(options)
        began = time.monotonic()
        played = self._played(scenario)
        self._say(scenario, played, time.monotonic() - began)
        if out:
            _write(out, scenario, played)
            self.stdout.write(f"Written to {out}")

    def _played(self, scenario: Scenario) -> Played:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"{scenario.devices:,} devices", total=scenario.steps)
            return play(scenario, lambda _: bar.advance(task))

    def _say(self, scenario: Scenario, played: Played, seconds: float) -> None:
        for each in played.happenings:
            what = f"{each.version:<10} {each.what} at stage {each.stage}  {each.reason}"
            self.stdout.write(f"{each.at:%d %b %H:%M}  {what}")
        last = played.moments[-1]
        spread = ", ".join(f"{version} {number:,}" for version, number in last.versions.items() if number)
        self.stdout.write(f"{last.at:%d %b %H:%M}  {spread}; {last.updating:,} updating, {last.failed:,} failed")
        for reason, steps in sorted(played.holds.items(), key=lambda item: -item[1]):
            self.stdout.write(f"held {steps * scenario.step_minutes / 60:,.0f} h: {reason}")
        self.stdout.write(f"{scenario.devices:,} virtual devices, {scenario.days:g} days, in {seconds:.1f} s")


def _scenario(options: dict[str, Any]) -> Scenario:
    common = {"days": options["days"], "seed": options["seed"], "step_minutes": options["step"]}
    if options["rollout"] is not None:
        found = _found(options["rollout"], options["failing"])
        scenario = replace(found, **common)
        return replace(scenario, devices=options["devices"]) if options["devices"] else _checked(scenario)
    devices = options["devices"] or Scenario().devices
    percents = options["stage"] or [1.0, 10.0, 50.0, 100.0]
    budgets = [round(options["budget"] * devices * percent / 100) for percent in percents]
    stages = [
        Stage(percent, options["soak"], success=options["success"], budget=budget)
        for percent, budget in zip(percents, budgets, strict=True)
    ]
    releases = [_release(text) for text in options["release"] or ["1.1.0:0.001"]]
    guarded = {"guards": _guards(options["guards"]), "on_failure": options["on_failure"]}
    return _checked(Scenario(devices=devices, stages=stages, releases=releases, **guarded, **common))


def _guards(text: str) -> Terms:
    try:
        terms = Terms.parse(parse_text(text))
    except ValueError as error:
        raise CommandError(str(error)) from error
    if left_out := terms.guards.keys() - playable(terms).guards.keys():
        raise CommandError(f"virtual devices infer nothing: no guard of {', '.join(sorted(left_out))} can be played")
    return terms


def _checked(scenario: Scenario) -> Scenario:
    percents = [stage.percent for stage in scenario.stages]
    if not 1 <= scenario.devices <= MOST:
        raise CommandError(f"devices: expected 1 to {MOST:,}; got {scenario.devices:,}")
    if percents != sorted(set(percents)) or not 0 < percents[0] <= percents[-1] <= 100:
        raise CommandError(f"stages: percentages must rise from over 0 to 100; got {percents}")
    if not (0 < scenario.days <= 3_650 and 1 <= scenario.step_minutes <= 1_440):
        raise CommandError("expected up to 3,650 days, and steps of 1 to 1,440 minutes")
    return scenario


def _found(rollout: int, failing: float) -> Scenario:
    try:
        return of_rollout(Rollout.objects.select_related("release__model", "group").get(pk=rollout), failing)
    except Rollout.DoesNotExist as error:
        raise CommandError(f"there is no rollout {rollout}; see `rollout list`") from error


def _release(text: str) -> Quality:
    version, _, failing = text.partition(":")
    try:
        quality = Quality(version, float(failing or 0.001))
    except ValueError as error:
        raise CommandError(f"release: expected VERSION:FRACTION; got {text!r:.60}") from error
    if not (version and 0 <= quality.failing <= 1):
        raise CommandError(f"release: expected VERSION:FRACTION with a fraction from 0 to 1; got {text!r:.60}")
    return quality


def _write(folder: Path, scenario: Scenario, played: Played) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = picture.rows(played)
    title = f"Simulated: {scenario.devices:,} devices, {', '.join(each.version for each in scenario.releases)}"
    (folder / "adoption.svg").write_text(picture.svg(played, title))
    with (folder / "adoption.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
    told = {"scenario": asdict(scenario), "happenings": [asdict(each) for each in played.happenings], "moments": rows}
    (folder / "adoption.json").write_text(json.dumps(told, indent=1, default=str))
