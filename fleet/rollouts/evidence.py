"""Collect what devices say for a rollout's guards, and ask the guards. What it means is said in `guards`.

A report touches the rows of its own device alone, in its own transaction, so web processes wait for nobody. What a
device adds to a comparison is a row of its own, `Finding`; the engine folds these into sheets of constant size and
deletes them, in one transaction that claims the rollout: nothing is counted twice or lost, whoever dies when. No tick
looks at all devices.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import structlog
from django.db import transaction
from django.db.models import Count, F, Q
from django.utils import timezone

from device_sdk.protocol.events import COMMITTED, HEALTH, Event
from fleet.devices.models import Device, ModelStatus
from fleet.errors import Invalid
from fleet.rollouts import guards, policy, snapshots
from fleet.rollouts.models import Finding, GuardReading, Outcome, Rollout, Sheet, Watch
from fleet.rollouts.quality import Change, Numbers, changes

FOLDED_AT_ONCE = 5_000
WATCHES_KEPT = timedelta(days=30)  # of a rollout that is over
UNEXPOSED_KEPT = 5_000  # devices that stand for the unexposed of a stage; more would tell little
POINTS = 200  # of the plot

logger = structlog.get_logger(__name__)


def checked(terms: Mapping[str, Any] | None) -> dict[str, Any]:
    """A new rollout's guards as they are kept. Invalid `guards_malformed` says what was expected."""
    try:
        return guards.Terms.parse(dict(terms or {})).to_json()
    except (ValueError, TypeError) as error:
        raise Invalid("guards_malformed", str(error)) from error


# --- by devices ---------------------------------------------------------------------------------------------------


def heard(device: Device, events: Iterable[Event]) -> dict[str, Numbers]:
    """Numbers of each model that the device told last, before this post replaces them."""
    models = {event.model for event in events if event.kind in {HEALTH, COMMITTED}}
    rows = ModelStatus.objects.filter(device=device, model__in=models) if models else ()
    found = {row.model: Numbers.parse(row.health) for row in rows}
    return {model: numbers for model, numbers in found.items() if numbers is not None}


def note(device: Device, events: Sequence[Event], heard_before: Mapping[str, Numbers]) -> None:
    """Keep what new events add to the guards of running rollouts. In the transaction that holds the device's row."""
    told = _newest(events)
    if not told:
        return
    rollouts = Rollout.objects.filter(state=Rollout.State.RUNNING, release__model__name__in=told)
    guarded = rollouts.exclude(guards={}).select_related("release__model", "group").prefetch_related("stages")
    for rollout in guarded:
        event, numbers = told[rollout.release.model.name]
        terms = _terms(rollout)
        if isinstance(terms, guards.Terms):
            last = heard_before.get(event.model)
            _note_one(rollout, terms, device, event, numbers, last)


def _newest(events: Sequence[Event]) -> dict[str, tuple[Event, Numbers]]:
    """The last usable report on each model."""
    told = {}
    for event in events:
        numbers = Numbers.parse(event.detail) if event.kind in {HEALTH, COMMITTED} and event.release else None
        if numbers is not None:
            told[event.model] = (event, numbers)
    return told


def _note_one(
    rollout: Rollout, terms: guards.Terms, device: Device, event: Event, numbers: Numbers, last: Numbers | None
) -> None:
    exposed = _side(rollout, device, event)
    if exposed is None:
        return
    key = {"rollout": rollout, "run": rollout.evidence_run, "device": device, "exposed": exposed}
    key["stage"] = 0 if exposed else rollout.stage_index
    watch = Watch.objects.filter(**key).first()
    if watch is None:
        watch = _begin(Watch(**key, since=timezone.now()), terms, numbers, last)
        if watch is None:
            return
    _look(watch, rollout, terms, numbers)
    watch.save()


def _side(rollout: Rollout, device: Device, event: Event) -> bool | None:
    """Whether the device is exposed: it runs the release because of the rollout. None: it is on neither side."""
    release = rollout.release
    runs_it = event.release is not None and event.release.version == release.version
    outcome = Outcome.objects.filter(rollout=rollout, device=device).first()
    if runs_it:
        because = outcome is not None and outcome.step != ""  # who ran it before has no step
        return True if because and event.rollout == str(rollout.pk) else None
    rules = snapshots.rules_of(rollout) if outcome is None else None
    return False if rules is not None and policy.targets(rules, device.labels, device.name) else None


def _begin(watch: Watch, terms: guards.Terms, numbers: Numbers, last: Numbers | None) -> Watch | None:
    """A new device in the comparison; None: not yet, or enough stand for its side.

    An exposed one began with the load of the release; its numbers before are what it told last of another load, or
    those of an earlier run. An unexposed one begins now, and its numbers before are those until now.
    """
    if watch.exposed:
        earlier = (
            Watch.objects.filter(rollout=watch.rollout, device=watch.device, exposed=True).order_by("-run").first()
        )
        before = last if last and last.load != numbers.load and last.calls >= terms.calls else None
        watch.before = earlier.before if earlier else before.to_json() if before else {}
        watch.base = last.to_json() if last and last.load == numbers.load else Numbers().to_json()
        return watch
    if numbers.calls < terms.calls or _enough_unexposed(watch):
        return None
    watch.before = watch.base = numbers.to_json()
    return watch


def _enough_unexposed(watch: Watch) -> bool:
    sheet = Sheet.objects.filter(rollout=watch.rollout, run=watch.run, stage=watch.stage, age=0).first()
    return sheet is not None and any(side[1]["devices"] >= UNEXPOSED_KEPT for side in sheet.sides.values())


def _look(watch: Watch, rollout: Rollout, terms: guards.Terms, numbers: Numbers) -> None:
    """Where a span is long enough, it becomes what the device adds at this age, and the next span begins."""
    span = numbers.since(Numbers.of_json(watch.base))
    old = (timezone.now() - watch.since).total_seconds()
    if not watch.before or watch.age >= len(guards.AGES) or span.calls < terms.calls or old < guards.AGES[watch.age]:
        return
    found = {name: each for name, each in changes(Numbers.of_json(watch.before), span).items() if name in terms.guards}
    Finding.objects.create(
        rollout=rollout,
        run=watch.run,
        stage=rollout.stage_index,
        age=watch.age,
        exposed=watch.exposed,
        changes={name: [each.now, each.change] for name, each in found.items()},
    )
    watch.scores = {name: guards.SCALES[name].score(each.change) for name, each in found.items()}
    watch.base, watch.age = numbers.to_json(), watch.age + 1


# --- by the engine ------------------------------------------------------------------------------------------------


def ask(rollout: Rollout, now: datetime) -> guards.Trip | policy.Hold | None:
    """Fold what came in, read every guard, and give the verdict. No objection where there is no guard."""
    if not rollout.guards:
        return None
    terms = _terms(rollout)
    if isinstance(terms, policy.Hold):
        return terms
    fold(rollout)
    readings = list(_readings(rollout, terms))
    return guards.verdict(terms, _remembered(rollout, terms, readings, now))


@transaction.atomic
def fold(rollout: Rollout) -> int:
    """Add waiting findings to their sheets; how many. The rollout's row is claimed: two engines fold one by one."""
    if not Finding.objects.filter(rollout=rollout).exists():
        return 0
    Rollout.objects.select_for_update().get(pk=rollout.pk)
    waiting = list(Finding.objects.filter(rollout=rollout).order_by("pk")[:FOLDED_AT_ONCE])
    mine = [each for each in waiting if each.run == rollout.evidence_run]
    sheets = {(row.stage, row.age): row for row in _sheets(rollout)}
    for finding in mine:
        place = (finding.stage, finding.age)
        blank = Sheet(rollout=rollout, run=rollout.evidence_run, stage=finding.stage, age=finding.age)
        _add(sheets.setdefault(place, blank), finding)
    for place in {(each.stage, each.age) for each in mine}:
        sheets[place].save()
    Finding.objects.filter(pk__in=[each.pk for each in waiting]).delete()
    return len(waiting)


def _add(sheet: Sheet, finding: Finding) -> None:
    for name, (now, change) in finding.changes.items():
        sides = sheet.sides.setdefault(name, [guards.Side().to_json(), guards.Side().to_json()])
        place = 0 if finding.exposed else 1
        side = guards.Side.of_json(sides[place])
        side.add(guards.SCALES[name], Change(now, change), exposed=finding.exposed)
        sides[place] = side.to_json()


def _sheets(rollout: Rollout) -> Iterable[Sheet]:
    return Sheet.objects.filter(rollout=rollout, run=rollout.evidence_run)


def _readings(rollout: Rollout, terms: guards.Terms) -> Iterable[guards.Reading]:
    sheets, stages = list(_sheets(rollout)), len(rollout.stages.all())
    for name in terms.guards:
        if name == guards.FAILURES:
            yield guards.failures_reading(terms, *_updates(rollout))
            continue
        rows = [(sheet, sheet.sides[name]) for sheet in sheets if name in sheet.sides]
        compared = [
            guards.Comparison(sheet.stage, sheet.age, *(guards.Side.of_json(side) for side in sides))
            for sheet, sides in rows
        ]
        yield guards.reading(name, terms, compared, stages)


def _updates(rollout: Rollout) -> tuple[int, int, int]:
    """Devices that ever began; that began, or began again, since the evidence did; and how many of these failed.

    Who ran it before has no step. A resume accepts the failures so far: `forgiven` counts them, and who failed does not
    begin again. Who went on running it has nothing to begin, and is still known about.
    """
    said = Outcome.objects.filter(rollout=rollout).exclude(step="")
    since = Q(changed_at__gte=rollout.evidence_since) if rollout.evidence_since else Q()
    failures = Q(state=Outcome.State.FAILED)
    ever, began, failed = said.aggregate(
        ever=Count("pk"), began=Count("pk", filter=since), failed=Count("pk", filter=failures)
    ).values()
    failed = max(failed - rollout.forgiven, 0)
    return ever, max(began, failed), failed


def _remembered(
    rollout: Rollout, terms: guards.Terms, readings: Sequence[guards.Reading], now: datetime
) -> list[guards.Reading]:
    """Each with the highest evidence so far. What changed is written, for who looks and for the next tick."""
    rows = {row.guard: row for row in GuardReading.objects.filter(rollout=rollout, run=rollout.evidence_run)}
    kept = []
    for found in readings:
        row = rows.get(found.name)
        reading = replace(found, peak=max(found.evidence, row.peak if row else 0.0))
        kept.append(reading)
        seen = (reading.compared, reading.strongest.unexposed.devices, reading.evidence)
        if row is None or (row.compared, row.unexposed, row.evidence) != seen:
            _write(rollout, terms, reading, row, now)
    return kept


def _write(
    rollout: Rollout, terms: guards.Terms, reading: guards.Reading, row: GuardReading | None, now: datetime
) -> None:
    points = [*(row.points if row else []), [int(now.timestamp()), round(reading.evidence, 3)]]
    GuardReading.objects.update_or_create(
        rollout=rollout,
        run=rollout.evidence_run,
        guard=reading.name,
        defaults={
            "compared": reading.compared,
            "unexposed": reading.strongest.unexposed.devices,
            "evidence": reading.evidence,
            "peak": reading.peak,
            "sentence": reading.sentence(terms)[:500],
            "points": points if len(points) <= POINTS else [*points[:-2:2], points[-1]],
            "at": now,
        },
    )


# --- what is shown ------------------------------------------------------------------------------------------------


def readings(rollout: Rollout) -> list[GuardReading]:
    """What each guard saw last, in this run of the evidence."""
    return list(GuardReading.objects.filter(rollout=rollout, run=rollout.evidence_run))


def looked_at(rollout: Rollout, terms: guards.Terms) -> list[guards.Reading]:
    """What the guards see in what was folded so far. Writes nothing."""
    peaks = {row.guard: row.peak for row in readings(rollout)}
    return [replace(found, peak=max(found.evidence, peaks.get(found.name, 0.0))) for found in _readings(rollout, terms)]


def terms_of(rollout: Rollout) -> guards.Terms | None:
    """None where it has no guards, or where they cannot be read."""
    terms = _terms(rollout) if rollout.guards else None
    return terms if isinstance(terms, guards.Terms) else None


def _terms(rollout: Rollout) -> guards.Terms | policy.Hold:
    try:
        return guards.Terms.parse(rollout.guards)
    except (ValueError, TypeError) as error:
        return policy.Hold(f"the guards' terms are malformed: {error}"[:500])


# --- housekeeping -------------------------------------------------------------------------------------------------


def thin(now: datetime) -> int:
    """Forget what no comparison will read again; how many rows. What guards have seen (sheets, readings) stays.

    1. Unexposed devices of an earlier stage or run: they are compared anew in each.
    2. Devices of a rollout that is over, and what they told last: after `WATCHES_KEPT`, since one that was halted, or
       rolled back when it was complete, may be resumed; those of a cancelled one at once.
    """
    over = Q(rollout__finished_at__lt=now - WATCHES_KEPT) | Q(rollout__state=Rollout.State.CANCELLED)
    in_force = Q(stage=F("rollout__stage_index"), run=F("rollout__evidence_run"))
    number, _ = Watch.objects.filter(over | Q(exposed=False) & ~in_force).delete()
    return number + Finding.objects.filter(over).delete()[0]
