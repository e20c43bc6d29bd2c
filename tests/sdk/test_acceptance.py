"""A device asks a new release what its makers asked it: what holds is served, what does not never is."""

from itertools import chain, repeat

import numpy as np
import pytest
from onnx import TensorProto, helper

from device_sdk import acceptance, runtime
from device_sdk.acceptance import CALLS, TRIES, Exam
from device_sdk.errors import ModelError, UntrustedError
from device_sdk.peers import Seen, Served
from device_sdk.protocol import limits
from device_sdk.protocol.arrays.acceptance import Acceptance, Budgets, Sample, Tolerance
from device_sdk.protocol.manifest import TensorSpec, digest
from device_sdk.protocol.polls import BLOBS
from device_sdk.room import SLACK, Rules
from device_sdk.runtime import RuntimeOptions, load
from device_sdk.schema import Schema
from tests.sdk.world import World, answer, failing_on_data, graph, judge, manifest_of, scaling

OLD, NEW = "detector/1.0.0/default", "detector/1.1.0/default"
X = np.arange(8, dtype=np.float32).reshape(2, 4)
FIRST = "sample 1 of 2: output 'y' at [0, 1]: expected 3 ± 0.0031;"  # of `bundle(3)`
SCHEMA = Schema({"x": TensorSpec("x", "float32", ("n", 4))}, {"y": TensorSpec("y", "float32", ("n", 4))})


def bundle(factor, *, rows=(2, 1), budgets=Budgets(), name="x"):  # noqa: B008  frozen
    """What `scaling(factor)` answers, to calls of several shapes."""
    samples = [Sample({name: X[:count]}, {"y": X[:count] * np.float32(factor)}) for count in rows]
    return Acceptance(samples, Tolerance(1e-3, 1e-4), budgets=budgets)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


def offer(world, fleet, data, asked):
    """Publish NEW with a bundle, and let the device look at it. The last event, and the hash."""
    manifest = world.server.publish(NEW, data, asked if isinstance(asked, bytes) else asked.to_bytes())
    world.server.assign(manifest)
    fleet.update_once()
    return world.server.events[-1], digest(manifest.to_bytes())


@pytest.mark.parametrize("rehearse", [True, False])
def test_a_release_that_answers_as_its_makers_say_is_served_and_what_was_found_is_told(world, rehearse):
    with world.committed(OLD, scaling(2), rehearse=rehearse) as fleet:
        offer(world, fleet, scaling(3), bundle(3, budgets=Budgets(60_000, 2**30)))
        assert answer(fleet) == 3.0
        (told,) = [event.detail for event in world.server.events if event.kind == "activating"][1:]
        assert told["accepted"] == 2
        assert told["latency_ms"] > 0
        assert (0 < told["memory"] < 2**28) if rehearse else "memory" not in told


@pytest.mark.parametrize("options", [{"rehearse": True}, {}, {"swap": "unload-first"}], ids=["child", "own", "tight"])
def test_a_release_that_does_not_is_refused_for_ever_with_what_came_and_the_old_one_serves(world, options):
    with world.committed(OLD, scaling(2), **options) as fleet:
        event, sha = offer(world, fleet, scaling(4), bundle(3))
        said = (
            "acceptance_failed: sample 1 of 2: output 'y' at [0, 1]: expected 3 ± 0.0031; got 4 (7 of 8 values differ)"
        )
        assert (event.kind, event.reason) == ("failed", said)
        assert fleet.status().models["detector"].reason == said
        assert fleet._store.bad_reason(sha) == "acceptance_failed"
        assert answer(fleet) == 2.0


@pytest.mark.parametrize(
    ("data", "asked", "reason"),
    [
        (scaling(3), b"PK no zip", "bad_acceptance: its acceptance bundle is no good: expected a whole zip"),
        (
            scaling(3),
            bundle(3, name="z"),
            "bad_acceptance: its acceptance bundle does not fit: sample 1: unknown",
        ),
        (failing_on_data(), bundle(0), "acceptance_failed: sample 1: the model does not answer: "),
        (scaling(3), bundle(3, budgets=Budgets(latency_ms=1e-6)), "acceptance_latency: a call takes "),
    ],
    ids=["no bundle", "an unknown input", "a call that fails", "too slow"],
)
def test_each_way_to_fail_has_its_name(world, monkeypatch, data, asked, reason):
    monkeypatch.setattr(acceptance, "PAUSE_SECONDS", 0.0)
    with world.committed(OLD, scaling(2)) as fleet:
        event, _ = offer(world, fleet, data, asked)
        assert event.reason.startswith(reason)
        assert answer(fleet) == 2.0


def test_the_memory_that_a_release_takes_is_held_against_its_budget(world):
    """It answers with 40 MB of its own, which the rehearsal's limit would let pass."""
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["one"], keepdims=0),
        helper.make_node("Expand", ["one", "size"], ["big"]),
        helper.make_node("ReduceMax", ["big"], ["most"], keepdims=0),
        helper.make_node("Mul", ["x", "most"], ["y"]),
    ]
    large = graph(nodes, {"size": np.array([10**7], np.int64)})
    expected = Sample({"x": X[:1]}, {"y": X[:1] * X[:1].sum()})
    asked = Acceptance([expected], Tolerance(1e-3, 1e-4), budgets=Budgets(memory=30 * limits.MIB))
    with world.committed(OLD, scaling(2), rehearse=True) as fleet:
        event, _ = offer(world, fleet, large, asked)
        assert event.reason.startswith("acceptance_memory: it takes ")
        assert event.reason.endswith(" MiB of memory; expected at most 30")
        assert answer(fleet) == 2.0


def test_a_memory_budget_lowers_the_limit_of_the_rehearsal_and_never_raises_it():
    manifest = manifest_of(NEW, bytes(1000))
    assert Rules().allowance(manifest, 5) == SLACK + 5
    assert Rules().allowance(manifest, 2**50) == Rules().allowance(manifest)
    assert Rules(memory=7).allowance(manifest, 5) == 7


# --- latency ---


class Clock:
    """Each call of a session takes the next of these milliseconds."""

    def __init__(self, took):
        self.took, self.now, self.calls = iter(took), 0.0, 0

    def run(self, names, feeds):
        self.calls += 1
        self.now += next(self.took) / 1e3
        return [feeds["x"] * 3]


def timed(monkeypatch, took, *, budget=10.0, paused=None):
    clock = Clock(chain([0], took))  # the first call is the sample's
    monkeypatch.setattr(acceptance.time, "perf_counter", lambda: clock.now)
    exam = Exam(
        bundle(3, rows=(1,), budgets=Budgets(budget)), timed=True, pause=(paused if paused is not None else []).append
    )
    exam(clock, SCHEMA)
    return exam, clock


def test_outliers_of_a_busy_device_do_not_count(monkeypatch):
    exam, clock = timed(monkeypatch, [500, 9, 500, 9, 9, 500, 9])
    assert exam.latency_ms == pytest.approx(9)
    assert clock.calls == 1 + CALLS


def test_a_device_that_is_busy_for_a_while_is_asked_again(monkeypatch):
    paused = []
    exam, _ = timed(monkeypatch, chain(repeat(50, 8), repeat(9)), paused=paused)
    assert exam.latency_ms == pytest.approx(9)
    assert paused == [acceptance.PAUSE_SECONDS] * 2


def test_what_is_always_too_slow_is_refused_with_what_was_measured_and_not_called_for_long(monkeypatch):
    with pytest.raises(ModelError, match=r"a call takes 12 ms; expected at most 10 ms \(median of 7 calls") as caught:
        timed(monkeypatch, chain(repeat(12, TRIES * 4), repeat(10**9)))
    assert caught.value.code == "acceptance_latency"


def test_without_a_budget_latency_is_measured_once(monkeypatch):
    exam, clock = timed(monkeypatch, repeat(1000), budget=0.0)
    assert exam.latency_ms == pytest.approx(1000)
    assert clock.calls == 1 + CALLS


def test_the_program_can_end_an_exam_between_any_two_calls(monkeypatch):
    class StopError(Exception):
        pass

    def exam(after):
        left = iter([None] * after)

        def go_on():
            if next(left, StopError) is StopError:
                raise StopError

        session = Clock(repeat(1))
        with pytest.raises(StopError):
            Exam(bundle(3), timed=True, go_on=go_on)(session, SCHEMA)
        return session.calls

    assert [exam(after) for after in (0, 1, 2, 5)] == [0, 1, 2, 5]


def test_a_release_that_passed_elsewhere_is_asked_no_longer_than_warming_up_takes():
    exam = Exam(bundle(3, rows=(1, 2, 1)), seconds=0.0)
    exam(Clock(repeat(1)), SCHEMA)
    assert exam.asked == 1


# --- text, files, processes ---


def test_labels_of_text_are_compared_as_they_are():
    node = helper.make_node(
        "LabelEncoder", ["x"], ["y"], domain="ai.onnx.ml", keys_floats=[0.0, 1.0], values_strings=["cat", "dög"]
    )
    data = graph([node], output=TensorProto.STRING)
    x = np.float32([[0, 1, 1, 0]])

    def ask(*labels):
        asked = Acceptance([Sample({"x": x}, {"y": np.array([labels])})], Tolerance())
        manifest = manifest_of(NEW, data)
        load(manifest, sha256="0" * 64, entry=data, options=RuntimeOptions(1), exam=Exam(asked))

    ask("cat", "dög", "dög", "cat")
    with pytest.raises(ModelError, match="expected 'cow'; got 'cat'"):
        ask("cat", "dög", "dög", "cow")


def test_a_bundle_is_kept_with_its_release_and_swept_with_it(world):
    with world.committed(OLD, scaling(2)) as fleet:
        offer(world, fleet, scaling(3), bundle(4))  # refused
        refused = fleet._store.blob(digest(bundle(4).to_bytes()))
        assert refused.exists()
        world.server.assign(
            manifest := world.server.publish("detector/1.2.0/default", scaling(3), bundle(3).to_bytes())
        )
        fleet.update_once()
        fleet._store.collect_garbage()
        assert not refused.exists()
        assert fleet._store.blob(manifest.acceptance.sha256).read_bytes() == bundle(3).to_bytes()


def test_a_bundle_that_was_changed_on_disk_is_not_used_and_is_fetched_again(world):
    with world.committed(OLD, scaling(2)) as fleet:
        _, sha = offer(world, fleet, scaling(3), bundle(3))
        store, entry = fleet._store, fleet._store.manifest(fleet._store.state("detector").trial).acceptance
        store.blob(entry.sha256).write_bytes(bundle(4).to_bytes())
        with pytest.raises(UntrustedError) as caught:
            store.read_blob(entry)
        assert caught.value.code == "hash_mismatch"
        assert (store.has(sha), store.has_all(sha)) == (True, False)
        world.server.calls.clear()
        fleet._parts.fetch(store.manifest(sha), "", lambda *_: None)
        assert [call for call in world.server.calls if "blobs" in call] == [f"GET {BLOBS}{entry.sha256}"]
        assert store.has_all(sha)


def test_a_bundle_that_is_lost_holds_up_no_start(world):
    with world.committed(OLD, scaling(2)) as fleet:
        offer(world, fleet, scaling(3), bundle(3))
        for _ in range(9):
            answer(fleet)
        judge(fleet)
        assert fleet.status().models["detector"].state == "committed"
        fleet._store.blob(digest(bundle(3).to_bytes())).unlink()
    with world.open() as fleet:
        assert answer(fleet) == 3.0


def test_a_process_that_follows_asks_a_release_on_trial_too_and_what_it_finds_is_evidence(world, monkeypatch):
    """It may have other providers than the process that updates."""
    with world.committed(OLD, scaling(2)) as fleet, world.open() as other:
        assert answer(other) == 2.0
        _, sha = offer(world, fleet, scaling(3), bundle(3))
        installer, real = other._installers["detector"], runtime.make_session
        installer._store.reload()
        monkeypatch.setattr(runtime, "make_session", lambda *given: Off(real(*given)))
        with pytest.raises(ModelError, match="expected 3"):
            installer.follow(Served(sha, trial=True))
        assert installer.failure == Seen(sha, failure="acceptance_failed")
        assert answer(other) == 2.0
        monkeypatch.undo()
        installer.follow(Served(sha, trial=True))
        assert answer(other) == 3.0


class Off:
    """A session on a device that computes otherwise."""

    def __init__(self, session):
        self._session = session

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run(self, names, feeds):
        return [value * 1.01 for value in self._session.run(names, feeds)]


def test_a_release_that_is_good_elsewhere_is_refused_where_it_computes_otherwise(world, monkeypatch):
    with world.committed(OLD, scaling(2)) as fleet:
        real = runtime.make_session
        monkeypatch.setattr(runtime, "make_session", lambda *given: Off(real(*given)))
        event, _ = offer(world, fleet, scaling(3), bundle(3))
        assert event.reason.startswith(
            "acceptance_failed: sample 1 of 2: output 'y' at [0, 1]: expected 3 ± 0.0031; got 3.03"
        )
        assert answer(fleet) == 2.0
