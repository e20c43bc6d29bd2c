"""What can be asked about rollouts: a device's assignments, how far a rollout is, and why a device lags."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from itertools import islice

from django.db.models import Count, Q

from device_sdk.protocol import events
from device_sdk.protocol.abilities import UNSAID, Abilities
from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.errors import ProtocolError
from fleet import sql
from fleet.devices.models import Device, ModelStatus, RunningSet
from fleet.devices.selectors import members, offline_before
from fleet.releases.models import Release, Variant
from fleet.rollouts import explaining, policy, snapshots
from fleet.rollouts.models import Outcome, Rollout

FAILED, COMMITTED = Outcome.State.FAILED, Outcome.State.COMMITTED
UPDATING, WITHDRAWN = Outcome.State.UPDATING, Outcome.State.WITHDRAWN
AT_ONCE = 1_000  # devices as rows in memory


# --- one device --------------------------------------------------------------------------------------------------


def assignments_for(device: Device, *, runs: Mapping[str, str] | None = None) -> list[Assignment]:
    """What the device should run, one assignment for each of its models.

    `runs` is what it says it runs now; None: what the server knows.
    """
    return list(policy.desired(snapshots.current(), device_facts(device, runs=runs)).values())


def explain(device: Device, model: str | None = None) -> list[explaining.Explanation]:
    """Why the device runs what it runs, of each of its models or of one; with rollouts that are not in force, too."""
    told = explaining.explain(snapshots.compile_history(), device_facts(device))
    return [each for each in told if model in {None, each.model}]


def manifests_for(assignments: Iterable[Assignment]) -> dict[str, str]:
    """The texts of the assigned manifests, by sha256."""
    return {item.sha256: _manifest(item.sha256) for item in assignments if item.release}


@lru_cache(maxsize=256)  # by hash: a manifest never changes
def _manifest(sha256: str) -> str:
    return Variant.objects.filter(manifest_sha256=sha256).values_list("manifest", flat=True)[0]


def releases_exist(runs: Mapping[str, str]) -> bool:
    """Whether every `<version>/<variant>` of a running set was published here."""
    wanted = Q()
    for model, running in runs.items():
        version, _, variant = running.partition("/")
        wanted |= Q(release__model__name=model, release__version=version, name=variant)
    return not runs or Variant.objects.filter(wanted).count() == len(runs)


TRAITS = ("labels", "model_names", "sdk", "abilities")  # the columns of which `traits_of` makes them


def traits_of(device: Device) -> policy.Traits:
    """What it said it can run is its own word, checked when it came; a row that is wrong all the same says nothing."""
    try:
        abilities = Abilities.parse(device.abilities)
    except ProtocolError:
        abilities = UNSAID
    return policy.Traits.of(device.labels, device.model_names, sdk=device.sdk, abilities=abilities)


def device_facts(device: Device, *, runs: Mapping[str, str] | None = None) -> policy.DeviceFacts:
    """All that the policy wants to know of a device. `runs` None: what the server knows."""
    failed = sql.fetch("SELECT rollout_id FROM rollouts_outcome WHERE device_id = %s AND state = %s", device.pk, FAILED)
    return _facts(device, failed=frozenset(rollout for (rollout,) in failed), pinned=_pinned([device]), runs=runs)


def facts_of(
    *,
    name: str,
    traits: policy.Traits,
    pins: Mapping[str, str],
    pinned: "Pins",
    runs: Mapping[str, str],
    failed: frozenset[int],
) -> policy.DeviceFacts:
    """A device as the policy sees it: for whoever has its row, and for the poll, which has not."""
    bound = {pin[0]: pinned.valid.get(pin) for pin in pins.items() if pin not in pinned.void} if pins else {}
    return policy.DeviceFacts(name=name, traits=traits, pins=bound, runs=runs, failed=failed)


def _facts(
    device: Device,
    *,
    failed: frozenset[int],
    pinned: "Pins",
    runs: Mapping[str, str] | None = None,
) -> policy.DeviceFacts:
    if runs is None:
        runs = device.runs.runs if device.runs else {}
    return facts_of(
        name=device.name, traits=traits_of(device), pins=device.pins, pinned=pinned, runs=runs, failed=failed
    )


def failures(devices: Collection[int] | None = None) -> dict[int, frozenset[int]]:
    """In which rollouts devices failed that may still admit them, by device; None: of all devices. One query."""
    rows = Outcome.objects.filter(state=FAILED).exclude(rollout__state=Rollout.State.CANCELLED)
    if devices is not None:
        rows = rows.filter(device__in=devices)
    found = defaultdict[int, set[int]](set)
    for device, rollout in rows.values_list("device_id", "rollout_id"):
        found[device].add(rollout)
    return {device: frozenset(rollouts) for device, rollouts in found.items()}


@dataclass(frozen=True, slots=True)
class Pins:
    """What devices are pinned to, by model and version. `void`: revoked since, so that the pin binds no more."""

    valid: Mapping[tuple[str, str], policy.ReleaseRef]
    void: frozenset[tuple[str, str]] = frozenset()


def _pinned(devices: Iterable[Device]) -> Pins:
    return pinned_to({pin for device in devices for pin in device.pins.items()})


def pinned_to(pins: Collection[tuple[str, str]]) -> Pins:
    """Where these pins, each a model and a version, lead. No query where there is none."""
    if not pins:
        return Pins({})
    wanted = Q()
    for model, version in pins:
        wanted |= Q(model__name=model, version=version)
    found = list(Release.objects.filter(wanted).select_related("model").prefetch_related(snapshots.with_variants()))
    refs = [snapshots.release_ref(release) for release in found if release.state == Release.State.VALID]
    void = {(row.model.name, row.version) for row in found if row.state == Release.State.REVOKED}
    return Pins({(ref.model, ref.version): ref for ref in refs}, frozenset(void))


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


def to_be_retried(rollout: Rollout) -> int:
    """Failures that are not final, see `attempts`."""
    return Outcome.objects.filter(rollout=rollout, state=FAILED, retry_at__isnull=False).count()


def assigned_among(rollout: Rollout, devices: Iterable[Device]) -> Iterator[Device]:
    """Those of some devices that should run the release because of this rollout, by the policy itself."""
    model = rollout.release.model.name
    snapshot = snapshots.current()
    for device, facts in all_facts(devices):
        if model in facts.models and policy.desired(snapshot, facts)[model].rollout == str(rollout.pk):
            yield device


def all_facts(devices: Iterable[Device]) -> Iterator[tuple[Device, policy.DeviceFacts]]:
    """What the policy wants to know of each, some at a time: memory does not grow with the devices."""
    remaining = iter(devices)
    while some := list(islice(remaining, AT_ONCE)):
        pinned, failed = _pinned(some), failures([device.pk for device in some])
        for device in some:
            yield device, _facts(device, failed=failed.get(device.pk, frozenset()), pinned=pinned)


# --- who lags, and why -------------------------------------------------------------------------------------------

PINNED, OFFLINE, FAILED_THERE, PAUSED = "pinned", "offline", "failed", "paused"
NOT_ADMITTED, WAITING, UPDATING_NOW, UNSEEN = "not_admitted", "waiting", "updating", "not_polled"
REFUSES, LACKS = "refused", explaining.LACKS


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
    meant = (each for each in snapshot.rollouts.get(model, ()) if policy.targets(each, facts.labels, facts.name))
    return next(meant, None)


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
    if obstacle := explaining.obstacle(rollout, facts):
        return obstacle[0], f"rollout {rollout.id}: {obstacle[1]}", None
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


def _path(facts: policy.DeviceFacts, rollout: policy.RolloutRules) -> str:
    """What it is given on the way to the rollout's release: maybe a release to step through."""
    alone = policy.Snapshot({rollout.release.model: [rollout]})
    return str(policy.desired(alone, replace(facts, pins={}))[rollout.release.model].release)
