"""What can be asked about rollouts: a device's assignments, how far a rollout is, and why a device lags."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache

from django.db.models import Count, Q

from device_sdk.protocol import events
from device_sdk.protocol.abilities import UNSAID, Abilities
from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.errors import ProtocolError
from fleet.devices.models import Device, ModelStatus
from fleet.devices.selectors import members, offline_before
from fleet.releases.models import Release, Variant
from fleet.rollouts import explaining, policy, snapshots, targeting
from fleet.rollouts.models import Outcome, Rollout

FAILED, COMMITTED = Outcome.State.FAILED, Outcome.State.COMMITTED
UPDATING, WITHDRAWN = Outcome.State.UPDATING, Outcome.State.WITHDRAWN


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
    failed = Outcome.objects.filter(device=device, state=FAILED).values_list("rollout_id", flat=True)
    return _facts(device, failed=frozenset(failed), pinned=_pinned([device]), runs=runs)


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
    total = sum(rollout.release.model.name in device.model_names for device in targeting.devices(rollout))
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
    it cannot know. Who went silent later is waited for, until it times out: the release may be why. A failure that is
    to be tried again is not decided either.
    """
    counts, pending = outcome_counts(rollout), to_be_retried(rollout)
    committed, failed = counts[COMMITTED], max(counts[FAILED] - pending - rollout.forgiven, 0)
    if not counted:
        return policy.Tally(committed=committed, failed=failed)
    said = dict(Outcome.objects.filter(rollout=rollout).values_list("device_id", "state"))
    horizon = min(rollout.stage_since or offline_before(), offline_before())
    undecided = sum(
        said.get(device.pk, UPDATING) not in {COMMITTED, FAILED} and (device.pk in said or _seen_since(device, horizon))
        for device in assigned_devices(rollout)
    )
    return policy.Tally(committed=committed, failed=failed, admitted=committed + failed + undecided + pending)


def to_be_retried(rollout: Rollout) -> int:
    """Failures that are not final, see `attempts`."""
    return Outcome.objects.filter(rollout=rollout, state=FAILED, retry_at__isnull=False).count()


def assigned_devices(rollout: Rollout) -> Iterator[Device]:
    """Active devices that should run the release because of this rollout, by the policy itself."""
    return assigned_among(rollout, list(members(rollout.group)))


def assigned_among(rollout: Rollout, devices: Sequence[Device]) -> Iterator[Device]:
    """Those of some devices, see `assigned_devices`."""
    model = rollout.release.model.name
    snapshot = snapshots.current()
    for device, facts in _all_facts(devices):
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
    meant = [rules for rollout in rollouts if (rules := snapshots.rules_of(rollout))]
    assigned, totals, behind = defaultdict[str, set[int]](set), Counter[int](), []
    for device, facts in _all_facts(list(members(None))):
        for assignment in policy.desired(snapshot, facts).values():
            assigned[assignment.rollout].add(device.pk)
        totals.update(rules.id for rules in meant if _is_of(rules, facts))
        for model in facts.models:
            newest = _newest_for(snapshot, facts, model)
            if newest and not policy.runs_release(facts, newest.release):
                behind.append(_explain(device, facts, newest, statuses.get((device.pk, model)), horizon))
    progress = {row.pk: _progress(row, totals[row.pk], assigned[str(row.pk)]) for row in rollouts}
    return Survey(progress, behind)


def _is_of(rollout: policy.RolloutRules, facts: policy.DeviceFacts) -> bool:
    return rollout.release.model in facts.models and policy.targets(rollout, facts.labels, facts.name)


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
