"""Last-seen marks, kept in memory and written by one statement about once a second: a poll writes nothing itself.

What may be lost: the marks of the last `LAST_SEEN_FLUSH` seconds when a process is killed outright. The next poll of
each device brings them again. An orderly stop writes what is left; a failed write keeps its marks for the next one.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

import structlog
from django.conf import settings
from django.db import DatabaseError, close_old_connections, connection
from django.utils import timezone

ROWS = 1_000  # of one statement; SQLite allows some 32,000 parameters
STATEMENT = """
    UPDATE devices_device AS d
    SET last_seen = v.column2,
        runs_id = COALESCE((SELECT r.id FROM devices_runningset r WHERE r.digest = v.column3), d.runs_id)
    FROM (VALUES {rows}) AS v
    WHERE d.id = v.column1 AND (d.last_seen IS NULL OR d.last_seen < v.column2)
"""  # VALUES names its columns column1, column2... in SQLite and PostgreSQL alike

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Mark:
    """`runs` is the digest of what the device runs; empty, or a digest nobody knows, leaves that as it was."""

    at: datetime
    runs: str


class SeenBuffer:
    """The newest mark of each device. Bounded by the number of devices."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._marks: dict[int, Mark] = {}

    def mark(self, device: int, *, runs: str, now: datetime) -> None:
        with self._lock:
            self._marks[device] = Mark(now, runs)

    def flush(self) -> int:
        """Write all marks; return how many. On failure they are kept, unless newer ones came, and the error goes on."""
        with self._lock:
            marks, self._marks = self._marks, {}
        try:
            _write(marks)
        except DatabaseError:
            with self._lock:
                self._marks = marks | self._marks
            raise
        return len(marks)


class Flusher:
    """A thread that flushes now and then, and once more when the main thread has ended.

    Not a daemon: it outlives the main thread by one flush. Started by the first mark, so that a server that forks
    its workers has one in each worker and none before.
    """

    def __init__(self, buffer: SeenBuffer) -> None:
        self._buffer = buffer
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ensure(self) -> None:
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="last-seen", daemon=False)
                self._thread.start()

    def _run(self) -> None:
        main, more = threading.main_thread(), True
        while more:
            main.join(settings.LAST_SEEN_FLUSH)
            more = main.is_alive()  # looked at before the flush: the last one comes after the end
            self._flush_quietly()
        connection.close()

    def _flush_quietly(self) -> None:
        close_old_connections()
        try:
            self._buffer.flush()
        except DatabaseError as error:
            logger.warning("last_seen_not_written", error=str(error))


def _write(marks: Mapping[int, Mark]) -> None:
    rows = iter(sorted(marks.items()))  # one order for everyone, so that two processes do not lock each other out
    with connection.cursor() as cursor:
        while chunk := list(islice(rows, ROWS)):
            parameters = [value for device, mark in chunk for value in _parameters(device, mark)]
            cursor.execute(STATEMENT.format(rows=", ".join(["(%s, %s, %s)"] * len(chunk))), parameters)


def _parameters(device: int, mark: Mark) -> Iterator[int | str | None]:
    yield device
    yield connection.ops.adapt_datetimefield_value(mark.at)
    yield mark.runs


_buffer = SeenBuffer()
_flusher = Flusher(_buffer)


def mark_seen(device: int, *, runs: str = "") -> None:
    """Note that a device called, and the digest of what it runs where that changed. Writes nothing."""
    _buffer.mark(device, runs=runs, now=timezone.now())
    _flusher.ensure()


def flush_seen() -> int:
    """Write the marks now, in this thread."""
    return _buffer.flush()


def _start_afresh() -> None:
    """After a fork: the parent keeps its marks and its thread; the child has neither."""
    global _buffer, _flusher  # noqa: PLW0603  # locks held by the parent's threads must not be inherited
    _buffer = SeenBuffer()
    _flusher = Flusher(_buffer)


os.register_at_fork(after_in_child=_start_afresh)
