"""A device without room for two models: the old one goes first, calls wait, and it comes back if the new one fails."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from device_sdk import install, room
from device_sdk.client import Fleet
from device_sdk.errors import HeldError, ModelError, QueueFullError, SetupError, StorageError
from tests.sdk.world import QUICK, World, answer, nan_emitting, prove, scaling, unknown_operator

ROOT = Path(__file__).parents[2]
OLD, NEW = "detector/1.0.0/default", "detector/2.0.0/default"


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


@pytest.fixture
def slow(monkeypatch):
    """Loading waits until it is let go; says when it has begun."""
    real, begun, go = install.runtime.load, threading.Event(), threading.Event()

    def load(*arguments, **options):
        begun.set()
        assert go.wait(20)
        return real(*arguments, **options)

    monkeypatch.setattr(install.runtime, "load", load)
    return begun, go


def updating(world, fleet, data):
    world.server.assign(world.server.publish(NEW, data), probation=QUICK)
    thread = threading.Thread(target=fleet.update_once)
    thread.start()
    return thread


def calls(fleet, number):
    """Threads that call once, and what came of each."""
    outcomes = []

    def call():
        try:
            outcomes.append(answer(fleet))
        except HeldError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=call) for _ in range(number)]
    for thread in threads:
        thread.start()
    return threads, outcomes


def test_calls_wait_for_the_new_release_and_none_fails(world, slow):
    begun, go = slow
    go.set()
    with world.committed(OLD, scaling(1), swap="unload-first") as fleet:
        begun.clear()
        go.clear()
        update = updating(world, fleet, scaling(2))
        assert begun.wait(10)
        assert fleet._slots["detector"].current is fleet._slots["detector"].previous is None
        assert fleet.model("detector").release is None
        threads, outcomes = calls(fleet, 5)
        assert outcomes == []
        go.set()
        for thread in (*threads, update):
            thread.join(20)
        assert outcomes == [2.0] * 5
        prove(fleet)
        assert fleet.status().models["detector"].state == "committed"


def test_queue_is_bounded_and_waits_end_and_both_have_a_name(world, slow):
    begun, go = slow
    go.set()
    with world.committed(OLD, scaling(1), swap="unload-first", held_calls=2, held_seconds=0.3) as fleet:
        begun.clear()
        go.clear()
        update = updating(world, fleet, scaling(2))
        assert begun.wait(10)
        gate = fleet._slots["detector"].gate
        threads, outcomes = calls(fleet, 5)
        for thread in threads:
            thread.join(20)
        go.set()
        update.join(20)
        assert sorted(outcomes, key=str) == [HeldError] * 2 + [QueueFullError] * 3
        assert (gate.held, gate.turned_away) == (2, 5)
        assert answer(fleet) == 2.0


@pytest.mark.parametrize(
    "fault",
    [ModelError("no", code="load_failed"), StorageError("full"), RuntimeError("a bug"), None],
    ids=["model", "disk", "bug", "operator"],
)
def test_old_release_comes_back_when_the_new_one_fails(world, monkeypatch, fault):
    with world.committed(OLD, scaling(1), swap="unload-first") as fleet:
        real = install.runtime.load

        def load(manifest, **options):
            if fault is not None and str(manifest.path) == NEW:
                raise fault
            return real(manifest, **options)

        monkeypatch.setattr(install.runtime, "load", load)
        world.server.assign(world.server.publish(NEW, unknown_operator() if fault is None else scaling(2)))
        fleet.update_once()
        assert answer(fleet) == 1.0
        assert fleet._slots["detector"].gate is None


def test_trial_that_fails_gives_way_to_the_old_release(world):
    with world.committed(OLD, scaling(1), swap="unload-first") as fleet:
        world.server.assign(world.server.publish(NEW, nan_emitting()), probation=QUICK)
        fleet.update_once()
        prove(fleet)
        assert fleet.status().models["detector"].state == "rolled_back"
        assert answer(fleet) == 1.0


@pytest.mark.parametrize(("free", "tight"), [(None, False), (10**12, False), (10**6, True)])
def test_auto_goes_by_what_is_free(world, monkeypatch, free, tight):
    monkeypatch.setattr(room, "free_memory", lambda: free)
    with world.committed(OLD, scaling(1), swap="auto") as fleet:
        manifest = world.server.publish(NEW, scaling(2))
        assert fleet._parts.swap.is_tight(manifest) is tight
        world.server.assign(manifest)
        fleet.update_once()
        assert (fleet._slots["detector"].previous is None) is tight
        assert answer(fleet) == 2.0


def test_unknown_way_to_swap_is_refused(world):
    with pytest.raises(SetupError, match="unload-first"):
        Fleet.open(world.path, swap="somehow")


MEASURE = """
import sys, tempfile, threading, time
from pathlib import Path
import numpy as np
from onnx import helper
from tests.sdk.world import World, graph, X

def big(seed):
    weights = np.random.default_rng(seed).random((4, 4 * 2**20), np.float32)  # 64 MB
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("ReduceMax", ["h"], ["m"], axes=[1]),
             helper.make_node("Mul", ["x", "m"], ["y"])]
    return graph(nodes, {"w": weights})

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

with tempfile.TemporaryDirectory() as folder:
    world = World(Path(folder) / "device")
    first, second = (Path(folder) / name for name in ("1", "2"))
    fleet = world.committed("detector/1.0.0/default", big(1), swap=sys.argv[1])
    world.server.assign(world.server.publish("detector/2.0.0/default", big(2)))
    world.server.calls.clear()
    worst, base, over = [0], resident(), threading.Event()
    def watch():
        while not over.wait(0.001):
            worst[0] = max(worst[0], resident())
    thread = threading.Thread(target=watch)
    thread.start()
    fleet.update_once()
    over.set()
    thread.join()
    print((worst[0] - base) >> 20)
"""


def extra_megabytes(how):
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, how], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True
    )
    return int(ended.stdout.split()[-1])


def test_peak_memory_is_lower_by_a_model(world):
    """64 MB of weights. The resident memory of a process of its own, beyond what it had with the old release."""
    beside, unloaded = extra_megabytes("beside"), extra_megabytes("unload-first")
    print(f"extra peak: beside {beside} MB, unload-first {unloaded} MB")  # noqa: T201
    assert unloaded <= beside - 50
