"""A start without a network: quick, and no less careful about what it serves."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest

from device_sdk import runtime
from device_sdk.deferred import is_made
from device_sdk.errors import NoModelError
from device_sdk.install import MAX_STARTS
from device_sdk.protocol.assignment import Assignment, Sampling
from device_sdk.protocol.manifest import FileEntry, digest
from device_sdk.protocol.names import ReleasePath
from device_sdk.store import Store
from tests.sdk.world import QUICK, World, X, answer, graph, helper, manifest_of, prove, scaling

OLD, NEW = "detector/1.0.0/default", "detector/2.0.0/default"
PROGRAM = """
import json, sys
import numpy as np
import onnxruntime
before = set(sys.modules)
from device_sdk import Fleet
fleet = Fleet.open(sys.argv[1])
outputs = fleet.model("detector").run({"x": np.ones((1, 4), np.float32)})
print(json.dumps([float(outputs["y"][0, 0]), sorted(set(sys.modules) - before)]))
"""
# What a start loads beyond numpy and onnxruntime. Each module costs every start of every device: a new one needs a
# reason. What is private to a module of the standard library (`_json`) comes with it.
LOADED = {
    "device_sdk", "device_sdk.assembly", "device_sdk.binding", "device_sdk.client", "device_sdk.comparison",
    "device_sdk.config", "device_sdk.counts", "device_sdk.deferred", "device_sdk.errors", "device_sdk.following",
    "device_sdk.hashed", "device_sdk.holds", "device_sdk.hooks", "device_sdk.install", "device_sdk.journal",
    "device_sdk.ledger", "device_sdk.locking", "device_sdk.looking", "device_sdk.model", "device_sdk.naming",
    "device_sdk.options", "device_sdk.outbox", "device_sdk.peers", "device_sdk.probes", "device_sdk.protocol",
    "device_sdk.protocol.assignment", "device_sdk.protocol.cohorts", "device_sdk.protocol.errors",
    "device_sdk.protocol.events", "device_sdk.protocol.fields", "device_sdk.protocol.frozen",
    "device_sdk.protocol.limits", "device_sdk.protocol.manifest", "device_sdk.protocol.names",
    "device_sdk.protocol.scores", "device_sdk.protocol.versions", "device_sdk.room", "device_sdk.runtime",
    "device_sdk.sampling", "device_sdk.schema", "device_sdk.scoring", "device_sdk.slot", "device_sdk.standing",
    "device_sdk.stats", "device_sdk.store", "device_sdk.traffic", "device_sdk.updater",
}  # fmt: skip
HEAVY = {
    "asyncio", "base64", "bz2", "concurrent", "cryptography", "decimal", "email", "hmac", "http", "lzma",
    "multiprocessing", "requests", "secrets", "securesystemslib", "shutil", "socket", "ssl", "statistics", "subprocess",
    "tempfile", "tuf", "urllib3", "zipfile",
}  # fmt: skip


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


def test_start_serves_before_it_loads_what_only_a_network_needs(world):
    world.committed(OLD, scaling(3)).stop()
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(world.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answered, loaded = json.loads(done.stdout)
    assert answered == 3.0
    assert {name for name in loaded if name.startswith("device_sdk")} - LOADED == set()
    assert {name.partition(".")[0] for name in loaded} & HEAVY == set()


def test_what_polls_and_uploads_is_made_at_once_where_samples_are_asked_for(world):
    asked = Sampling("c", 1.0, 1_000, int(time.time()) + 86_400)
    with world.committed(OLD, scaling(3)) as fleet:
        world.server.assign(manifest_of(OLD, scaling(3)), sampling=asked)
        fleet.update_once()
    with world.open() as fleet:
        assert is_made(fleet._worker)
        answer(fleet)
        fleet._worker.spool.drain()
        assert fleet.status().samples_waiting == {"detector": 1}


def test_what_polls_and_uploads_is_made_when_it_is_first_asked_for(world):
    world.committed(OLD, scaling(3)).stop()
    with world.open() as fleet:
        assert answer(fleet) == 3.0
        assert fleet.updates
        assert not is_made(fleet._worker)
        assert fleet.status().poll is not None
        assert is_made(fleet._worker)


def test_a_device_that_was_never_started_ends_cleanly_without_making_what_polls(world):
    with world.committed(OLD, scaling(1)) as fleet:
        world.server.assign(world.server.publish(NEW, scaling(2)))
        fleet.update_once()
    for _ in range(MAX_STARTS + 2):  # none of which is held against the release on trial
        fleet = world.open()
        worker = fleet._worker
        assert answer(fleet) == 2.0
        fleet.stop()
        assert not fleet.updates
        assert not is_made(worker)


@pytest.mark.parametrize(("by", "calls"), [(runtime.RUNTIME, 1), ("1.0.0", 2)], ids=["it", "another"])
def test_start_leaves_the_first_call_to_the_program_where_this_onnxruntime_has_answered(world, monkeypatch, by, calls):
    with world.committed(OLD, scaling(3)) as fleet:
        answer(fleet)
    path = world.path / "ledger.json"
    ledger = json.loads(path.read_text())
    (done,) = ledger["detector"].values()
    assert done["runtime"] == runtime.RUNTIME
    done["runtime"] = by
    path.write_text(json.dumps(ledger))
    made, asked = runtime.make_session, []

    class Session:
        def __init__(self, *given):
            self.real = made(*given)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def run(self, *given):
            asked.append(given)
            return self.real.run(*given)

    monkeypatch.setattr(runtime, "make_session", Session)
    with world.open() as fleet:
        assert answer(fleet) == 3.0
        assert len(asked) == calls


def test_view_that_is_remembered_says_what_must_not_be_served(world):
    with world.committed(OLD, scaling(1)) as fleet:
        new = world.server.publish(NEW, scaling(2))
        world.server.assign(new)
        fleet.update_once()
        prove(fleet)
        world.server.simulator.withdraw(NEW)
        world.server.assign(None)
        fleet._worker.poller.poll()  # it hears of it, and is killed before it does anything about it
        fleet._store.begin_trial("detector", fleet._store.state("detector").previous)
    with world.open() as fleet:
        assert answer(fleet) == 1.0
        assert fleet._worker._is_unverified


def test_remembered_view_installs_nothing_before_the_view_itself_is_verified(world):
    world.committed(OLD, scaling(1)).stop()
    bad = manifest_of(NEW, scaling(2))
    path = world.path / "standing.json"
    standing = json.loads(path.read_text())
    forged = Assignment("detector", bad.path, len(bad.to_bytes()), digest(bad.to_bytes()), probation=QUICK)
    standing["models"]["detector"] = {
        "length": forged.length, "sha256": forged.sha256, "custom": forged.to_custom(), "listed": [forged.sha256],
    }  # fmt: skip
    path.write_text(json.dumps(standing))
    world.server.simulator.blobs[bad.files[0].sha256] = scaling(2)
    with world.open() as fleet:
        assert answer(fleet) == 1.0
        fleet._worker.install()
        assert answer(fleet) == 1.0
        assert fleet._installers["detector"].latest.assignment.release == ReleasePath.parse(OLD)
        assert fleet.status().models["detector"].state == "committed"


@pytest.mark.parametrize("content", ["", "{}", '{"view": "00", "models": {}}', None])
def test_remembered_view_that_is_not_of_the_view_on_disk_is_verified_first(world, content):
    world.committed(OLD, scaling(1)).stop()
    path = world.path / "standing.json"
    if content is None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"models": {"detector": {"length": "long"}}}))
    else:
        path.write_text(content)
    with world.open() as fleet:
        assert not fleet._worker._is_unverified
        assert answer(fleet) == 1.0


def external(factor):
    """Weights beside the model, as torch exports them: they are hashed while they are loaded."""
    weights = np.full((4, 512), factor, np.float32)
    shrink = np.full((512, 4), 1 / 512, np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "s"], ["y"])]
    return onnx.load_from_string(graph(nodes, {"w": weights, "s": shrink}))


def publish_external(world, path, factor, folder):
    folder.mkdir()
    onnx.save(
        external(factor), folder / "model.onnx", save_as_external_data=True, location="model.onnx.data",
        size_threshold=0,
    )  # fmt: skip
    contents = {name: (folder / name).read_bytes() for name in ("model.onnx", "model.onnx.data")}
    files = tuple(FileEntry(name, len(data), digest(data)) for name, data in contents.items())
    for file, data in zip(files, contents.values(), strict=True):
        world.server.simulator.blobs[file.sha256] = data
    signed = world.server.publish(path, contents["model.onnx"], files=files)
    world.server.assign(signed)
    return files


@pytest.fixture
def large(world, tmp_path):
    """A committed release of several files, which follows another. The files."""
    with world.committed(OLD, scaling(1)) as fleet:
        files = publish_external(world, NEW, 3.0, tmp_path / "new")
        fleet.update_once()
        prove(fleet)
        assert said(fleet) == pytest.approx(18.0)
    return files


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that the store hashes."""
    names, real = [], Store._hash

    def noted(store, path):
        names.append(path.name)
        return real(store, path)

    monkeypatch.setattr(Store, "_hash", noted)
    return names


def said(fleet):
    return float(fleet.model("detector").run(X)["y"][0, 0])


def rot(world, file):
    """As a medium does it: other bytes, and nothing to see from outside."""
    blob = world.path / "store" / "blobs" / file.sha256
    blob.write_bytes(bytes(file.length))
    status = blob.stat()
    path = world.path / "store" / "hashed.json"
    known = json.loads(path.read_text())
    known[file.sha256] = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    path.write_text(json.dumps(known))
    return blob


def test_files_that_nobody_has_written_to_are_hashed_once_they_serve(world, large, hashed):
    for _ in range(2):  # the second start goes by what the first has left
        with world.open() as fleet:
            assert said(fleet) == pytest.approx(18.0)
            assert hashed == []
            fleet.update_once()
            assert sorted(hashed) == sorted(file.sha256 for file in large)
            fleet.update_once()
            assert len(hashed) == 2
        hashed.clear()


@pytest.mark.parametrize("by", ["the program", "lost", "rubbish", "written to", "another runtime", "read-only"])
def test_files_are_hashed_before_they_serve_where_anything_speaks_against_waiting(world, large, hashed, by):
    path, options = world.path / "store" / "hashed.json", {}
    if by == "the program":
        options = {"hash_first": True}
    elif by == "lost":
        path.unlink()
    elif by == "rubbish":
        path.write_text('{"' + large[1].sha256 + '": [1, 2, 3]}')
    elif by == "written to":
        blob = world.path / "store" / "blobs" / large[1].sha256
        before = blob.stat()
        blob.write_bytes(blob.read_bytes())
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif by == "another runtime":
        ledger = world.path / "ledger.json"
        ledger.write_text(ledger.read_text().replace(runtime.RUNTIME, "1.0.0"))
    else:
        options = {"read_only": True}
    with world.open(**options) as fleet:
        assert said(fleet) == pytest.approx(18.0)
        assert large[1].sha256 in hashed or large[1].name in hashed


def test_weights_that_rotted_on_the_disk_are_replaced_as_soon_as_they_serve(world, large):
    blob = rot(world, large[1])
    with world.open() as fleet:
        assert said(fleet) != pytest.approx(18.0)
        kept = dict(world.server.simulator.blobs)
        world.server.simulator.blobs.clear()
        fleet._worker.install()
        assert answer(fleet) == 1.0
        assert not blob.exists()
        told = [(event.kind, event.reason) for event in fleet._outbox.pending().events]
        assert told.count(("refused", "damaged")) == 1
        world.server.simulator.blobs.update(kept)
        world.time.seconds += 3_600
        fleet.update_once()  # it is fetched again
        prove(fleet)
        assert said(fleet) == pytest.approx(18.0)


def test_the_only_release_rotted_and_serves_no_more_until_it_is_fetched_again(world, tmp_path):
    files = publish_external(world, OLD, 3.0, tmp_path / "only")
    with world.open() as fleet:
        fleet.update_once()
        prove(fleet)
    blob, kept = rot(world, files[1]), dict(world.server.simulator.blobs)
    with world.open() as fleet:
        model = fleet.model("detector")
        world.server.simulator.blobs.clear()
        fleet._worker.install()
        assert not blob.exists()
        with pytest.raises(NoModelError):
            model.run(X)
        assert not model.wait(0)
        world.server.simulator.blobs.update(kept)
        world.time.seconds += 3_600
        fleet.update_once()
        assert said(fleet) == pytest.approx(18.0)


def test_nothing_that_rotted_takes_the_place_of_what_rotted(world, tmp_path):
    blobs = []
    for path, factor in ((OLD, 2.0), (NEW, 3.0)):
        files = publish_external(world, path, factor, tmp_path / str(factor))
        with world.open() as fleet:
            fleet.update_once()
            prove(fleet)
        blobs.append((files[1], world.path / "store" / "blobs" / files[1].sha256))
    for file, _ in blobs:
        rot(world, file)
    with world.open() as fleet:
        model = fleet.model("detector")
        world.server.simulator.blobs.clear()
        fleet._worker.install()
        assert [blob.exists() for _, blob in blobs] == [False, False]
        with pytest.raises(NoModelError):
            model.run(X)


def test_a_model_that_rotted_so_that_it_does_not_load_is_found_out_at_the_start(world):
    with world.committed(OLD, scaling(1)) as fleet:
        world.server.assign(world.server.publish(NEW, scaling(3)))
        fleet.update_once()
        prove(fleet)
    blob = rot(world, manifest_of(NEW, scaling(3)).files[0])
    with world.open() as fleet:
        assert answer(fleet) == 1.0
        assert not blob.exists()
        fleet.update_once()
        prove(fleet)
        assert answer(fleet) == 3.0


def test_weights_that_were_damaged_are_found_beside_the_loading_and_what_went_before_serves(world, large):
    blob = world.path / "store" / "blobs" / large[1].sha256
    data = bytearray(blob.read_bytes())
    data[100] ^= 1
    blob.write_bytes(data)
    with world.open() as fleet:
        assert answer(fleet) == 1.0
        assert not blob.exists()
        told = [(event.kind, event.reason) for event in fleet._outbox.pending().events]
        assert told.count(("refused", "damaged")) == 1
        fleet.update_once()  # it is fetched again
        prove(fleet)
        assert float(fleet.model("detector").run(X)["y"][0, 0]) == pytest.approx(18.0)
