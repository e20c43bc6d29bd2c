"""Fetch the files of a release: by patches where those are less, resumable, bounded by the signed length, and hashed.

Nothing here trusts the network: a partial file is only ever a guess, until `Store.admit` has hashed all of it.
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from device_sdk.errors import TransferError, UntrustedError
from device_sdk.mirror import Mirror
from device_sdk.patching import Patcher, RefusedError
from device_sdk.protocol.manifest import FileEntry, Manifest
from device_sdk.protocol.patches.offers import PatchOffer
from device_sdk.protocol.polls import BLOBS
from device_sdk.store import Store
from device_sdk.traffic import BudgetError, Traffic

if TYPE_CHECKING:
    from device_sdk.transport import StreamAnswer, Transport

log = logging.getLogger("device_sdk")

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of the whole release: how many are here, of how many."""

    done: int
    total: int


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """`bytes` of files that were missing, `wire_bytes` that came for them, and why a patch was no good."""

    bytes: int = 0
    wire_bytes: int = 0
    refused: str = ""
    message: str = ""

    def detail(self) -> dict[str, float | str]:
        """For an event."""
        told: dict[str, float | str] = {"bytes": self.bytes, "wire_bytes": self.wire_bytes}
        return {**told, "patch_refused": f"{self.refused}: {self.message}"} if self.refused else told


def fetch(
    transport: "Transport",
    store: Store,
    manifest: Manifest,
    *,
    on_progress: OnProgress | None = None,
    deadline: float,
    patcher: Patcher | None = None,
    traffic: Traffic | None = None,
    mirror: Mirror | None = None,
) -> Fetched:
    """Bring every missing file of `manifest` into the store, within `deadline` seconds; by patches, where they help.

    A `mirror` is asked before the server, and believed as little. `traffic` slows down, counts, and sets the end.

    Raises TransferError where the network failed (what has come is kept, and the next call resumes), UntrustedError
    `hash_mismatch` or `too_large` where other bytes came than were signed (what has come is deleted), StorageError
    `disk_full`, and BudgetError where today's bytes are spent. In each case what the store holds and runs is as it was.
    """
    ends = time.monotonic() + deadline
    meter = _Meter(sum(file.length for file in manifest.fetched), on_progress)
    line = _Line(transport, store, meter, ends, patcher, traffic or Traffic(None), mirror)
    fetched = Fetched()
    try:
        for file in manifest.fetched:
            if not store.has_blob(file):
                fetched = _together(fetched, _fetch_file(line, file))
            meter.finished(file)
    finally:
        line.traffic.settle()
    return fetched


@dataclass(frozen=True)
class _Line:
    """What each file of one fetch has in common."""

    transport: "Transport"
    store: Store
    meter: "_Meter"
    ends: float
    patcher: Patcher | None
    traffic: Traffic
    mirror: Mirror | None


class _Meter:
    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._total, self._tell, self._finished = total, on_progress, 0

    def at(self, received: int) -> None:
        if self._tell:
            self._tell(Progress(self._finished + received, self._total))

    def finished(self, file: FileEntry) -> None:
        self._finished += file.length
        self.at(0)


def _together(one: Fetched, other: Fetched) -> Fetched:
    refused, message = (other.refused, other.message) if other.refused else (one.refused, one.message)
    return Fetched(one.bytes + other.bytes, one.wire_bytes + other.wire_bytes, refused, message)


def _fetch_file(line: _Line, file: FileEntry) -> Fetched:
    """By a patch, else whole. A patch that was no good has cost its bytes and nothing else."""
    offer = None
    if line.patcher:
        left = file.length - line.store.partial_length(file.sha256)
        offer = line.patcher.best(file, left=left, ends=line.ends)
    if offer is None or line.patcher is None:
        _fetch_whole(line, file)
        return Fetched(file.length, file.length)
    try:
        _fetch_patch(line, line.patcher, offer, file)
    except RefusedError as error:
        _fetch_whole(line, file)
        return Fetched(file.length, file.length + offer.length, error.code, str(error))
    return Fetched(file.length, offer.length)


def _fetch_patch(line: _Line, patcher: Patcher, offer: PatchOffer, file: FileEntry) -> None:
    """Of the offer only the length counts, as a limit: the patch is not believed, what comes of it is hashed."""
    patch = FileEntry(f"patch of {file.name}", offer.length, offer.sha256)
    line.store.keep_partial(patch.sha256)
    start = line.store.partial_length(patch.sha256)
    if start > patch.length:
        line.store.discard(patch.sha256)
        start = 0
    try:
        if start < patch.length:
            _receive(line, patch, start)
    except TransferError as error:
        patcher.cut(offer, error)
        raise
    except UntrustedError as error:
        patcher.refuse(offer, error)
    patcher.make(offer, file, go_on=lambda: line.meter.at(offer.length), ends=line.ends)


def _fetch_whole(line: _Line, file: FileEntry) -> None:
    store = line.store
    start = store.partial_length(file.sha256)
    if start > file.length:
        store.discard(file.sha256)
        start = 0
    if start < file.length:
        _receive(line, file, start)
    elif file.length == 0:
        store.append(file.sha256, b"")
    try:
        store.admit(file.sha256, file.length)
    except UntrustedError:
        if not start:
            raise
        # A power loss leaves zeros in what had come: nobody is to blame before all of it came in one go.
        log.warning("%s: what had come of it was damaged; it is fetched from its beginning", file.name)
        _receive(line, file, 0)
        store.admit(file.sha256, file.length)


def _receive(line: _Line, file: FileEntry, start: int) -> None:
    """All bytes of `file` from `start` on: of the mirror where there is one, else and after any fault the server's."""
    mirror = line.mirror
    if mirror is None:
        _receive_from(line.transport, line, file, start)
        return
    is_suspect = bool(start)  # what came before may have been the mirror's
    if mirror.is_asked_for(file.sha256):
        try:
            _receive_from(mirror.transport, line, file, start)
            start, is_suspect = file.length, True
        except (TransferError, UntrustedError) as error:
            mirror.failed(file.sha256, error)
            start = line.store.partial_length(file.sha256)
            is_suspect = bool(start)
    _receive_from(line.transport, line, file, start)
    if is_suspect and not line.store.has_come(file.sha256):
        mirror.lied(file.sha256)
        line.store.discard(file.sha256)
        _receive_from(line.transport, line, file, 0)


def _receive_from(transport: "Transport", line: _Line, file: FileEntry, start: int) -> None:
    while start < file.length:
        start = _receive_slice(transport, line, file, start)


def _receive_slice(transport: "Transport", line: _Line, file: FileEntry, start: int) -> int:
    """As much as may come at once; where the next begins. UntrustedError: what has come is deleted."""
    end = start + line.traffic.slice(file.length - start)
    is_all = end == file.length
    headers = {"Range": f"bytes={start}-{'' if is_all else end - 1}"} if start or not is_all else {}
    try:
        # A server that ignores Range sends the whole file: the limit is the length in either case.
        with transport.stream(
            BLOBS + file.sha256, headers=headers, limit=file.length, deadline=line.ends - time.monotonic()
        ) as answer:
            at, end = _place(line.store, file, answer, start, end)
            return _write(line, file, answer, at, end)
    except UntrustedError:
        line.store.discard(file.sha256)
        raise
    except TransferError as error:
        if error.status == 416:
            line.store.discard(file.sha256)  # what we have is not a beginning of what the server has
        raise


def _place(store: Store, file: FileEntry, answer: "StreamAnswer", start: int, end: int) -> tuple[int, int]:
    """Where the answer's bytes belong. A 200 starts over; a 206 must be the range that was asked for."""
    if answer.status == 200:
        if start:
            store.discard(file.sha256)
        return 0, file.length
    if answer.status != 206 or (not start and end == file.length):
        raise TransferError(
            f"{file.name}: expected 200 or 206; got {answer.status}", code="status", status=answer.status
        )
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
    if not match or not _is_within(match, start, end, file.length):
        said = answer.headers.get("Content-Range", "nothing")
        message = f"{file.name}: expected bytes {start}-{end - 1}/{file.length}; got {said:.80}"
        raise UntrustedError(message, code="bad_range")
    return start, end


def _is_within(match: re.Match[str], start: int, end: int, length: int) -> bool:
    return int(match[1]) == start and int(match[2]) < end and match[3] in {str(length), "*"}


def _write(line: _Line, file: FileEntry, answer: "StreamAnswer", at: int, end: int) -> int:
    for chunk in answer.chunks:
        at += len(chunk)
        if at > end:
            message = f"{file.name}: expected {end} bytes; more came"
            raise UntrustedError(message, code="too_large")
        line.store.append(file.sha256, chunk)
        line.meter.at(at)
        line.traffic.took(len(chunk), lambda at=at: line.meter.at(at))  # type: ignore[misc]
        if at < end and line.traffic.left() == 0:
            raise BudgetError("today's bytes are spent")  # by a server that sends more than it was asked for
    if at < end:
        raise TransferError(f"{file.name}: expected {end} bytes; the answer ended after {at}", code="truncated")
    return at
