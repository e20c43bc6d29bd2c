"""Downloads by patch over a loopback: less on the wire, and the whole file at once where anything is wrong."""

import json
from contextlib import closing

import pytest

from device_sdk import patching
from device_sdk.download import Fetched, fetch
from device_sdk.errors import StorageError, TransferError, UnauthorizedError
from device_sdk.patching import Patcher
from device_sdk.protocol.patches.frames import Kind, Operation
from device_sdk.protocol.patches.offers import PatchOffer, offers_to_json, patches_path
from device_sdk.protocol.patches.planes import Codec, pack
from device_sdk.protocol.polls import BLOBS
from device_sdk.store import FileOps, Store
from device_sdk.transport import Transport
from tests.deltas import frame, head, model, moved, patched, sha, weights
from tests.sdk import world
from tests.sdk.loopback import Reply, blob_route, loopback
from tests.simulator import release

BASE = weights()
OLD, NEW = model(BASE), model(moved(BASE, 1e-7), 3.0)
OLD_MANIFEST, _ = release("detector/1.0.0/default", {"model.onnx": OLD})
NEW_MANIFEST, _ = release("detector/1.1.0/default", {"model.onnx": NEW})
(FILE,) = NEW_MANIFEST.files


@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    return patched(tmp_path_factory.mktemp("patch"), {"model.onnx": OLD}, {"model.onnx": NEW})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """From nothing."""
    return patched(tmp_path_factory.mktemp("patch"), None, {"model.onnx": NEW})


@pytest.fixture
def server():
    with loopback() as server:
        server.on(BLOBS + FILE.sha256, blob_route(NEW))
        yield server


@pytest.fixture
def transport(server):
    with closing(Transport(server.url, [], "7.1.k1.mac")) as transport:
        yield transport


@pytest.fixture
def store(tmp_path):
    """A device that has the old release."""
    store = Store(tmp_path / "store")
    store.append(sha(OLD), OLD)
    store.admit(sha(OLD), len(OLD))
    store.begin_trial("detector", store.add_manifest(OLD_MANIFEST.to_bytes()))
    store.commit("detector")
    return store


def offer(server, *patches, base=OLD):
    """Offers that lead to these bytes."""
    offers = []
    for data in patches:
        offers.append(PatchOffer(sha(base), sha(data), len(data)))
        server.on(BLOBS + sha(data), blob_route(data))
    say(server, offers)


def say(server, offers):
    body = json.dumps(offers_to_json(offers)).encode()
    server.on(patches_path(BLOBS + FILE.sha256), Reply(200, body, {"Content-Type": "application/json"}))


def download(transport, store, patcher=None, **changes):
    patcher = patcher or Patcher(transport, store)
    return fetch(transport, store, NEW_MANIFEST, deadline=20, patcher=patcher, **changes)


def asked(server, data):
    return [each for each in server.asked if each.path == BLOBS + sha(data)]


def is_clean(store, tmp_path):
    """The new file is there, whole, and nothing else came to stay."""
    assert store.has_blob(FILE)
    assert (tmp_path / "store" / "blobs" / FILE.sha256).read_bytes() == NEW
    return list((tmp_path / "store" / "incoming").iterdir()) == []


def test_a_patch_brings_the_file_for_less(server, transport, store, tmp_path, patch):
    offer(server, patch)
    assert download(transport, store) == Fetched(len(NEW), len(patch))
    assert is_clean(store, tmp_path)
    assert asked(server, NEW) == []
    assert len(patch) < 0.5 * len(NEW)


def test_a_device_with_nothing_takes_the_patch_from_nothing(server, transport, tmp_path, patch, whole):
    store = Store(tmp_path / "store")
    offer(server, patch)
    say(server, [PatchOffer(sha(OLD), sha(patch), len(patch)), PatchOffer(sha(b""), sha(whole), len(whole))])
    server.on(BLOBS + sha(whole), blob_route(whole))
    assert download(transport, store) == Fetched(len(NEW), len(whole))
    assert is_clean(store, tmp_path)
    assert asked(server, patch) == []


@pytest.mark.parametrize(
    "answer",
    [
        Reply(404, b'{"code": "not_found", "message": "an older server"}'),
        Reply(500, b""),
        Reply(200, b"<html>", {"Content-Type": "text/html"}),
        Reply(200, b'{"patches": [{"base": "../../x"}]}'),
        Reply(200, b"[" * 100_000),
        Reply(200, b'{"patches": []}'),
    ],
)
def test_without_sensible_offers_the_whole_file_is_fetched(server, transport, store, tmp_path, answer):
    server.on(patches_path(BLOBS + FILE.sha256), answer)
    assert download(transport, store) == Fetched(len(NEW), len(NEW))
    assert is_clean(store, tmp_path)


def test_a_device_that_is_turned_away_does_not_go_on(server, transport, store):
    server.on(patches_path(BLOBS + FILE.sha256), Reply(401, b'{"code": "revoked", "message": "no"}'))
    with pytest.raises(UnauthorizedError):
        download(transport, store)


def test_row_30_a_patch_for_another_base_gives_way_to_the_whole_file(server, transport, store, tmp_path, patch):
    """The server says that it fits a blob that is here; the patch itself says another."""
    other = b"another base" * 9_000
    store.append(sha(other), other)
    store.admit(sha(other), len(other))
    offer(server, patch, base=other)
    fetched = download(transport, store)
    assert (fetched.bytes, fetched.wire_bytes, fetched.refused) == (len(NEW), len(NEW) + len(patch), "bad_patch")
    assert "expected one from" in fetched.detail()["patch_refused"]
    assert is_clean(store, tmp_path)


def test_row_30_a_patch_that_lies_about_its_base_gives_way_to_the_whole_file(server, transport, store, tmp_path, patch):
    """Head and hint agree, the differences are to other bytes: only the hash of what comes out tells."""
    offer(server, patch)
    (tmp_path / "store" / "blobs" / sha(OLD)).write_bytes(OLD[:-5_000] + bytes(5_000))
    fetched = download(transport, store)
    assert fetched.refused == "hash_mismatch"
    assert is_clean(store, tmp_path)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty base", "longer"])
def test_any_doubt_about_a_patch_means_the_whole_file(server, transport, store, tmp_path, patch, damage):
    blob = tmp_path / "store" / "blobs" / sha(OLD)
    bad = patch
    if damage == "flipped":
        bad = patch[:5_000] + bytes([patch[5_000] ^ 1]) + patch[5_001:]
    elif damage == "cut":
        bad = patch[:-100]
    elif damage == "empty base":
        blob.write_bytes(b"")
    else:
        bad = patch + b"\0"
    offer(server, bad)
    fetched = download(transport, store)
    assert fetched.refused in {"bad_patch", "hash_mismatch"}
    assert fetched.wire_bytes == len(NEW) + len(bad)
    assert is_clean(store, tmp_path)


def test_row_29_a_bomb_ends_at_the_signed_length_and_the_whole_file_is_fetched(server, transport, store, tmp_path):
    """33 kB that would unfold to a GiB. What reaches the disk is counted."""
    zeros = frame(Operation.LITERAL, 2**20, pack(Codec.ZEROS, b""))
    bomb = head(OLD, len(NEW), sha(NEW)) + zeros * 1024
    copies = head(OLD, len(NEW), sha(NEW)) + frame(Operation.COPY, 100_000) * 1_000
    written = []

    class Counting(FileOps):
        def append(self, path, data):
            written.append(len(data))
            super().append(path, data)

    for number, data in enumerate((bomb, copies)):
        here = Store(tmp_path / f"{number}", Counting())
        here.append(sha(OLD), OLD)
        here.admit(sha(OLD), len(OLD))
        written.clear()
        offer(server, data)
        fetched = download(transport, here)
        assert fetched.refused == "bad_patch"
        assert sum(written) <= len(data) + 2 * len(NEW)
        assert here.has_blob(FILE)


def test_an_offer_that_understates_its_length_is_cut_there(server, transport, store, tmp_path, patch):
    server.on(BLOBS + sha(patch), blob_route(patch))
    say(server, [PatchOffer(sha(OLD), sha(patch), 500)])
    fetched = download(transport, store)
    assert fetched.refused == "too_large"
    assert is_clean(store, tmp_path)


def test_offers_as_large_as_the_file_or_of_unknown_bases_are_not_taken(server, transport, store, patch):
    server.on(BLOBS + sha(patch), blob_route(patch))
    offers = [
        PatchOffer(sha(OLD), sha(patch), len(NEW)),
        PatchOffer(sha(b"unknown"), sha(patch), 10),
        PatchOffer(sha(OLD), FILE.sha256, 10),
    ]
    say(server, offers)
    assert download(transport, store) == Fetched(len(NEW), len(NEW))
    assert asked(server, patch) == []


def test_the_smallest_usable_offer_is_taken(server, transport, store, patch, whole):
    offer(server, patch)
    server.on(BLOBS + sha(whole), blob_route(whole))
    say(server, [PatchOffer(sha(b""), sha(whole), len(whole)), PatchOffer(sha(OLD), sha(patch), len(patch))])
    assert download(transport, store).wire_bytes == len(patch)


def test_a_bad_patch_is_not_tried_twice(server, transport, store, patch):
    offer(server, patch[:-1])
    patcher = Patcher(transport, store)
    assert download(transport, store, patcher).refused == "bad_patch"
    (store._blobs / FILE.sha256).unlink()
    assert download(transport, store, patcher) == Fetched(len(NEW), len(NEW))
    assert len(asked(server, patch[:-1])) == 1


def test_a_cut_patch_is_resumed(server, transport, store, tmp_path, patch):
    offer(server, patch)
    cut = Reply(200, patch[:20_000], {"Content-Length": str(len(patch))})
    server.on(BLOBS + sha(patch), cut)
    patcher = Patcher(transport, store)
    with pytest.raises(TransferError):
        download(transport, store, patcher)
    store.collect_garbage(wanted=[NEW_MANIFEST])  # another model's commit in between
    assert store.partial_length(sha(patch)) == 20_000
    server.on(BLOBS + sha(patch), blob_route(patch))
    assert download(transport, store, patcher) == Fetched(len(NEW), len(patch))
    assert asked(server, patch)[-1].headers["Range"] == "bytes=20000-"
    assert is_clean(store, tmp_path)


def test_a_patch_that_never_comes_gives_way_in_the_end(server, transport, store, tmp_path, patch):
    offer(server, patch)
    server.on(BLOBS + sha(patch), Reply(503, b""))
    patcher = Patcher(transport, store)
    for _ in range(patching.MOST_CUTS - 1):
        with pytest.raises(TransferError):
            download(transport, store, patcher)
    assert download(transport, store, patcher).bytes == len(NEW)
    assert is_clean(store, tmp_path)


def test_a_patch_that_is_gone_gives_way_at_once(server, transport, store, tmp_path, patch):
    offer(server, patch)
    server.on(BLOBS + sha(patch), Reply(404, b'{"code": "unknown_blob", "message": "revoked"}'))
    assert download(transport, store).refused == "unknown_blob"
    assert is_clean(store, tmp_path)


def test_what_came_of_the_whole_file_counts_against_a_patch(server, transport, store, patch):
    offer(server, patch)
    store.append(FILE.sha256, NEW[:-1_000])
    assert download(transport, store).wire_bytes == len(NEW)
    assert asked(server, patch) == []


def test_a_patch_that_is_here_already_is_applied_after_a_crash(server, transport, store, tmp_path, patch):
    """The process died while it wrote the new file: the beginning of that file counts for nothing."""
    offer(server, patch)
    store.append(sha(patch), patch)
    store.append(FILE.sha256, b"half of it, or of something")
    assert download(transport, store) == Fetched(len(NEW), len(patch))
    assert asked(server, patch) == []
    assert is_clean(store, tmp_path)


def test_a_disk_without_room_for_both_takes_the_whole_file(server, transport, store, monkeypatch, patch):
    offer(server, patch)
    monkeypatch.setattr(store, "free_bytes", lambda: len(NEW) + len(patch) - 1)
    assert download(transport, store) == Fetched(len(NEW), len(NEW))
    assert asked(server, patch) == []


def test_a_disk_that_fills_meanwhile_keeps_the_patch(server, transport, tmp_path, patch):
    class Full(FileOps):
        full = False

        def append(self, path, data):
            if self.full and path.name.startswith(FILE.sha256):
                raise OSError(28, "No space left on device")
            super().append(path, data)

    ops = Full()
    store = Store(tmp_path / "store", ops)
    store.append(sha(OLD), OLD)
    store.admit(sha(OLD), len(OLD))
    offer(server, patch)
    ops.full = True
    with pytest.raises(StorageError) as caught:
        download(transport, store)
    assert caught.value.code == "disk_full"
    ops.full = False
    assert download(transport, store) == Fetched(len(NEW), len(patch))
    assert len(asked(server, patch)) == 1


def test_progress_and_withdrawal_reach_into_the_making(server, transport, store, patch):
    offer(server, patch)
    told = []
    download(transport, store, on_progress=told.append)
    assert told[-1].done == told[-1].total == len(NEW)
    assert all(each.done <= each.total for each in told)


def test_small_files_are_not_asked_about(server, transport, tmp_path):
    manifest, _ = release("detector/1.0.0/default", {"model.onnx": b"small"})
    server.on(BLOBS + manifest.files[0].sha256, blob_route(b"small"))
    store = Store(tmp_path / "store")
    fetch(transport, store, manifest, deadline=20, patcher=Patcher(transport, store))
    assert len(server.asked) == 1


# --- a whole device ---


def test_a_device_updates_by_patch_and_says_what_it_saved(tmp_path, patch):
    here = world.World(tmp_path)
    fleet = here.committed("detector/1.0.0/default", OLD)
    with fleet:
        here.server.assign(here.server.publish("detector/1.1.0/default", NEW))
        here.server.simulator.blobs[sha(patch)] = patch
        offers = offers_to_json([PatchOffer(sha(OLD), sha(patch), len(patch))])
        here.server.routes[patches_path(BLOBS + sha(NEW))] = lambda _: offers
        fleet.update_once()
        assert world.answer(fleet) == 3.0
        (event,) = [each for each in here.server.events if each.kind == "verifying" and "1.1.0" in str(each.release)]
        assert event.detail == {"bytes": len(NEW), "wire_bytes": len(patch)}
        assert f"GET {BLOBS}{sha(NEW)}" not in here.server.calls


def test_a_device_that_refuses_a_patch_says_why_and_updates_all_the_same(tmp_path, patch):
    here = world.World(tmp_path)
    with here.committed("detector/1.0.0/default", OLD) as fleet:
        here.server.assign(here.server.publish("detector/1.1.0/default", NEW))
        bad = head(OLD, len(NEW), sha(NEW)) + frame(Operation.COPY, 10, offset=2**40, kind=Kind.U8)
        here.server.simulator.blobs[sha(bad)] = bad
        offers = offers_to_json([PatchOffer(sha(OLD), sha(bad), len(bad))])
        here.server.routes[patches_path(BLOBS + sha(NEW))] = lambda _: offers
        fleet.update_once()
        assert world.answer(fleet) == 3.0
        (refusal,) = [each for each in here.server.events if each.kind == "refused"]
        assert refusal.reason == "bad_patch"
        (event,) = [each for each in here.server.events if each.kind == "verifying" and "1.1.0" in str(each.release)]
        assert event.detail["wire_bytes"] == len(NEW) + len(bad)
        assert event.detail["patch_refused"].startswith("bad_patch: patch: COPY: reads to")
