"""Fetch the files of a release: resumable, bounded by the signed length, hashed as a whole before they count.

Nothing here trusts the network: a partial file is only ever a guess, until `Store.admit` has hashed all of it.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from device_sdk.errors import TransferError, UntrustedError
from device_sdk.protocol.manifest import FileEntry, Manifest
from device_sdk.protocol.polls import BLOBS
from device_sdk.store import Store
from device_sdk.transport import StreamAnswer, Transport

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of the whole release: how many are here, of how many."""

    done: int
    total: int


OnProgress = Callable[[Progress], None]


def fetch(
    transport: Transport, store: Store, manifest: Manifest, *, on_progress: OnProgress | None = None, deadline: float
) -> None:
    """Bring every missing file of `manifest` into the store, within `deadline` seconds.

    Raises TransferError where the network failed (what has come is kept, and the next call resumes), UntrustedError
    `hash_mismatch` or `too_large` where other bytes came than were signed (what has come is deleted), and StorageError
    `disk_full`. In each case what the store holds and runs is as it was.
    """
    ends = time.monotonic() + deadline
    meter = _Meter(manifest.length, on_progress)
    for file in manifest.files:
        if not store.has_blob(file):
            _fetch_file(transport, store, file, meter, ends)
        meter.finished(file)


class _Meter:
    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._total, self._tell, self._finished = total, on_progress, 0

    def at(self, received: int) -> None:
        if self._tell:
            self._tell(Progress(self._finished + received, self._total))

    def finished(self, file: FileEntry) -> None:
        self._finished += file.length
        self.at(0)


def _fetch_file(transport: Transport, store: Store, file: FileEntry, meter: _Meter, ends: float) -> None:
    start = store.partial_length(file.sha256)
    if start > file.length:
        store.discard(file.sha256)
        start = 0
    if start < file.length:
        _receive(transport, store, file, start, meter, ends)
    elif file.length == 0:
        store.append(file.sha256, b"")
    store.admit(file.sha256, file.length)


def _receive(transport: Transport, store: Store, file: FileEntry, start: int, meter: _Meter, ends: float) -> None:
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        # A server that ignores Range sends the whole file: the limit is the length in either case.
        with transport.stream(
            BLOBS + file.sha256, headers=headers, limit=file.length, deadline=ends - time.monotonic()
        ) as answer:
            _write(store, file, answer, _offset(store, file, answer, start), meter)
    except UntrustedError:
        store.discard(file.sha256)
        raise
    except TransferError as error:
        if error.status == 416:
            store.discard(file.sha256)  # what we have is not a beginning of what the server has
        raise


def _offset(store: Store, file: FileEntry, answer: StreamAnswer, start: int) -> int:
    """Where the answer's bytes belong. A 200 to a Range starts over; a 206 must be the range that was asked for."""
    if answer.status == 200:
        if start:
            store.discard(file.sha256)
        return 0
    if answer.status != 206 or not start:
        raise TransferError(
            f"{file.name}: expected 200 or 206; got {answer.status}", code="status", status=answer.status
        )
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
    if not match or not _is_the_rest(match, start, file.length):
        said = answer.headers.get("Content-Range", "nothing")
        message = f"{file.name}: expected bytes {start}-{file.length - 1}/{file.length}; got {said:.80}"
        raise UntrustedError(message, code="bad_range")
    return start


def _is_the_rest(match: re.Match[str], start: int, length: int) -> bool:
    return int(match[1]) == start and int(match[2]) < length and match[3] in {str(length), "*"}


def _write(store: Store, file: FileEntry, answer: StreamAnswer, at: int, meter: _Meter) -> None:
    for chunk in answer.chunks:
        at += len(chunk)
        if at > file.length:
            message = f"{file.name}: expected {file.length} bytes; more came"
            raise UntrustedError(message, code="too_large")
        store.append(file.sha256, chunk)
        meter.at(at)
    if at < file.length:
        raise TransferError(f"{file.name}: expected {file.length} bytes; the answer ended after {at}", code="truncated")
