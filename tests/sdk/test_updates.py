"""A device's whole way from assigned to committed or back: the real trust, store, download and onnxruntime."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from device_sdk import runtime
from device_sdk.errors import InputError, NoModelError, StorageError, TransferError, UntrustedError
from device_sdk.protocol.assignment import Probation, Window
from device_sdk.protocol.manifest import Manifest, Requirements, digest
from tests.sdk.world import World, X, answer, failing_on_data, judge, manifest_of, nan_emitting, prove, scaling

LIFECYCLE = ["downloading", "verifying", "testing", "activating", "probation"]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


def install(world, path, data, **changes):
    manifest = world.server.publish(path, data)
    world.server.assign(manifest, **changes)
    return manifest


def test_new_device_installs_proves_and_commits_its_first_release(world):
    install(world, "detector/1.0.0/default", scaling(1))
    with world.open() as fleet:
        model = fleet.model("detector")
        with pytest.raises(NoModelError):
            model.run(X)
        fleet.update_once()
        assert str(model.release) == "detector/1.0.0/default"
        assert fleet.status().models["detector"].state == "probation"
        prove(fleet)
        assert fleet.status().models["detector"].state == "committed"
    assert world.server.kinds() == [*LIFECYCLE, "committed"]


def test_committed_event_carries_release_rollout_and_counts(world):
    install(world, "detector/1.0.0/default", scaling(1), rollout="r-7")
    with world.open() as fleet:
        fleet.update_once()
        prove(fleet)
    event = world.server.events[-1]
    assert (event.kind, str(event.release), event.rollout) == ("committed", "detector/1.0.0/default", "r-7")
    assert event.detail["calls"] == 6
    assert event.detail["errors"] == 0


def test_probation_waits_for_both_calls_and_seconds(world):
    rules = Probation(calls=5, seconds=60.0)
    install(world, "detector/1.0.0/default", scaling(1), probation=rules)
    with world.open() as fleet:
        fleet.update_once()
        prove(fleet)
        assert fleet.status().models["detector"].state == "probation"
        world.time.seconds += 61
        judge(fleet)
        assert fleet.status().models["detector"].state == "committed"


def test_release_that_emits_nan_is_rolled_back_at_once_and_never_tried_again(world):
    fleet = world.committed("detector/1.0.0/default", scaling(2))
    with fleet:
        bad = install(world, "detector/1.1.0/default", nan_emitting(), rollout="r-9")
        fleet.update_once()
        assert fleet.model("detector").release.version == "1.1.0"
        prove(fleet)
        assert answer(fleet) == 2.0
        assert fleet._store.is_bad(digest(bad.to_bytes()))
        event = world.server.events[-1]
        assert (event.kind, event.rollout) == ("rolled_back", "r-9")
        assert event.reason == "invalid_rate: 6 of 6 calls, allowed 0"
        world.server.renew()
        fleet.update_once()
        assert answer(fleet) == 2.0
        assert world.server.kinds()[-1] == "rolled_back"


def test_release_that_fails_on_real_data_is_rolled_back(world):
    with world.committed("detector/1.0.0/default", scaling(2)) as fleet:
        install(world, "detector/1.1.0/default", failing_on_data())
        fleet.update_once()
        prove(fleet, inputs={"x": np.full((1, 4), 9, np.float32)})
        assert answer(fleet) == 2.0
        assert world.server.events[-1].reason == "error_rate: 6 of 6 calls, allowed 0"


def test_allowed_rate_of_invalid_outputs_does_not_roll_back(world):
    rules = Probation(calls=5, seconds=0, max_invalid_rate=1.0)
    install(world, "detector/1.0.0/default", nan_emitting(), probation=rules)
    with world.open() as fleet:
        fleet.update_once()
        prove(fleet)
        assert fleet.status().models["detector"].state == "committed"


def test_callers_wrong_inputs_are_no_evidence_against_a_release(world):
    install(world, "detector/1.0.0/default", scaling(1))
    with world.open() as fleet:
        fleet.update_once()
        model = fleet.model("detector")
        for _ in range(9):
            with pytest.raises(InputError):
                model.run({"x": np.zeros((1, 4))})
        judge(fleet)
        assert fleet.status().models["detector"].state == "probation"
        assert model.stats.rejected == 9


def test_device_starts_without_a_network_from_its_last_good_release(world):
    world.committed("detector/1.0.0/default", scaling(3)).stop()
    world.server.faults["/api/device/v1/poll"] = [TransferError("no network")]
    with world.open() as fleet:
        assert answer(fleet) == 3.0
        with pytest.raises(TransferError):
            fleet.update_once()
        assert answer(fleet) == 3.0


def test_trial_that_took_the_process_down_twice_is_rolled_back_at_the_third_start(world):
    world.committed("detector/1.0.0/default", scaling(2)).stop()
    install(world, "detector/1.1.0/default", scaling(5))
    crash(world.open, lambda fleet: fleet.update_once())
    crash(world.open, lambda fleet: fleet.model("detector"))
    with world.open() as fleet:
        assert answer(fleet) == 2.0
        fleet._worker.poller.report()
    assert [(e.kind, e.reason) for e in world.server.events][-1] == ("rolled_back", "crash_loop")


def test_clean_ends_are_not_held_against_a_trial(world):
    world.committed("detector/1.0.0/default", scaling(2)).stop()
    install(world, "detector/1.1.0/default", scaling(5))
    with world.open() as fleet:
        fleet.update_once()
    for _ in range(4):
        with world.open() as fleet:
            assert answer(fleet) == 5.0


def test_probation_goes_on_after_a_restart_and_rolls_back_to_disk_without_a_network(world):
    world.committed("detector/1.0.0/default", scaling(2)).stop()
    install(world, "detector/1.1.0/default", nan_emitting())
    with world.open() as fleet:
        fleet.update_once()
    with world.open() as fleet:
        model = fleet.model("detector")
        for _ in range(6):
            model.run(X)
        fleet._worker.install()
        assert answer(fleet) == 2.0
        assert fleet._outbox.pending().events[-1].kind == "rolled_back"


def test_server_going_back_to_the_previous_release_needs_no_download(world):
    with world.committed("detector/1.0.0/default", scaling(2)) as fleet:
        first = world.server.simulator.assigned["detector"]
        install(world, "detector/1.1.0/default", scaling(5))
        fleet.update_once()
        prove(fleet)
        assert answer(fleet) == 5.0
        world.server.simulator.assigned["detector"] = first
        world.server.renew()
        before = len([call for call in world.server.calls if "/blobs/" in call])
        fleet.update_once()
        assert answer(fleet) == 2.0
        assert len([call for call in world.server.calls if "/blobs/" in call]) == before


def test_release_recalled_in_probation_gives_way_at_once_and_is_not_bad(world):
    with world.committed("detector/1.0.0/default", scaling(2)) as fleet:
        first = world.server.simulator.assigned["detector"]
        second = install(world, "detector/1.1.0/default", scaling(5))
        fleet.update_once()
        assert answer(fleet) == 5.0
        world.server.simulator.assigned["detector"] = first
        world.server.renew()
        fleet.update_once()
        assert answer(fleet) == 2.0
        assert not fleet._store.is_bad(digest(second.to_bytes()))
        said = [event.kind for event in world.server.events if str(event.release) == "detector/1.1.0/default"]
        assert said[-1] == "withdrawn"
    with world.open() as fleet:
        assert answer(fleet) == 2.0


def test_newer_release_supersedes_one_in_probation(world):
    with world.committed("detector/1.0.0/default", scaling(2)) as fleet:
        install(world, "detector/1.1.0/default", scaling(5))
        fleet.update_once()
        install(world, "detector/1.2.0/default", scaling(7))
        fleet.update_once()
        prove(fleet)
        assert answer(fleet) == 7.0
        state = fleet._store.state("detector")
        assert fleet._store.manifest(state.previous).path.version == "1.0.0"


def test_update_waits_for_its_window_and_says_so_once(world):
    install(world, "detector/1.0.0/default", scaling(1), window=Window(120, 300))
    with world.open() as fleet:
        fleet.update_once()
        fleet.update_once()
        assert fleet.model("detector").release is None
        assert [(e.kind, e.reason) for e in world.server.events] == [("waiting", "window")]
        world.time.second_of_day = 3 * 3600
        fleet.update_once()
        assert fleet.model("detector").release is not None


def test_urgent_update_does_not_wait_for_the_window(world):
    install(world, "detector/1.0.0/default", scaling(1), window=Window(120, 300), urgent=True)
    with world.open() as fleet:
        fleet.update_once()
        assert fleet.model("detector").release is not None


def test_failed_download_waits_and_is_tried_again_after_a_backoff(world):
    install(world, "detector/1.0.0/default", scaling(1))
    world.server.faults["blobs"] = [TransferError("reset by peer")]
    with world.open() as fleet:
        fleet.update_once()
        assert fleet.status().models["detector"].reason == "network"
        fleet.update_once()
        assert fleet.model("detector").release is None
        world.time.seconds += 60
        fleet.update_once()
        assert fleet.model("detector").release is not None


def test_swapped_blob_is_refused_and_the_old_release_serves(world):
    with world.committed("detector/1.0.0/default", scaling(2)) as fleet:
        data = scaling(5)
        install(world, "detector/1.1.0/default", data)
        world.server.simulator.blobs[digest(data)] = scaling(6)
        fleet.update_once()
        assert answer(fleet) == 2.0
        assert [(e.kind, e.reason) for e in world.server.events][-2:] == [
            ("refused", "hash_mismatch"),
            ("failed", "hash_mismatch"),
        ]
        world.server.simulator.blobs[digest(data)] = data
        world.time.seconds += 60
        fleet.update_once()
        assert answer(fleet) == 5.0


def test_full_disk_holds_the_update_and_the_old_release_serves(world, monkeypatch):
    with world.committed("detector/1.0.0/default", scaling(2)) as fleet:
        install(world, "detector/1.1.0/default", scaling(5))

        def full(*_, **__):
            raise StorageError("no space left on device", code="disk_full")

        with monkeypatch.context() as patch:
            patch.setattr(fleet._store, "begin_trial", full)
            fleet.update_once()
        assert answer(fleet) == 2.0
        assert fleet.status().models["detector"].reason == "disk: disk_full"
        world.time.seconds += 60
        fleet.update_once()
        assert answer(fleet) == 5.0


def test_release_that_requires_a_newer_sdk_fails_with_that_reason(world):

    data = scaling(1)
    manifest = replace(manifest_of("detector/1.0.0/default", data), requires=Requirements(sdk="99.0"))
    world.server.simulator.list_release(manifest)
    world.server.simulator.blobs[digest(data)] = data
    world.server.assign(manifest)
    with world.open() as fleet:
        fleet.update_once()
        fleet.update_once()
        assert [(e.kind, e.reason) for e in world.server.events] == [("failed", "requires_sdk")]


def test_test_that_took_the_process_down_twice_is_not_begun_a_third_time(world, monkeypatch):
    world.committed("detector/1.0.0/default", scaling(2)).stop()
    manifest = install(world, "detector/1.1.0/default", scaling(5))
    load = runtime.load

    def dies(manifest, **options):
        if manifest.path.version == "1.1.0":
            raise KeyboardInterrupt
        return load(manifest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "load", dies)
        for _ in range(2):
            crash(world.open, _update_and_die)
    with world.open() as fleet:
        fleet.update_once()
        assert answer(fleet) == 2.0
        assert fleet._store.is_bad(digest(manifest.to_bytes()))
    assert [(e.kind, e.reason) for e in world.server.events][-1] == ("failed", "crashed_in_test")


def test_first_release_that_takes_the_process_down_ends_as_a_crash_loop(world, monkeypatch):
    install(world, "detector/1.0.0/default", scaling(1))

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "load", dies)
        crash(world.open, _update_and_die)
        crash(world.open, _open_model_and_die)
    with world.open() as fleet:
        assert fleet.model("detector").release is None
        fleet.update_once()
    assert world.server.kinds()[-1] == "rolled_back"


def test_release_already_running_is_reported_to_a_new_rollout(world):
    with world.committed("detector/1.0.0/default", scaling(1)) as fleet:
        world.server.simulator.assign(_manifest(world), rollout="r-2")
        world.server.renew()
        fleet.update_once()
        assert [(e.kind, e.rollout) for e in world.server.events][-1] == ("committed", "r-2")


def test_expired_view_installs_nothing_and_is_reported(world):
    install(world, "detector/1.0.0/default", scaling(1), window=Window(120, 300))
    with world.open() as fleet:
        fleet.update_once()
        world.server.simulator.now += 2 * 86_400
        world.time.second_of_day = 3 * 3600
        fleet.update_once()
        assert fleet.model("detector").release is None
        assert ("refused", "stale") in [(e.kind, e.reason) for e in world.server.events]


def test_refused_view_is_reported_once_and_changes_nothing(world):
    with world.committed("detector/1.0.0/default", scaling(2)) as fleet:
        install(world, "detector/1.1.0/default", scaling(5))
        world.server.current = world.server.simulator.bundle(director_key="thief")
        for _ in range(3):
            with pytest.raises(UntrustedError):
                fleet.update_once()
        assert answer(fleet) == 2.0
        world.server.renew()
        fleet.update_once()
        refused = [event for event in world.server.events if event.kind == "refused"]
        assert [event.reason for event in refused] == ["bad_signature"]
        assert answer(fleet) == 5.0


def test_garbage_of_older_releases_is_collected(world):
    with world.committed("detector/1.0.0/default", scaling(1)) as fleet:
        for number in (2, 3, 4):
            install(world, f"detector/1.{number}.0/default", scaling(number))
            fleet.update_once()
            prove(fleet)
        assert len(list((world.path / "store" / "blobs").iterdir())) == 2


def test_commit_that_was_not_reported_is_reported_after_the_restart(world, monkeypatch):
    install(world, "detector/1.0.0/default", scaling(1))
    fleet = world.open()
    fleet.update_once()
    for _ in range(6):
        fleet.model("detector").run(X)

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fleet._journal, "record", dies)
        with pytest.raises(KeyboardInterrupt):
            fleet._worker.install()
    kill(fleet)
    with world.open() as fleet:
        fleet.update_once()
    assert world.server.kinds()[-1] == "committed"


def test_transition_that_never_reached_the_outbox_is_reported_after_the_restart_under_its_own_id(world, monkeypatch):
    fleet = world.committed("detector/1.0.0/default", scaling(2))
    install(world, "detector/1.1.0/default", scaling(5))
    fleet.update_once()

    def dies(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fleet._outbox, "add", dies)
        for _ in range(6):
            fleet.model("detector").run(X)
        with pytest.raises(KeyboardInterrupt):
            fleet._worker.install()
    told = fleet._journal.get("detector").id
    kill(fleet)
    for _ in range(2):
        with world.open() as fleet:
            fleet.update_once()
    assert [event.id for event in world.server.events if event.kind == "committed"][-1] == told
    assert world.server.kinds().count("committed") == 2


@pytest.mark.parametrize("moment", ["download", "test"])
def test_release_recalled_before_it_was_activated_is_never_activated(world, monkeypatch, moment):
    with world.committed("detector/1.0.0/default", scaling(2)) as fleet:
        first = fleet._installers["detector"].latest
        install(world, "detector/1.1.0/default", scaling(5))
        stream, load = world.server.stream, runtime.load

        def recall():
            fleet._installers["detector"].latest = first

        def streamed(url, **options):
            recall()
            return stream(url, **options)

        def loading(manifest, **options):
            recall()
            return load(manifest, **options)

        if moment == "download":
            monkeypatch.setattr(world.server, "stream", streamed)
        else:
            monkeypatch.setattr(runtime, "load", loading)
        fleet.update_once()
        assert answer(fleet) == 2.0
        assert fleet._store.state("detector").trial is None
        assert "activating" not in world.server.kinds()[6:]


def test_calls_under_way_when_a_release_is_retired_finish_on_it(world):
    with world.committed("detector/1.0.0/default", scaling(2)) as fleet:
        entered, go_on = threading.Event(), threading.Event()
        loaded = fleet._installers["detector"].slot.current
        original = loaded.call

        def slow(names, inputs):
            entered.set()
            go_on.wait(10)
            return original(names, inputs)

        loaded.call = slow
        results = []
        caller = threading.Thread(target=lambda: results.append(answer(fleet)), daemon=True)
        caller.start()
        entered.wait(10)
        loaded.call = original
        del loaded
        install(world, "detector/1.1.0/default", scaling(5))
        fleet.update_once()
        assert answer(fleet) == 5.0
        go_on.set()
        caller.join(10)
        assert results == [2.0]


def _manifest(world):
    (data,) = world.server.simulator.manifests.values()
    return Manifest.parse(data)


def _update_and_die(fleet):
    with pytest.raises(KeyboardInterrupt):
        fleet.update_once()


def _open_model_and_die(fleet):
    with pytest.raises(KeyboardInterrupt):
        fleet.model("detector")


def crash(start, act):
    """A process that ends in the middle: nothing is closed, only the lock is gone."""
    fleet = start()
    act(fleet)
    kill(fleet)


def kill(fleet):
    fleet._lock.release()
    fleet._lock = None
    fleet._worker = None
