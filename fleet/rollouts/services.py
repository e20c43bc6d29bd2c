"""All that changes a rollout. Every move is a compare-and-set on its state, with a row that says who and why."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from itertools import pairwise
from math import isfinite
from secrets import token_hex
from typing import Any

import structlog
from django.contrib.auth.models import User
from django.db import transaction
from django.utils import timezone

from device_sdk.protocol import events as wire
from device_sdk.protocol.assignment import Conditions, Probation, Window
from device_sdk.protocol.errors import ProtocolError
from fleet.audit import services as audit
from fleet.devices import services as devices
from fleet.devices.models import Device, Group, ModelStatus
from fleet.devices.selectors import members, version_of
from fleet.errors import Conflict, Invalid
from fleet.releases import selectors as releases
from fleet.releases.deltas import services as deltas
from fleet.releases.models import Release
from fleet.rollouts import policy, selectors, snapshots
from fleet.rollouts.models import Outcome, Rollout, RolloutAction, Stage

START, PAUSE, RESUME, CANCEL, ROLL_BACK = "start", "pause", "resume", "cancel", "roll_back"
CREATE, ADVANCE, COMPLETE, HALT = "create", "advance", "complete", "halt"
GUARD = "guard"  # the actor of what nobody did

State = Rollout.State
TRANSITIONS = {
    (State.DRAFT, START): State.RUNNING,
    (State.DRAFT, CANCEL): State.CANCELLED,
    (State.AWAITING_APPROVAL, CANCEL): State.CANCELLED,
    (State.RUNNING, PAUSE): State.PAUSED,
    (State.RUNNING, CANCEL): State.CANCELLED,
    (State.RUNNING, ROLL_BACK): State.HALTED,
    (State.RUNNING, HALT): State.HALTED,
    (State.RUNNING, ADVANCE): State.RUNNING,
    (State.RUNNING, COMPLETE): State.COMPLETED,
    (State.PAUSED, RESUME): State.RUNNING,
    (State.PAUSED, CANCEL): State.CANCELLED,
    (State.PAUSED, ROLL_BACK): State.HALTED,
    (State.HALTED, RESUME): State.RUNNING,
    (State.HALTED, CANCEL): State.CANCELLED,
    (State.COMPLETED, ROLL_BACK): State.HALTED,
}
ENDED = {State.HALTED, State.CANCELLED, State.COMPLETED}
OVER = {State.CANCELLED, State.COMPLETED}
SALTS_TRIED = 64

logger = structlog.get_logger(__name__)


# --- by people ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage as its author wants it; see `models.Stage`."""

    percent: float
    soak_seconds: int = 0
    min_reports: int = 1
    success_threshold: float = 0.9
    failure_budget: int = 0


@transaction.atomic
def create(  # noqa: PLR0913  # a rollout has so many terms
    *,
    release: Release,
    group: Group | None,
    stages: Sequence[StagePlan],
    actor: User | str,
    on_failure: str = Rollout.OnFailure.ROLL_BACK,
    urgent: bool = False,
    window: Mapping[str, int] | None = None,
    probation: Mapping[str, float] | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Rollout:
    """Draft a rollout of a valid release. `group` None: every device. The last three are as on the wire."""
    _check_release(release)
    _check_stages(stages)
    if on_failure not in Rollout.OnFailure.values:
        raise Invalid("malformed", f"on_failure: expected one of {Rollout.OnFailure.values}; got {on_failure!r:.40}")
    rollout = Rollout.objects.create(
        release=release,
        group=group,
        salt=token_hex(16),
        on_failure=on_failure,
        urgent=urgent,
        window=_checked_window(window),
        probation=_checked_probation(probation),
        conditions=_checked_conditions(conditions),
        created_by=actor if isinstance(actor, User) else None,
    )
    Stage.objects.bulk_create([Stage(rollout=rollout, index=i, **asdict(plan)) for i, plan in enumerate(stages)])
    plan = {
        "release": str(release),
        "group": group.name if group else "every device",
        "stages": [asdict(stage) for stage in stages],
        "on_failure": rollout.on_failure,
        "urgent": urgent,
        "window": rollout.window,
        "probation": rollout.probation,
        "conditions": rollout.conditions,
    }
    _log(rollout.pk, CREATE, actor, "", plan)
    return rollout


@transaction.atomic
def start(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """Draft to running, at the first stage."""
    row = _fetch(rollout)
    _check_release(row.release)
    now = timezone.now()
    moved = _move(row, START, actor, comment, started_at=now, stage_since=now, salt=_fair_salt(row))
    Stage.objects.filter(rollout=moved, index=0).update(entered_at=now)
    _credit_those_who_run_it(moved)
    if deltas.order(release=row.release):  # devices may run something else than when it was published
        deltas.wake()
    return moved


def pause(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """Recall whoever has not activated it yet; those who run it keep it."""
    return _move(_fetch(rollout), PAUSE, actor, comment)


@transaction.atomic
def resume(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """Go on with the same stage. The failures so far are accepted; the devices that failed are not asked again."""
    row = _fetch(rollout)
    _check_release(row.release)
    failures = selectors.outcome_counts(row)[Outcome.State.FAILED]
    return _move(row, RESUME, actor, comment, stage_since=timezone.now(), forgiven=failures)


def cancel(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """For good: nobody is admitted any more, devices go back to what an older rollout gives them."""
    return _move(_fetch(rollout), CANCEL, actor, comment)


def roll_back(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """Admit nobody, also after completion: devices go back. A person may resume it."""
    return _move(_fetch(rollout), ROLL_BACK, actor, comment)


def on_revoked(*, release: Release, reason: str, **_: object) -> None:
    """End every rollout of a revoked release that has an end to come, and let no process keep the old policy.

    A completed one stays in the history; the policy leaves it out, so that its devices go to what is older and valid.
    """
    for pk in Rollout.objects.filter(release=release).exclude(state__in=OVER).values_list("pk", flat=True):
        try:
            cancel(rollout=pk, actor=GUARD, comment=f"{release} was revoked: {reason}")
        except Conflict:  # it moved meanwhile; whatever it is now, the policy leaves out what is revoked
            logger.info("rollout_moved_meanwhile", rollout=pk)
    snapshots.bump()


def on_when_nothing_changed(**_: object) -> None:
    snapshots.bump()


def pin(*, device: Device, model: str, version: str | None, actor: User | str) -> None:
    """Fix a device's model to a valid release, whatever rollouts say; None lets it go."""
    if version is not None:
        release = Release.objects.filter(model__name=model, version=version, state=Release.State.VALID)
        if not release.exists():
            found = releases.release(model, version)
            reason = releases.standing(found) if found else f"{model} {version}: there is no such release"
            raise Invalid("release_not_valid", f"{reason}; expected a valid release")
    devices.set_pin(device=device, model=model, version=version, actor=actor)


# --- by devices --------------------------------------------------------------------------------------------------

OUTCOMES = {
    wire.WAITING: Outcome.State.UPDATING,
    wire.DOWNLOADING: Outcome.State.UPDATING,
    wire.VERIFYING: Outcome.State.UPDATING,
    wire.TESTING: Outcome.State.UPDATING,
    wire.ACTIVATING: Outcome.State.UPDATING,
    wire.PROBATION: Outcome.State.UPDATING,
    wire.COMMITTED: Outcome.State.COMMITTED,
    wire.FAILED: Outcome.State.FAILED,
    wire.ROLLED_BACK: Outcome.State.FAILED,
    wire.WITHDRAWN: Outcome.State.WITHDRAWN,
}
# It never falls; whoever was recalled may begin again.
RANK: dict[str, int] = {
    Outcome.State.UPDATING: 0,
    Outcome.State.WITHDRAWN: 0,
    Outcome.State.COMMITTED: 1,
    Outcome.State.FAILED: 2,
}
ROLLOUT_ID = re.compile(r"[0-9]{1,18}")


@transaction.atomic
def note_events(device: Device, events: Sequence[wire.Event]) -> None:
    """Keep how the device fares in the rollouts that its events name. A failure wakes the engine.

    Only a rollout that was started and admits the device, and only its own release: events are the device's word.
    """
    named = {int(event.rollout) for event in events if event.kind in OUTCOMES and ROLLOUT_ID.fullmatch(event.rollout)}
    started = Rollout.objects.filter(pk__in=named, started_at__isnull=False) if named else Rollout.objects.none()
    rollouts = list(started.select_related("release__model", "group").prefetch_related("stages"))
    if not rollouts:
        return
    Device.objects.select_for_update().get(pk=device.pk)  # its reports one after another
    outcomes = {row.rollout_id: row for row in Outcome.objects.filter(device=device, rollout__in=rollouts)}
    failures = _failures(outcomes.values())
    for rollout in rollouts:
        told = [event for event in events if event.rollout == str(rollout.pk) and _is_report(event, rollout)]
        if told and (rollout.pk in outcomes or _admitted(rollout, device)):
            outcomes[rollout.pk] = _after(told, outcomes.get(rollout.pk) or Outcome(rollout=rollout, device=device))
    _store(outcomes.values())
    if _failures(outcomes.values()) > failures:
        wake_engine()


def wake_engine() -> None:
    """After the commit. A broker that is away loses nothing: the beat ticks too."""
    from fleet.rollouts import tasks

    transaction.on_commit(tasks.tick.delay, robust=True)


def _is_report(event: wire.Event, rollout: Rollout) -> bool:
    release = rollout.release
    mine = event.release and (event.release.model, event.release.version) == (release.model.name, release.version)
    return bool(mine) and event.kind in OUTCOMES


def _admitted(rollout: Rollout, device: Device) -> bool:
    """Whether the device is in the rollout's cohort, whatever became of the rollout since."""
    rules = snapshots.rules_of(rollout)
    if rules is None or rollout.release.model.name not in device.model_names:
        return False
    return policy.targets(rules, device.labels) and policy.in_cohort(rules.salt, device.name, rules.percent)


def _after(events: Sequence[wire.Event], outcome: Outcome) -> Outcome:
    for event in events:
        state = OUTCOMES[event.kind]
        if RANK[state] >= RANK.get(outcome.state, 0):
            outcome.state, outcome.step, outcome.reason = state, event.kind, event.reason
    return outcome


def _failures(outcomes: Iterable[Outcome]) -> int:
    return sum(outcome.state == Outcome.State.FAILED for outcome in outcomes)


def _store(outcomes: Collection[Outcome]) -> None:
    now = timezone.now()
    for outcome in outcomes:
        outcome.changed_at = now
    Outcome.objects.bulk_create(
        outcomes,
        update_conflicts=True,
        unique_fields=["rollout", "device"],
        update_fields=["state", "step", "reason", "changed_at"],
    )


# --- by the engine -----------------------------------------------------------------------------------------------


def tick() -> None:
    """Let every running rollout take the step that its policy says. Safe to repeat, and with two engines at once."""
    running = Rollout.objects.filter(state=State.RUNNING).select_related("release__model", "group")
    for rollout in running.prefetch_related("stages"):
        try:
            _step(rollout, timezone.now())
        except Exception:  # one rollout that cannot be judged must not keep another from being halted
            logger.exception("rollout_step_failed", rollout=rollout.pk)


def _step(rollout: Rollout, now: datetime) -> None:
    rules = _stage_rules(rollout)
    quick = selectors.tally(rollout, counted=False)
    worthwhile = policy.enough_reports(rules, quick, now)
    decision = policy.next_step(rules, selectors.tally(rollout, counted=True) if worthwhile else quick, now)
    try:
        _apply(rollout, decision, now)
    except Conflict:
        logger.info("rollout_moved_meanwhile", rollout=rollout.pk)


def _stage_rules(rollout: Rollout) -> policy.StageRules:
    stages = list(rollout.stages.all())
    stage = next((stage for stage in stages if stage.index == rollout.stage_index), None)
    return policy.StageRules(
        percent=stage.percent if stage else float("nan"),
        soak_seconds=stage.soak_seconds if stage else 0,
        min_reports=stage.min_reports if stage else 0,
        success_threshold=stage.success_threshold if stage else float("nan"),
        failure_budget=stage.failure_budget if stage else 0,
        last=stage is not None and stage == stages[-1],
        on_failure=rollout.on_failure,
        since=rollout.stage_since,
    )


def _apply(rollout: Rollout, decision: policy.Decision, now: datetime) -> None:
    match decision:
        case policy.Hold(reason):
            _note_hold(rollout, reason)
        case policy.Halt(reason):
            _move(rollout, HALT, GUARD, reason)
        case policy.Pause(reason):
            _move(rollout, PAUSE, GUARD, reason)
        case policy.Advance():
            _pass_stage(rollout, ADVANCE, now, stage_index=rollout.stage_index + 1, stage_since=now)
        case policy.Complete():
            _pass_stage(rollout, COMPLETE, now)


@transaction.atomic
def _pass_stage(rollout: Rollout, action: str, now: datetime, **changes: Any) -> None:
    passed = rollout.stage_index
    _move(rollout, action, GUARD, f"stage {passed + 1} passed", **changes)
    Stage.objects.filter(rollout=rollout, index=passed).update(passed_at=now)
    Stage.objects.filter(rollout=rollout, index=passed + 1).update(entered_at=now)


def _note_hold(rollout: Rollout, reason: str) -> None:
    """Say why it does not move, where that changed. Not an action: nothing was done."""
    if rollout.reason != reason:
        here = Rollout.objects.filter(pk=rollout.pk, state=State.RUNNING, stage_index=rollout.stage_index)
        here.update(reason=reason)


# --- shared ------------------------------------------------------------------------------------------------------


@transaction.atomic
def _move(rollout: Rollout, action: str, actor: User | str, comment: str, **changes: Any) -> Rollout:
    """Claim a transition from the state and stage in which the caller saw the rollout, or raise `wrong_state`."""
    before = State(rollout.state)
    after = TRANSITIONS.get((before, action))
    if after is None:
        raise Conflict("wrong_state", f"rollout {rollout.pk} is {before.label}: cannot {action.replace('_', ' ')}")
    changes |= {"state": after, "reason": comment[:500], "finished_at": timezone.now() if after in ENDED else None}
    seen = Rollout.objects.filter(pk=rollout.pk, state=before, stage_index=rollout.stage_index)
    if not seen.update(**changes):
        raise Conflict("wrong_state", f"rollout {rollout.pk} was changed meanwhile; look again")
    detail = {
        "was": before.value,
        "is": State(after).value,
        "stage": changes.get("stage_index", rollout.stage_index) + 1,
    }
    _log(rollout.pk, action, actor, comment, detail)
    snapshots.bump()
    rollout.refresh_from_db()
    return rollout


def _fetch(rollout: Rollout | int) -> Rollout:
    """As it is now: the caller may have looked at it a while ago."""
    pk = rollout if isinstance(rollout, int) else rollout.pk
    return Rollout.objects.select_related("release__model", "group").get(pk=pk)


def _log(rollout: int, action: str, actor: User | str, comment: str, detail: Mapping[str, Any]) -> None:
    name = actor.get_username() if isinstance(actor, User) else actor
    RolloutAction.objects.create(rollout_id=rollout, action=action, actor=name, comment=comment)
    by = audit.guard() if actor == GUARD else None
    audit.record(f"rollout.{action}", target=rollout, detail={**detail, "for": name}, comment=comment, by=by)
    logger.info("rollout_action", rollout=rollout, action=action, actor=name, comment=comment)


def _check_release(release: Release) -> None:
    if release.state != Release.State.VALID:
        raise Invalid("release_not_valid", f"{releases.standing(release)}; only a valid release can be rolled out")


def _check_stages(stages: Sequence[StagePlan]) -> None:
    percents = [plan.percent for plan in stages]
    rising = all(low < high for low, high in pairwise(percents))
    if not percents or not rising or percents[0] <= 0 or percents[-1] != 100:
        raise Invalid("stages_malformed", f"stages: percentages must rise from over 0 to 100; got {percents}")
    for plan in stages:
        counts = (plan.soak_seconds, plan.min_reports, plan.failure_budget)
        share = plan.success_threshold
        if min(counts) < 0 or not (isfinite(share) and 0 <= share <= 1):
            raise Invalid(
                "stages_malformed", f"stages: expected whole numbers, and a threshold from 0 to 1; got {plan}"
            )


def _checked_window(window: Mapping[str, int] | None) -> dict[str, int] | None:
    if window is None:
        return None
    try:
        return asdict(Window.parse(dict(window)))
    except ProtocolError as error:
        raise Invalid(error.code, error.message) from error


def _checked_conditions(conditions: Mapping[str, Any] | None) -> dict[str, Any]:
    """Devices pass over conditions that they do not know; here an unknown one is a mistake."""
    unknown = set(conditions or ()) - {field.name for field in fields(Conditions)}
    if unknown:
        raise Invalid("malformed", f"conditions: unknown: {', '.join(sorted(unknown)):.200}")
    try:
        return Conditions.parse(dict(conditions or {})).to_json()
    except ProtocolError as error:
        raise Invalid(error.code, error.message) from error


def _checked_probation(probation: Mapping[str, float] | None) -> dict[str, float]:
    try:
        return asdict(Probation.parse({**asdict(Probation()), **probation})) if probation else {}
    except ProtocolError as error:
        raise Invalid(error.code, error.message) from error


def _fair_salt(rollout: Rollout) -> str:
    """A salt by which every stage gets the reports that it asks for, where the group is large enough for that.

    Ten percent of eight devices is often nobody, and half of them now and then one: such a stage would wait for ever.
    """
    model = rollout.release.model.name
    names = [device.name for device in members(rollout.group) if model in device.model_names and not device.pins]
    salts = [rollout.salt, *(token_hex(16) for _ in range(SALTS_TRIED))] if len(names) < 1_000 else [rollout.salt]
    asked = [(stage.percent, min(stage.min_reports, len(names))) for stage in rollout.stages.all()]

    def is_fair(salt: str) -> bool:
        return all(sum(policy.in_cohort(salt, name, percent) for name in names) >= enough for percent, enough in asked)

    return next(filter(is_fair, salts), rollout.salt)


def _credit_those_who_run_it(rollout: Rollout) -> None:
    """Devices that committed this release before have nothing left to report: they count from the start."""
    model, version = rollout.release.model.name, rollout.release.version
    in_trial = set(
        ModelStatus.objects.filter(model=model, state__in=[wire.ACTIVATING, wire.PROBATION]).values_list(
            "device_id", flat=True
        )
    )
    running = [
        device
        for device in members(rollout.group)
        if device.runs and version_of(device.runs.runs.get(model, "")) == version
        if device.pk not in in_trial and model not in device.pins
    ]
    ran = "ran it before the rollout"
    Outcome.objects.bulk_create(
        [Outcome(rollout=rollout, device=device, state=Outcome.State.COMMITTED, reason=ran) for device in running]
    )
