"""`desired`, by plans kept for devices of the same traits, says what plainly asking each rollout in turn says.

`explain` tells that answer and no other, whatever overlaps.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_sdk.protocol.abilities import Abilities
from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.cohorts import cohort
from device_sdk.protocol.manifest import Requirements
from fleet.devices.mirrors import Mirror, Mirrors
from fleet.devices.selection import EVERY, NAME, Selector, parse
from fleet.rollouts import explaining, policy
from fleet.rollouts.policy import DeviceFacts, ManifestRef, ReleaseRef, RolloutRules, Snapshot, Traits
from fleet.rollouts.variants import lacks

MODELS = ("digits", "wine")
STATES = (*sorted(policy.IN_FORCE), policy.HALTED, policy.DRAFT)
VERSIONS = ("1.0.0", "1.1.0", "2.0.0")
FLOORED = "2.0.0"  # must be stepped to through 1.1.0
SELECTORS = [
    "", "site=berlin", "site in (berlin, paris), hw!=pi", "!hw", "hw=pi", "@name in (cam-1, cam-2, cam-3)",
    "site=berlin, @name!=cam-1", "@name=cam-4",
]  # fmt: skip

requirements = st.sampled_from([Requirements(), Requirements(opset=20), Requirements(providers=("CUDA",))])


def _release(model: str, version: str, variants: dict[str, Requirements]) -> ReleaseRef:
    floor = "1.1.0" if version == FLOORED else ""
    refs = {name: ManifestRef(1, "aa" * 32, replace(each, release=floor)) for name, each in variants.items()}
    step = ReleaseRef(model, "1.1.0", {"default": ManifestRef(2, "bb" * 32)})
    return ReleaseRef(model, version, refs, {"1.1.0": step} if floor else {})


releases = st.builds(
    _release,
    st.sampled_from(MODELS),
    st.sampled_from(VERSIONS),
    st.dictionaries(st.sampled_from(["default", "int8"]), requirements, max_size=2),
)
selectors = st.sampled_from(SELECTORS).map(parse)
rollouts = st.builds(
    RolloutRules,
    id=st.integers(1, 4),
    state=st.sampled_from(STATES),
    release=releases,
    salt=st.sampled_from(["a", "b"]),
    percent=st.sampled_from([0, 0.5, 30, 70, 100]),
    selector=selectors,
    excludes=st.lists(selectors.filter(bool), max_size=1).map(tuple),
    rings=st.lists(selectors, max_size=1).map(tuple),
)


def _snapshot(rollouts: list[RolloutRules], stops: frozenset[str], sites: list[Selector]) -> Snapshot:
    mirrors = Mirrors(tuple(Mirror(f"site-{at}", each, f"http://mirror-{at}") for at, each in enumerate(sites)))
    return Snapshot({model: [r for r in rollouts if r.release.model == model] for model in MODELS}, stops, mirrors)


snapshots = st.builds(
    _snapshot, st.lists(rollouts, max_size=6), st.frozensets(st.sampled_from(MODELS)), st.lists(selectors, max_size=4)
)
traits = st.builds(
    Traits.of,
    st.fixed_dictionaries(
        {},
        optional={
            "site": st.sampled_from(["berlin", "paris"]),
            "hw": st.sampled_from(["jetson", "pi"]),
            "variant": st.sampled_from(["int8", "default"]),
        },
    ),
    st.sampled_from([("digits",), MODELS]),
    abilities=st.sampled_from([Abilities(), Abilities(opset=19), Abilities(opset=26, providers=("CUDA", "CPU"))]),
)
devices = st.builds(
    DeviceFacts,
    name=st.sampled_from([f"cam-{number}" for number in range(8)]),
    traits=traits,
    pins=st.one_of(st.just({}), st.dictionaries(st.sampled_from(MODELS), st.none() | releases, max_size=1)),
    runs=st.dictionaries(st.sampled_from(MODELS), st.sampled_from([f"{version}/default" for version in VERSIONS])),
    failed=st.frozensets(st.integers(1, 4), max_size=2),
)

Told = tuple[str | None, str, bool]


def plainly(snapshot: Snapshot, device: DeviceFacts, model: str) -> Told:
    """Version, rollout and stop, by the rules as they are worded, one after the other."""
    stop = model in snapshot.stops
    if model in device.pins:
        pinned = device.pins[model]
        version = plain_step(pinned, device) if pinned else None
        return (version, "", stop) if version else (None, "", False)
    for rollout in snapshot.rollouts[model]:
        runs_it = device.runs.get(model, "").split("/")[0] == rollout.release.version
        reached = cohort(rollout.salt, device.name) < rollout.percent * 100 or any(
            fits(r, device) for r in rollout.rings
        )
        admits = {policy.RUNNING: reached, policy.PAUSED: runs_it, policy.COMPLETED: True}
        meant = fits(rollout.selector, device) and not any(fits(each, device) for each in rollout.excludes)
        version = plain_step(rollout.release, device)
        can = version is not None or not rollout.release.variants
        if meant and can and rollout.id not in device.failed and admits.get(rollout.state, False):
            return (version, str(rollout.id), stop) if version else (None, "", False)
    return None, "", stop


def fits(selector: Selector, device: DeviceFacts) -> bool:
    return all(r.holds(device.name if r.label == NAME else device.labels.get(r.label)) for r in selector.requirements)


def plain_step(release: ReleaseRef, device: DeviceFacts) -> str | None:
    """The version itself, or the floor before it; None where the device can run no variant of it."""
    label = device.labels.get("variant")
    names = [label] if label in release.variants else list(release.variants)
    if all(lacks(release.variants[name].requires, device.traits) for name in names):
        return None
    running = device.runs.get(release.model, "").split("/")[0]
    return "1.1.0" if release.version == FLOORED and running in {"", "1.0.0"} else release.version


def plain_mirror(snapshot: Snapshot, device: DeviceFacts) -> str:
    return next((each.address for each in snapshot.mirrors.every if fits(each.selector, device)), "")


def told(assignment: Assignment) -> Told:
    return assignment.release.version if assignment.release else None, assignment.rollout, assignment.stop


@settings(max_examples=120)
@given(snapshot=snapshots, device=devices)
def test_desired_is_what_asking_each_rollout_in_turn_says(snapshot: Snapshot, device: DeviceFacts) -> None:
    answers = policy.desired(snapshot, device)
    assert {model: told(answer) for model, answer in answers.items()} == {
        model: plainly(snapshot, device, model) for model in device.models
    }
    mirror = plain_mirror(snapshot, device)
    assert all(answer.mirror == (mirror if answer.release else "") for answer in answers.values())


@given(snapshot=snapshots, device=devices, others=st.lists(devices, max_size=5))
def test_a_plan_is_for_every_device_of_its_traits(
    snapshot: Snapshot, device: DeviceFacts, others: list[DeviceFacts]
) -> None:
    """One plan answers for a device whoever else it answered before: it depends on the traits alone."""
    plans = {facts.traits: policy.plan(snapshot, facts.traits) for facts in (*others, device)}
    for facts in (*others, device):
        assert policy.decide(plans[facts.traits], facts) == policy.desired(snapshot, facts)


@settings(max_examples=120)
@given(snapshot=snapshots, device=devices)
def test_what_is_explained_is_what_is_desired(snapshot: Snapshot, device: DeviceFacts) -> None:
    """And the rollout that decides is the first of those that admit the device; pinned, none decides."""
    explained = explaining.explain(snapshot, device)
    assert {each.model: each.assignment for each in explained} == policy.desired(snapshot, device)
    for each in explained:
        rollouts = snapshot.rollouts[each.model]
        assert [row.rollout for row in each.considered] == [rollout.id for rollout in rollouts]
        admitted = [policy.admits(rollout, device) for rollout in rollouts]
        assert [row.why == explaining.ADMITS for row in each.considered] == admitted
        deciding = [place for place, row in enumerate(each.considered) if row.decides]
        assert deciding == ([admitted.index(True)] if any(admitted) and each.by != explaining.BY_PIN else [])
        assert all(row.detail for row in each.considered)


def test_a_hundred_rollouts_over_overlapping_groups_have_one_answer_for_each_device() -> None:
    """The newest that admits it, for each of 200 devices; and every rollout is told, with its reason."""
    hundred = [
        RolloutRules(
            id=number,
            state=[policy.RUNNING, policy.PAUSED, policy.COMPLETED, policy.RUNNING][number % 4],
            release=_release("digits", f"1.{number}.0", {"default": Requirements()}),
            salt=f"salt-{number}",
            percent=number % 25,
            selector=parse(SELECTORS[number % len(SELECTORS)]),
            excludes=(parse("hw=pi"),) if number % 3 == 0 else (),
            rings=(parse("@name in (cam-7, cam-8)"),) if number % 5 == 0 else (),
        )
        for number in range(100, 0, -1)
    ]
    standing = RolloutRules(0, policy.COMPLETED, _release("digits", "1.0.0", {"default": Requirements()}), "s", 100)
    snapshot, answers = Snapshot({"digits": [*hundred, standing]}), set()
    for number in range(200):
        labels = {"site": ["berlin", "paris"][number % 2], "hw": ["pi", "jetson", "nano"][number % 3]}
        device = DeviceFacts(f"cam-{number}", Traits.of(labels, ["digits"]))
        answer = policy.desired(snapshot, device)["digits"]
        assert told(answer) == plainly(Snapshot({"digits": [*hundred, standing], "wine": []}), device, "digits")
        explanation = explaining.explain(snapshot, device)[0]
        assert explanation.assignment == answer
        assert len(explanation.considered) == 101
        answers.add(answer.rollout)
    assert len(answers) > 10  # the rollouts do overlap


@pytest.mark.parametrize("percent", [5, 100])
def test_a_completed_rollout_is_for_every_device_of_its_group_not_of_its_ring(percent: float) -> None:
    done = RolloutRules(
        1, policy.COMPLETED, _release("digits", "1.0.0", {"default": Requirements()}), "s", percent, EVERY,
        rings=(parse("site=paris"),),
    )  # fmt: skip
    device = DeviceFacts("cam-1", Traits.of({"site": "berlin"}, ["digits"]))
    assert policy.desired(Snapshot({"digits": [done]}), device)["digits"].release is not None
