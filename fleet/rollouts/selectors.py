"""What can be asked about rollouts: a device's assignments, how far a rollout is, and why a device lags."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from django.db.models import Count, Q

from device_sdk.protocol import events
from device_sdk.protocol.assignment import Assignment
from fleet.devices.models import Device, ModelStatus
from fleet.devices.selectors import matches, members, offline_before
from fleet.releases.models import Release, Variant
from fleet.rollouts import policy, snapshots
from fleet.rollouts.models import Outcome, Rollout

FAILED, COMMITTED = Outcome.State.FAILED, Outcome.State.COMMITTED
UPDATING, WITHDRAWN = Outcome.State.UPDATING, Outcome.State.WITHDRAWN


# --- one device --------------------------------------------------------------------------------------------------


def assignments_for(device: Device, *, runs: Mapping[str, str] | None = None) -> list[Assignment]:
    """What the device should run, one assignment for each of its models.

    `runs` is what it says it runs now; None: what the server knows.
    """
    failed = Outcome.objects.filter(device=device, state=FAILED).values_list("rollout_id", flat=True)
    facts = _facts(device, failed=frozenset(failed), pinned=_pinned([device]), runs=runs)
    return list(policy.desired(snapshots.current(), facts).values())


def manifests_for(assignments: Iterable[Assignment]) -> dict[str, str]:
    """The texts of the assigned manifests, by sha256."""
    wanted = {assignment.sha256 for assignment in assignments if assignment.release}
    found = Variant.objects.filter(manifest_sha256__in=wanted) if wanted else Variant.objects.none()
    return dict(found.values_list("manifest_sha256", "manifest"))


def releases_exist(runs: Mapping[str, str]) -> bool:
    """Whether every `<version>/<variant>` of a running set was published here."""
    wanted = Q()
    for model, running in runs.items():
        version, _, variant = running.partition("/")
        wanted |= Q(release__model__name=model, release__version=version, name=variant)
    return not runs or Variant.objects.filter(wanted).count() == len(runs)


def _facts(
    device: Device,
    *,
    failed: frozenset[int],
    pinned: "_Pins",
    runs: Mapping[str, str] | None = None,
) -> policy.DeviceFacts:
    if runs is None:
        runs = device.runs.runs if device.runs else {}
    return policy.DeviceFacts(
        name=device.name,
        labels=device.labels,
        models=device.model_names,
        pins={pin[0]: pinned.valid.get(pin) for pin in device.pins.items() if pin not in pinned.void},
        runs=runs,
        failed=failed,
    )


@dataclass(frozen=True, slots=True)
class _Pins:
    """What devices are pinned to, by model and version. `void`: revoked since, so that the pin binds no more."""

    valid: Mapping[tuple[str, str], policy.ReleaseRef]
    void: frozenset[tuple[str, str]] = frozenset()


def _pinned(devices: Iterable[Device]) -> _Pins:
    """The releases to which these devices are pinned. No query where there is no pin."""
    pins = {pin for device in devices for pin in device.pins.items()}
    if not pins:
        return _Pins({})
    wanted = Q()
    for model, version in pins:
        wanted |= Q(model__name=model, version=version)
    found = list(Release.objects.filter(wanted).select_related("model").prefetch_related(snapshots.with_variants()))
    refs = [snapshots.release_ref(release) for release in found if release.state == Release.State.VALID]
    void = {(row.model.name, row.version) for row in found if row.state == Release.State.REVOKED}
    return _Pins({(ref.model, ref.version): ref for ref in refs}, frozenset(void))


# --- one rollout -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """Devices of a rollout now. `admitted` counts who is assigned its release or has reported on it."""

    total: int  # devices of the group that run the model
    admitted: int
    updating: int
    committed: int
    failed: int
    withdrawn: int = 0  # recalled before they had committed

    @property
    def waiting(self) -> int:
        """Admitted, and not heard of yet."""
        return self.admitted - self.updating - self.committed - self.failed - self.withdrawn

    @property
    def percent(self) -> float:
        """Share of the group that committed, 0 to 100."""
        return 100 * self.committed / self.total if self.total else 0.0


def progress(rollout: Rollout) -> Progress:
    total = sum(rollout.release.model.name in device.model_names for device in members(rollout.group))
    return _progress(rollout, total, {device.pk for device in assigned_devices(rollout)})


def _progress(rollout: Rollout, total: int, assigned: set[int]) -> Progress:
    counts = outcome_counts(rollout)
    reported = set(Outcome.objects.filter(rollout=rollout).values_list("device_id", flat=True))
    return Progress(
        total=total,
        admitted=len(reported | assigned),
        updating=counts[UPDATING],
        committed=counts[COMMITTED],
        failed=counts[FAILED],
        withdrawn=counts[WITHDRAWN],
    )


def outcome_counts(rollout: Rollout) -> dict[str, int]:
    found = Outcome.objects.filter(rollout=rollout).order_by().values_list("state").annotate(number=Count("pk"))
    return {**dict.fromkeys(Outcome.State.values, 0), **dict(found)}


def tally(rollout: Rollout, *, counted: bool) -> policy.Tally:
    """What is known of the stage in force. `counted` adds the admitted devices, which takes a look at the group.

    Who has not decided yet is waited for, unless it never said a word and is offline since before the stage began:
    it cannot know. Who went silent later is waited for: the release may be why.
    """
    counts = outcome_counts(rollout)
    committed, failed = counts[COMMITTED], max(counts[FAILED] - rollout.forgiven, 0)
    if not counted:
        return policy.Tally(committed=committed, failed=failed)
    said = dict(Outcome.objects.filter(rollout=rollout).values_list("device_id", "state"))
    horizon = min(rollout.stage_since or offline_before(), offline_before())
    undecided = sum(
        said.get(device.pk, UPDATING) not in {COMMITTED, FAILED} and (device.pk in said or _seen_since(device, horizon))
        for device in assigned_devices(rollout)
    )
    return policy.Tally(committed=committed, failed=failed, admitted=committed + failed + undecided)


def assigned_devices(rollout: Rollout) -> Iterator[Device]:
    """Active devices that should run the release because of this rollout, by the policy itself."""
    model = rollout.release.model.name
    snapshot = snapshots.current()
    for device, facts in _all_facts(list(members(rollout.group))):
        if model in facts.models and policy.desired(snapshot, facts)[model].rollout == str(rollout.pk):
            yield device


def _all_facts(devices: Sequence[Device]) -> Iterator[tuple[Device, policy.DeviceFacts]]:
    failures = Outcome.objects.filter(state=FAILED, rollout__state__in=policy.IN_FORCE)
    pinned, failed = _pinned(devices), defaultdict(set)
    for device_id, rollout_id in failures.values_list("device_id", "rollout_id"):
        failed[device_id].add(rollout_id)
    for device in devices:
        yield device, _facts(device, failed=frozenset(failed[device.pk]), pinned=pinned)


def _seen_since(device: Device, moment: datetime) -> bool:
    return device.last_seen is not None and device.last_seen >= moment


# --- who lags, and why -------------------------------------------------------------------------------------------

PINNED, OFFLINE, FAILED_THERE, PAUSED = "pinned", "offline", "failed", "paused"
NOT_ADMITTED, WAITING, UPDATING_NOW, UNSEEN = "not_admitted", "waiting", "updating", "not_polled"
REFUSES = "refused"


@dataclass(frozen=True, slots=True)
class Laggard:
    """A device that does not run the newest release meant for it. `why` is one of the words above."""

    device: Device
    model: str
    runs: str  # a version, or empty
    target: str  # a version
    why: str
    detail: str = ""
    since: datetime | None = None


def laggards(model: str | None = None) -> Iterator[Laggard]:
    """Every active device that runs something else than the newest rollout in force for its group would give it."""
    snapshot = snapshots.current()
    statuses = {(status.device_id, status.model): status for status in ModelStatus.objects.all()}
    horizon = offline_before()
    for device, facts in _all_facts(list(members(None))):
        for name in facts.models if model is None else {model} & set(facts.models):
            rollout = _newest_for(snapshot, facts, name)
            if rollout and not policy.runs_release(facts, rollout.release):
                yield _explain(device, facts, rollout, statuses.get((device.pk, name)), horizon)


@dataclass(frozen=True, slots=True)
class Survey:
    """`progress` by the rollout's key."""

    progress: Mapping[int, Progress]
    laggards: Sequence[Laggard]


def survey(rollouts: Sequence[Rollout]) -> Survey:
    """`progress` of several rollouts and all `laggards` by one look at the fleet: for pages that show them together."""
    snapshot, horizon = snapshots.current(), offline_before()
    statuses = {(status.device_id, status.model): status for status in ModelStatus.objects.all()}
    assigned, totals, behind = defaultdict[str, set[int]](set), Counter[int](), []
    for device, facts in _all_facts(list(members(None))):
        for assignment in policy.desired(snapshot, facts).values():
            assigned[assignment.rollout].add(device.pk)
        totals.update(rollout.pk for rollout in rollouts if _is_of(rollout, facts))
        for model in facts.models:
            newest = _newest_for(snapshot, facts, model)
            if newest and not policy.runs_release(facts, newest.release):
                behind.append(_explain(device, facts, newest, statuses.get((device.pk, model)), horizon))
    progress = {row.pk: _progress(row, totals[row.pk], assigned[str(row.pk)]) for row in rollouts}
    return Survey(progress, behind)


def _is_of(rollout: Rollout, facts: policy.DeviceFacts) -> bool:
    selector = rollout.group.selector if rollout.group else {}
    return rollout.release.model.name in facts.models and matches(selector, facts.labels)


# --- who still runs what was taken back --------------------------------------------------------------------------

KEPT = "kept"


def still_running(release: Release) -> Iterator[Laggard]:
    """Active devices that run a release, and why they do not run what they should; of a revoked one, in short.

    `target` is empty where nothing is left that may run.
    """
    snapshot, horizon, model = snapshots.current(), offline_before(), release.model.name
    ref = policy.ReleaseRef(model, release.version, {})
    statuses = {status.device_id: status for status in ModelStatus.objects.filter(model=model)}
    for device, facts in _all_facts(list(members(None))):
        if policy.runs_release(facts, ref) and model in facts.models:
            assignment = policy.desired(snapshot, facts)[model]
            why, detail, since = _why_still(device, assignment, statuses.get(device.pk), horizon, release.revoked_at)
            target = assignment.release.version if assignment.release else ""
            yield Laggard(device, model, release.version, target, why, detail, since)


def _why_still(
    device: Device, assignment: Assignment, status: ModelStatus | None, horizon: datetime, revoked_at: datetime | None
) -> tuple[str, str, datetime | None]:
    if device.last_seen is None or device.last_seen < horizon:
        return OFFLINE, "", device.last_seen
    if assignment.release is None and not assignment.stop:
        return KEPT, "nothing else may run, and the policy is to keep serving", None
    if revoked_at is not None and device.last_seen < revoked_at:
        return UNSEEN, "has not polled since it was revoked", device.last_seen
    if refusing := _refusing(device):
        return refusing
    if status is not None and assignment.release is not None and status.release == str(assignment.release):
        return _doing(status)
    return UNSEEN, "has not started on it yet", device.last_seen


def _doing(status: ModelStatus) -> tuple[str, str, datetime | None]:
    if status.state == events.WAITING:
        return WAITING, status.reason, status.since
    if status.state in {events.FAILED, events.ROLLED_BACK}:
        return FAILED_THERE, status.reason, status.since
    return UPDATING_NOW, status.state, status.since


def _newest_for(snapshot: policy.Snapshot, facts: policy.DeviceFacts, model: str) -> policy.RolloutRules | None:
    found = (rollout for rollout in snapshot.rollouts.get(model, ()) if policy.targets(rollout, facts.labels))
    return next(found, None)


def _explain(
    device: Device,
    facts: policy.DeviceFacts,
    rollout: policy.RolloutRules,
    status: ModelStatus | None,
    horizon: datetime,
) -> Laggard:
    model = rollout.release.model
    why, detail, since = _reason(device, facts, rollout, status, horizon)
    running = facts.runs.get(model, "").partition("/")[0]
    return Laggard(device, model, running, rollout.release.version, why, detail, since)


def _reason(
    device: Device,
    facts: policy.DeviceFacts,
    rollout: policy.RolloutRules,
    status: ModelStatus | None,
    horizon: datetime,
) -> tuple[str, str, datetime | None]:
    """The first that holds: what people decided, then what the device cannot help, then what it does."""
    reason, since = (status.reason, status.since) if status else ("", None)
    if rollout.release.model in facts.pins:
        return PINNED, f"pinned to {device.pins[rollout.release.model]}", None
    if rollout.id in facts.failed:
        return FAILED_THERE, reason, since
    if not policy.admits(rollout, facts):
        paused = rollout.state == policy.PAUSED
        return (PAUSED, f"rollout {rollout.id} is paused", None) if paused else _not_admitted(rollout)
    if refusing := _refusing(device):  # before its silence: whoever answers in our place lets no poll through
        return refusing
    if device.last_seen is None or device.last_seen < horizon:
        return OFFLINE, "", device.last_seen
    return _working(device, status, _path(facts, rollout))


def _refusing(device: Device) -> tuple[str, str, datetime] | None:
    if not device.refusal:
        return None
    return REFUSES, f"refused: {device.refusal['code']}", datetime.fromisoformat(device.refusal["at"])


def _working(device: Device, status: ModelStatus | None, path: str) -> tuple[str, str, datetime | None]:
    if status is None or status.release != path:
        return UNSEEN, "has not started on it yet", device.last_seen
    if status.state == events.WAITING:
        return WAITING, status.reason, status.since
    return UPDATING_NOW, status.state, status.since


def _not_admitted(rollout: policy.RolloutRules) -> tuple[str, str, None]:
    return NOT_ADMITTED, f"rollout {rollout.id} admits {rollout.percent:g} % so far", None


def _path(facts: policy.DeviceFacts, rollout: policy.RolloutRules) -> str:
    variant = policy.choose_variant(rollout.release.variants, facts.labels)
    return f"{rollout.release.model}/{rollout.release.version}/{variant}"
