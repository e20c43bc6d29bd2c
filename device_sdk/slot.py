"""Where the release that serves stands: one reference, swapped under load, and the old one freed once no call is on it.

Nothing on the way of a call takes a lock.
"""

import ctypes
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from device_sdk.counts import Counts, detail
from device_sdk.errors import HeldError, ModelStoppedError, NoModelError, QueueFullError
from device_sdk.ledger import Done
from device_sdk.naming import token_hex
from device_sdk.protocol.names import ReleasePath
from device_sdk.protocol.scores import Scores
from device_sdk.schema import Schema
from device_sdk.stats import Stats

log = logging.getLogger("device_sdk")

CHECK_EVERY = 64  # a committed release has one call in so many timed, and its outputs looked at; a power of two

Array = np.ndarray[Any, Any]
Tensors = Mapping[str, Array]


class Sampler(Protocol):
    """Takes inferences in, off the caller's way. `rate` is read at each call; `offer` copies and never raises."""

    rate: float

    def offer(self, release: ReleasePath, inputs: Tensors, outputs: Tensors) -> None: ...


@dataclass(eq=False, slots=True, weakref_slot=True)
class Loaded:
    """One release in memory. `check_mask` 0: look at the outputs of every call (probation). `due`: of the next one.

    What a call needs lies here at hand: attributes looked up once instead of at each call.
    """

    sha256: str
    path: ReleasePath
    session: Any
    schema: Schema
    check_mask: int = 0
    due: bool = True
    scores: Scores | None = None  # where its answers tell class and confidence
    asked: tuple[str, ...] = ()  # execution providers
    before: Done = field(default_factory=Done)  # what the release did in earlier processes
    stats: Stats = field(default_factory=Stats)
    load: str = field(default_factory=lambda: token_hex(4))  # names this load in events
    bound: "WeakKeyDictionary[Any, Any]" = field(default_factory=WeakKeyDictionary)  # I/O bindings, by their owner
    names: list[str] = field(init=False)
    call: Callable[..., list[Any]] = field(init=False)
    ended: Callable[[], int] = field(init=False)  # of `stats`

    def __post_init__(self) -> None:
        self.names = list(self.schema.outputs)
        self.call = self.session.run
        self.ended = self.stats.ended

    def watch(self, *, each_call: bool) -> None:
        """Look at the outputs of each call from now on, or of one in so many."""
        self.check_mask = 0 if each_call else CHECK_EVERY - 1
        self.due = each_call

    @property
    def providers(self) -> tuple[str, ...]:
        """What it runs on now: onnxruntime may also fall back in the middle of a call."""
        return tuple(self.session.get_providers())

    @property
    def missing(self) -> tuple[str, ...]:
        """Execution providers that were asked for, and that it does not run on."""
        return tuple(name for name in self.asked if name not in self.providers)


def told(loaded: Loaded | None, counts: Counts, seconds: float) -> dict[str, float | str]:
    """The numbers of an event about a release in memory. What it was asked to run on, and does not, stands beside."""
    if loaded is None:
        return detail(counts, seconds=seconds)
    missing = loaded.missing
    beside = {"missing_providers": ", ".join(missing)[:200], "providers": ", ".join(loaded.providers)[:200]}
    return detail(counts, load=loaded.load, seconds=seconds) | (beside if missing else {})


class Gate:
    """Where calls wait while a model is swapped without room for two: so many, each for so long. Counts the others."""

    def __init__(self, *, calls: int, seconds: float) -> None:
        self._seconds = seconds
        self._calls = calls
        self._is_open = threading.Event()
        self._lock = threading.Lock()
        self._waiting = 0
        self.held = self.turned_away = 0

    def wait(self) -> None:
        """Raises QueueFullError, HeldError."""
        with self._lock:
            if self._waiting >= self._calls:
                self.turned_away += 1
                raise QueueFullError(f"the model is being swapped, and {self._calls} calls wait already")
            self._waiting += 1
            self.held += 1
        in_time = self._is_open.wait(self._seconds)
        with self._lock:
            self._waiting -= 1
            if not in_time:
                self.turned_away += 1
        if not in_time:
            raise HeldError(f"the model is being swapped, for more than {self._seconds:g} s")

    def open(self) -> None:
        self._is_open.set()


class Slot:
    """Holds the release that serves, by one reference; during probation also the one to fall back to."""

    __slots__ = ("_filled", "alarm", "awake", "current", "gate", "previous", "sampler", "stopped")

    def __init__(self) -> None:
        self.current: Loaded | None = None
        self.previous: Loaded | None = None
        self.sampler: Sampler | None = None
        self.stopped = ""  # why nothing serves, where that was decided
        self.alarm: Callable[[], None] = lambda: None  # called when a call goes wrong, so that a verdict need not wait
        self.gate: Gate | None = None  # where calls wait while nothing serves for a moment
        self.awake: Callable[[], None] = _nothing  # brings the release back where a fork lost it
        self._filled = threading.Event()

    def forget(self, awake: Callable[[], None]) -> None:
        """In a forked child: let go of sessions whose threads are the parent's; `awake` loads anew.

        Takes no lock: whoever held one is not here. A session's destructor would wait for threads that do not exist,
        hence it is kept for ever; its pages are shared with the parent.
        """
        for loaded in (self.current, self.previous):
            if loaded is not None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(loaded))
        self.current = self.previous = self.sampler = None
        self.alarm, self.awake, self.gate = _nothing, awake, None
        self._filled = threading.Event()

    def now(self, *, patient: bool = False) -> Loaded | None:
        """What serves, after a fork too. The way of a call looks at `current`, and comes here if there is none.

        `patient`: wait while the model is being swapped. Raises HeldError then, where it takes too long.
        """
        gate = self.gate
        if gate is not None and patient and self.current is None:
            gate.wait()
        elif self.current is None:
            self.awake()
        return self.current

    def unload(self, gate: "Gate", *, timeout: float) -> None:
        """Free what serves before something else is loaded. Calls wait at the gate until `publish`, or `open_gate`."""
        self.drop_previous(timeout=timeout)
        self.gate = gate  # first: a call that finds nothing finds it
        if self.current is not None:
            holder = [self.current]
            self.current = None
            retire(holder, timeout=timeout)

    def open_gate(self) -> None:
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.open()

    def publish(self, loaded: Loaded) -> None:
        """Swap: calls that begin from now on use `loaded`, those under way finish on what they have."""
        if self.current is not None and self.previous is None:
            self.previous = self.current
        self.current = loaded
        self.stopped = ""
        self._filled.set()
        self.open_gate()

    def fall_back(self) -> bool:
        """Serve the previous release again at once. False: it is not in memory."""
        if self.previous is None:
            return False
        self.current, self.previous = self.previous, self.current
        return True

    def drop_previous(self, *, timeout: float = 30.0) -> bool:
        """Let go of the release that no longer serves. See `retire`."""
        if self.previous is None:
            return True
        holder = [self.previous]
        self.previous = None
        return retire(holder, timeout=timeout)

    def pinned(self) -> "Slot":
        """What serves now, whatever is published later. For the length of a call: it keeps the release in memory."""
        pinned = Slot.__new__(Slot)
        pinned.current, pinned.previous = self.current, self.previous
        pinned.sampler, pinned.alarm, pinned.stopped = self.sampler, self.alarm, self.stopped
        pinned.awake, pinned.gate = _nothing, None
        return pinned

    def clear(self, reason: str = "") -> None:
        """Serve nothing. `reason`: that was decided, and calls are told why."""
        self.stopped = reason
        self.current = None
        self._filled.clear()

    def nothing(self, model: str) -> NoModelError:
        """What a call gets that finds nothing."""
        if self.stopped:
            return ModelStoppedError(f"{model!r} is stopped: {self.stopped}")
        return NoModelError(f"no release of {model!r} is installed yet")

    def wait(self, timeout: float | None) -> bool:
        self.now()
        return self._filled.wait(timeout)


def _nothing() -> None:
    return


def retire(holder: list[Loaded], *, timeout: float) -> bool:
    """Free a release once no call is on it any more. `holder` has the only reference besides those of calls.

    The session's destructor holds the GIL and runs where the last reference drops: here, not in a call. After
    `timeout` seconds the reference is dropped all the same, and the slow call frees the session when it ends.
    """
    probe = [object()]
    alone = sys.getrefcount(probe[0])
    deadline, pause = time.monotonic() + timeout, 0.001
    while sys.getrefcount(holder[0]) > alone and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
    clean = sys.getrefcount(holder[0]) <= alone
    if not clean:
        log.warning("a call has been running on %s for %.0f s; it frees the release itself", holder[0].path, timeout)
    holder.clear()
    trim()
    return clean


def trim() -> None:
    """Give freed memory back to the system; glibc keeps a retired model's pages otherwise."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        return
