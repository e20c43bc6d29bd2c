"""Load a release, warm it up, serve it, and swap it for another under load. The only import of onnxruntime.

A call reads one reference and finishes on the release that it read. Nothing on the way of a call takes a lock.
"""

import contextlib
import ctypes
import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import random
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np
import onnxruntime

from device_sdk.errors import HeldError, InputError, ModelError, ModelStoppedError, NoModelError, QueueFullError
from device_sdk.protocol.manifest import Manifest, TensorSpec
from device_sdk.protocol.names import ReleasePath
from device_sdk.sampling import decide
from device_sdk.updater import Counts, older

log = logging.getLogger("device_sdk")

RUNTIME = str(onnxruntime.__version__)
GIL_FREE_LOAD = "1.31"  # the first onnxruntime whose session constructor releases the GIL
CHECK_EVERY = 16  # a committed release has one call in so many timed, and its outputs looked at; a power of two
RECENT = 1_024  # calls over which latency is reported, of those that were looked at
_PROBE_SIZES = (1, 32, 224)  # tried for dimensions that the signed shape leaves open
_PROBE_ELEMENTS = 4_000_000
MEMORY_LIMIT = "memory_limit"  # the code of a release that asked for more memory than it may have
_STARVED = ("bad_alloc", "Failed to allocate memory", "AllocateRawInternal", "Cannot allocate memory", "MemoryError")
_SMALL = 4_096  # elements up to which one dot product finds NaN and infinity fastest

Array = np.ndarray[Any, Any]
Tensors = Mapping[str, Array]

_DTYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "bool": "bool", "string": "object",
    **{name: name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}  # fmt: skip


class Sampler(Protocol):
    """Takes inferences in, off the caller's way. `rate` is read at each call; `offer` copies and never raises."""

    rate: float

    def offer(self, release: ReleasePath, inputs: Tensors, outputs: Tensors) -> None: ...


@dataclass(frozen=True)
class RuntimeOptions:
    """How sessions are made. `session_options` is called for each session, so that none is shared."""

    intra_op_threads: int | None = None
    providers: Sequence[Any] = ("CPUExecutionProvider",)
    session_options: Callable[[], Any] | None = None

    def make(self) -> Any:
        options = self.session_options() if self.session_options else onnxruntime.SessionOptions()
        if self.intra_op_threads is not None:
            options.intra_op_num_threads = self.intra_op_threads
        return options


class _Cell:
    """One thread's counts. Only that thread writes it, so no update is lost; anyone may add the cells up."""

    __slots__ = ("calls", "checked", "errors", "invalid", "rejected", "thread")

    def __init__(self) -> None:
        self.calls = self.errors = self.checked = self.invalid = self.rejected = 0
        self.thread = threading.get_ident()


class Stats:
    """What one loaded release did. Exact: each thread counts for itself; cells of ended threads are folded."""

    def __init__(self) -> None:
        self.recent: deque[int] = deque(maxlen=RECENT)  # nanoseconds
        self.local = threading.local()  # `cell`: the thread's own
        self._cells: list[_Cell] = []
        self._folded = _Cell()
        self._lock = threading.Lock()

    def cell(self) -> _Cell:
        """The calling thread's own."""
        try:
            return self.local.cell  # type: ignore[no-any-return]
        except AttributeError:
            return self.register()

    def counts(self) -> Counts:
        with self._lock:
            cells = [*self._cells, self._folded]
            total = {name: sum(getattr(cell, name) for cell in cells) for name in _COUNTED}
        times = sorted(self.recent.copy())
        p50, p95 = ((times[len(times) * q // 100] / 1e3) if times else 0.0 for q in (50, 95))
        return Counts(**total, p50=p50, p95=p95)

    def register(self) -> _Cell:
        cell = _Cell()
        with self._lock:
            if len(self._cells) >= 64:
                self._fold()
            self._cells.append(cell)
        self.local.cell = cell
        return cell

    def _fold(self) -> None:
        """Programs that start a thread for each call must not grow the list for ever."""
        alive = set(sys._current_frames()) - {threading.get_ident()}  # noqa: SLF001  documented, whatever its name
        for cell in [cell for cell in self._cells if cell.thread not in alive]:
            self._cells.remove(cell)
            for name in _COUNTED:
                setattr(self._folded, name, getattr(self._folded, name) + getattr(cell, name))


_COUNTED = ("calls", "errors", "checked", "invalid", "rejected")


@dataclass(frozen=True, slots=True)
class Schema:
    """What a session takes and gives, by its own account."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def complaint(self, feeds: Mapping[str, Any]) -> str:
        """Say what is wrong with a call's inputs; empty: nothing that the schema forbids."""
        for name in feeds:
            if name not in self.inputs:
                return f"unknown input {name!r}; the model takes {', '.join(map(_shown, self.inputs.values()))}"
        for name, spec in self.inputs.items():
            if name not in feeds:
                return f"input {name!r} is missing; expected {_shown(spec)}"
            if problem := _mismatch(spec, feeds[name]):
                return problem
        return ""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Loaded:
    """One release in memory. `check_mask` 0: look at the outputs of every call (probation).

    What a call needs lies here at hand: attributes looked up once instead of at each call.
    """

    sha256: str
    path: ReleasePath
    session: Any
    schema: Schema
    check_mask: int = 0
    stats: Stats = field(default_factory=Stats)
    names: list[str] = field(init=False)
    call: Callable[..., list[Any]] = field(init=False)
    mine: Any = field(init=False)  # the thread-local of `stats`

    def __post_init__(self) -> None:
        self.names = list(self.schema.outputs)
        self.call = self.session.run
        self.mine = self.stats.local


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


class Model:
    """A named model as the application sees it: always the release that serves now."""

    def __init__(self, name: str, slot: Slot) -> None:
        self.name = name
        self._slot = slot

    def __repr__(self) -> str:
        return f"<Model {self.name}: {self.release or 'nothing installed'}>"

    @property
    def release(self) -> ReleasePath | None:
        loaded = self._slot.now()
        return loaded.path if loaded else None

    @property
    def stats(self) -> Counts:
        """Counts of the release that serves, since it was loaded."""
        loaded = self._slot.now()
        return loaded.stats.counts() if loaded else Counts()

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        loaded = self._slot.now()
        return loaded.schema.inputs if loaded else {}

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        loaded = self._slot.now()
        return loaded.schema.outputs if loaded else {}

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a release is installed; a new device has none before its first update."""
        return self._slot.wait(timeout)

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Infer. Arrays by tensor name, in and out; `outputs` picks some, default all.

        Raises NoModelError (nothing installed; ModelStoppedError: nothing may run), InputError (not what the model
        takes), ModelError (the model failed), and with `swap="unload-first"` HeldError (it is being swapped).
        """
        slot = self._slot  # every line from here on is paid for by each inference: no lock, one read of `current`
        loaded = slot.current
        if loaded is None and (loaded := slot.now(patient=True)) is None:
            raise slot.nothing(self.name)
        try:
            cell = loaded.mine.cell
        except AttributeError:
            cell = loaded.stats.register()
        calls = cell.calls + 1
        started = 0 if calls & loaded.check_mask else perf_counter_ns()
        names = loaded.names if outputs is None else outputs
        try:
            values = loaded.call(names, inputs)
        except Exception as error:  # noqa: BLE001  onnxruntime has no base class
            failure = _failure(slot, loaded, inputs, outputs, error)
            del loaded, slot  # the traceback, which the caller may keep, must not keep the release in memory
            raise failure from error.with_traceback(None)
        cell.calls = calls
        if started:
            _look(slot, loaded.stats, values, perf_counter_ns() - started)
        results = {names[0]: values[0]} if len(values) == 1 else dict(zip(names, values, strict=True))
        sampler = slot.sampler
        if sampler is not None and decide(random(), sampler.rate):  # noqa: S311  no secret
            sampler.offer(loaded.path, inputs, results)
        return results

    def run_on(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> tuple[ReleasePath, dict[str, Array]]:
        """As `run`, and say which release answered: after a swap `release` may already be another."""
        self._slot.now(patient=True)
        pinned = self._slot.pinned()
        if pinned.current is None:
            raise pinned.nothing(self.name)
        path = pinned.current.path
        try:
            return path, Model(self.name, pinned).run(inputs, outputs)
        finally:
            pinned.current = pinned.previous = None  # an error that is kept must not keep the release in memory


def _nothing() -> None:
    return


def end_plainly() -> None:
    """In a forked child: end the process right after Python has ended, with the same status.

    onnxruntime's own clean-up at the end of a process waits for the parent's threads, for ever. glibc only: its
    `on_exit` calls with the status first, which is what `_exit` takes.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.on_exit(libc._exit, None)  # noqa: SLF001  the C function's name


def load(manifest: Manifest, *, sha256: str, entry: bytes | Path, options: RuntimeOptions) -> Loaded:
    """Make a session of a verified release and prove that it answers as its manifest says. Raises ModelError.

    `entry`: the verified bytes of the model file, or its path where external data lies beside it.
    """
    _warn_of_old_runtime()
    session = _make_session(entry, options)
    schema = Schema(_specs(session.get_inputs()), _specs(session.get_outputs()))
    _check_signed(schema.inputs, manifest.inputs, "input")
    _check_signed(schema.outputs, manifest.outputs, "output")
    _warm_up(session, schema, manifest)
    return Loaded(sha256=sha256, path=manifest.path, session=session, schema=schema)


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
    _trim()
    return clean


def _look(slot: Slot, stats: Stats, values: Sequence[Any], elapsed: int) -> None:
    """Time a call and look at what it gave: each call in probation, one in so many later."""
    stats.recent.append(elapsed)
    cell = stats.cell()
    cell.checked += 1
    if not all(map(_is_valid, values)):
        cell.invalid += 1
        slot.alarm()


def _failure(
    slot: Slot, loaded: Loaded, inputs: Mapping[str, Any], outputs: Sequence[str] | None, error: Exception
) -> Exception:
    """Whose fault was it? Only then is the call checked against the schema: a good call pays nothing for it.

    A release on trial that refuses what its predecessor took is at fault itself.
    """
    cell = loaded.stats.cell()
    unknown = [name for name in outputs or () if name not in loaded.schema.outputs]
    complaint = loaded.schema.complaint(inputs) or (unknown and f"unknown output {unknown[0]!r}")
    previous = slot.previous
    if complaint and (previous is None or previous.schema.complaint(inputs)):
        cell.rejected += 1
        return InputError(f"{loaded.path}: {complaint}")
    cell.calls += 1
    cell.errors += 1
    slot.alarm()
    return ModelError(f"{loaded.path}: {complaint or _first_line(error)}")


def _is_valid(value: Any) -> bool:
    """Whether an output is there and finite. A dot product is one pass and not finite if any element is not."""
    if not isinstance(value, np.ndarray):
        return value is not None and (not hasattr(value, "__len__") or len(value) > 0)
    if value.size == 0:
        return False
    if value.dtype.kind != "f":
        return True
    if value.size <= _SMALL and math.isfinite(np.vdot(value, value)):
        return True
    return bool(np.isfinite(value).all())


def _make_session(entry: bytes | Path, options: RuntimeOptions) -> Any:
    source: bytes | str = entry if isinstance(entry, bytes) else str(entry)
    try:
        return onnxruntime.InferenceSession(source, options.make(), providers=list(options.providers))
    except Exception as error:
        code = MEMORY_LIMIT if is_starved(str(error) or repr(error)) else "load_failed"
        raise ModelError(f"does not load: {_first_line(error)}", code=code) from error


def _specs(arguments: Sequence[Any]) -> dict[str, TensorSpec]:
    """What a session says of its tensors. Kinds other than tensors (sequences, maps) keep onnxruntime's word."""
    return {
        argument.name: TensorSpec(argument.name, _dtype(argument.type), tuple(argument.shape or ()))
        for argument in arguments
    }


def _dtype(name: str) -> str:
    """`tensor(float)`, `float` and `float32` are one thing: numpy's name."""
    bare = name.removeprefix("tensor(").removesuffix(")") if name.startswith("tensor(") else name
    return _DTYPES.get(bare, bare)


def _check_signed(found: Mapping[str, TensorSpec], signed: Sequence[TensorSpec], what: str) -> None:
    """The session must be what the manifest promised. A manifest that lists no tensors promises nothing."""
    if not signed:
        return
    if set(found) != {spec.name for spec in signed}:
        names = sorted(spec.name for spec in signed)
        raise ModelError(f"{what}s: the manifest says {names}; the model has {sorted(found)}", code="schema")
    for spec in signed:
        real = found[spec.name]
        ranks_differ = spec.shape and real.shape and len(spec.shape) != len(real.shape)
        if _dtype(spec.dtype) != real.dtype or ranks_differ:
            raise ModelError(f"{what}: the manifest says {_shown(spec)}; the model has {_shown(real)}", code="schema")


def _warm_up(session: Any, schema: Schema, manifest: Manifest) -> None:
    """Run twice on zeros: the first call costs double, and a model that cannot answer is found out here.

    Where a shape leaves sizes open (beyond the batch axis) we invent them, and a failure proves nothing.
    """
    signed = {spec.name: spec.shape for spec in manifest.inputs}
    shapes = {name: signed.get(name) or spec.shape for name, spec in schema.inputs.items()}
    invented = any(not isinstance(size, int) for shape in shapes.values() for size in shape[1:])
    problem = ""
    for size in _PROBE_SIZES if invented else _PROBE_SIZES[:1]:
        feeds = _zeros(schema, shapes, size)
        if feeds is None:
            break
        try:
            session.run(None, feeds)
            _check_outputs(schema, session.run(None, feeds))
            return
        except ModelError:
            raise
        except Exception as error:
            problem = _first_line(error)
            if is_starved(str(error) or repr(error)):  # whatever the sizes: what it asks for is not to be had
                raise ModelError(f"does not answer: {problem}", code=MEMORY_LIMIT) from error
    if problem and not invented:
        raise ModelError(f"does not answer: {problem}", code="test_failed")
    log.warning("%s could not be warmed up with invented sizes: %s", manifest.path, problem or "no plain tensors")


def _zeros(schema: Schema, shapes: Mapping[str, Sequence[Any]], size: int) -> dict[str, Array] | None:
    feeds = {}
    for name, spec in schema.inputs.items():
        shape = [dim if isinstance(dim, int) and dim >= 0 else size for dim in shapes[name]]
        if spec.dtype not in _DTYPES.values() or math.prod(shape) > _PROBE_ELEMENTS:
            return None
        feeds[name] = np.full(shape, "", dtype=object) if spec.dtype == "object" else np.zeros(shape, spec.dtype)
    return feeds


def _check_outputs(schema: Schema, values: Sequence[Any]) -> None:
    for spec, value in zip(schema.outputs.values(), values, strict=True):
        if isinstance(value, np.ndarray) and spec.dtype in _DTYPES.values() and spec.dtype != "object":
            problem = _mismatch(spec, value, what="output")
            if problem:
                raise ModelError(problem, code="test_failed")


def _mismatch(spec: TensorSpec, value: Any, what: str = "input") -> str:
    if spec.dtype not in _DTYPES.values():
        return ""
    if not isinstance(value, np.ndarray):
        return f"{what} {spec.name!r}: expected a numpy array, {_shown(spec)}; got {type(value).__name__}"
    same = value.dtype.name == spec.dtype or (spec.dtype == "object" and value.dtype.kind in "OUST")
    fits = not spec.shape or (
        len(spec.shape) == value.ndim
        and all(not isinstance(d, int) or d == size for d, size in zip(spec.shape, value.shape, strict=True))
    )
    if same and fits:
        return ""
    return f"{what} {spec.name!r}: expected {_shown(spec)}; got {value.dtype.name} {list(value.shape)}"


def _shown(spec: TensorSpec) -> str:
    sizes = ", ".join("?" if size is None else str(size) for size in spec.shape)
    return f"{spec.name}: {_dtype(spec.dtype)} [{sizes}]"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def is_starved(text: str) -> bool:
    """Whether an error of onnxruntime's says that it got no memory. It has no class for that."""
    return any(mark in text for mark in _STARVED)


def _warn_of_old_runtime() -> None:
    if older(RUNTIME, GIL_FREE_LOAD):
        log.warning(
            "onnxruntime %s holds the GIL while it loads a model: calls stall during an update. Install %s or newer.",
            RUNTIME, GIL_FREE_LOAD,
        )  # fmt: skip


def _trim() -> None:
    """Give freed memory back to the system; glibc keeps a retired model's pages otherwise."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        return
