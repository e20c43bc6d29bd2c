"""What devices report of rollouts: how each fares, by its own word, bounded by what it could know."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from django.db import transaction
from django.utils import timezone

from device_sdk.protocol import events as wire
from fleet.devices.changes import device_changed
from fleet.devices.models import Device
from fleet.rollouts import attempts, policy, snapshots
from fleet.rollouts.models import Outcome, Rollout

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
    rollouts = list(started.select_related("release__model", "group", "exclude_group").prefetch_related("stages__ring"))
    if not rollouts:
        return
    Device.objects.select_for_update().get(pk=device.pk)  # its reports one after another
    outcomes = {row.rollout_id: row for row in Outcome.objects.filter(device=device, rollout__in=rollouts)}
    failures = _failures(outcomes.values())
    for rollout in rollouts:
        told = list(_reports(rollout, [event for event in events if event.rollout == str(rollout.pk)]))
        if told and (rollout.pk in outcomes or _admitted(rollout, device)):
            outcome = outcomes.get(rollout.pk) or Outcome(rollout=rollout, device=device)
            before, retry_before = outcome.state, outcome.retry_at
            outcome = _after(told, outcome)
            outcomes[rollout.pk] = attempts.judged(outcome, before=before, retry_before=retry_before, rollout=rollout)
    _store(outcomes.values())
    if _failures(outcomes.values()) > failures:
        wake_engine()
        device_changed(device.pk)


def _reports(rollout: Rollout, events: Iterable[wire.Event]) -> Iterator[tuple[wire.Event, str]]:
    """The events that say how the device fares, with what each amounts to.

    Of a release to step through, a failure counts and a success does not yet.
    """
    release = rollout.release
    for event in events:
        if event.release is None or event.release.model != release.model.name or event.kind not in OUTCOMES:
            continue
        if event.release.version == release.version:
            yield event, OUTCOMES[event.kind]
        elif event.release.version in snapshots.release_ref(release).floors:
            failed = OUTCOMES[event.kind] == Outcome.State.FAILED
            yield event, Outcome.State.FAILED if failed else Outcome.State.UPDATING


def _admitted(rollout: Rollout, device: Device) -> bool:
    """Whether the device is in the rollout's cohort, whatever became of the rollout since."""
    rules = snapshots.rules_of(rollout)
    if rules is None or rollout.release.model.name not in device.model_names:
        return False
    facts = policy.DeviceFacts(device.name, policy.Traits.of(device.labels, device.model_names))
    return policy.targets(rules, device.labels, device.name) and policy.reaches(rules, facts)


def _after(reports: Sequence[tuple[wire.Event, str]], outcome: Outcome) -> Outcome:
    for event, state in reports:
        if RANK[state] >= RANK.get(outcome.state, 0) or attempts.is_late_success(outcome, state):
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
        update_fields=["state", "step", "reason", "changed_at", "retry_at"],
    )


def wake_engine() -> None:
    """After the commit. A broker that is away loses nothing: the beat ticks too."""
    from fleet.rollouts import tasks

    transaction.on_commit(tasks.tick.delay, robust=True)
