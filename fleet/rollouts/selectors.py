"""What can be asked about rollouts: a device's assignments, how far a rollout is, and why a device lags."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

from django.db.models import Count, Q

from device_sdk.protocol import events
from device_sdk.protocol.assignment import Assignment
from fleet.devices.models import Device, ModelStatus, RunningSet
from fleet.devices.selectors import members, offline_before
from fleet.releases.models import Release, Variant
from fleet.rollouts import policy, snapshots
from fleet.rollouts.models import Outcome, Rollout

FAILED, COMMITTED = Outcome.State.FAILED, Outcome.State.COMMITTED
UPDATING, WITHDRAWN = Outcome.State.UPDATING, Outcome.State.WITHDRAWN
AT_ONCE = 1_000  # devices as rows in memory


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


TRAIT_FIELDS = ("labels", "model_names", "sdk")  # what traits are made of, and nothing else


def traits_of(device: Device) -> policy.Traits:
    return policy.Traits.of(device.labels, device.model_names, sdk=device.sdk)


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
        traits=traits_of(device),
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
    from fleet.rollouts.counting import tallies

    return tallies.progress(rollout)


def outcome_counts(rollout: Rollout) -> dict[str, int]:
    found = Outcome.objects.filter(rollout=rollout).order_by().values_list("state").annotate(number=Count("*"))
    return {**dict.fromkeys(Outcome.State.values, 0), **dict(found)}


def all_facts(devices: Iterable[Device]) -> Iterator[tuple[Device, policy.DeviceFacts]]:
    """What the policy wants to know of each, some at a time: memory does not grow with the devices."""
    remaining = iter(devices)
    while some := list(islice(remaining, AT_ONCE)):
        failures = Outcome.objects.filter(state=FAILED, rollout__state__in=policy.IN_FORCE, device__in=some)
        pinned, failed = _pinned(some), defaultdict(set)
        for device_id, rollout_id in failures.values_list("device_id", "rollout_id"):
            failed[device_id].add(rollout_id)
        for device in some:
            yield device, _facts(device, failed=frozenset(failed[device.pk]), pinned=pinned)


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


def laggards(model: str | None = None, *, among: Iterable[Device] | None = None) -> Iterator[Laggard]:
    """Every active device that runs something else than the newest rollout in force for its group would give it.

    `among`: only of these. Of a large fleet see `counting.survey` first.
    """
    snapshot, horizon = snapshots.current(), offline_before()
    remaining = all_facts(members(None) if among is None else among)
    while some := list(islice(remaining, AT_ONCE)):
        statuses = _statuses([device.pk for device, _ in some])
        for device, facts in some:
            for name in facts.models if model is None else {model} & set(facts.models):
                rollout = _newest_for(snapshot, facts, name)
                if rollout and not policy.runs_release(facts, rollout.release):
                    yield _explain(device, facts, rollout, statuses.get((device.pk, name)), horizon)


def _statuses(devices: Sequence[int]) -> dict[tuple[int, str], ModelStatus]:
    rows = ModelStatus.objects.filter(device__in=devices)
    return {(status.device_id, status.model): status for status in rows}


# --- who still runs what was taken back --------------------------------------------------------------------------

KEPT = "kept"


def still_running(release: Release) -> Iterator[Laggard]:
    """Active devices that run a release, and why they do not run what they should; of a revoked one, in short.

    `target` is empty where nothing is left that may run.
    """
    snapshot, horizon, model = snapshots.current(), offline_before(), release.model.name
    ref = policy.ReleaseRef(model, release.version, {})
    running = Device.objects.filter(state=Device.State.ACTIVE, runs__in=sets_with(ref)).select_related("runs")
    remaining = all_facts(running.iterator(chunk_size=AT_ONCE))
    while some := list(islice(remaining, AT_ONCE)):
        statuses = _statuses([device.pk for device, _ in some])
        for device, facts in some:
            if model not in facts.models:
                continue
            assignment, status = policy.desired(snapshot, facts)[model], statuses.get((device.pk, model))
            why, detail, since = _why_still(device, assignment, status, horizon, release.revoked_at)
            target = assignment.release.version if assignment.release else ""
            yield Laggard(device, model, release.version, target, why, detail, since)


def sets_with(release: policy.ReleaseRef) -> list[int]:
    """Running sets that hold some variant of it."""
    start = f"{release.version}/"
    found = RunningSet.objects.values_list("pk", "runs")
    return [pk for pk, runs in found if runs.get(release.model, "").startswith(start)]


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
