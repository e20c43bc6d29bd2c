"""All that changes a rollout. Every move is a compare-and-set on its state, with a row that says who and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from secrets import token_hex
from typing import Any

import structlog
from django.contrib.auth.models import User
from django.db import transaction
from django.utils import timezone

from device_sdk.protocol.assignment import MAX_HOLD
from fleet.audit import services as audit
from fleet.devices import services as devices
from fleet.devices.models import Device, Group
from fleet.errors import Conflict, Invalid
from fleet.releases import selectors as releases
from fleet.releases.deltas import services as deltas
from fleet.releases.models import Release
from fleet.rollouts import (
    approval,
    attempts,
    engine_clock,
    evidence,
    guards,
    notes,
    policy,
    selectors,
    snapshots,
    targeting,
    throttle,
)
from fleet.rollouts.counting import starting
from fleet.rollouts.counting.tallies import Tallies
from fleet.rollouts.engine_clock import Moment
from fleet.rollouts.models import Outcome, Rollout, RolloutAction, Stage
from fleet.rollouts.reports import note_events, wake_engine
from fleet.rollouts.terms import watch
from fleet.rollouts.terms.basics import StagePlan, checked_conditions, checked_window, columns
from fleet.rollouts.terms.pace import USUAL, Pace

__all__ = ["StagePlan", "note_events", "wake_engine"]

START, PAUSE, RESUME, CANCEL, ROLL_BACK = "start", "pause", "resume", "cancel", "roll_back"
SUBMIT, APPROVE, REJECT, SCHEDULE, APPROVE_STAGE = "submit", "approve", "reject", "schedule", "approve_stage"
CREATE, ADVANCE, COMPLETE, HALT = "create", "advance", "complete", "halt"
GUARD = "guard"  # the actor of what nobody did

State = Rollout.State
TRANSITIONS = {
    (State.DRAFT, START): State.RUNNING,
    (State.DRAFT, SUBMIT): State.AWAITING_APPROVAL,
    (State.DRAFT, SCHEDULE): State.SCHEDULED,
    (State.DRAFT, CANCEL): State.CANCELLED,
    (State.AWAITING_APPROVAL, APPROVE): State.SCHEDULED,
    (State.AWAITING_APPROVAL, REJECT): State.CANCELLED,
    (State.AWAITING_APPROVAL, CANCEL): State.CANCELLED,
    (State.SCHEDULED, START): State.RUNNING,
    (State.SCHEDULED, CANCEL): State.CANCELLED,
    (State.RUNNING, PAUSE): State.PAUSED,
    (State.RUNNING, CANCEL): State.CANCELLED,
    (State.RUNNING, ROLL_BACK): State.HALTED,
    (State.RUNNING, HALT): State.HALTED,
    (State.RUNNING, ADVANCE): State.RUNNING,
    (State.RUNNING, APPROVE_STAGE): State.RUNNING,
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

logger = structlog.get_logger(__name__)


# --- by people ---------------------------------------------------------------------------------------------------


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
    max_hold: int = MAX_HOLD,
    forgive: bool = False,
    selector: str = "",
    exclude: str = "",
    exclude_group: Group | None = None,
    guards: Mapping[str, Any] | None = None,
    pace: Pace = USUAL,
) -> Rollout:
    """Draft a rollout of a valid release. `group` None: every device; `window` to `forgive` are as on the wire.

    `selector` narrows the group, `exclude` and `exclude_group` leave devices of it out: see `devices.selection`. For
    `guards` see `guards.Terms`.
    """
    pace.check()
    check_release(release)
    reached = targeting.percents(stages)
    targeting.check_guards(stages)
    if on_failure not in Rollout.OnFailure.values:
        raise Invalid("malformed", f"on_failure: expected one of {Rollout.OnFailure.values}; got {on_failure!r:.40}")
    rollout = Rollout.objects.create(
        release=release,
        group=group,
        salt=token_hex(16),
        on_failure=on_failure,
        urgent=urgent,
        window=checked_window(window),
        probation=watch.checked_probation(probation),
        conditions=checked_conditions(conditions),
        max_hold=watch.checked_max_hold(max_hold),
        forgive=forgive,
        guards=evidence.checked(guards),
        created_by=actor if isinstance(actor, User) else None,
        **targeting.checked(selector=selector, exclude=exclude, exclude_group=exclude_group),
        **pace.columns(),
    )
    rows = [columns(plan) | {"percent": percent} for plan, percent in zip(stages, reached, strict=True)]
    Stage.objects.bulk_create([Stage(rollout=rollout, index=index, **row) for index, row in enumerate(rows)])
    plan = {
        "release": str(release),
        "group": group.name if group else "every device",
        "selector": rollout.selector,
        "exclude": rollout.exclude,
        "exclude_group": exclude_group.name if exclude_group else "",
        "stages": [row | {"ring": row["ring"].name if row["ring"] else ""} for row in rows],
        "on_failure": rollout.on_failure,
        "urgent": urgent,
        "window": rollout.window,
        "probation": rollout.probation,
        "conditions": rollout.conditions,
        "max_hold": max_hold,
        "forgive": forgive,
        "guards": rollout.guards,
        **pace.told(),
    }
    _log(rollout.pk, CREATE, actor, "", plan)
    return rollout


@transaction.atomic
def start(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """Draft to running, at the first stage; or to waiting for approval where that is needed, or for its time to come.

    One that waits for its time begins at once.
    """
    row = fetch(rollout)
    check_release(row.release)
    if row.state == State.DRAFT and approval.is_needed(row):
        approval.check_author(row)
        return move(row, SUBMIT, actor, comment)
    if row.state == State.DRAFT and is_early(row):
        return move(row, SCHEDULE, actor, comment)
    return begin(row, actor, comment)


def is_early(rollout: Rollout) -> bool:
    return rollout.start_at is not None and rollout.start_at > timezone.now()


@transaction.atomic
def begin(row: Rollout, actor: User | str, comment: str) -> Rollout:
    """To running, by whoever's word that is."""
    now, who = timezone.now(), starting.members(row)
    kept = {"stage_lost": engine_clock.lost(), "reach": throttle.beginning(row), "reach_at": None}
    since = {"started_at": now, "stage_since": now, "evidence_since": now}
    moved = claim(row, START, actor, comment, salt=starting.fair_salt(row, who), **since, **kept)
    Stage.objects.filter(rollout=moved, index=0).update(entered_at=now)
    starting.credit_those_who_run_it(moved, who)
    if deltas.order(release=row.release):  # devices may run something else than when it was published
        deltas.wake()
    snapshots.bump()  # last: from here to the commit every revocation waits for us
    return moved


def pause(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """Recall whoever has not activated it yet; those who run it keep it."""
    return move(fetch(rollout), PAUSE, actor, comment)


@transaction.atomic
def resume(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """Go on with the same stage. The failures so far are accepted; the devices that failed are not asked again."""
    row = fetch(rollout)
    check_release(row.release)
    failures = selectors.outcome_counts(row)[Outcome.State.FAILED] - selectors.to_be_retried(row)
    now, run = timezone.now(), row.evidence_run + 1  # what halted it is accepted: the guards begin anew
    kept = {"stage_since": now, "stage_lost": engine_clock.lost(), "evidence_run": run, "evidence_since": now}
    return move(row, RESUME, actor, comment, forgiven=failures, **kept)


def cancel(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """For good: nobody is admitted any more, devices go back to what an older rollout gives them."""
    return move(fetch(rollout), CANCEL, actor, comment)


def roll_back(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """Admit nobody, also after completion: devices go back. A person may resume it."""
    return move(fetch(rollout), ROLL_BACK, actor, comment)


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


def pin(*, device: Device, model: str, version: str | None, actor: User | str, comment: str = "") -> None:
    """Fix a device's model to a valid release, whatever rollouts say; None lets it go."""
    if version is not None:
        release = Release.objects.filter(model__name=model, version=version, state=Release.State.VALID)
        if not release.exists():
            found = releases.release(model, version)
            reason = releases.standing(found) if found else f"{model} {version}: there is no such release"
            raise Invalid("release_not_valid", f"{reason}; expected a valid release")
    devices.set_pin(device=device, model=model, version=version, actor=actor, comment=comment)


# --- by the engine -----------------------------------------------------------------------------------------------


def tick() -> None:
    """Let every running rollout take the step that its policy says. Safe to repeat, and with two engines at once."""
    moment = engine_clock.look()
    _unless_it_fails("begin_due", _begin_due, moment)
    _unless_it_fails("look_after_devices", attempts.look_after, moment)
    running = Rollout.objects.filter(state=State.RUNNING).select_related("release__model", "group", "exclude_group")
    rows = sorted(running.prefetch_related("stages__ring"), key=Tallies.turn)
    tallies = Tallies(rows)
    for rollout in rows:
        _unless_it_fails("rollout_step", _step, rollout, tallies, moment)


def _unless_it_fails(what: str, act: Callable[..., object], *subject: object) -> None:
    """One rollout that cannot be judged must not keep another from being halted."""
    try:
        act(*subject)
    except Exception:
        logger.exception("engine_failed", at=what, subject=[getattr(each, "pk", "") for each in subject])


def _begin_due(moment: Moment) -> None:
    due = Rollout.objects.filter(state=State.SCHEDULED, start_at__lte=moment.now)
    for rollout in due.select_related("release__model", "group", "exclude_group"):
        _unless_it_fails("rollout_start", _begin_by_itself, rollout)


def _begin_by_itself(rollout: Rollout) -> None:
    try:
        check_release(rollout.release)
        begin(rollout, GUARD, "its time has come")
    except Invalid as error:  # it may be valid later; meanwhile its page says why nothing happens
        Rollout.objects.filter(pk=rollout.pk, state=State.SCHEDULED).update(reason=error.message[:500])
    except Conflict:
        logger.info("rollout_moved_meanwhile", rollout=rollout.pk)


def _step(rollout: Rollout, tallies: Tallies, moment: Moment) -> None:
    rules, now = replace(_stage_rules(rollout), since=engine_clock.counted_since(rollout, moment)), moment.now
    throttle.widen(rollout, rules.percent, now, said=tallies.said(rollout), roster=tallies.roster)
    asked = evidence.ask(rollout, now)
    decision = policy.next_step(rules, tallies.of(rollout, rules, now), now)
    try:
        judged = guards.before_success(asked, rollout.on_failure, decision)
        _apply(rollout, _held_back(judged, rollout, rules.percent), now)
    except Conflict:
        logger.info("rollout_moved_meanwhile", rollout=rollout.pk)


WANTS_APPROVAL = "waiting for a person's approval to pass the stage"


def _held_back(decision: policy.Decision, rollout: Rollout, percent: float) -> policy.Decision:
    """A stage that has done well passes when all of it was admitted, and a person agreed where that is needed."""
    if not isinstance(decision, policy.Advance | policy.Complete):
        return decision
    unfinished = throttle.unfinished(rollout, percent)
    if unfinished:
        return policy.Hold(unfinished)
    return policy.Hold(WANTS_APPROVAL) if approval.stage_waits(rollout) else decision


def _stage_rules(rollout: Rollout) -> policy.StageRules:
    stages = list(rollout.stages.all())
    stage = next((stage for stage in stages if stage.index == rollout.stage_index), None)
    return policy.StageRules(
        percent=stage.percent if stage else float("nan"),
        soak_seconds=stage.soak_seconds if stage else 0,
        min_reports=stage.min_reports if stage else 0,
        success_threshold=stage.success_threshold if stage else float("nan"),
        failure_budget=stage.failure_budget if stage else 0,
        ring=stage is not None and stage.ring_id is not None,
        last=stage is not None and stage == stages[-1],
        on_failure=rollout.on_failure,
        since=rollout.stage_since,
    )


def _apply(rollout: Rollout, decision: policy.Decision, now: datetime) -> None:
    match decision:
        case policy.Hold(reason):
            _note_hold(rollout, reason)
        case policy.Halt(reason):
            move(rollout, HALT, GUARD, reason)
        case policy.Pause(reason):
            move(rollout, PAUSE, GUARD, reason)
        case policy.Advance():
            _pass_stage(rollout, ADVANCE, now, stage_index=rollout.stage_index + 1)
        case policy.Complete():
            _pass_stage(rollout, COMPLETE, now)


@transaction.atomic
def _pass_stage(rollout: Rollout, action: str, now: datetime, **changes: Any) -> None:
    passed = rollout.stage_index
    if action == ADVANCE:
        changes |= {"stage_since": now, "stage_lost": engine_clock.lost()}
    claim(rollout, action, GUARD, f"stage {passed + 1} passed", **changes)
    Stage.objects.filter(rollout=rollout, index=passed).update(passed_at=now)
    Stage.objects.filter(rollout=rollout, index=passed + 1).update(entered_at=now)
    snapshots.bump()


@transaction.atomic
def _note_hold(rollout: Rollout, reason: str) -> None:
    """Say why it does not move, where that changed. Not an action: nothing was done."""
    if rollout.reason != reason:
        here = Rollout.objects.filter(pk=rollout.pk, state=State.RUNNING, stage_index=rollout.stage_index)
        if here.exclude(reason=reason).update(reason=reason) and reason == WANTS_APPROVAL:
            notes.tell_stage_wanted(rollout)


# --- shared ------------------------------------------------------------------------------------------------------


@transaction.atomic
def move(rollout: Rollout, action: str, actor: User | str, comment: str, **changes: Any) -> Rollout:
    """Claim a transition from the state and stage in which the caller saw the rollout, or raise `wrong_state`."""
    moved = claim(rollout, action, actor, comment, **changes)
    snapshots.bump()
    return moved


def claim(rollout: Rollout, action: str, actor: User | str, comment: str, **changes: Any) -> Rollout:
    """Who calls this ends the transaction with `snapshots.bump`."""
    before, to = State(rollout.state), after(rollout, action)
    changes |= {"state": to, "reason": comment[:500], "finished_at": timezone.now() if to in ENDED else None}
    seen = Rollout.objects.filter(pk=rollout.pk, state=before, stage_index=rollout.stage_index)
    if not seen.update(**changes):
        raise Conflict("wrong_state", f"rollout {rollout.pk} was changed meanwhile; look again")
    detail = {
        "was": before.value,
        "is": State(to).value,
        "stage": changes.get("stage_index", rollout.stage_index) + 1,
    }
    _log(rollout.pk, action, actor, comment, detail)
    rollout.refresh_from_db()
    notes.tell(rollout, action, name_of(actor), comment)
    return rollout


def after(rollout: Rollout, action: str) -> State:
    """The state that an action leads to from the one it is in. Conflict `wrong_state` where it leads nowhere."""
    before = State(rollout.state)
    found = TRANSITIONS.get((before, action))
    if found is None:
        raise Conflict("wrong_state", f"rollout {rollout.pk} is {before.label}: cannot {action.replace('_', ' ')}")
    return found


def fetch(rollout: Rollout | int) -> Rollout:
    """As it is now: the caller may have looked at it a while ago."""
    pk = rollout if isinstance(rollout, int) else rollout.pk
    return Rollout.objects.select_related("release__model", "group", "exclude_group").get(pk=pk)


def _log(rollout: int, action: str, actor: User | str, comment: str, detail: Mapping[str, Any]) -> None:
    name = name_of(actor)
    RolloutAction.objects.create(rollout_id=rollout, action=action, actor=name, comment=comment)
    by = audit.guard() if actor == GUARD else None
    audit.record(f"rollout.{action}", target=rollout, detail={**detail, "for": name}, comment=comment, by=by)
    logger.info("rollout_action", rollout=rollout, action=action, actor=name, comment=comment)


def name_of(actor: User | str) -> str:
    return actor.get_username() if isinstance(actor, User) else actor


def check_release(release: Release) -> None:
    if release.state != Release.State.VALID:
        raise Invalid("release_not_valid", f"{releases.standing(release)}; only a valid release can be rolled out")
