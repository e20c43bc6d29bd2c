"""Uploads that survive a broken line: bytes are appended to `<INCOMING>/<sha256>.part`, hashed and stored when whole.

One writer at a time holds the partial's lock, whichever process it is in; a second one is told to come back.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Protocol

from django.conf import settings

from device_sdk.protocol.names import check_sha256
from fleet.errors import Conflict, Invalid, TooLarge
from fleet.releases import storage
from fleet.releases.models import Artifact

CHUNK = 1024 * 1024
ABANDONED_SECONDS = 7 * 86_400


class Source(Protocol):
    """What an upload is read from; a request, for instance."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an upload is. `offset` in bytes, all of them on disk."""

    offset: int
    complete: bool


def progress(sha256: str) -> Progress:
    """Whole in the store, or how much of it came so far."""
    check_sha256(sha256)
    artifact = Artifact.objects.filter(sha256=sha256).first()
    if artifact is not None and storage.exists(storage.blob_name(sha256)):
        return Progress(artifact.length, complete=True)
    try:
        return Progress(_partial(sha256).stat().st_size, complete=False)
    except FileNotFoundError:
        return Progress(0, complete=False)


def receive(*, sha256: str, length: int, offset: int, source: Source) -> Progress:
    """Append what `source` gives at `offset` of a file of `length` bytes; hash and store it when it is whole.

    What came before the line broke is kept. Raises too_large, wrong_offset (detail: the right one), upload_busy,
    and hash_mismatch, which deletes the partial.
    """
    check_sha256(sha256)
    _check_bounds(length, offset)
    known = progress(sha256)
    if known.complete:
        return known
    with _exclusive(_partial(sha256)) as file:
        known = progress(sha256)
        if known.complete:  # another upload of the same bytes was faster
            _partial(sha256).unlink(missing_ok=True)
            return known
        _append(file, source, offset=offset, length=length)
        if file.tell() < length:
            return Progress(file.tell(), complete=False)
        _finish(file, sha256, length)
    return Progress(length, complete=True)


def remove_abandoned(*, older_than: float = ABANDONED_SECONDS) -> int:
    """Delete partials that nobody went on with. Returns how many."""
    count = 0
    for path in settings.INCOMING.glob("*.part"):
        with suppress(OSError, Conflict):
            if time.time() - path.stat().st_mtime > older_than:
                with _exclusive(path):
                    path.unlink()
                count += 1
    return count


def _partial(sha256: str) -> Path:
    return Path(settings.INCOMING) / f"{sha256}.part"


def _check_bounds(length: int, offset: int) -> None:
    if length > settings.MAX_ARTIFACT_BYTES:
        raise TooLarge(
            "too_large", f"file: expected at most {settings.MAX_ARTIFACT_BYTES} bytes; got {length}", {"length": length}
        )
    if offset > length:
        raise Invalid("wrong_offset", f"offset: expected at most the length, {length}; got {offset}")


@contextmanager
def _exclusive(path: Path) -> Iterator[BufferedRandom]:
    """Open the partial under a lock that dies with the process. Raises `upload_busy` if another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            still_there = path.stat().st_ino == os.fstat(descriptor).st_ino
        except (BlockingIOError, FileNotFoundError):
            still_there = False
        if not still_there:  # held by another, or finished by it between our open and our lock
            raise Conflict("upload_busy", "the same file is being uploaded by another; try again in a moment")
        yield file


def _append(file: BufferedRandom, source: Source, *, offset: int, length: int) -> None:
    at = file.seek(0, os.SEEK_END)
    if at != offset:
        raise Conflict(
            "wrong_offset", f"offset: expected {at}, which is what came so far; got {offset}", {"offset": at}
        )
    try:
        while chunk := source.read(CHUNK):
            if file.tell() + len(chunk) > length:
                file.truncate(offset)
                raise TooLarge("too_large", f"body: expected {length - offset} bytes at most, as announced; got more")
            file.write(chunk)
    except OSError as error:  # the line broke: what came stays, and the next try goes on from there
        if not isinstance(error, _line_errors()):
            raise
    finally:
        file.flush()
        os.fsync(file.fileno())


def _line_errors() -> tuple[type[OSError], ...]:
    from django.http import UnreadablePostError

    return (UnreadablePostError, ConnectionError, TimeoutError)


def _finish(file: BufferedRandom, sha256: str, length: int) -> None:
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()
    path = _partial(sha256)
    if found != sha256:
        path.unlink()
        raise Invalid("hash_mismatch", f"file: expected sha256 {sha256}; got {found}. Start again from offset 0")
    storage.put_file(storage.blob_name(sha256), path)
    Artifact.objects.get_or_create(sha256=sha256, defaults={"length": length})
