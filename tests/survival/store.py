"""The drill's tables of the store: kills, kills in the recovery, power losses, failing disks, mutants, a switch."""

import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from device_sdk.store import Store
from tests.survival import disk, matrix, mutants
from tests.survival.matrix import MODEL, NEW, NEW_BLOBS, OLD, OLD_BLOBS
from tests.survival.outcome import Line, Step, Table, Tried, in_memory

LEAST = {"nested": 1_000, "losses": 300, "fsync mutants": 4}  # shared/BARS.md
SWITCHES, SWITCH_MS, OVER_DISK = 40, 5.0, 1.5  # idle it takes 0.9 ms, of which two thirds are the disk's
SHOWN = 5  # of broken promises


def tables(folder: Path, step: Step) -> Iterator[Table]:
    with in_memory() as memory:
        yield from _matrix(memory, step)
    yield _small(folder / "small", step)
    yield _switch(folder / "switch", step)


def _matrix(folder: Path, step: Step) -> Iterator[Table]:
    killed, operations = zip(*matrix.kills(folder / "kills", step=step), strict=True)
    yield table("Store: killed at every operation", killed, "before it, in the middle of each write, after the last")
    yield _by_operation(operations)
    nested = list(matrix.nested(folder / "nested", step=step))
    yield table("Store: killed, and again in the recovery", nested, "at each operation of it", LEAST["nested"])
    lost = list(matrix.losses(folder / "losses", step=step))
    what = "unsynced names lost or reordered, unsynced bytes lost, zeroed or torn; states that differ"
    yield table("Store: power lost", lost, what, LEAST["losses"])
    failed = list(matrix.failures(folder / "failures", step=step))
    yield table("Store: disk full, failing or read-only, from any operation", failed, "told, served, then resumed")
    yield _mutants(folder / "mutants", step)


def table(title: str, found: Sequence[Tried], note: str, least: int = 0) -> Table:
    lines = [
        Line((each.what, str(each.count), said(each.outcomes), str(len(each.broken))), not each.broken, why(each))
        for each in found
    ]
    total = sum(each.count for each in found)
    bar = f", at least {least:,}" if least else ""
    lines.append(Line(("all", f"{total:,}{bar}", "", str(sum(len(e.broken) for e in found))), total >= least))
    return Table(title, ("course", "cut points", "found afterwards", "broken promises"), lines, [note])


def _by_operation(courses: tuple[list[str], ...]) -> Table:
    counts = Counter(name for names in courses for name in names)
    lines = [Line((name, str(count))) for name, count in sorted(counts.items())]
    return Table("Store: the operations that were cut", ("operation", "times in the courses"), lines)


def _mutants(folder: Path, step: Step) -> Table:
    found = list(mutants.notices(folder, step=step))
    lines = [Line((name, f"{broken:,}"), broken > 0) for name, broken in found]
    syncs = sum("sync" in name for name, broken in found if broken)
    lines.append(Line(("fsync mutants noticed", f"{syncs}, at least 4"), syncs >= LEAST["fsync mutants"]))
    return Table("Store: precautions taken out, one by one", ("mutant", "promises seen broken"), lines)


def _small(folder: Path, step: Step) -> Table:
    step("a small real disk")
    folder.mkdir()
    found, missing = disk.tried(folder)
    title = f"Store: a tmpfs of {disk.SIZE >> 20} MiB that is filled up to so many pages, and one remounted read-only"
    if missing:
        return Table(title, ("not tried on this machine",), [Line((missing,))])
    return table(title, found, "an update by a store whose errors are the kernel's")


def _switch(folder: Path, step: Step) -> Table:
    """With real fsyncs, beside the same bytes written by hand: the disk's share is not ours to shorten."""
    step("a state switch, with real fsyncs")
    store = Store(folder / "store")
    shas = [matrix.install(store, OLD, OLD_BLOBS), matrix.install(store, NEW, NEW_BLOBS)]
    ours, disks = [], []
    data = (folder / "store" / "state.json").read_bytes()
    for number in range(SWITCHES):
        began = time.perf_counter()
        store.begin_trial(MODEL, shas[number % 2])
        between = time.perf_counter()
        _replace(folder / "plain.json", data)
        ours.append((between - began) * 1e3)
        disks.append((time.perf_counter() - between) * 1e3)
    ms, disk = statistics.median(ours), statistics.median(disks)
    bar = f"<= {SWITCH_MS:g} ms, or <= x {OVER_DISK:g} of what the disk takes"
    line = Line(("median of a switch", f"{ms:.2f} ms", f"{disk:.2f} ms", bar), ms <= max(SWITCH_MS, OVER_DISK * disk))
    return Table("Store: one state switch", ("", "ours", "the same bytes by hand", "bar"), [line])


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def said(outcomes: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in outcomes.most_common())


def why(tried: Tried) -> tuple[str, ...]:
    return tuple(tried.broken[:SHOWN])
