"""Decide what a device should run, and whether a stage may pass. No IO, no clock: callers pass facts, counts, time.

What it refuses: to guess. A release that is not there, a number that is none, a time without a zone: the answer is
"keep what runs" for a device, and Hold for a stage.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from device_sdk.protocol.assignment import ALWAYS, NO_CONDITIONS, Assignment, Conditions, Probation, Window
from device_sdk.protocol.cohorts import COHORTS, cohort
from device_sdk.protocol.names import ReleasePath

DRAFT, AWAITING_APPROVAL, RUNNING, PAUSED = "draft", "awaiting_approval", "running", "paused"
HALTED, CANCELLED, COMPLETED = "halted", "cancelled", "completed"
IN_FORCE = frozenset({RUNNING, PAUSED, COMPLETED})  # the others admit nobody

HOLD, PAUSE, ROLL_BACK = "hold", "pause", "roll_back"  # what a spent failure budget does

VARIANT_LABEL, DEFAULT_VARIANT = "variant", "default"


# --- what a device should run ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ManifestRef:
    """The signed manifest of a variant. `length` in bytes."""

    length: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ReleaseRef:
    """A valid release and its valid variants."""

    model: str
    version: str
    variants: Mapping[str, ManifestRef]


@dataclass(frozen=True, slots=True)
class RolloutRules:
    """A rollout as far as devices are concerned. `percent` is that of the stage in force."""

    id: int
    state: str
    release: ReleaseRef
    salt: str
    percent: float
    selector: Mapping[str, Sequence[str]] = field(default_factory=dict)
    urgent: bool = False
    window: Window = ALWAYS
    probation: Probation = field(default_factory=Probation)
    conditions: Conditions = NO_CONDITIONS


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The policy in force: rollouts by model, the newest first. `stops`: models to stop where nothing may run."""

    rollouts: Mapping[str, Sequence[RolloutRules]] = field(default_factory=dict)
    stops: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """`runs` maps a model to `<version>/<variant>`; a pin to a release that is gone is None, to a revoked one: none."""

    name: str
    labels: Mapping[str, str]
    models: Sequence[str]
    pins: Mapping[str, ReleaseRef | None] = field(default_factory=dict)
    runs: Mapping[str, str] = field(default_factory=dict)
    failed: frozenset[int] = frozenset()  # rollouts in which it failed


def desired(snapshot: Snapshot, device: DeviceFacts) -> dict[str, Assignment]:
    """What the device should run of each of its models; without a release: keep what runs, or stop the model."""
    return {model: _desired(snapshot, device, model) for model in device.models}


def _desired(snapshot: Snapshot, device: DeviceFacts, model: str) -> Assignment:
    stop = model in snapshot.stops
    if model in device.pins:
        return _assign(model, device.pins[model], device.labels, stop=stop)
    for rollout in snapshot.rollouts.get(model, ()):
        if admits(rollout, device):
            return _assign(model, rollout.release, device.labels, rollout, stop=stop)
    return Assignment(model=model, stop=stop)


def admits(rollout: RolloutRules, device: DeviceFacts) -> bool:
    """Whether this rollout's release is for this device now."""
    if rollout.state not in IN_FORCE or rollout.id in device.failed or not targets(rollout, device.labels):
        return False
    if rollout.state == PAUSED:
        return runs_release(device, rollout.release)
    return rollout.state == COMPLETED or in_cohort(rollout.salt, device.name, rollout.percent)


def targets(rollout: RolloutRules, labels: Mapping[str, str]) -> bool:
    """Whether the labels are those of the rollout's group: each named label has one of its allowed values."""
    return all(labels.get(label) in allowed for label, allowed in rollout.selector.items())


def in_cohort(salt: str, device: str, percent: float) -> bool:
    """Sticky and nested: who is in at some percentage is in at every larger one."""
    return cohort(salt, device) * 100 < percent * COHORTS


def runs_release(device: DeviceFacts, release: ReleaseRef) -> bool:
    return device.runs.get(release.model, "").startswith(f"{release.version}/")


def choose_variant(variants: Iterable[str], labels: Mapping[str, str]) -> str | None:
    """The one that the device's label asks for, else `default`, else the first by name."""
    names = sorted(variants)
    for wanted in (labels.get(VARIANT_LABEL), DEFAULT_VARIANT):
        if wanted in names:
            return wanted
    return names[0] if names else None


def _assign(
    model: str,
    release: ReleaseRef | None,
    labels: Mapping[str, str],
    rollout: RolloutRules | None = None,
    *,
    stop: bool,
) -> Assignment:
    """A release that is gone, or has no variant, is a doubt: what runs is kept, whatever the model's policy."""
    variant = choose_variant(release.variants, labels) if release else None
    if release is None or variant is None:
        return Assignment(model=model)
    manifest = release.variants[variant]
    return Assignment(
        model=model,
        release=ReleasePath(model, release.version, variant),
        length=manifest.length,
        sha256=manifest.sha256,
        rollout=str(rollout.id) if rollout else "",
        urgent=rollout.urgent if rollout else False,
        window=rollout.window if rollout else ALWAYS,
        probation=rollout.probation if rollout else Probation(),
        conditions=rollout.conditions if rollout else NO_CONDITIONS,
        stop=stop,
    )


# --- whether a stage may pass ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StageRules:
    """A stage as its author wrote it, and when it began. `success_threshold` is a fraction of the admitted.

    Zero reports at a threshold of zero needs no device at all: for the first release of a model.
    """

    percent: float
    soak_seconds: float
    min_reports: int
    success_threshold: float
    failure_budget: int
    last: bool
    on_failure: str = ROLL_BACK
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """`admitted`: devices of the stage that could know of it, None if not counted; the others are outcomes."""

    committed: int
    failed: int
    admitted: int | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    reason: str


@dataclass(frozen=True, slots=True)
class Advance:
    pass


@dataclass(frozen=True, slots=True)
class Complete:
    pass


@dataclass(frozen=True, slots=True)
class Pause:
    reason: str


@dataclass(frozen=True, slots=True)
class Halt:
    reason: str


Decision = Hold | Advance | Complete | Pause | Halt


def next_step(stage: StageRules, tally: Tally, now: datetime) -> Decision:
    """Errors before success; then soak, reports, share of success. Any doubt is Hold."""
    if not (_count(stage.failure_budget) and _count(tally.failed)):
        return Hold("the failure budget or the count of failures is malformed")
    if tally.failed > stage.failure_budget:
        return _on_failure(stage, tally)
    waits = _doubt(stage, tally, now) or _soak(stage, now) or _reports(stage, tally) or _share(stage, tally)
    if waits:
        return Hold(waits)
    return Complete() if stage.last else Advance()


def enough_reports(stage: StageRules, tally: Tally, now: datetime) -> bool:
    """Whether it is worth counting the admitted devices: everything cheaper already speaks for passing."""
    return not (_doubt(stage, tally, now) or _soak(stage, now) or _reports(stage, tally))


def _on_failure(stage: StageRules, tally: Tally) -> Decision:
    reason = f"failure budget spent: {tally.failed} failed, {stage.failure_budget} allowed"
    if stage.on_failure == HOLD:
        return Hold(reason)
    return Pause(reason) if stage.on_failure == PAUSE else Halt(reason)


def _doubt(stage: StageRules, tally: Tally, now: datetime) -> str:
    """Name the first thing that cannot be trusted, or nothing."""
    doubts = {
        "the stage's percentage is malformed": not _number(stage.percent, 0, 100) or stage.percent == 0,
        "the stage's soak time is malformed": not _number(stage.soak_seconds, 0, math.inf),
        "the success threshold is malformed": not _number(stage.success_threshold, 0, 1),
        "the counts of reports are malformed": not (_count(stage.min_reports) and _count(tally.committed)),
        "the stage has no beginning": not (_moment(stage.since) and _moment(now)),
    }
    return next((reason for reason, doubtful in doubts.items() if doubtful), "")


def _soak(stage: StageRules, now: datetime) -> str:
    passed = (now - (stage.since or now)).total_seconds()
    return f"soaking for {stage.soak_seconds:g} s" if passed < stage.soak_seconds else ""


def _reports(stage: StageRules, tally: Tally) -> str:
    reports = tally.committed + tally.failed
    return f"waiting for reports: {reports} of {stage.min_reports}" if reports < stage.min_reports else ""


def _share(stage: StageRules, tally: Tally) -> str:
    if not _count(tally.admitted):
        return "the admitted devices are not counted"
    admitted = max(tally.admitted or 0, tally.committed + tally.failed)
    needed = math.ceil(stage.success_threshold * admitted - 1e-9)
    if tally.committed < needed:
        return f"waiting for success: {tally.committed} of {admitted} committed, {needed} needed"
    return ""


def _number(value: object, low: float, high: float) -> bool:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return good and low <= value <= high  # type: ignore[operator]  # checked in the line above


def _moment(value: object) -> bool:
    return isinstance(value, datetime) and value.utcoffset() is not None


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
