"""Say why a device runs what it runs: each rollout that was considered, in the order in which they are asked. Pure.

The rules are those of `policy`, told one by one; that the verdict is always what `desired` says, a property test holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.names import ReleasePath
from fleet.devices.selection import Selector
from fleet.rollouts.facts import COMPLETED, IN_FORCE, PAUSED, DeviceFacts, RolloutRules, Snapshot
from fleet.rollouts.policy import desired, in_a_ring, is_excluded, near, pinned_assignment, reaches, runs_release
from fleet.rollouts.variants import way_to

ADMITS, NOT_IN_FORCE, NOT_IN_GROUP, EXCLUDED = "admits", "not_in_force", "not_in_group", "excluded"
FAILED, LACKS, NOT_RUNNING, NOT_REACHED = "failed", "lacks", "paused", "not_admitted"
BY_PIN, BY_ROLLOUT, BY_NOBODY = "pin", "rollout", "nobody"


@dataclass(frozen=True, slots=True)
class Considered:
    """A rollout, and why it does or does not admit the device; `why` is one of the words above. `gives`: its release.

    `decides`: it is the one whose release the device should run.
    """

    rollout: int
    gives: str
    state: str
    why: str
    detail: str
    decides: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of one model. `by` is `pin`, `rollout` or `nobody`; `verdict` says it in a sentence."""

    model: str
    runs: str
    assignment: Assignment
    by: str
    verdict: str
    considered: tuple[Considered, ...]


def explain(snapshot: Snapshot, device: DeviceFacts) -> list[Explanation]:
    """One for each of the device's models, in its order. The snapshot may hold rollouts that are not in force, too."""
    return [_explain(snapshot, device, model) for model in dict.fromkeys(device.models)]


def _explain(snapshot: Snapshot, device: DeviceFacts, model: str) -> Explanation:
    rollouts = snapshot.rollouts.get(model, ())
    told = [_consider(rollout, device) for rollout in rollouts]
    stop = model in snapshot.stops
    runs = device.runs.get(model, "")
    if model in device.pins:
        pinned = pinned_assignment(model, device, stop=stop)
        assignment = near(pinned, snapshot.mirrors.possible(device.labels), device)
        return Explanation(model, runs, assignment, BY_PIN, _pinned(device, model, assignment), tuple(told))
    place = next((place for place, each in enumerate(told) if each.why == ADMITS), None)
    if place is None:
        assignment = Assignment(model=model, stop=stop)
        verdict = "no rollout admits it: " + ("the model is stopped" if stop else "it keeps what runs")
        return Explanation(model, runs, assignment, BY_NOBODY, verdict, tuple(told))
    told[place] = _deciding(told[place])
    assignment = _given(snapshot, device, rollouts[place])
    return Explanation(model, runs, assignment, BY_ROLLOUT, _by_rollout(rollouts[place], assignment), tuple(told))


def _given(snapshot: Snapshot, device: DeviceFacts, rollout: RolloutRules) -> Assignment:
    alone = replace(snapshot, rollouts={rollout.release.model: [rollout]})
    return desired(alone, device)[rollout.release.model]


def _consider(rollout: RolloutRules, device: DeviceFacts) -> Considered:
    why, detail = obstacle(rollout, device) or (ADMITS, _why_in(rollout, device))
    return Considered(rollout.id, rollout.release.version, rollout.state, why, detail)


def _deciding(each: Considered) -> Considered:
    return Considered(each.rollout, each.gives, each.state, each.why, each.detail, decides=True)


def obstacle(rollout: RolloutRules, device: DeviceFacts) -> tuple[str, str] | None:
    """The first rule by which the rollout does not admit the device, and a sentence; None: it admits it."""
    return _not_meant(rollout, device) or _not_possible(rollout, device) or _not_yet(rollout, device)


def _not_meant(rollout: RolloutRules, device: DeviceFacts) -> tuple[str, str] | None:
    if rollout.state not in IN_FORCE:
        return NOT_IN_FORCE, f"it is {rollout.state.replace('_', ' ')}"
    if not rollout.selector.matches(device.labels, device.name):
        return NOT_IN_GROUP, f"its group is {rollout.selector}"
    if is_excluded(rollout, device.labels, device.name):
        return EXCLUDED, f"it excludes {_matching(rollout.excludes, device)}"
    return None


def _not_possible(rollout: RolloutRules, device: DeviceFacts) -> tuple[str, str] | None:
    if rollout.id in device.failed:
        return FAILED, "the device failed in it"
    if rollout.release.variants and (lacks := way_to(rollout.release, device.traits).lacks):
        return LACKS, lacks
    return None


def _not_yet(rollout: RolloutRules, device: DeviceFacts) -> tuple[str, str] | None:
    if rollout.state == PAUSED and not runs_release(device, rollout.release):
        return NOT_RUNNING, "it is paused: only who runs the release keeps it"
    if rollout.state not in {PAUSED, COMPLETED} and not reaches(rollout, device):
        return NOT_REACHED, f"it admits {reach(rollout)} so far"
    return None


def reach(rollout: RolloutRules) -> str:
    """How far its stages have come: `the ring tier=canary and 5 %`."""
    rings = [f"the ring {ring or 'of every device'}" for ring in rollout.rings]
    return " and ".join([*rings, f"{rollout.percent:g} %"] if rollout.percent or not rings else rings)


def _why_in(rollout: RolloutRules, device: DeviceFacts) -> str:
    if rollout.state == COMPLETED:
        return "it is completed: the standing answer of its group"
    if rollout.state == PAUSED:
        return "it is paused, and the device runs the release"
    if in_a_ring(rollout, device):
        return f"in the ring {_matching(rollout.rings, device)}"
    return f"in the first {rollout.percent:g} %"


def _matching(selectors: Sequence[Selector], device: DeviceFacts) -> str:
    found = (each for each in selectors if each.matches(device.labels, device.name))
    return next((str(each) or "every device" for each in found), "")


def _pinned(device: DeviceFacts, model: str, assignment: Assignment) -> str:
    release = device.pins[model]
    if release is None:
        return "pinned to a release that is not valid: it keeps what runs"
    if assignment.release is None:
        return f"pinned to {release.version}, which it cannot run: it keeps what runs"
    return f"pinned to {release.version}{_stepping(assignment.release, release.version)}"


def _by_rollout(rollout: RolloutRules, assignment: Assignment) -> str:
    version = rollout.release.version
    if assignment.release is None:
        return f"rollout {rollout.id} admits it, but {version} has no valid variant: it keeps what runs"
    return f"rollout {rollout.id} gives it {version}{_stepping(assignment.release, version)}"


def _stepping(path: ReleasePath, version: str) -> str:
    variant = f", variant {path.variant}"
    return variant if path.version == version else f", by way of {path.version} first{variant}"
