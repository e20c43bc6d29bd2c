"""A release on trial is compared with the one before it, on the device, offline too, and over restarts."""

import numpy as np
import pytest

from device_sdk.errors import TransferError
from device_sdk.protocol.assignment import Probation
from device_sdk.protocol.manifest import digest
from device_sdk.protocol.scores import Scores
from tests.sdk.world import World, graph, helper, judge, scaling

SCORES = Scores("y")
OLD, NEW = "detector/1.0.0/default", "detector/2.0.0/default"
CALLS = 300


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


def rules(**more):
    return Probation(calls=5, seconds=0, **more)


def inputs(seed):
    """One-hot rows of four classes: `scaling(1)` gives them back as probabilities."""
    random = np.random.default_rng(seed)
    return [{"x": np.eye(4, dtype=np.float32)[[kind]] * np.float32(0.9)} for kind in random.integers(0, 4, CALLS)]


def feed(fleet, seed=1):
    model = fleet.model("detector")
    for each in inputs(seed):
        model.run(each)
    judge(fleet)


def serve(world, path, data, asked, **said):
    world.server.assign(world.server.publish(path, data, scores=SCORES, **said), probation=asked, rollout="r-1")


def served_long(world):
    """A device whose first release has a history: enough for comparisons."""
    serve(world, OLD, scaling(1), rules())
    fleet = world.open()
    fleet.update_once()
    feed(fleet)
    feed(fleet)
    return fleet


def always(kind):
    """Says the same whatever it sees, and is sure of it."""
    row = np.zeros((1, 4), np.float32)
    row[0, kind] = 0.9
    nodes = [helper.make_node("Mul", ["x", "none"], ["z"]), helper.make_node("Add", ["z", "row"], ["y"])]
    return graph(nodes, {"none": np.float32(0), "row": row})


def last(world):
    return world.server.events[-1]


def test_release_that_collapsed_to_one_class_is_rolled_back_and_the_event_says_why(world):
    with served_long(world) as fleet:
        serve(world, NEW, always(2), rules(max_class_shift=0.3))
        fleet.update_once()
        feed(fleet, 2)
        assert fleet.model("detector").release.version == "1.0.0"
    event = last(world)
    assert (event.kind, event.reason.partition(":")[0]) == ("rolled_back", "class_shift")
    assert event.detail["class_shift"] == pytest.approx(0.75, abs=0.1)
    assert event.detail["classes"].startswith("2:")
    assert event.detail["confidence"] == pytest.approx(0.9)


def test_release_that_is_unsure_is_rolled_back_without_a_network(world):
    with served_long(world) as fleet:
        serve(world, NEW, scaling(0.3), rules(max_confidence_drop=0.1))
        fleet.update_once()
        world.server.faults["/api/device/v1/events"] = [TransferError("no network")] * 9
        model = fleet.model("detector")
        for each in inputs(2):
            model.run(each)
        fleet._worker.install()
        assert model.release.version == "1.0.0"
        assert fleet._outbox.pending().events[-1].reason.startswith("confidence_drop: 0.270 in ")


def test_release_like_the_one_before_is_committed_and_says_how_it_compared(world):
    with served_long(world) as fleet:
        serve(world, NEW, scaling(0.98), rules(max_confidence_drop=0.1, max_class_shift=0.3, max_slowdown=50))
        fleet.update_once()
        feed(fleet, 2)
        assert fleet.status().models["detector"].state == "committed"
    detail = last(world).detail
    assert detail["confidence_drop"] == pytest.approx(0.018, abs=0.001)
    assert detail["class_shift"] < 0.2
    assert detail["slowdown"] > 0
    assert len(detail["load"]) == 8


def test_baseline_survives_a_restart_and_so_does_the_trials_own_count(world):
    served_long(world).stop()
    serve(world, NEW, always(1), rules(max_class_shift=0.3))
    with world.open() as fleet:
        fleet.update_once()
        for each in inputs(3)[:80]:
            fleet.model("detector").run(each)
        judge(fleet)
        assert fleet.status().models["detector"].state == "probation"  # too few to say
    world.server.faults["/api/device/v1/poll"] = [TransferError("no network")] * 9
    with world.open() as fleet:
        feed(fleet, 4)
        assert fleet.model("detector").release.version == "1.0.0"
    assert last(world).reason.startswith("class_shift: 0.7")
    assert "in 380 answers" in last(world).reason  # of both processes


def test_trial_that_is_shorter_than_the_time_between_two_restarts_ends_all_the_same(world):
    serve(world, OLD, scaling(1), Probation(calls=20, seconds=100))
    for _ in range(4):
        with world.open() as fleet:
            fleet.update_once()
            for each in inputs(1)[:6]:
                fleet.model("detector").run(each)
            world.time.seconds += 30
            fleet._worker.install()
    with world.open() as fleet:
        assert fleet.status().models["detector"].state == "committed"


def test_what_was_not_asked_is_not_compared_and_nothing_waits_for_it(world):
    with served_long(world) as fleet:
        serve(world, NEW, always(2), rules())
        fleet.update_once()
        feed(fleet, 2)
        assert fleet.status().models["detector"].state == "committed"
    assert "class_shift" not in last(world).detail


def test_device_without_a_history_says_that_nothing_was_compared(world):
    serve(world, OLD, scaling(1), rules(max_class_shift=0.3))
    with world.open() as fleet:
        fleet.update_once()
        feed(fleet)
        assert fleet.status().models["detector"].state == "committed"
    assert last(world).detail["class_shift"] == "not compared: 0 looked at before, 100 needed"


def test_rejected_release_leaves_no_numbers_behind_and_the_old_one_goes_on_with_its_own(world):
    with served_long(world) as fleet:
        before = fleet.model("detector").stats.calls
        bad = world.server.publish(NEW, always(2), scores=SCORES)
        world.server.assign(bad, probation=rules(max_class_shift=0.3))
        fleet.update_once()
        feed(fleet, 2)
        feed(fleet, 2)
        good = fleet._store.state("detector").active
    with world.open() as fleet:
        ledger = fleet._parts.ledger
        assert ledger.get("detector", digest(bad.to_bytes())).counts.calls == 0
        assert ledger.get("detector", good).counts.calls == before + CALLS


def test_manifest_that_names_no_output_of_the_model_is_refused(world):
    serve(world, OLD, scaling(1), rules())
    missing = world.server.publish(NEW, scaling(2), scores=Scores("nothing"))
    world.server.assign(missing, probation=rules())
    with world.open() as fleet:
        fleet.update_once()
        assert fleet.model("detector").release is None
    assert (last(world).kind, last(world).reason) == ("failed", "schema")
