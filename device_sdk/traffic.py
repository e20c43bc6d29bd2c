"""How fast and how much a device downloads, or uploads: a rate in bytes a second, and a budget for each of its days.

Owns the count of what came today, on disk, so that a restart does not begin the day anew. Bytes are counted as they
come off the wire, also those that are thrown away. Knows nothing of files or hashes.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import field
from datetime import date
from pathlib import Path

from device_sdk.config import read_plainly, write_durably
from device_sdk.errors import DeviceError, StorageError
from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.frozen import frozen

log = logging.getLogger("device_sdk")

DAYS = 8  # kept: a clock that starts at 1970 and is set right later finds today's count again
SLICE_SECONDS = 20  # a capped download asks for so much at a time: what waits in buffers has been sent, and counted
SMALLEST_SLICE = 64 * limits.KIB
_FILE = 4 * limits.KIB
_STEP = limits.MIB  # written down ahead of what comes, so that a crash cannot win bytes back
_AHEAD = 256 * limits.KIB  # at least so much, where more is to come: one read
_LONGEST_WAIT = 1.0  # seconds between two looks at whether to go on


class BudgetError(DeviceError):
    """Today's bytes are spent. What has come stays, and is resumed the next day."""

    code = "budget"


@frozen
class Limits:
    """Zero: none."""

    rate: int = 0  # bytes a second
    daily: int = 0  # bytes in a day

    def and_of(self, other: "Limits") -> "Limits":
        """The smaller of each counts."""
        return Limits(_smaller(self.rate, other.rate), _smaller(self.daily, other.daily))


def _smaller(one: int, other: int) -> int:
    return min(one, other) if one and other else one or other


NO_LIMITS = Limits()


@frozen
class Clock:
    """`today`: the device's local day. `wait` may return early; `monotonic` says how long it was."""

    today: Callable[[], date] = date.today
    monotonic: Callable[[], float] = time.monotonic
    wait: Callable[[float], object] = field(default_factory=lambda: threading.Event().wait)


class Traffic:
    """Counts and slows down the downloads, or the uploads, of one directory. One thread at a time."""

    def __init__(self, path: Path | None, own: Limits = NO_LIMITS, clock: Clock | None = None) -> None:
        self._path = path
        self._own = own
        self._clock = clock or Clock()
        self._days = _read(path) if path else {}
        self._written = dict(self._days)
        self._limits = own
        self._counts = bool(own.daily)
        self._due = 0  # bytes that were asked for and have not come
        self._paid_until = 0.0  # monotonic: when what has come would have come at the rate

    def obey(self, signed: Limits, *, urgent: bool) -> None:
        """Limits for what is fetched from now on. An urgent release is not kept waiting by the budget."""
        both = self._own.and_of(signed)
        self._counts = bool(both.daily)
        self._limits = Limits(both.rate, 0 if urgent else both.daily)

    def left(self) -> int | None:
        """Bytes that may still come today. None: any number."""
        if not self._limits.daily:
            return None
        return max(self._limits.daily - self._days.get(self._today(), 0), 0)

    def slice(self, wanted: int) -> int:
        """How much to ask for at once, of `wanted` bytes. Raises BudgetError when today's are spent."""
        left = self.left()
        if left is not None:
            if not left:
                raise BudgetError(f"today's {self._limits.daily} bytes are spent")
            wanted = min(wanted, left)
        if self._limits.rate:
            wanted = min(wanted, max(self._limits.rate * SLICE_SECONDS, SMALLEST_SLICE))
        self.expect(wanted)
        return wanted

    def expect(self, size: int) -> None:
        """So much travels next. Raises StorageError where it cannot be counted."""
        self._due = size
        self._write_ahead()

    def has_room(self, size: int) -> bool:
        """Whether what can only travel whole may travel today. More than a whole day's goes first on its day."""
        left = self.left()
        return left is None or size <= left or left == self._limits.daily

    def seconds(self, size: int) -> float:
        """How long so much takes at the rate; 0: as long as the line needs."""
        return size / self._limits.rate if self._limits.rate else 0.0

    def took(self, size: int, go_on: Callable[[], None] = lambda: None) -> None:
        """Count what came, and wait until it would have come at the rate; `go_on` may end the wait by raising."""
        today = self._today()
        self._days[today] = self._days.pop(today, 0) + size
        self._due = max(self._due - size, 0)
        self._write_ahead()
        if self._limits.rate:
            self._slow_down(size / self._limits.rate, go_on)

    def settle(self) -> None:
        """A download ended: write down what really came."""
        if self._counts and self._days != self._written:
            try:
                self._write(self._days)
            except StorageError as error:
                log.warning("today's count stays too high: %s", error)

    def _slow_down(self, seconds: float, go_on: Callable[[], None]) -> None:
        now = self._clock.monotonic()
        self._paid_until = max(self._paid_until, now) + seconds
        while (left := self._paid_until - self._clock.monotonic()) > 0:
            self._clock.wait(min(left, _LONGEST_WAIT))
            go_on()

    def _today(self) -> str:
        return self._clock.today().isoformat()

    def _write_ahead(self) -> None:
        """Keep the disk's count ahead of the truth: what came may be lost with the process before it is counted."""
        today = self._today()
        count = self._days.get(today, 0)
        if self._counts and self._written.get(today, 0) < count + min(self._due, _AHEAD):
            self._write({**self._days, today: count + min(self._due, _STEP)})

    def _write(self, days: dict[str, int]) -> None:
        """Raises StorageError: what cannot be counted is not fetched."""
        kept = dict(list(days.items())[-DAYS:])  # those that were counted last, whatever the clock said then
        if self._path is not None:
            try:
                write_durably(self._path, json.dumps(kept).encode())
            except OSError as error:
                raise StorageError(f"cannot write {self._path.name}: {error.strerror}") from error
        self._written = kept
        self._days = {day: count for day, count in self._days.items() if day in kept}


def _read(path: Path) -> dict[str, int]:
    """A count that is lost begins at nothing: it bounds a bill, no trust."""
    try:
        days = fields.parse_object(read_plainly(path, limit=_FILE), limit=_FILE, what=path.name)
        return {date.fromisoformat(day).isoformat(): fields.take_int(days, day, high=2**60) for day in days}
    except FileNotFoundError:
        return {}
    except (OSError, ProtocolError, ValueError) as error:
        log.warning("%s was lost: %s", path, error)
        return {}


def local_second_of_day() -> float:
    """Seconds since midnight by the device's local clock."""
    now = time.localtime()
    return now.tm_hour * 3600.0 + now.tm_min * 60.0 + now.tm_sec
