"""Several processes on one directory: real processes, killed for real. One updates, all swap, one takes over."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from device_sdk.counts import Counts
from device_sdk.peers import Board, Seen, Served
from device_sdk.protocol.assignment import Probation, Sampling
from device_sdk.store import Store
from tests.sdk.world import QUICK, World, answer, judge, nan_emitting, prove, scaling
from tests.simulator import DAY

ROOT = Path(__file__).parents[2]
OLD, NEW, NEXT = (f"detector/{number}.0.0/default" for number in (1, 2, 3))
PATIENT = Probation(calls=10**6, seconds=0.0)

# Opens the home, calls the model all the time, and says on a line what answers and whether it updates, when it changes.
PROCESS = """
import json, os, sys, threading
import numpy as np
from device_sdk.client import Fleet
from device_sdk.errors import TransferError

class Nobody:
    def request(self, *_, **__):
        with open(os.path.join(sys.argv[1], "polls"), "a") as file:
            file.write(f"{os.getpid()}\\n")
        raise TransferError("no route")

threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
fleet = Fleet.open(sys.argv[1], transport=Nobody(), intra_op_threads=1, rehearse=False, follow_seconds=0.1,
                   poll_seconds=0.2, read_only="read" in sys.argv)
model, said, x, failed = fleet.model("detector"), None, {"x": np.ones((1, 4), np.float32)}, 0
fleet.start()
while True:
    try:
        factor = float(model.run(x)["y"][0, 0])
    except Exception as error:
        factor, failed = type(error).__name__, failed + 1
    now = {"answer": str(factor), "updates": fleet.updates, "failed": failed}
    if now != said:
        print(json.dumps({**now, "pid": os.getpid()}), flush=True)
        said = now
    threading.Event().wait(0.002)
"""


class Process:
    def __init__(self, home, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(home), *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self.process.pid
        self.said = {}
        self.failed = 0
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self):
        for line in self.process.stdout:
            self.said = json.loads(line)
            self.failed = self.said["failed"]

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
        self.thread.join(10)
        self.process.stdout.close()


@contextmanager
def processes(home, number, *arguments):
    started = [Process(home, *arguments) for _ in range(number)]
    try:
        yield list(started)
    finally:
        for each in started:
            each.close()


def eventually(condition, seconds=30.0, meanwhile=lambda: None):
    """How long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not come about"
        meanwhile()
        threading.Event().wait(0.01)
    return time.monotonic() - began


def all_answer(several, factor):
    return lambda: all(each.said.get("answer") == str(factor) for each in several)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


def update_to(world, fleet, path, data, probation=QUICK):
    world.server.assign(world.server.publish(path, data), probation=probation)
    fleet.update_once()


def test_all_processes_swap_with_the_one_that_updates_and_no_call_fails(world):
    fleet = world.committed(OLD, scaling(1))
    with fleet, processes(world.path, 3) as several:
        eventually(all_answer(several, 1.0))
        update_to(world, fleet, NEW, scaling(2), PATIENT)
        eventually(all_answer(several, 2.0))
        fleet._installers["detector"].latest = None
        world.server.assign(world.server.publish(NEXT, scaling(3)))
        fleet.update_once()
        eventually(all_answer(several, 3.0))
        assert [each.failed for each in several] == [0, 0, 0]
        assert not any(each.said["updates"] for each in several)


def test_what_the_others_call_ends_a_probation(world):
    """The process that updates calls nothing itself."""
    fleet = world.committed(OLD, scaling(1))
    with fleet, processes(world.path, 2) as several:
        eventually(all_answer(several, 1.0))
        update_to(world, fleet, NEW, scaling(2))
        assert fleet.status().models["detector"].state == "probation"
        eventually(lambda: fleet.status().models["detector"].state == "committed", meanwhile=lambda: judge(fleet))
        healthy = [event for event in world.server.events if event.kind == "committed"][-1]
        assert healthy.detail["calls"] >= QUICK.calls
        assert fleet.model("detector").stats.calls == 0
        eventually(lambda: fleet._board.seen("detector", fleet._store.state("detector").active) == [])


def test_a_release_that_is_bad_in_the_others_is_rolled_back_in_all(world):
    fleet = world.committed(OLD, scaling(1))
    with fleet, processes(world.path, 2) as several:
        eventually(all_answer(several, 1.0))
        update_to(world, fleet, NEW, nan_emitting())
        eventually(lambda: fleet.status().models["detector"].state == "rolled_back", meanwhile=lambda: judge(fleet))
        assert answer(fleet) == 1.0
        eventually(all_answer(several, 1.0))
        assert "invalid_rate" in fleet.status().models["detector"].reason
        assert [each.failed for each in several] == [0, 0]


def test_when_the_updating_process_is_killed_another_takes_over_and_polls(world):
    world.committed(OLD, scaling(1)).stop()
    with processes(world.path, 1) as (first,):
        eventually(lambda: first.said.get("updates"))
        with processes(world.path, 2) as others, processes(world.path, 1, "read") as (reader,):
            eventually(all_answer([*others, reader], 1.0))
            assert not any(each.said["updates"] for each in others)
            first.kill()
            eventually(lambda: any(each.said["updates"] for each in others))
            (second,) = [each for each in others if each.said["updates"]]
            eventually(lambda: str(second.pid) in (world.path / "polls").read_text().split())
            assert sum(each.said["updates"] for each in others) == 1
            second.kill()
            (third,) = [each for each in others if each is not second]
            eventually(lambda: third.said["updates"])
            assert not reader.said["updates"]
            assert [each.failed for each in (*others, reader)] == [0, 0, 0]


def test_a_trial_whose_updating_process_is_killed_twice_is_rolled_back_by_the_third(world):
    fleet = world.committed(OLD, scaling(1))
    update_to(world, fleet, NEW, scaling(2), PATIENT)
    (trial,) = fleet._store.state("detector").kept - {fleet._store.state("detector").active}
    with processes(world.path, 3) as several:
        eventually(all_answer(several, 2.0))
        fleet._lock.release()  # as if killed: nothing is closed
        fleet._lock = None
        eventually(lambda: any(each.said["updates"] for each in several))
        (victim,) = [each for each in several if each.said["updates"]]
        eventually(lambda: Store(world.path / "store").state("detector").starts == 2)  # it answers for the trial now
        assert not Store(world.path / "store").is_bad(trial)
        victim.kill()
        several.remove(victim)
        eventually(all_answer(several, 1.0))
        assert Store(world.path / "store").bad_reason(trial) == "crash_loop"
        assert [each.failed for each in several] == [0, 0]
    fleet._worker = None


def test_a_stopped_model_is_stopped_in_all_processes(world):
    fleet = world.committed(OLD, scaling(1))
    with fleet, processes(world.path, 2) as several:
        eventually(all_answer(several, 1.0))
        world.server.simulator.withdraw(OLD)
        world.server.assign(None, stop=True)
        fleet.update_once()
        eventually(all_answer(several, "ModelStoppedError"))
        assert not any(each.said["updates"] for each in several)


def test_samples_of_the_others_are_not_kept_and_counted(world):
    fleet = world.committed(OLD, scaling(1))
    with fleet, processes(world.path, 2) as several:
        eventually(all_answer(several, 1.0))
        now = int(time.time())
        manifest = world.server.publish(NEW, scaling(2))
        world.server.assign(manifest, sampling=Sampling("c", 1.0, 1_000, now + 300 * DAY))
        fleet.update_once()
        eventually(all_answer(several, 2.0))
        eventually(lambda: fleet.status().samples_dropped["detector"] > 20, meanwhile=fleet._worker._tell_health)
        assert fleet.status().samples_waiting["detector"] == 0
        prove(fleet)
        fleet._worker.spool.drain()
        assert fleet.status().samples_waiting["detector"] > 0


def test_what_a_dead_process_saw_is_ignored_and_removed(tmp_path):
    sha, updater, follower = "a" * 64, Board(tmp_path), Board(tmp_path)
    follower.report({"m": Seen(sha, Counts(calls=7, errors=1))})
    assert [seen.counts.calls for seen in updater.seen("m", sha)] == [7]
    assert updater.seen("m", "b" * 64) == []
    os.close(follower._alive)
    assert updater.seen("m", sha) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"m": "3"}', '{"m": {"sha256": "x", "counts": {}}}', "{}" * 300_000])
def test_what_does_not_parse_is_not_there(tmp_path, text):
    updater, follower = Board(tmp_path), Board(tmp_path)
    follower.report({"m": Seen("a" * 64)})
    (tmp_path / f"{follower._id}.json").write_text(text, encoding="utf-8")
    (tmp_path / "serving.json").write_text(text, encoding="utf-8")
    (tmp_path / "x.drops").write_text(text, encoding="utf-8")
    assert (updater.seen("m", "a" * 64), follower.news(), updater.take_drops()) == ([], None, {})


def test_what_is_served_is_news_once(tmp_path):
    updater, follower = Board(tmp_path), Board(tmp_path)
    assert follower.news() is None
    served = {"m": Served("a" * 64, trial=True, rate=0.25)}
    updater.tell(served)
    assert follower.news() == served
    assert follower.news() is None
    follower.look_again()
    assert follower.news() == served


def test_drops_are_counted_once_whoever_asks(tmp_path):
    updater, follower = Board(tmp_path), Board(tmp_path)
    assert follower.hand_over_drops({"m": 3})
    assert not follower.hand_over_drops({"m": 4})
    assert updater.take_drops() == {"m": 3}
    assert updater.take_drops() == {}
    assert follower.hand_over_drops({"m": 4})
    follower.leave()
    assert Board(tmp_path).take_drops() == {"m": 4}


def test_garbage_collection_spares_what_another_process_is_loading(world):
    with world.committed(OLD, scaling(1)) as fleet:
        other = Store(world.path / "store")
        sha = other.current("detector")
        with other.open(sha) as files:
            fleet._store.collect_garbage()
            assert files.entry_path.exists()
        files.directory.mkdir()
        fleet._store.collect_garbage()
        assert not files.directory.exists()
