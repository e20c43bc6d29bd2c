"""A new release is loaded first in a process that may die of it: what it says of bombs, crashes, and of itself."""

import os
import sys
import threading
from pathlib import Path

import pytest

from device_sdk import rehearsal, runtime
from device_sdk.errors import ModelError, RehearsalError, ShortageError, UntrustedError
from device_sdk.protocol import limits
from device_sdk.protocol.manifest import Requirements, digest
from device_sdk.rehearsal import rehearse
from device_sdk.room import Rules
from device_sdk.runtime import RuntimeOptions
from device_sdk.store import Store
from device_sdk.updater import Progress, Signal, State
from tests.sdk import bombs
from tests.sdk.bombs import dying_options
from tests.sdk.world import World, answer, manifest_of, scaling
from tests.simulator import release

RULES = Rules(memory=512 * limits.MIB, seconds=30.0)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def keep(store, files):
    """A release in the store; its manifest's hash."""
    manifest, blobs = release("detector/1.0.0/default", files)
    for file in manifest.files:
        store.append(file.sha256, blobs[file.sha256])
        store.admit(file.sha256, file.length)
    return store.add_manifest(manifest.to_bytes())


def rehearsed(store, files, *, rules=RULES, go_on=lambda: None, **options):
    with store.open(keep(store, files if isinstance(files, dict) else {"model.onnx": files})) as opened:
        rehearse(opened, options=RuntimeOptions(**options), rules=rules, go_on=go_on)


def test_a_good_release_passes_with_its_weights_beside_it_too(store):
    rehearsed(store, scaling(2))
    rehearsed(store, {"model.onnx": bombs.reaching("model.onnx.data"), "model.onnx.data": bytes(16)})
    assert os.listdir(store._loading) == []  # noqa: PTH208


def test_a_directory_may_be_named_from_where_the_program_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rehearsed(Store(Path("store")), {"model.onnx": bombs.reaching("model.onnx.data"), "model.onnx.data": bytes(16)})
    assert os.listdir("store/loading") == []  # noqa: PTH208


def test_a_bomb_is_over_the_memory_limit(store):
    with pytest.raises(ModelError) as caught:
        rehearsed(store, bombs.expanding())
    assert caught.value.code == "memory_limit"
    assert "512 MiB" in str(caught.value)


def test_a_bomb_behind_an_open_dimension_is_over_the_limit_too(store):
    """Where sizes had to be invented, a warm-up that fails proves nothing; one that finds no memory does."""
    data = bombs.expanding().replace(b"\x08\x04", b"\x12\x00")  # [n, 4] becomes [n, ?]
    with pytest.raises(ModelError) as caught:
        rehearsed(store, data)
    assert caught.value.code == "memory_limit"


def test_a_release_that_spins_is_ended_in_time(store):
    with pytest.raises(ModelError) as caught:
        rehearsed(store, bombs.spinning(), rules=Rules(RULES.memory, seconds=0.5))
    assert caught.value.code == "test_timed_out"


def test_native_code_that_crashes_takes_nobody_with_it(store):
    with pytest.raises(ModelError, match="SIGSEGV") as caught:
        rehearsed(store, scaling(2), session_options=dying_options)
    assert caught.value.code == "crashed_in_test"


def test_too_little_free_memory_is_the_devices_fault_and_no_verdict(store, monkeypatch):
    monkeypatch.setattr(rehearsal, "free_memory", lambda: 40 * limits.MIB)
    with pytest.raises(ShortageError) as caught:
        rehearsed(store, bombs.expanding())
    assert caught.value.code == "memory"


def test_its_process_gives_way_to_this_one(store, monkeypatch):
    given = []
    monkeypatch.setattr(os, "setpriority", lambda _which, _pid, value: given.append(value))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    rehearsed(store, scaling(1))
    rehearsed(store, scaling(1), rules=Rules(RULES.memory, RULES.seconds, nice=0))
    assert given == [own + 10, own]


def test_an_interpreter_that_does_not_start_is_no_verdict_either(store, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(RehearsalError):
        rehearsed(store, scaling(2))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RehearsalError, match="rehearse=False"):
        rehearsed(store, scaling(2))


@pytest.mark.parametrize("reason", ["frozen", "options", "providers"])
def test_where_it_cannot_be_done_the_log_says_so(store, monkeypatch, caplog, reason):
    options = {}
    if reason == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        options = {"options": {"session_options": lambda: None}, "providers": {"providers": [object()]}}[reason]
    rehearsed(store, bombs.expanding(), **options)
    assert "is not tried in a process of its own" in caplog.text


def test_whoever_is_told_to_stop_does_not_wait_for_the_test(store):
    class StopError(Exception):
        pass

    over = threading.Event()

    def go_on():
        if over.is_set():
            raise StopError

    threading.Timer(0.4, over.set).start()
    with pytest.raises(StopError):
        rehearsed(store, bombs.spinning(), go_on=go_on)
    assert over.is_set()


def test_the_allowance_is_what_the_manifest_asks_for_else_by_the_size_of_its_files():
    manifest = manifest_of("detector/1.0.0/default", bytes(1000))
    assert Rules(memory=5).allowance(manifest) == 5
    assert Rules().allowance(manifest) == 1024 * limits.MIB + 8_000
    object.__setattr__(manifest, "requires", Requirements(memory=7))
    assert Rules().allowance(manifest) == 256 * limits.MIB + 7


def test_a_file_that_is_changed_while_it_is_loaded_is_not_used_and_is_fetched_again(store):
    files = {"model.onnx": bombs.reaching("model.onnx.data"), "model.onnx.data": bytes(16)}
    sha = keep(store, files)
    blob = store._blobs / digest(bytes(16))

    def swap():
        with store.open(sha):
            blob.write_bytes(b"\x01" * 16)  # after the hash, before the runtime reads it

    with pytest.raises(UntrustedError) as caught:
        swap()
    assert caught.value.code == "hash_mismatch"
    assert not blob.exists()


def test_a_link_that_another_process_makes_meanwhile_is_no_change(store, tmp_path):
    sha = keep(store, {"model.onnx": bombs.reaching("model.onnx.data"), "model.onnx.data": bytes(16)})
    with store.open(sha):
        os.link(store._blobs / digest(bytes(16)), tmp_path / "beside")
    assert store.has(sha)


def test_a_device_rejects_a_bomb_for_ever_and_goes_on(tmp_path):
    world = World(tmp_path / "device")
    options = {"rehearse": True, "rehearsal_bytes": RULES.memory}
    with world.committed("detector/1.0.0/default", scaling(2), **options) as fleet:
        manifest = world.server.publish("detector/1.1.0/default", bombs.expanding())
        world.server.assign(manifest)
        fleet.update_once()
        assert answer(fleet) == 2.0
        event = world.server.events[-1]
        assert (event.kind, event.reason) == ("failed", "memory_limit")
        assert fleet._store.is_bad(digest(manifest.to_bytes()))


def test_a_shortage_is_waited_out_however_often_and_is_no_crash(tmp_path, monkeypatch):
    world = World(tmp_path / "device")
    with world.committed("detector/1.0.0/default", scaling(2), rehearse=True) as fleet:
        world.server.assign(world.server.publish("detector/1.1.0/default", scaling(5)))

        def short(*_, **__):
            raise ShortageError("none left")

        monkeypatch.setattr("device_sdk.testing.rehearse", short)
        for _ in range(4):
            fleet.update_once()
            assert fleet.status().models["detector"].reason == "memory"
            world.time.seconds += 4_000
        monkeypatch.undo()
        fleet.update_once()
        assert answer(fleet) == 5.0


def test_a_release_that_cannot_be_rehearsed_is_not_loaded(tmp_path, monkeypatch):
    world = World(tmp_path / "device")
    with world.committed("detector/1.0.0/default", scaling(2), rehearse=True) as fleet:
        world.server.assign(world.server.publish("detector/1.1.0/default", scaling(5)))
        monkeypatch.setattr(sys, "executable", "/bin/false")
        fleet.update_once()
        assert answer(fleet) == 2.0
        assert world.server.events[-1].reason == "no_rehearsal"


def test_only_a_test_that_came_to_no_end_is_counted():
    begun = Progress("detector", State.VERIFYING).after(Signal.VERIFIED)
    assert begun.tests == 1
    assert begun.after(Signal.INTERRUPT).tests == 1
    assert [begun.after(signal).tests for signal in (Signal.HOLD, Signal.FAIL, Signal.TESTED)] == [0, 0, 0]


def test_no_memory_while_loading_has_a_name_of_its_own(monkeypatch):
    def starved(*_, **__):
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(runtime.onnxruntime, "InferenceSession", starved)
    data = scaling(2)
    with pytest.raises(ModelError) as caught:
        runtime.load(manifest_of("detector/1.0.0/default", data), sha256="0" * 64, entry=data, options=RuntimeOptions())
    assert caught.value.code == "memory_limit"
