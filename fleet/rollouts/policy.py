"""Decide what a device should run. No IO, no clock: callers pass facts. Whether a stage may pass is `stages`.

For each model of a device, one answer, however many rollouts there are and however their groups overlap:

1. A pin overrides every rollout. A pin to a release that is gone, or that the device cannot run: keep what runs.
2. Else the model's rollouts are asked in turn, the one started last first; the first that admits the device gives its
   release. It admits the device if, in this order:
   a. it is in force: running, paused or completed, and its release valid;
   b. the device is in its group, and not among those excluded;
   c. the device has not failed in it;
   d. the device can run a variant of the release, and of each release to step through before it (`variants`);
   e. completed: everyone. Paused: who runs the release already. Running: who is in a ring of the stages so far, or in
      the cohort of their percentage.
3. What it gives is the release; or, while the device has not passed a floor, the release to step through first.
4. No rollout admits the device: keep what runs, or stop the model where its policy says so.

Beside a release stands the mirror that is nearest to the device (`fleet.devices.mirrors`), whoever gave the release.

A release that is in force without a valid variant is a doubt, and a doubt keeps what runs. `explaining` tells all this
about one device in words.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from device_sdk.protocol.assignment import ALWAYS, MAX_HOLD, NO_CONDITIONS, Assignment, Probation
from device_sdk.protocol.cohorts import COHORTS, cohort
from fleet.devices.mirrors import Mirror
from fleet.devices.mirrors import chosen as chosen_mirror
from fleet.rollouts.facts import (
    AWAITING_APPROVAL,
    CANCELLED,
    COMPLETED,
    DRAFT,
    HALTED,
    IN_FORCE,
    PAUSED,
    RUNNING,
    DeviceFacts,
    ManifestRef,
    ReleaseRef,
    RolloutRules,
    Snapshot,
    Traits,
)
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
from fleet.rollouts.variants import Step, Way, choose_variant, place_on, way_to

__all__ = [
    "AWAITING_APPROVAL", "CANCELLED", "COMPLETED", "DRAFT", "HALTED", "HOLD", "IN_FORCE", "PAUSE", "PAUSED",
    "ROLL_BACK", "RUNNING", "Advance", "Complete", "Decision", "DeviceFacts", "Halt", "Hold", "ManifestRef", "Pause",
    "ReleaseRef", "RolloutRules", "Snapshot", "StageRules", "Tally", "Traits", "choose_variant", "enough_reports",
    "next_step",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Option:
    """A rollout in force that may admit devices of some traits, and what it assigns at each step of the way.

    `targeted`, `ahead` (in a ring of the stages so far): None where it hangs on the device's name.
    """

    rollout: RolloutRules
    way: Way
    assignments: tuple[Assignment, ...]
    targeted: bool | None
    ahead: bool | None

    @property
    def assignment(self) -> Assignment:
        """That of the release itself; one without a release is a doubt, and keeps what runs."""
        return self.assignments[0]


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
    mirrors: tuple[Mirror, ...] = ()


def desired(snapshot: Snapshot, device: DeviceFacts) -> dict[str, Assignment]:
    """What the device should run of each of its models; without a release: keep what runs, or stop the model."""
    return decide(plan(snapshot, device.traits), device)


# --- what depends on the traits alone ----------------------------------------------------------------------------


def plan(snapshot: Snapshot, traits: Traits) -> Plan:
    """Worth keeping, as long as the snapshot is in force."""
    models = tuple(_model_plan(snapshot, traits, model) for model in traits.models)
    return Plan(traits, models, snapshot.mirrors.possible(dict(traits.labels)))


def _model_plan(snapshot: Snapshot, traits: Traits, model: str) -> ModelPlan:
    stop = model in snapshot.stops
    options = tuple(_options(snapshot.rollouts.get(model, ()), traits, stop=stop))
    return ModelPlan(model, options, otherwise=Assignment(model=model, stop=stop))


def _options(rollouts: Sequence[RolloutRules], traits: Traits, *, stop: bool) -> Iterator[Option]:
    labels = dict(traits.labels)
    for rollout in rollouts:
        targeted = _targeted_by_labels(rollout, labels)
        if rollout.state not in IN_FORCE or targeted is False:
            continue
        way = way_to(rollout.release, traits)
        if not way.steps and rollout.release.variants:
            continue
        ahead = any_of([ring.by_labels(labels) for ring in rollout.rings])
        yield Option(rollout, way, _assignments(rollout.release, way, rollout, stop=stop), targeted, ahead)


def _targeted_by_labels(rollout: RolloutRules, labels: Mapping[str, str]) -> bool | None:
    inside = rollout.selector.by_labels(labels)
    outside = any_of([each.by_labels(labels) for each in rollout.excludes])
    if inside is False or outside is True:
        return False
    return None if inside is None or outside is None else True


def any_of(answers: Sequence[bool | None]) -> bool | None:
    """True where one is; None where it hangs on one that is not known."""
    return True if True in answers else None if None in answers else False


def _assignments(
    release: ReleaseRef, way: Way, rollout: RolloutRules | None = None, *, stop: bool
) -> tuple[Assignment, ...]:
    """One for each step. Without a way: that keeps what runs, whatever the model's policy is where nothing may run."""
    return tuple(_assignment(step, rollout, stop=stop) for step in way.steps) or (Assignment(model=release.model),)


def _assignment(step: Step, rollout: RolloutRules | None, *, stop: bool) -> Assignment:
    return Assignment(
        model=step.path.model,
        release=step.path,
        length=step.manifest.length,
        sha256=step.manifest.sha256,
        rollout=str(rollout.id) if rollout else "",
        urgent=rollout.urgent if rollout else False,
        window=rollout.window if rollout else ALWAYS,
        probation=rollout.probation if rollout else Probation(),
        conditions=rollout.conditions if rollout else NO_CONDITIONS,
        max_hold=rollout.max_hold if rollout else MAX_HOLD,
        forgive=rollout.forgive if rollout else False,
        stop=stop,
    )


# --- what depends on the device ----------------------------------------------------------------------------------


def decide(plan: Plan, device: DeviceFacts) -> dict[str, Assignment]:
    """What hangs on the device itself: its name, its pins, its place in cohorts, what it runs and where it failed."""
    return {each.model: near(_decide(each, device), plan.mirrors, device) for each in plan.models}


def _decide(each: ModelPlan, device: DeviceFacts) -> Assignment:
    if each.model in device.pins:
        return pinned_assignment(each.model, device, stop=each.otherwise.stop)
    for option in each.options:
        if _lets_in(option, device):
            return option.assignments[place_on(option.way, running_version(device, each.model))]
    return each.otherwise


def _lets_in(option: Option, device: DeviceFacts) -> bool:
    rollout = option.rollout
    if rollout.id in device.failed or not (option.targeted or targets(rollout, device.labels, device.name)):
        return False
    return rollout.state == COMPLETED or (
        runs_release(device, rollout.release)
        if rollout.state == PAUSED
        else bool(option.ahead) or reaches(rollout, device, rings=option.ahead is None)
    )


def pinned_assignment(model: str, device: DeviceFacts, *, stop: bool) -> Assignment:
    release = device.pins[model]
    if release is None:
        return Assignment(model=model)
    way = way_to(release, device.traits)
    return _assignments(release, way, stop=stop)[place_on(way, running_version(device, model))]


def near(assignment: Assignment, mirrors: Sequence[Mirror], device: DeviceFacts) -> Assignment:
    """The same with the address of a mirror, where there is one for the device and something to fetch."""
    found = chosen_mirror(mirrors, device.labels, device.name) if mirrors and assignment.release else None
    return replace(assignment, mirror=found.address) if found else assignment


# --- parts of the rules ------------------------------------------------------------------------------------------


def admits(rollout: RolloutRules, device: DeviceFacts) -> bool:
    """Whether this rollout gives the device something now, pins aside. `explaining.obstacle` says why not."""
    if rollout.state not in IN_FORCE or rollout.id in device.failed:
        return False
    if not targets(rollout, device.labels, device.name):
        return False
    if rollout.release.variants and way_to(rollout.release, device.traits).lacks:
        return False
    if rollout.state == PAUSED:
        return runs_release(device, rollout.release)
    return rollout.state == COMPLETED or reaches(rollout, device)


def targets(rollout: RolloutRules, labels: Mapping[str, str], name: str) -> bool:
    """Whether a device of these labels and name is in the rollout's group, and not excluded."""
    return rollout.selector.matches(labels, name) and not is_excluded(rollout, labels, name)


def is_excluded(rollout: RolloutRules, labels: Mapping[str, str], name: str) -> bool:
    return any(each.matches(labels, name) for each in rollout.excludes)


def reaches(rollout: RolloutRules, device: DeviceFacts, *, rings: bool = True) -> bool:
    """Whether the stages so far have come to a device of the group. `rings` False: its percentage alone."""
    return in_cohort(rollout.salt, device.name, rollout.percent) or (rings and in_a_ring(rollout, device))


def in_a_ring(rollout: RolloutRules, device: DeviceFacts) -> bool:
    return any(ring.matches(device.labels, device.name) for ring in rollout.rings)


def in_cohort(salt: str, device: str, percent: float) -> bool:
    """Sticky and nested: who is in at some percentage is in at every larger one."""
    return cohort(salt, device) * 100 < percent * COHORTS


def running_version(device: DeviceFacts, model: str) -> str:
    return device.runs.get(model, "").partition("/")[0]


def runs_release(device: DeviceFacts, release: ReleaseRef) -> bool:
    return running_version(device, release.model) == release.version
