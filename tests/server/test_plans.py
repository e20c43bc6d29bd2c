"""`desired`, by plans kept for devices of the same traits, says what plainly asking each rollout in turn says."""

from hypothesis import given
from hypothesis import strategies as st

from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.cohorts import cohort
from fleet.rollouts import policy
from fleet.rollouts.policy import DeviceFacts, ManifestRef, ReleaseRef, RolloutRules, Snapshot, Traits

MODELS = ("digits", "wine")
LABELS = {"site": ("berlin", "paris"), "hw": ("jetson", "pi")}
STATES = (*sorted(policy.IN_FORCE), policy.HALTED, policy.DRAFT)

releases = st.builds(
    lambda model, version, variants: ReleaseRef(model, version, {name: ManifestRef(1, "aa" * 32) for name in variants}),
    st.sampled_from(MODELS),
    st.sampled_from(["1.0.0", "1.1.0"]),
    st.sampled_from([(), ("default",), ("default", "int8")]),
)
rollouts = st.builds(
    RolloutRules,
    id=st.integers(1, 4),
    state=st.sampled_from(STATES),
    release=releases,
    salt=st.sampled_from(["a", "b"]),
    percent=st.sampled_from([0.5, 30, 70, 100]),
    selector=st.dictionaries(st.sampled_from(sorted(LABELS)), st.just(["berlin", "pi"]), max_size=2),
)


def _snapshot(rollouts: list[RolloutRules], stops: frozenset[str]) -> Snapshot:
    return Snapshot({model: [r for r in rollouts if r.release.model == model] for model in MODELS}, stops)


snapshots = st.builds(_snapshot, st.lists(rollouts, max_size=6), st.frozensets(st.sampled_from(MODELS)))
traits = st.builds(
    Traits.of,
    st.fixed_dictionaries({}, optional={**{key: st.sampled_from(values) for key, values in LABELS.items()},
                                        "variant": st.sampled_from(["int8", "default"])}),
    st.sampled_from([("digits",), MODELS]),
)  # fmt: skip
devices = st.builds(
    DeviceFacts,
    name=st.sampled_from([f"cam-{number}" for number in range(20)]),
    traits=traits,
    pins=st.one_of(st.just({}), st.dictionaries(st.sampled_from(MODELS), st.none() | releases, max_size=1)),
    runs=st.dictionaries(st.sampled_from(MODELS), st.sampled_from(["1.0.0/default", "1.1.0/int8"])),
    failed=st.frozensets(st.integers(1, 4), max_size=2),
)


def plainly(snapshot: Snapshot, device: DeviceFacts, model: str) -> tuple[str | None, str, bool]:
    """Version, rollout and stop, by the rules as DESIGN.md words them."""
    stop = model in snapshot.stops
    if model in device.pins:
        pinned = device.pins[model]
        return (pinned.version, "", stop) if pinned and pinned.variants else (None, "", False)
    for rollout in snapshot.rollouts[model]:
        fits = all(device.labels.get(label) in allowed for label, allowed in rollout.selector.items())
        runs_it = device.runs.get(model, "").split("/")[0] == rollout.release.version
        reached = cohort(rollout.salt, device.name) < rollout.percent * 100
        admits = {policy.RUNNING: reached, policy.PAUSED: runs_it, policy.COMPLETED: True}
        if fits and rollout.id not in device.failed and admits.get(rollout.state, False):
            return (rollout.release.version, str(rollout.id), stop) if rollout.release.variants else (None, "", False)
    return None, "", stop


def told(assignment: Assignment) -> tuple[str | None, str, bool]:
    return assignment.release.version if assignment.release else None, assignment.rollout, assignment.stop


@given(snapshot=snapshots, device=devices)
def test_desired_is_what_asking_each_rollout_in_turn_says(snapshot: Snapshot, device: DeviceFacts) -> None:
    answers = policy.desired(snapshot, device)
    assert {model: told(answer) for model, answer in answers.items()} == {
        model: plainly(snapshot, device, model) for model in device.models
    }


@given(snapshot=snapshots, device=devices, others=st.lists(devices, max_size=5))
def test_a_plan_is_for_every_device_of_its_traits(
    snapshot: Snapshot, device: DeviceFacts, others: list[DeviceFacts]
) -> None:
    """One plan answers for a device whoever else it answered before: it depends on the traits alone."""
    plans = {facts.traits: policy.plan(snapshot, facts.traits) for facts in (*others, device)}
    for facts in (*others, device):
        assert policy.decide(plans[facts.traits], facts) == policy.desired(snapshot, facts)
