"""Events on their way to the server: durable, bounded, each sent until it is acknowledged.

An append-only file of JSON lines. An event is on disk before `add` returns, and leaves it after the server's 200.
What the bound pushes out is counted, and the count is sent.
"""

import contextlib
import json
import logging
import os
from collections import deque
from pathlib import Path
from threading import Lock

from device_sdk.config import read_plainly, write_durably
from device_sdk.errors import StorageError
from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.events import Event
from device_sdk.protocol.frozen import frozen

log = logging.getLogger("device_sdk")

BOUND = 2_000  # events
_READ_LIMIT = 64 * limits.MIB
_POST_BYTES = limits.EVENT_BODY // 2


@frozen
class Pending:
    """The oldest events, few enough for one post, and how many were dropped since the last acknowledged one."""

    events: tuple[Event, ...]
    dropped: int


class Outbox:
    """One process writes it; threads may share it."""

    def __init__(self, directory: Path, *, bound: int = BOUND) -> None:
        self._path = directory / "events.jsonl"
        self._bound = bound
        self._lock = Lock()
        self._dropped = 0
        self._whole = True  # False: the file is not what memory is, and must be rewritten before it is added to
        self._events: deque[Event] = deque()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._read()

    def __len__(self) -> int:
        return len(self._events)

    @property
    def has_news(self) -> bool:
        """Whether there is anything that the server should be told."""
        return bool(self._events or self._dropped)

    def add(self, event: Event) -> None:
        """Keep an event. Where the disk takes nothing it is kept in memory, so that a full disk is still reported."""
        with self._lock:
            if any(event.id == other.id for other in self._events):
                return
            self._events.append(event)
            try:
                if len(self._events) > self._bound:
                    self._drop_oldest()
                elif self._whole:
                    _append(self._path, _line(event.to_json()))
                else:
                    self._rewrite()
            except OSError as error:
                self._whole = False
                log.warning("event %s is kept in memory only: %s", event.kind, error.strerror)

    def pending(self) -> Pending:
        with self._lock:
            chosen: list[Event] = []
            size = 0
            for event in self._events:
                size += len(_line(event.to_json()))
                if len(chosen) == limits.EVENTS_PER_POST or (chosen and size > _POST_BYTES):
                    break
                chosen.append(event)
            return Pending(tuple(chosen), self._dropped)

    def acknowledge(self, sent: Pending) -> None:
        """The server has `sent`: forget it."""
        with self._lock:
            done = {event.id for event in sent.events}
            self._events = deque(event for event in self._events if event.id not in done)
            self._dropped -= sent.dropped
            try:
                self._rewrite()
            except OSError as error:
                self._whole = False
                raise StorageError(f"cannot write {self._path}: {error.strerror}") from error

    def discard(self, refused: Pending) -> None:
        """The server will never take `refused`: drop it, and say so with the next post."""
        self.acknowledge(refused)
        with self._lock:
            self._dropped += refused.dropped + len(refused.events)
            self._whole = False

    def _drop_oldest(self) -> None:
        """Drop a tenth at once: the file is rewritten for it."""
        for _ in range(max(1, self._bound // 10)):
            self._events.popleft()
            self._dropped += 1
        self._rewrite()

    def _rewrite(self) -> None:
        lines = [_line({"dropped": self._dropped}), *(_line(event.to_json()) for event in self._events)]
        write_durably(self._path, b"".join(lines))
        self._whole = True

    def _read(self) -> None:
        """Take up what an earlier process left. A line torn by a power cut is passed over, and the file made whole."""
        try:
            lines = read_plainly(self._path, limit=_READ_LIMIT).split(b"\n")
        except FileNotFoundError:
            lines = [b"torn"]
        except OSError as error:  # what waits to be told is not worth a device that does not start
            log.warning("outbox: %s was lost: %s", self._path, error.strerror)
            lines = [b"lost"]
        torn = lines.pop()
        taken = [self._take(line) for line in lines]
        self._whole = not torn and all(taken)
        if not self._whole:
            with contextlib.suppress(OSError):
                self._rewrite()

    def _take(self, line: bytes) -> bool:
        try:
            item = json.loads(line)
            if isinstance(item, dict) and isinstance(item.get("dropped"), int):
                self._dropped = item["dropped"]
            else:
                self._events.append(Event.parse(item))
        except (ProtocolError, ValueError):
            log.warning("outbox: a broken line was passed over")
            return False
        return True


def _line(item: dict[str, object]) -> bytes:
    return json.dumps(item, separators=(",", ":")).encode() + b"\n"


def _append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        written = os.write(descriptor, data)
        if written != len(data):
            raise OSError(28, "no space left")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
