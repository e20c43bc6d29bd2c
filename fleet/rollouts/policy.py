"""Decide what a device should run. No IO, no clock: callers pass facts. Whether a stage may pass is `stages`.

What it refuses: to guess. A release that is not there, or has no variant: the answer is "keep what runs".
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from device_sdk.protocol.assignment import ALWAYS, NO_CONDITIONS, Assignment, Conditions, Probation, Window
from device_sdk.protocol.cohorts import COHORTS, cohort
from device_sdk.protocol.names import ReleasePath
from fleet.rollouts.stages import (
    HOLD,
    PAUSE,
    ROLL_BACK,
    Advance,
    Complete,
    Decision,
    Halt,
    Hold,
    Pause,
    StageRules,
    Tally,
    enough_reports,
    next_step,
)

__all__ = [
    "HOLD", "PAUSE", "ROLL_BACK", "Advance", "Complete", "Decision", "Halt", "Hold", "Pause", "StageRules", "Tally",
    "enough_reports", "next_step",
]  # fmt: skip

DRAFT, AWAITING_APPROVAL, RUNNING, PAUSED = "draft", "awaiting_approval", "running", "paused"
HALTED, CANCELLED, COMPLETED = "halted", "cancelled", "completed"
IN_FORCE = frozenset({RUNNING, PAUSED, COMPLETED})  # the others admit nobody

VARIANT_LABEL, DEFAULT_VARIANT = "variant", "default"


# --- what is known -----------------------------------------------------------------------------------------------


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
class Traits:
    """What many devices share: their labels (sorted pairs), their models, and what they can run. Hashable.

    Empty text and 0: the device does not say. `memory` in bytes.
    """

    labels: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = ()
    sdk: str = ""
    runtime: str = ""
    opset: int = 0
    memory: int = 0
    arch: str = ""
    providers: tuple[str, ...] = ()

    @classmethod
    def of(cls, labels: Mapping[str, str], models: Iterable[str], **abilities: Any) -> "Traits":
        return cls(tuple(sorted(labels.items())), tuple(models), **abilities)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """`runs` maps a model to `<version>/<variant>`; a pin to a release that is gone is None, to a revoked one: none."""

    name: str
    traits: Traits
    pins: Mapping[str, ReleaseRef | None] = field(default_factory=dict)
    runs: Mapping[str, str] = field(default_factory=dict)
    failed: frozenset[int] = frozenset()  # rollouts in which it failed

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.traits.labels)

    @property
    def models(self) -> tuple[str, ...]:
        return self.traits.models


# --- the answer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Option:
    """A rollout that is meant for devices of some traits, and what those that it admits are assigned."""

    rollout: RolloutRules
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The options for one model, the newest first; `otherwise` is for devices that none of them admits."""

    model: str
    options: tuple[Option, ...]
    otherwise: Assignment


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the policy says to devices of the same traits, whoever they are."""

    traits: Traits
    models: tuple[ModelPlan, ...]


def desired(snapshot: Snapshot, device: DeviceFacts) -> dict[str, Assignment]:
    """What the device should run of each of its models; without a release: keep what runs, or stop the model."""
    return decide(plan(snapshot, device.traits), device)


def plan(snapshot: Snapshot, traits: Traits) -> Plan:
    """What depends on the traits alone: worth keeping, as long as the snapshot is in force."""
    return Plan(traits, tuple(_model_plan(snapshot, traits, model) for model in traits.models))


def _model_plan(snapshot: Snapshot, traits: Traits, model: str) -> ModelPlan:
    stop = model in snapshot.stops
    options = tuple(_options(snapshot.rollouts.get(model, ()), traits, stop=stop))
    return ModelPlan(model, options, otherwise=Assignment(model=model, stop=stop))


def _options(rollouts: Sequence[RolloutRules], traits: Traits, *, stop: bool) -> Iterator[Option]:
    labels = dict(traits.labels)
    for rollout in rollouts:
        if rollout.state in IN_FORCE and targets(rollout, labels):
            yield Option(rollout, _assign(rollout.release.model, rollout.release, labels, rollout, stop=stop))


def decide(plan: Plan, device: DeviceFacts) -> dict[str, Assignment]:
    """What depends on the device itself: its pins, its place in cohorts, what it runs and where it failed."""
    return {each.model: _decide(each, device) for each in plan.models}


def _decide(each: ModelPlan, device: DeviceFacts) -> Assignment:
    if each.model in device.pins:
        return _assign(each.model, device.pins[each.model], device.labels, stop=each.otherwise.stop)
    admitted = (option.assignment for option in each.options if _lets_in(option.rollout, device))
    return next(admitted, each.otherwise)


def admits(rollout: RolloutRules, device: DeviceFacts) -> bool:
    """Whether this rollout's release is for this device now."""
    return rollout.state in IN_FORCE and targets(rollout, device.labels) and _lets_in(rollout, device)


def _lets_in(rollout: RolloutRules, device: DeviceFacts) -> bool:
    """Of a rollout in force that is meant for devices like this one: whether this one may have it now."""
    if rollout.id in device.failed:
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
