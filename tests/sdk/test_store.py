"""The store: what it keeps, what it refuses, and what is left after the power was cut at any operation."""

import errno
import json
import os
import stat
from dataclasses import replace

import pytest

from device_sdk.errors import ModelError, StorageError, UntrustedError
from device_sdk.protocol.manifest import digest
from device_sdk.store import FileOps, ModelState, Store
from tests.sdk.crashes import CountingOps, PowerCut, PowerLossOps, UnsyncedOps
from tests.simulator import release

OLD, OLD_BLOBS = release("detector/1.0.0/default")
NEW, NEW_BLOBS = release(
    "detector/1.1.0/default", {"model.onnx": b"graph " * 500, "model.onnx.data": b"weights " * 5000}
)
OLD_SHA, NEW_SHA = digest(OLD.to_bytes()), digest(NEW.to_bytes())
FIRST = next(iter(NEW_BLOBS))


@pytest.fixture
def home(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(home):
    return Store(home)


def receive(store, manifest, blobs):
    """What a download does, as often as it takes."""
    for file in manifest.files:
        if store.has_blob(file):
            continue
        store.discard(file.sha256)
        data = blobs[file.sha256]
        half = len(data) // 2
        store.append(file.sha256, data[:half])
        store.append(file.sha256, data[half:])
        store.admit(file.sha256, file.length)
    return store.add_manifest(manifest.to_bytes())


def install(store, manifest, blobs):
    sha = receive(store, manifest, blobs)
    store.begin_trial(manifest.path.model, sha)
    store.commit(manifest.path.model)
    return sha


def contents(store, sha):
    with store.open(sha) as files:
        return {file.name: (files.directory / file.name).read_bytes() for file in files.manifest.files}


def expected(manifest, blobs):
    return {file.name: blobs[file.sha256] for file in manifest.files}


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


# Power cuts


def update(store, done):
    """An update from OLD to NEW; `done` is told of each step that returned."""
    receive(store, NEW, NEW_BLOBS)
    store.begin_trial("detector", NEW_SHA)
    done.append("trial")
    store.commit("detector")
    done.append("committed")
    store.collect_garbage()


def update_and_reject(store, done):
    receive(store, NEW, NEW_BLOBS)
    store.begin_trial("detector", NEW_SHA)
    done.append("trial")
    store.reject("detector", NEW_SHA, "NaN")
    done.append("rejected")
    store.collect_garbage()


def survives(home, done):
    """Whether what was done before the cut is still so after it, and the rest can be done over."""
    store = Store(home, UnsyncedOps())
    current = store.current("detector")
    allowed = {OLD_SHA, NEW_SHA}
    if "rejected" in done:
        allowed = {OLD_SHA}
    elif done:
        allowed = {NEW_SHA, OLD_SHA} if store.is_bad(NEW_SHA) else {NEW_SHA}
    known = {OLD_SHA: expected(OLD, OLD_BLOBS), NEW_SHA: expected(NEW, NEW_BLOBS)}
    if current not in allowed or contents(store, current) != known[current]:
        return False
    if "committed" in done and store.state("detector") != ModelState(active=NEW_SHA, previous=OLD_SHA):
        return False
    if "rejected" in done and store.bad_reason(NEW_SHA) != "NaN":
        return False
    if "rejected" in done or store.is_bad(NEW_SHA):
        return resurrection_is_prevented(home)
    install(store, NEW, NEW_BLOBS)
    return contents(store, Store(home, UnsyncedOps()).current("detector")) == known[NEW_SHA]


def resurrection_is_prevented(home):
    """Even when the state file is lost later."""
    (home / "state.json").unlink(missing_ok=True)
    return Store(home, UnsyncedOps()).current("detector") == OLD_SHA


def run(course, home, ops):
    """Start from OLD, open the store on `ops` and take the course as far as it goes. The steps done; cut or not."""
    install(Store(home, UnsyncedOps()), OLD, OLD_BLOBS)
    done = []
    try:
        course(Store(home, ops), done)
    except PowerCut:
        return done, True
    return done, False


def operations(course, home):
    counter = CountingOps()
    assert run(course, home, counter)[1] is False
    return counter.count


@pytest.mark.parametrize("course", [update, update_and_reject])
@pytest.mark.parametrize("torn", [False, True])
def test_a_cut_at_any_operation_leaves_the_old_or_the_new(tmp_path, course, torn):
    count = operations(course, tmp_path / "count")
    assert count > 30
    for cut in range(count):
        done, was_cut = run(course, tmp_path / f"cut-{cut}", CountingOps(cut_at=cut, torn=torn))
        assert was_cut
        assert survives(tmp_path / f"cut-{cut}", done), f"cut at operation {cut}, after {done}"


def losses(tmp_path, course, broken=None):
    """Cut at each operation and lose what was not synced, in each way; the (operation, way) that did not survive."""
    failed = []
    for cut in range(operations(course, tmp_path / "count") + 1):
        for way in ("data", "names", "both"):
            home, ops = tmp_path / f"loss-{cut}-{way}", PowerLossOps(cut_at=cut, skip_sync_of=broken)
            done, _ = run(course, home, ops)
            ops.lose(way)
            if not survives(home, done):
                failed.append((cut, way))
    return failed


@pytest.mark.parametrize("course", [update, update_and_reject])
def test_losing_all_that_was_not_synced_leaves_the_old_or_the_new(tmp_path, course):
    assert losses(tmp_path, course) == []


@pytest.mark.parametrize(
    "broken", [".part", "blobs", ".json.tmp", "manifests", ".state.json.tmp", "store-root", ".bad.tmp"]
)
def test_the_loss_model_notices_each_sync_that_is_left_out(tmp_path, broken):
    """The mutants: a test that cannot see a missing sync would prove nothing above."""
    course = update_and_reject if broken == ".bad.tmp" else update
    assert losses(tmp_path, course, broken) != []


def test_switching_back_before_the_mark_would_be_noticed(tmp_path, monkeypatch):
    """The rollback-without-bad mutant: the mark comes first, or a lost state resurrects the release."""

    def reject_in_the_wrong_order(self, model, sha, reason):
        self._switch(model, replace(self.state(model), trial=None))
        self._write_durably(self._manifests / f"{sha}.bad", reason.encode())

    def broken(store, done):
        receive(store, NEW, NEW_BLOBS)
        store.begin_trial("detector", NEW_SHA)
        reject_in_the_wrong_order(store, "detector", NEW_SHA, "NaN")

    def rolled_back_for_good(home):
        store = Store(home, UnsyncedOps())
        return store.current("detector") != OLD_SHA or resurrection_is_prevented(home)

    outcomes = []
    for cut in range(operations(broken, tmp_path / "count")):
        run(broken, tmp_path / f"cut-{cut}", CountingOps(cut_at=cut))
        outcomes.append(rolled_back_for_good(tmp_path / f"cut-{cut}"))
    assert not all(outcomes)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_operation_leaves_the_old_model_and_the_update_can_be_done_over(tmp_path, number):
    code = {errno.ENOSPC: "disk_full", errno.EIO: "storage"}[number]
    codes = []
    for at in range(operations(update, tmp_path / "count")):
        home = tmp_path / f"fail-{at}"
        try:
            run(update, home, CountingOps(fail_at=at, error=OSError(number, os.strerror(number))))
        except StorageError as error:
            codes.append(error.code)
        store = Store(home, UnsyncedOps())
        assert contents(store, store.current("detector"))
        install(store, NEW, NEW_BLOBS)
        assert Store(home, UnsyncedOps()).current("detector") == NEW_SHA
    assert set(codes) == {code}
    assert len(codes) > 30
