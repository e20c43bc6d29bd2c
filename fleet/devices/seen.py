"""Last-seen marks, kept in memory and written by one statement about once a second: a poll writes nothing itself.

What may be lost: the marks of the last `LAST_SEEN_FLUSH` seconds when a process is killed outright. The next poll of
each device brings them again. An orderly stop writes what is left; a failed write keeps its marks for the next one.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice

import structlog
from django.conf import settings
from django.db import DatabaseError, close_old_connections, connection
from django.db.backends.utils import CursorWrapper

ROWS = 1_000  # of one statement; SQLite allows some 32,000 parameters
STATEMENT = """
    UPDATE devices_device AS d
    SET last_seen = v.seen,
        runs_id = COALESCE((SELECT r.id FROM devices_runningset r WHERE r.digest = v.runs), d.runs_id)
    FROM ({rows}) AS v
    WHERE d.id = v.device AND (d.last_seen IS NULL OR d.last_seen < v.seen)
"""
VALUES = "SELECT column1 AS device, column2 AS seen, column3 AS runs FROM (VALUES {rows}) AS w"  # SQLite's names
ARRAYS = """
    SELECT w.device, to_timestamp(w.seen) AS seen, w.runs
    FROM unnest(%s::bigint[], %s::float8[], %s::text[]) AS w (device, seen, runs)
"""  # three parameters, however many rows

logger = structlog.get_logger(__name__)


# When a device was seen, in seconds of the epoch, and the digest of what it runs. Empty, or a digest that nobody
# knows, leaves that as it was.
Mark = tuple[float, str]


class SeenBuffer:
    """The newest mark of each device. Bounded by the number of devices."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._marks: dict[int, Mark] = {}

    def mark(self, device: int, *, runs: str, now: float) -> None:
        with self._lock:
            self._marks[device] = now, runs

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
    write = _write_arrays if connection.vendor == "postgresql" else _write_values
    with connection.cursor() as cursor:
        while chunk := list(islice(rows, ROWS)):
            write(cursor, chunk)


def _write_arrays(cursor: CursorWrapper, chunk: Sequence[tuple[int, Mark]]) -> None:
    columns = zip(*((device, at, runs) for device, (at, runs) in chunk), strict=True)
    cursor.execute(STATEMENT.format(rows=ARRAYS), [list(column) for column in columns])


def _write_values(cursor: CursorWrapper, chunk: Sequence[tuple[int, Mark]]) -> None:
    adapt, parameters = connection.ops.adapt_datetimefield_value, list[int | str | None]()
    for device, (at, runs) in chunk:
        parameters += [device, adapt(datetime.fromtimestamp(at, UTC)), runs]
    cursor.execute(STATEMENT.format(rows=VALUES.format(rows=", ".join(["(%s, %s, %s)"] * len(chunk)))), parameters)


_buffer = SeenBuffer()
_flusher = Flusher(_buffer)


def mark_seen(device: int, *, runs: str = "", at: float | None = None) -> None:
    """Note that a device called (now, or `at` seconds of the epoch), and what it runs by its digest. Writes nothing."""
    _buffer.mark(device, runs=runs, now=time.time() if at is None else at)
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
