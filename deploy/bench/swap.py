"""What callers feel while a release is swapped under them: the real installer, from hashing to retiring the old one."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from deploy.bench import models
from deploy.bench.measure import Row, Scale, Section, forget_peak, memory, percentile
from device_sdk.download import Fetched
from device_sdk.install import Clock, Installer, Parts
from device_sdk.journal import Journal
from device_sdk.ledger import Ledger
from device_sdk.model import Model
from device_sdk.probes import Probes
from device_sdk.protocol.assignment import Assignment, Probation
from device_sdk.protocol.manifest import Manifest
from device_sdk.runtime import RuntimeOptions
from device_sdk.store import Store
from device_sdk.traffic import Traffic

WORST = 50.0  # ms
QUICK = Probation(calls=5, seconds=0.0)
ONE_THREAD = RuntimeOptions(intra_op_threads=1)
LOADS = (  # last: p99's limit
    ("1 thread at half load", 1, 1.0, 2), ("1 thread", 1, 0.0, 3), ("2 threads", 2, 0.0, 3), ("4 threads", 4, 0.0, 3),
)  # fmt: skip
NOTES = (
    "Wall time of calls.",
    "During a swap: hash, load, warm up, switch, publish, probation of 5 calls, until the old release is freed.",
    "Steady and control: no swap, in the same run; the control's windows are as long as the swaps.",
    "The naive way stops, loads and starts, and hashes nothing; its windows are shorter than ours.",
)
Span = tuple[float, float]


@dataclass
class Load:
    """Threads that call without a pause, or at `rest` times the length of a call. Counts what went wrong."""

    call: Callable[[], object]
    rest: float = 0.0
    calls: list[Span] = field(default_factory=list)  # append is atomic
    errors: int = 0
    forgotten: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def on(self, threads: int) -> Iterator["Load"]:
        workers = [threading.Thread(target=self._work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        try:
            yield self
        finally:
            self._ended.set()
            for worker in workers:
                worker.join()

    def _work(self) -> None:
        while not self._ended.is_set():
            started = time.perf_counter()
            try:
                self.call()
            except Exception:  # noqa: BLE001  whatever it is, a caller saw it
                self.errors += 1
            ended = time.perf_counter()
            self.calls.append((started, ended))
            if self.rest:
                time.sleep((ended - started) * self.rest)

    @property
    def count(self) -> int:
        return self.forgotten + len(self.calls)

    def forget(self) -> None:
        """Keep the number of the calls, and not each of them: in a long run they would be what grows."""
        count = len(self.calls)
        del self.calls[:count]
        self.forgotten += count

    def during(self, windows: list[Span]) -> list[float]:
        """Milliseconds of each call that was under way in one of the windows."""
        return [(b - a) * 1e3 for a, b in self.calls if any(a < end and b > start for start, end in windows)]


@dataclass(frozen=True, slots=True)
class Verified:
    assignment: Assignment
    manifest: Manifest
    manifest_bytes: bytes
    listed: frozenset[str] | None = None  # whatever it is, CI lets it run


class Device:
    """One model's installer with both releases in its store: nothing is left out but the network."""

    def __init__(self, folder: Path, releases: list[dict[str, bytes]]) -> None:
        self.store = Store(folder / "store")
        self.signed = [models.put(self.store, f"1.{n}.0", files) for n, files in enumerate(releases)]
        journal = Journal(folder / "progress.json", None, now=time.time)
        parts = Parts(
            "bench",
            "0",
            self.store,
            journal,
            fetch=lambda *_: Fetched(),
            probes=Probes({}, disk=self.store.free_bytes),
            traffic=Traffic(None),
            ledger=Ledger(folder / "ledger.json"),
            options=ONE_THREAD,
            clock=Clock(),
        )
        self.installer = Installer(models.MODEL, parts)
        self.model = Model(models.MODEL, self.installer.slot)
        self._turn = 0

    def begin(self) -> None:
        """Have the next release installed, on trial."""
        sha, signed = self.signed[self._turn % 2]
        self._turn += 1
        assignment = Assignment(
            models.MODEL, signed.path, len(signed.to_bytes()), sha, rollout=str(self._turn), probation=QUICK
        )
        self.installer.latest = Verified(assignment, signed, signed.to_bytes())
        self.installer.pursue()

    def swap(self) -> None:
        """The next release, until it is committed and the one before is freed."""
        self.begin()
        self.finish()

    def finish(self) -> None:
        """Pass the probation, which needs callers."""
        while self.store.state(models.MODEL).trial:
            time.sleep(0.005)
            self.installer.pursue()


class Naive:
    """Stop, load, start: calls wait while the model is away."""

    def __init__(self, folder: Path, releases: list[dict[str, bytes]]) -> None:
        self._paths = [_write(folder / str(number), files) for number, files in enumerate(releases)]
        self._lock = threading.Lock()
        self._turn = 0
        self._session: Any = None

    def run(self, feeds: dict[str, Any]) -> object:
        with self._lock:
            return self._session.run(None, feeds)

    def swap(self) -> None:
        with self._lock:
            self._session = None
            self._session = onnxruntime.InferenceSession(str(self._paths[self._turn % 2]), ONE_THREAD.make())
        self._turn += 1
        time.sleep(0.02)  # the call that waited for the lock belongs to the swap


@dataclass(frozen=True, slots=True)
class Felt:
    """Windows of one run under load, and what callers felt in them."""

    steady: list[float]
    control: list[float]
    swapping: list[float]
    errors: int


def measure(folder: Path, scale: Scale) -> Section:
    width = int(scale.layer * models.LARGER)  # the bars are for a model of some 90 MB
    releases = [models.medium(width, seed) for seed in range(2)]
    size = sum(map(len, releases[0].values())) / 2**20
    feeds = {"x": np.ones((1, width), np.float32)}
    device, naive = Device(folder / "device", releases), Naive(folder / "naive", releases)
    device.begin()
    with Load(lambda: device.model.run(feeds)).on(1):
        device.finish()
        device.swap()
    peak = _peak(device, feeds, size)  # before the naive way, which leaves freed memory about that a swap would reuse
    naive.swap()
    rows = []
    for name, threads, rest, limit in LOADS:
        felt = _under_load(Load(lambda: device.model.run(feeds), rest), threads, device.swap, scale.swaps)
        beside = _under_load(Load(lambda: naive.run(feeds), rest), threads, naive.swap, scale.swaps)
        rows += _rows(name, felt, beside, limit)
    return Section(f"Hot swap of a model of {size:.0f} MB, weights as external data", [*rows, peak], NOTES)


def _under_load(load: Load, threads: int, swap: Callable[[], None], swaps: int) -> Felt:
    steady, control, swapping = [], [], []
    with load.on(threads):
        for _ in range(swaps):
            steady.append(_window(lambda: time.sleep(0.3)))
            swapping.append(_window(swap))
            start, end = swapping[-1]
            control.append(_window(lambda length=end - start: time.sleep(length)))
    return Felt(load.during(steady), load.during(control), load.during(swapping), load.errors)


def _window(action: Callable[[], object]) -> Span:
    started = time.perf_counter()
    action()
    return started, time.perf_counter()


def _rows(name: str, felt: Felt, naive: Felt, limit: int) -> list[Row]:
    half, p99, worst = (percentile(felt.swapping, percent) for percent in (50, 99, 100))
    half0, p990 = (percentile(felt.steady, percent) for percent in (50, 99))
    control, worst0 = percentile(felt.control, 99), percentile(felt.control, 100)
    failed, calls = f"0 failed, got {felt.errors}", len(felt.swapping)
    away = percentile(naive.swapping, 100)
    return [
        Row(f"{name}: p50 during swaps", half, "ms", half0, "steady p50", "<= 1.1 x", half <= 1.1 * half0),
        Row(f"{name}: p99 during swaps", p99, "ms", p990, "steady p99", f"<= {limit} x", p99 <= limit * p990),
        Row(f"{name}: p99 of the control", control, "ms", p990, "steady p99"),
        Row(f"{name}: worst during swaps", worst, "ms", worst0, "control's worst", f"<= {WORST:g} ms", worst <= WORST),
        Row(f"{name}: worst, stop-load-start", away, "ms", worst, "our worst"),
        Row(f"{name}: calls during swaps", calls, "calls", len(felt.control), "control", failed, not felt.errors),
    ]  # fmt: skip


def _peak(device: Device, feeds: dict[str, Any], size: float) -> Row:
    """Peak memory that one swap needs beyond what the process holds before. Two layers: while the second is packed, the
    first is, and the second lies mapped beside its packed form, which makes 1.50 times the files.
    """
    with Load(lambda: device.model.run(feeds)).on(1):
        before = memory()
        forget_peak()
        device.swap()
        extra = max(memory("VmHWM") - before, 0.01)
    met = round(extra / size, 2) <= 1.5
    return Row("extra peak memory of a swap", extra, "MB", size, "the model's files", "<= 1.5 x", met)


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / "model.onnx"
