"""The store: what it keeps, what it refuses, and what it makes of a state that was lost."""

import errno
import json
import os
import stat

import pytest

from device_sdk.errors import ModelError, StorageError, UntrustedError
from device_sdk.protocol.manifest import digest
from device_sdk.store import FileOps, ModelState, Store
from tests.simulator import release
from tests.survival.matrix import (
    NEW,
    NEW_BLOBS,
    NEW_SHA,
    OLD,
    OLD_BLOBS,
    OLD_SHA,
    Told,
    contents,
    expected,
    install,
)
from tests.survival.matrix import receive as bring

FIRST = next(iter(NEW_BLOBS))


@pytest.fixture
def home(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(home):
    return Store(home)


def receive(store, manifest, blobs):
    return bring(store, manifest, blobs, Told())


# What it keeps


def test_a_trial_that_is_committed_becomes_active_and_the_old_one_previous(home, store):
    install(store, OLD, OLD_BLOBS)
    receive(store, NEW, NEW_BLOBS)
    store.begin_trial("detector", NEW_SHA)
    assert store.state("detector") == ModelState(active=OLD_SHA, trial=NEW_SHA)
    assert store.current("detector") == NEW_SHA
    store.commit("detector")
    assert store.state("detector") == ModelState(active=NEW_SHA, previous=OLD_SHA)
    assert Store(home).state("detector") == store.state("detector")


def test_models_do_not_touch_each_other(store):
    other, blobs = release("digits/1.0.0/default")
    install(store, OLD, OLD_BLOBS)
    install(store, other, blobs)
    store.reject("digits", digest(other.to_bytes()), "NaN")
    assert store.current("digits") is None
    assert store.current("detector") == OLD_SHA
    assert store.models() == {"detector", "digits"}


def test_a_rejected_trial_gives_way_to_the_active_release_and_is_never_tried_again(home, store):
    install(store, OLD, OLD_BLOBS)
    receive(store, NEW, NEW_BLOBS)
    store.begin_trial("detector", NEW_SHA)
    store.reject("detector", NEW_SHA, "NaN outputs")
    again = Store(home)
    assert again.current("detector") == OLD_SHA
    assert again.bad_reason(NEW_SHA) == "NaN outputs"
    with pytest.raises(ModelError, match="NaN outputs"):
        again.begin_trial("detector", NEW_SHA)


def test_a_committed_release_that_is_rejected_later_gives_way_to_the_previous_one(store):
    install(store, OLD, OLD_BLOBS)
    install(store, NEW, NEW_BLOBS)
    store.reject("detector", NEW_SHA, "late")
    assert store.state("detector") == ModelState(active=OLD_SHA)


def test_starts_of_a_trial_are_counted_across_processes_and_begin_anew_with_the_next_trial(home, store):
    install(store, OLD, OLD_BLOBS)
    assert store.count_start("detector") == 0
    receive(store, NEW, NEW_BLOBS)
    store.begin_trial("detector", NEW_SHA)
    assert store.count_start("detector") == 1
    assert Store(home).count_start("detector") == 2
    store = Store(home)
    store.begin_trial("detector", NEW_SHA)
    assert store.count_start("detector") == 1


def test_committing_the_active_release_again_keeps_the_previous_one(store):
    install(store, OLD, OLD_BLOBS)
    install(store, NEW, NEW_BLOBS)
    install(store, NEW, NEW_BLOBS)
    assert store.state("detector") == ModelState(active=NEW_SHA, previous=OLD_SHA)


def test_a_commit_without_a_trial_is_a_mistake_of_the_program(store):
    with pytest.raises(ValueError, match="no trial"):
        store.commit("detector")


def test_a_single_file_is_handed_over_as_the_bytes_that_were_hashed(store):
    install(store, OLD, OLD_BLOBS)
    with store.open(OLD_SHA) as files:
        assert files.entry_bytes == OLD_BLOBS[OLD.files[0].sha256]


def test_several_files_lie_side_by_side_under_their_names_until_closed(store):
    install(store, NEW, NEW_BLOBS)
    assert contents(store, NEW_SHA) == expected(NEW, NEW_BLOBS)
    with store.open(NEW_SHA) as files:
        assert files.entry_bytes is None
        assert files.entry_path == files.directory / "model.onnx"
    assert not files.directory.exists()


def test_files_are_copied_where_the_file_system_has_no_hard_links(home):
    class NoLinks(FileOps):
        def link(self, source, target):
            raise OSError(errno.EPERM, "no links here", str(target))

    store = Store(home, NoLinks())
    install(store, NEW, NEW_BLOBS)
    assert contents(store, NEW_SHA) == expected(NEW, NEW_BLOBS)


def test_everything_is_private(home, store):
    install(store, NEW, NEW_BLOBS)
    with store.open(NEW_SHA):
        modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in [home, *home.rglob("*")]}
    assert {path for path, mode in modes.items() if mode & 0o077} == set()


def test_a_folder_that_others_may_read_is_closed_to_them(home, store):
    (home / "blobs").chmod(0o755)
    Store(home)
    assert stat.S_IMODE((home / "blobs").stat().st_mode) == 0o700


# What it refuses


def test_a_release_of_another_model_cannot_be_tried(store):
    receive(store, OLD, OLD_BLOBS)
    with pytest.raises(UntrustedError) as caught:
        store.begin_trial("digits", OLD_SHA)
    assert caught.value.code == "wrong_model"


def test_a_release_with_a_missing_file_cannot_be_tried(store):
    store.add_manifest(NEW.to_bytes())
    assert not store.has(NEW_SHA)
    with pytest.raises(StorageError) as caught:
        store.begin_trial("detector", NEW_SHA)
    assert caught.value.code == "missing"


@pytest.mark.parametrize("data", [b"x" * len(NEW_BLOBS[FIRST]), NEW_BLOBS[FIRST][:-1], NEW_BLOBS[FIRST] + b"x", b""])
def test_a_blob_that_is_not_what_was_signed_is_refused_and_deleted(home, store, data):
    store.append(FIRST, data)
    with pytest.raises(UntrustedError) as caught:
        store.admit(FIRST, len(NEW_BLOBS[FIRST]))
    assert caught.value.code == "hash_mismatch"
    assert list((home / "incoming").iterdir()) == list((home / "blobs").iterdir()) == []


@pytest.mark.parametrize("sha", ["", "..", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 64 + "\n", "/etc/passwd"])
def test_only_a_hash_can_name_a_file(store, sha):
    for operation in (store.incoming, store.is_bad, store.manifest, lambda sha: store.admit(sha, 1)):
        with pytest.raises(ValueError, match="64"):
            operation(sha)


def test_a_manifest_that_does_not_parse_is_not_kept(home, store):
    with pytest.raises(UntrustedError) as caught:
        store.add_manifest(b'{"format": 1}')
    assert caught.value.code == "bad_manifest"
    assert list((home / "manifests").iterdir()) == []


def test_a_manifest_changed_on_disk_is_not_believed(home, store):
    install(store, OLD, OLD_BLOBS)
    (home / "manifests" / f"{OLD_SHA}.json").write_bytes(NEW.to_bytes())
    with pytest.raises(UntrustedError):
        store.manifest(OLD_SHA)
    assert Store(home).current("detector") is None


def test_a_blob_changed_under_the_same_length_is_never_opened_and_is_fetched_again(home, store):
    install(store, OLD, OLD_BLOBS)
    install(store, NEW, NEW_BLOBS)
    blob = home / "blobs" / FIRST
    blob.write_bytes(b"x" * blob.stat().st_size)
    with pytest.raises(UntrustedError) as caught:
        store.open(NEW_SHA)
    assert caught.value.code == "hash_mismatch"
    assert list((home / "loading").iterdir()) == []
    assert store.current("detector") == OLD_SHA
    assert not store.has(NEW_SHA)
    receive(store, NEW, NEW_BLOBS)
    assert store.current("detector") == NEW_SHA


def test_a_blob_changed_between_starts_is_noticed_by_the_next_start(home, store):
    install(store, OLD, OLD_BLOBS)
    install(store, NEW, NEW_BLOBS)
    blob = home / "blobs" / FIRST
    blob.write_bytes(b"x" * blob.stat().st_size)
    assert Store(home).current("detector") == OLD_SHA


@pytest.mark.parametrize("written", [False, True])
def test_a_file_that_is_written_to_after_it_was_hashed_is_hashed_again(home, store, written):
    install(store, OLD, OLD_BLOBS)
    blob = home / "blobs" / OLD.files[0].sha256
    with store.open(OLD_SHA) as files:  # as the bytes that were hashed: the file is looked at no more
        if written:
            blob.write_bytes(b"x" * blob.stat().st_size)
    store.remember_hashed(files)
    if not written:
        with Store(home).open(OLD_SHA, unchanged=True) as files:
            assert files.unhashed
        return
    with pytest.raises(UntrustedError, match="the disk gave"):
        Store(home).open(OLD_SHA, unchanged=True)


@pytest.mark.parametrize("where", ["blobs", "incoming", "manifests"])
def test_a_planted_link_is_not_followed(home, store, tmp_path, where):
    target = tmp_path / "outside"
    target.write_bytes(NEW_BLOBS[FIRST])
    name = {"blobs": FIRST, "incoming": f"{FIRST}.part", "manifests": f".{OLD_SHA}.json.tmp"}[where]
    (home / where / name).symlink_to(target)
    install(store, OLD, OLD_BLOBS)
    install(store, NEW, NEW_BLOBS)
    assert target.read_bytes() == NEW_BLOBS[FIRST]
    assert contents(store, NEW_SHA) == expected(NEW, NEW_BLOBS)


def test_a_link_in_place_of_a_partial_is_not_written_through(store, tmp_path):
    target = tmp_path / "outside"
    store.incoming(FIRST).symlink_to(target)
    with pytest.raises(StorageError):
        store.append(FIRST, b"x")
    assert not target.exists()


def test_a_link_in_place_of_a_manifest_is_not_read_through(home, store, tmp_path):
    target = tmp_path / "outside"
    target.write_bytes(OLD.to_bytes())
    (home / "manifests" / f"{OLD_SHA}.json").symlink_to(target)
    with pytest.raises(StorageError):
        store.manifest(OLD_SHA)


def test_a_folder_replaced_by_a_link_stops_the_store(home, store, tmp_path):
    (home / "blobs").rmdir()
    (home / "blobs").symlink_to(tmp_path)
    with pytest.raises(StorageError):
        Store(home)


def test_a_planted_pipe_does_not_hang(home, store):
    os.mkfifo(home / "incoming" / f"{FIRST}.part")
    with pytest.raises(StorageError):
        store.admit(FIRST, 10)


# Recovery


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b"\x00" * 300),
        lambda path: path.write_bytes(path.read_bytes().replace(OLD_SHA.encode(), NEW_SHA.encode())),
        lambda path: path.write_bytes(json.dumps({"state": 1, "sha256": "x"}).encode()),
    ],
)
def test_a_lost_state_is_recovered_from_the_newest_whole_manifest_that_is_not_bad(home, store, damage):
    install(store, OLD, OLD_BLOBS)
    receive(store, NEW, NEW_BLOBS)
    store.begin_trial("detector", NEW_SHA)
    store.reject("detector", NEW_SHA, "NaN")
    damage(home / "state.json")
    again = Store(home)
    assert again.current("detector") == OLD_SHA
    again.collect_garbage()
    assert again.current("detector") == OLD_SHA
    assert contents(again, OLD_SHA) == expected(OLD, OLD_BLOBS)


def test_a_state_that_was_edited_is_no_state(home, store):
    install(store, OLD, OLD_BLOBS)
    install(store, NEW, NEW_BLOBS)
    os.utime(home / "manifests" / f"{OLD_SHA}.json", (1, 1))
    text = (home / "state.json").read_text()
    (home / "state.json").write_text(text.replace(f'"active":"{NEW_SHA}"', f'"active":"{OLD_SHA}"'))
    assert Store(home).current("detector") == NEW_SHA
    assert Store(home).state("detector") == ModelState()


def test_of_two_whole_manifests_recovery_takes_the_newer(home, store):
    install(store, NEW, NEW_BLOBS)
    install(store, OLD, OLD_BLOBS)
    os.utime(home / "manifests" / f"{NEW_SHA}.json", (1, 1))
    (home / "state.json").unlink()
    assert Store(home).current("detector") == OLD_SHA


# Garbage


def test_garbage_goes_and_what_may_be_needed_stays(home, store):
    third, third_blobs = release("detector/1.2.0/default")
    wanted, wanted_blobs = release("detector/1.3.0/default")
    for manifest, blobs in ((third, third_blobs), (OLD, OLD_BLOBS), (NEW, NEW_BLOBS)):
        install(store, manifest, blobs)
    for sha in wanted_blobs:
        store.append(sha, b"half")
    store.append("e" * 64, b"abandoned")
    (home / "manifests" / ".x.tmp").write_bytes(b"left by a power cut")
    (home / "loading" / "1-1").mkdir()
    with store.open(NEW_SHA) as files:
        store.collect_garbage(wanted=[wanted])
        assert files.entry_path.exists()
    assert {path.name for path in (home / "blobs").iterdir()} == {*OLD_BLOBS, *NEW_BLOBS}
    assert {path.name for path in (home / "incoming").iterdir()} == {f"{sha}.part" for sha in wanted_blobs}
    assert {path.name for path in (home / "manifests").iterdir()} == {f"{OLD_SHA}.json", f"{NEW_SHA}.json"}
    assert list((home / "loading").iterdir()) == []
    assert store.current("detector") == NEW_SHA


def test_a_bad_mark_outlives_its_release(home, store):
    install(store, OLD, OLD_BLOBS)
    receive(store, NEW, NEW_BLOBS)
    store.reject("detector", NEW_SHA, "NaN")
    store.collect_garbage()
    assert not store.has(NEW_SHA)
    assert Store(home).is_bad(NEW_SHA)


def test_removing_a_directory_takes_what_is_in_it_and_nothing_that_is_linked(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"x")
    flat, nested, planted = (tmp_path / name for name in ("flat", "nested", "planted"))
    flat.mkdir()
    (flat / "link").symlink_to(outside / "kept")
    (flat / "file").write_bytes(b"x")
    (nested / "deep" / "deeper").mkdir(parents=True)
    (nested / "deep" / "link").symlink_to(outside)
    (nested / "file").write_bytes(b"x")
    planted.symlink_to(outside)
    for path in (flat, nested, planted, tmp_path / "nowhere"):
        FileOps().remove_tree(path)
    assert not flat.exists()
    assert not nested.exists()
    assert (outside / "kept").read_bytes() == b"x"
