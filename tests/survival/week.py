"""A week of virtual time in seconds: what a device keeps, holds open and says must not grow with its age.

Every day is alike: releases that are kept and releases that are rolled back, hours without a server, an hour of forged
views, an hour of being turned away, samples that nobody takes for days, and a restart. So what a day leaves behind,
the next must not add to.
"""

import gc
import inspect
import json
import logging
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper

from device_sdk.client import Fleet
from device_sdk.errors import TransferError, UnauthorizedError
from device_sdk.protocol.assignment import Sampling
from device_sdk.protocol.manifest import Manifest, digest
from device_sdk.protocol.polls import EVENTS, POLL
from tests.sdk.world import QUICK, World, graph
from tests.simulator import DAY
from tests.survival.outcome import Line, Step, Table, in_memory

HOUR = DAY // 24
MODEL = "detector"
SPOOL = 32 * 1024  # bytes
PAD = 50_000  # bytes of each release, so that a forgotten one would be seen
X = {"x": np.arange(4, dtype=np.float32).reshape(1, 4)}
# Hours of a day in which something is wrong, and on which days uploads fail.
GONE, FORGED, AWAY, FAILING_UPLOADS = range(2, 5), range(14, 15), range(20, 21), range(1, 4)
LOGGED_A_DAY = 1_500  # lines
LEAKED = 256 * 1024  # bytes of traced memory that a week may add: what python's own caches take


@dataclass(frozen=True)
class Evening:
    """A device at the end of a day. `marks`: of releases that were rejected, which are to be kept."""

    day: int
    polls: int
    updates: int
    rollbacks: int
    files: int
    marks: int
    kept: int  # bytes on disk
    spooled: int
    threads: int
    descriptors: int
    lines: int  # of the log, this day
    traced: int  # bytes


@dataclass
class Life:
    """A device and its server, and what went by."""

    world: World
    poll_seconds: int
    fleet: Fleet = field(init=False)
    polls: int = 0
    updates: int = 0
    rollbacks: int = 0
    releases: list[tuple[str, Manifest]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    most_spooled: int = 0

    def __post_init__(self) -> None:
        self.world.server.interval = str(self.poll_seconds)
        self.open()

    def open(self) -> None:
        self.fleet = self.world.open(
            spool_bytes=SPOOL, poll_seconds=self.poll_seconds, upload_seconds=float(HOUR),
            on_update=lambda *_: self._count("updates"), on_rollback=lambda *_: self._count("rollbacks"),
        )  # fmt: skip
        self.fleet.model(MODEL)

    def _count(self, what: str) -> None:
        setattr(self, what, getattr(self, what) + 1)

    def live(self, day: int) -> None:
        """One day, from midnight to midnight."""
        for hour in range(24):
            self._happen(day, hour)
            for second in range(0, HOUR, self.poll_seconds):
                self._fail(day, hour)
                self._go_on(is_new_hour=second == 0)
            self._look()
        self.fleet.stop()
        self.open()
        self._go_on(is_new_hour=True)

    def _happen(self, day: int, hour: int) -> None:
        """Releases at midnight and noon are good, those at six are not."""
        server = self.world.server
        if hour % 6 == 0 or hour in FORGED or hour - 1 in FORGED:
            server.renew()
        if hour in FORGED:
            server.current = server.simulator.copy().bundle(director_key="thief")
        if hour % 6 == 0:
            path = f"{MODEL}/{day}.{hour}.0/default"
            manifest = server.publish(path, padded(day * 24 + hour + 1.0, is_bad=hour % 12 == 6))
            self.releases.append((path, manifest))
            while len(self.releases) > 4:
                self._withdraw(*self.releases.pop(0))
            expires = server.simulator.now + 30 * DAY
            server.assign(manifest, sampling=Sampling("week", 0.5, 500, expires), probation=QUICK)

    def _withdraw(self, path: str, manifest: Manifest) -> None:
        """CI lists it no more, and the server of the test forgets it."""
        simulator = self.world.server.simulator
        simulator.withdraw(path)
        del simulator.manifests[digest(manifest.to_bytes())]
        for file in manifest.files:
            del simulator.blobs[file.sha256]

    def _fail(self, day: int, hour: int) -> None:
        """What the server answers the next requests with."""
        server = self.world.server
        error: Exception | None = None
        if hour in GONE:
            error = TransferError("gone")
        elif hour in AWAY:
            error = UnauthorizedError("not known", status=401)
        server.faults = {POLL: [error], EVENTS: [error]} if error else {}
        if day in FAILING_UPLOADS:
            server.faults["/api/device/v1/batches"] = [TransferError("busy", status=503)] * 10

    def _go_on(self, *, is_new_hour: bool) -> None:
        """A poll, its consequences, some inferences, and the time that goes by."""
        worker = self.fleet._worker
        assert worker is not None
        worker._poll_step()
        worker.install()
        self.fleet.model(MODEL).run(X)
        while self.fleet._store.state(MODEL).trial:
            self.fleet.model(MODEL).run(X)
            worker.install()
        if is_new_hour:
            worker._upload_step()
        worker.spool.drain()
        self.most_spooled = max(self.most_spooled, worker.spool.size())
        self.polls += self.world.server.calls.count(f"GET {POLL}")
        self._forget()
        self.world.server.simulator.now += self.poll_seconds
        self.world.time.seconds += self.poll_seconds
        self.world.time.second_of_day = (self.world.time.second_of_day + self.poll_seconds) % DAY

    def _forget(self) -> None:
        """What the server of the test keeps is no device's memory."""
        server = self.world.server
        for kept in (server.calls, server.tags, server.posts, server.batches, server.contents):
            kept.clear()  # type: ignore[attr-defined]

    def _look(self) -> None:
        """What it runs and what it would fall back to are here, whatever was thrown away."""
        state = self.fleet._store.state(MODEL)
        for sha in state.kept:
            if not self.fleet._store.has(sha):
                self.broken.append(f"a file of {sha[:8]}, which may be needed, is gone")


def padded(factor: float, *, is_bad: bool) -> bytes:
    """A release that answers `factor` times x, or nothing that is a number."""
    pad = np.random.default_rng(int(factor)).integers(0, 256, PAD, np.uint8)
    if is_bad:
        nodes = [helper.make_node("Sub", ["x", "k"], ["d"]), helper.make_node("Sqrt", ["d"], ["y"])]
        return graph(nodes, {"k": np.float32(1_000 + factor), "pad": pad})
    return graph([helper.make_node("Mul", ["x", "k"], ["y"])], {"k": np.float32(factor), "pad": pad})


def evenings(
    folder: Path, *, days: int = 7, poll_seconds: int = 60, tell: Callable[[Evening], None] = lambda _: None
) -> "Week":
    """Live it, and look each evening."""
    life = Life(World(folder / "device"), poll_seconds)
    found: list[Evening] = []
    tracemalloc.start()
    try:
        with _counted() as log, _unsynced():
            for day in range(days):
                before = log.lines
                life.live(day)
                found.append(_look(life, day, log.lines - before))
                tell(found[-1])
    finally:
        tracemalloc.stop()
        life.fleet.stop()
    return Week(found, life.broken)


def _look(life: Life, day: int, lines: int) -> Evening:
    gc.collect()
    paths = [path for path in life.world.path.rglob("*") if path.is_file()]
    descriptors = list(Path("/proc/self/fd").iterdir())
    return Evening(
        day=day + 1, polls=life.polls, updates=life.updates, rollbacks=life.rollbacks, files=len(paths),
        marks=sum(path.suffix == ".bad" for path in paths), kept=sum(path.stat().st_size for path in paths),
        spooled=life.most_spooled, threads=threading.active_count(), descriptors=len(descriptors),
        lines=lines, traced=_traced(),
    )  # fmt: skip


def _traced() -> int:
    """Bytes that somebody holds, but for Python's own table of the names in paths. That is one block of megabytes, and
    takes another size whenever it likes: names that are gone have their place in it until then.
    """
    traces = tracemalloc.take_snapshot().filter_traces(_interning()).traces
    return sum(trace.size for trace in traces)


@cache
def _interning() -> list[tracemalloc.Filter]:
    module = sys.modules[PurePath.__module__]
    lines = enumerate(inspect.getsource(module).splitlines(), 1)
    return [tracemalloc.Filter(False, str(module.__file__), at) for at, line in lines if "sys.intern(" in line]


class _Counter(logging.Handler):
    lines = 0

    def emit(self, _: Any) -> None:
        self.lines += 1


@contextmanager
def _counted() -> Iterator[_Counter]:
    log, counter = logging.getLogger("device_sdk"), _Counter()
    before = log.level, log.propagate
    log.addHandler(counter)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield counter
    finally:
        log.removeHandler(counter)
        log.level, log.propagate = before


@contextmanager
def _unsynced() -> Iterator[None]:
    """Durability is another drill's business, and a week of syncs takes minutes."""
    sync = os.fsync
    os.fsync = lambda _: None
    try:
        yield
    finally:
        os.fsync = sync


@dataclass(frozen=True)
class Week:
    """`broken`: what was promised for every hour of it, and was not so."""

    evenings: list[Evening]
    broken: list[str]

    @classmethod
    def lived_apart(cls, poll_seconds: int, step: Step = lambda _: None) -> "Week":
        """In a process of its own: whatever else a process does is in its memory too."""
        command = [sys.executable, "-m", "tests.survival.week", str(poll_seconds)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            found: list[Evening] = []
            for line in process.stdout:
                said = json.loads(line)
                if "broken" in said:
                    return cls(found, said["broken"])
                found.append(Evening(**said))
                step(f"day {len(found)} is over")
        raise RuntimeError(f"the week ended with {process.returncode}")

    def grown(self) -> list[str]:
        """What is not as it was: of the last evening, beside the days before it on which as much was waiting."""
        early, last = self.evenings[1:4], self.evenings[-1]
        found = list(self.broken)
        for what in ("threads", "descriptors"):
            before, after = (getattr(each, what) for each in (self.evenings[0], last))
            found += [f"{what}: {before} at first, {after} at last"] * (after > before)
        if last.files - last.marks > max(each.files - each.marks for each in early):
            found.append(f"files: {last.files}, {last.marks} of them marks of rejected releases")
        if last.kept > max(each.kept for each in early):
            found.append(f"bytes on disk: {last.kept:,}")
        if last.traced > early[0].traced + LEAKED:
            found.append(f"traced memory: {early[0].traced:,} and {last.traced:,}")
        found += [f"day {e.day}: {e.lines} lines of log" for e in self.evenings if e.lines > LOGGED_A_DAY]
        if last.spooled > 1.1 * SPOOL:
            found.append(f"spool: {last.spooled:,} bytes")
        return found


def tables(_: Path, step: Step) -> Iterator[Table]:
    lived = Week.lived_apart(60, step)
    lines = [
        Line((
            str(e.day), f"{e.polls:,}", str(e.updates), str(e.rollbacks), f"{e.files - e.marks} + {e.marks}",
            f"{e.kept:,}", f"{e.spooled:,}", str(e.threads), str(e.descriptors), str(e.lines), f"{e.traced / 1e6:.2f}",
        ))
        for e in lived.evenings
    ]  # fmt: skip
    grown = lived.grown()
    lines.append(Line(("no growth", *[""] * 10), not grown, tuple(grown)))
    columns = (
        "day", "polls", "updates", "rolled back", "files + bad marks", "bytes on disk", "most spooled", "threads",
        "descriptors", "log lines", "traced MB",
    )  # fmt: skip
    yield Table("A week of virtual time, each day alike", columns, lines, [NOTE])


NOTE = (
    "A day: two releases kept and two rolled back, three hours without the server, one of forged views, one of being "
    "turned away; uploads fail from the second day to the fourth. What is counted over the week stands for all of it."
)


def main(poll_seconds: int) -> None:
    onnxruntime.set_default_logger_severity(3)
    with in_memory() as folder:
        lived = evenings(folder, poll_seconds=poll_seconds, tell=lambda each: _say(asdict(each)))
    _say({"broken": lived.broken})


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
