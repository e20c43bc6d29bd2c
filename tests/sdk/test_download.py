"""Downloads over a loopback: resumed, bounded, and never believed before the hash."""

import threading
from contextlib import closing

import pytest

from device_sdk.download import Progress, fetch
from device_sdk.errors import StorageError, TransferError, UntrustedError, is_retryable
from device_sdk.protocol.polls import BLOBS
from device_sdk.store import FileOps, Store
from device_sdk.transport import Transport
from tests.sdk.loopback import Reply, blob_route, loopback
from tests.simulator import release

FILES = {"model.onnx": b"graph " * 1000, "model.onnx.data": b"weights " * 100_000}
MANIFEST, BLOBS_BY_SHA = release("detector/1.0.0/default", FILES)
GRAPH, WEIGHTS = MANIFEST.files


@pytest.fixture
def server():
    with loopback() as server:
        for sha, data in BLOBS_BY_SHA.items():
            server.on(BLOBS + sha, blob_route(data))
        yield server


@pytest.fixture
def transport(server):
    with closing(Transport(server.url, [], "7.1.k1.mac")) as transport:
        yield transport


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def download(transport, store, manifest=MANIFEST, **changes):
    fetch(transport, store, manifest, **{"deadline": 20, **changes})


def is_whole(store):
    return all(store.has_blob(file) for file in MANIFEST.files)


def ranges(server):
    return [asked.headers.get("Range") for asked in server.asked]


def test_every_missing_file_is_fetched_once(server, transport, store):
    download(transport, store)
    assert is_whole(store)
    download(transport, store)
    assert len(server.asked) == 2


def test_progress_runs_over_the_whole_release_and_ends_at_its_length(transport, store):
    told = []
    download(transport, store, on_progress=told.append)
    assert told == sorted(told, key=lambda progress: progress.done)
    assert told[-1] == Progress(MANIFEST.length, MANIFEST.length)
    assert len(told) > 3


def test_a_file_listed_under_two_names_is_fetched_once_and_counted_twice(server, transport, store):
    manifest, _ = release("detector/1.0.0/twins", {"a.onnx": FILES["model.onnx"], "b.onnx": FILES["model.onnx"]})
    told = []
    download(transport, store, manifest, on_progress=told.append)
    assert len(server.asked) == 1
    assert told[-1] == Progress(manifest.length, manifest.length)


def test_an_empty_file_needs_no_request(server, transport, store):
    manifest, _ = release("detector/1.0.0/empty", {"model.onnx": b"x", "model.onnx.data": b""})
    store.append(manifest.files[0].sha256, b"x")
    download(transport, store, manifest)
    assert server.asked == []
    assert store.has_blob(manifest.files[1])


def test_an_interrupted_download_is_resumed_where_it_broke(server, transport, store):
    data = BLOBS_BY_SHA[WEIGHTS.sha256]
    server.on(BLOBS + WEIGHTS.sha256, Reply(200, data[:1000], {"Content-Length": str(len(data))}))
    with pytest.raises(TransferError) as caught:
        download(transport, store)
    assert is_retryable(caught.value)
    assert store.partial_length(WEIGHTS.sha256) == 1000
    assert not store.has_blob(WEIGHTS)
    server.on(BLOBS + WEIGHTS.sha256, blob_route(data))
    download(transport, store)
    assert is_whole(store)
    assert ranges(server) == [None, None, "bytes=1000-"]


def test_an_answer_without_a_length_that_ends_early_is_resumed_too(server, transport, store):
    data = BLOBS_BY_SHA[WEIGHTS.sha256]
    server.on(BLOBS + WEIGHTS.sha256, lambda _: Reply(200, iter([data[:1000]])))
    with pytest.raises(TransferError) as caught:
        download(transport, store)
    assert caught.value.code == "truncated"
    assert is_retryable(caught.value)
    assert store.partial_length(WEIGHTS.sha256) == 1000


def test_a_complete_partial_is_admitted_without_a_request(server, transport, store):
    for sha, data in BLOBS_BY_SHA.items():
        store.append(sha, data)
    download(transport, store)
    assert server.asked == []
    assert is_whole(store)


def test_a_server_that_ignores_range_is_taken_from_the_start(server, transport, store):
    data = BLOBS_BY_SHA[WEIGHTS.sha256]
    store.append(WEIGHTS.sha256, data[:1000])
    server.on(BLOBS + WEIGHTS.sha256, blob_route(data, ranges=False))
    download(transport, store)
    assert is_whole(store)


@pytest.mark.parametrize(
    "said",
    [
        None,
        "",
        "bytes 0-99/100",
        "bytes 999-{last}/{length}",
        "bytes 1001-{last}/{length}",
        "bytes 1000-{last}/{longer}",
        "bytes 1000-{length}/{length}",
        "items 1000-{last}/{length}",
        "bytes 1000-{last}/{length}, 5-6/7",
        "bytes */{length}",
    ],
)
def test_a_range_that_was_not_asked_for_is_refused(server, transport, store, said):
    data, length = BLOBS_BY_SHA[WEIGHTS.sha256], WEIGHTS.length
    store.append(WEIGHTS.sha256, data[:1000])
    headers = {} if said is None else {"Content-Range": said.format(last=length - 1, length=length, longer=length + 1)}
    server.on(BLOBS + WEIGHTS.sha256, Reply(206, data[1000:], headers))
    with pytest.raises(UntrustedError) as caught:
        download(transport, store)
    assert caught.value.code == "bad_range"
    assert store.partial_length(WEIGHTS.sha256) == 0
    server.on(BLOBS + WEIGHTS.sha256, blob_route(data))
    download(transport, store)
    assert is_whole(store)


def test_a_partial_that_the_server_cannot_continue_is_dropped(server, transport, store):
    store.append(WEIGHTS.sha256, b"x" * 1000)
    server.on(BLOBS + WEIGHTS.sha256, Reply(416, b""))
    with pytest.raises(TransferError):
        download(transport, store)
    assert store.partial_length(WEIGHTS.sha256) == 0


def test_a_partial_longer_than_the_file_is_started_over(server, transport, store):
    store.append(GRAPH.sha256, b"x" * (GRAPH.length + 1))
    download(transport, store)
    assert is_whole(store)


@pytest.mark.parametrize("length", [1000, WEIGHTS.length])
def test_a_partial_that_was_damaged_is_fetched_from_its_beginning_and_nobody_is_blamed(
    server, transport, store, length
):
    """A power loss leaves zeros in what was not synced. The server's bytes are right: nothing has failed."""
    store.append(WEIGHTS.sha256, bytes(length))
    download(transport, store)
    assert is_whole(store)
    assert ranges(server)[-1] is None


def test_wrong_bytes_behind_a_partial_are_tried_once_more_and_refused(server, transport, store):
    server.on(BLOBS + WEIGHTS.sha256, blob_route(b"x" * WEIGHTS.length))
    store.append(WEIGHTS.sha256, FILES["model.onnx.data"][:1000])
    with pytest.raises(UntrustedError) as caught:
        download(transport, store)
    assert caught.value.code == "hash_mismatch"
    assert ranges(server) == [None, "bytes=1000-", None]
    assert store.partial_length(WEIGHTS.sha256) == 0


@pytest.mark.parametrize("announced", [True, False])
def test_more_bytes_than_were_signed_are_refused_and_deleted(server, transport, store, announced):
    body = b"x" * (GRAPH.length + 1)
    server.on(BLOBS + GRAPH.sha256, lambda _: Reply(200, body if announced else iter([body])))
    with pytest.raises(UntrustedError) as caught:
        download(transport, store)
    assert caught.value.code == "too_large"
    assert store.partial_length(GRAPH.sha256) == 0


@pytest.mark.parametrize("status", [204, 206, 304])
def test_a_status_that_brings_no_whole_file_is_a_transfer_error(server, transport, store, status):
    server.on(BLOBS + GRAPH.sha256, Reply(status, b""))
    with pytest.raises(TransferError):
        download(transport, store)


def test_a_page_of_a_portal_writes_nothing(server, transport, store):
    server.on(BLOBS + GRAPH.sha256, Reply(200, b"<html>", {"Content-Type": "text/html"}))
    with pytest.raises(TransferError) as caught:
        download(transport, store)
    assert caught.value.code == "captive_portal"
    assert store.partial_length(GRAPH.sha256) == 0


def test_the_deadline_is_for_all_files_together_and_keeps_what_came(server, transport, store):
    stop = threading.Event()

    def drip():
        for _ in range(1000):
            yield b"x"
            if stop.wait(0.01):
                return

    server.on(BLOBS + WEIGHTS.sha256, lambda _: Reply(200, drip()))
    with pytest.raises(TransferError) as caught:
        download(transport, store, deadline=0.3)
    stop.set()
    assert caught.value.code == "deadline"
    assert store.has_blob(GRAPH)
    assert 0 < store.partial_length(WEIGHTS.sha256) < 1000
    with pytest.raises(TransferError):
        download(transport, store, deadline=0)


def test_a_full_disk_keeps_what_came_and_resumes(tmp_path, server, transport):
    class Full(FileOps):
        left = 300_000

        def append(self, path, data):
            super().append(path, data[: self.left])
            self.left -= len(data)
            if self.left < 0:
                self.left = 0
                raise OSError(28, "No space left on device")

    with pytest.raises(StorageError) as caught:
        download(transport, Store(tmp_path / "store", Full()))
    assert caught.value.code == "disk_full"
    store = Store(tmp_path / "store")
    assert store.has_blob(GRAPH)
    resumed_at = store.partial_length(WEIGHTS.sha256)
    assert resumed_at == 300_000 - GRAPH.length
    download(transport, store)
    assert is_whole(store)
    assert ranges(server)[-1] == f"bytes={resumed_at}-"


def test_a_blob_damaged_on_disk_is_fetched_again(tmp_path, transport, store):
    download(transport, store)
    sha = store.add_manifest(MANIFEST.to_bytes())
    blob = tmp_path / "store" / "blobs" / GRAPH.sha256
    blob.write_bytes(b"x" * GRAPH.length)
    assert store.current("detector") is None
    download(transport, store)
    assert store.current("detector") == sha
