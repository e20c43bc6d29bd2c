"""What was rejected here stays rejected, over restarts, until someone says otherwise."""

import signal
import subprocess
import sys
import textwrap

import pytest

from device_sdk.__main__ import main
from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.manifest import digest
from tests.sdk.world import World, answer, nan_emitting, prove, scaling

OLD, NEW = "detector/1.0.0/default", "detector/2.0.0/default"


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


def rejected(world):
    """A device that rolled NEW back under rollout r-1."""
    with world.committed(OLD, scaling(1)) as fleet:
        bad = world.server.publish(NEW, nan_emitting())
        world.server.assign(bad, rollout="r-1")
        fleet.update_once()
        prove(fleet)
    return bad


def tries(world, bad, **assigned):
    """Whether a fresh process tries the release under this assignment."""
    world.server.assign(bad, **assigned)
    with world.open() as fleet:
        fleet.update_once()
        return fleet.model("detector").release.version == "2.0.0"


def test_quarantine_holds_over_restarts_and_newer_rollouts(world):
    bad = rejected(world)
    assert not tries(world, bad, rollout="r-1")
    assert not tries(world, bad, rollout="r-2")
    assert (world.server.events[-1].kind, world.server.events[-1].reason) == ("failed", "known_bad")


def test_signed_view_may_ask_for_one_more_try_and_gets_one_for_each_rollout(world):
    bad = rejected(world)
    assert not tries(world, bad, rollout="r-1", forgive=True)  # under which it failed: it would go round for ever
    assert tries(world, bad, rollout="r-2", forgive=True)
    with world.open() as fleet:
        prove(fleet)
        assert answer(fleet) == 1.0
        assert fleet._store.bad_rollout(digest(bad.to_bytes())) == "r-2"
    assert not tries(world, bad, rollout="r-2", forgive=True)


def test_person_at_the_device_may_forgive_and_the_device_tries_again_by_itself(world, capsys):
    bad = rejected(world)
    world.server.assign(bad, rollout="r-1")
    with world.open() as fleet:
        fleet.update_once()
        assert answer(fleet) == 1.0
        assert main(["forgive", "--home", str(world.path), "detector", "2.0.0"]) == 0
        assert "may be tried again: 1 variant" in capsys.readouterr().out
        assert fleet._worker.install() <= 60  # it looks without being told
        assert fleet.model("detector").release.version == "2.0.0"
    assert main(["forgive", "--home", str(world.path), "detector", "9.9.9"]) == 2


def test_mark_of_an_older_sdk_holds_and_can_be_forgiven_by_a_view(world):
    bad = rejected(world)
    (world.path / "store" / "manifests" / f"{digest(bad.to_bytes())}.bad").write_text("NaN")
    assert not tries(world, bad, rollout="r-2")
    assert tries(world, bad, rollout="r-2", forgive=True)


def test_forgiving_is_signed_only_where_it_is_asked_for():
    assert "forgive" not in Assignment("m").to_custom()
    asked = Assignment("m", sha256="a" * 64, forgive=True)
    assert Assignment.parse("m", 0, "a" * 64, asked.to_custom()) == asked


PROGRAM = """
    import os, signal, sys
    import numpy as np
    from device_sdk import Fleet, runtime
    load = runtime.load
    def deadly(manifest, **more):
        loaded = load(manifest, **more)
        if manifest.path.version == "2.0.0":
            loaded.call = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return loaded
    runtime.load = deadly
    fleet = Fleet.open(sys.argv[1], rehearse=False)
    outputs = fleet.model("detector").run({"x": np.ones((1, 4), np.float32)})
    print(outputs["y"][0, 0], flush=True)
    fleet.stop()
"""


def start_for_real(world):
    """A process of its own that calls the model once. Returns how it ended, and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(world.path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.strip()


def test_model_that_kills_the_process_twice_is_rolled_back_at_the_third_start_also_after_a_reboot(world):
    world.committed(OLD, scaling(1)).stop()
    bad = world.server.publish(NEW, scaling(2))
    world.server.assign(bad, rollout="r-1")
    with world.open() as fleet:
        fleet.update_once()
    assert start_for_real(world) == (-signal.SIGKILL, "")
    assert start_for_real(world) == (-signal.SIGKILL, "")
    reboot(world)
    assert start_for_real(world) == (0, "1.0")
    with world.open() as fleet:
        fleet.update_once()
        assert answer(fleet) == 1.0
        assert fleet._store.bad_reason(digest(bad.to_bytes())) == "crash_loop"
    assert [(e.kind, e.reason, e.rollout) for e in world.server.events][-1] == ("rolled_back", "crash_loop", "r-1")
    assert not tries(world, bad, rollout="r-2")


def reboot(world):
    """Nothing outlives it but what is on the disk: no lock is held, no file of a living process is left."""
    for path in world.path.glob("peers/*"):
        path.unlink()
