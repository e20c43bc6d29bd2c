"""Forked children: no dead threads, no shared session, no second updater. Each scenario is a program of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sdk.world import World, scaling

ROOT = Path(__file__).parents[2]

START = """
import json, multiprocessing, os, signal, sys, threading, time
import numpy as np
from device_sdk.client import Fleet
from device_sdk.errors import TransferError

class Nobody:
    def request(self, *_, **__):
        raise TransferError("no route")

x = {"x": np.ones((1, 4), np.float32)}
fleet = Fleet.open(sys.argv[1], transport=Nobody(), intra_op_threads=2, rehearse=False, follow_seconds=0.1)
model = fleet.model("detector")

def call(times=50):
    return {float(model.run(x)["y"][0, 0]) for _ in range(times)}

def threads():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("fleet-"))

def in_child(body):
    # What `body` returns in a forked child that ends as programs end, finalizers included.
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(body()).encode())
        finally:
            os.close(writing)
        sys.exit(0)
    os.close(writing)
    said = b"".join(iter(lambda: os.read(reading, 4096), b""))
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(said)

def until(condition, seconds=15.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
"""

SCENARIOS = {
    "a_child_answers_by_sessions_of_its_own": """
fleet.start()
busy = [threading.Thread(target=lambda: [call() for _ in range(200)], daemon=True) for _ in range(2)]
for thread in busy: thread.start()
for _ in range(3):
    said = in_child(lambda: [sorted(call()), fleet.updates, threads(), model.release.version, fleet.status().updates])
    assert said == [[2.0], False, ["fleet-follow"], "1.0.0", False], said
assert call() == {2.0}
assert fleet.updates
assert threads() == ["fleet-install", "fleet-poll", "fleet-spool", "fleet-upload"], threads()
""",
    "a_child_of_a_program_that_did_not_start_starts_nothing": """
said = in_child(lambda: [threads(), sorted(call()), threads()])
assert said == [[], [2.0], []], said
""",
    "a_child_whose_parent_was_in_the_middle_of_everything_is_not_stuck": """
fleet.start()
held = [fleet._worker._installing, fleet._restoring, fleet._store._lock, fleet._journal._lock, fleet._outbox._lock,
        fleet._opening, model._slot.current.stats._lock, fleet._worker.spool._lock]  # in the order of the SDK's threads
def hold():
    for lock in held: lock.acquire()
    ready.set()
    done.wait()
    for lock in reversed(held): lock.release()
ready, done = threading.Event(), threading.Event()
holder = threading.Thread(target=hold)
holder.start()
ready.wait()
said = in_child(lambda: [sorted(call()), fleet.status().device != "", fleet.stop()])
done.set()
holder.join()
assert said == [[2.0], True, None], said
""",
    "grandchildren_answer_too": """
fleet.start()
said = in_child(lambda: [sorted(call()), in_child(lambda: [sorted(call()), threads()])])
assert said == [[2.0], [[2.0], ["fleet-follow"]]], said
said = in_child(lambda: in_child(lambda: sorted(call())))
assert said == [2.0], said
""",
    "a_pool_of_workers_answers": """
fleet.start()
with multiprocessing.get_context("fork").Pool(3) as pool:
    assert pool.map(call, [20] * 6) == [{2.0}] * 6
""",
    "the_parent_keeps_the_lock_and_a_child_takes_over_when_it_is_killed": """
fleet.stop()
reading, writing = os.pipe()
parent = os.fork()
if not parent:
    fleet = Fleet.open(sys.argv[1], transport=Nobody(), intra_op_threads=2, rehearse=False, follow_seconds=0.1)
    model = fleet.model("detector")
    fleet.start()
    assert fleet.updates
    if not os.fork():
        time.sleep(0.5)
        os.write(writing, b"0" if not fleet.updates else b"!")
        until(lambda: fleet.updates)
        os.write(writing, b"1" if call() == {2.0} else b"?")
        os._exit(0)
    time.sleep(60)
os.close(writing)
assert os.read(reading, 1) == b"0"
os.kill(parent, signal.SIGKILL)
assert os.read(reading, 1) == b"1"
assert os.read(reading, 1) == b""
""",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("fork") / "device")
    world.committed("detector/1.0.0/default", scaling(2)).stop()
    return world.path


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_after_a_fork(home, scenario):
    program = [sys.executable, "-W", "ignore", "-c", START + SCENARIOS[scenario] + "\nprint('done')\n", str(home)]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=40, check=False)
    assert (ended.returncode, ended.stdout[-5:]) == (0, "done\n"), ended.stderr[-3_000:]
