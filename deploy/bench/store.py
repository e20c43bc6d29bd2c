"""What it costs to switch a device's state so that a power cut leaves the old or the new."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from deploy.bench import models
from deploy.bench.measure import Row, Scale, Section, percentile
from device_sdk.store import Store

LIMIT = 5.0  # ms
NOTE = (
    "Wall time with real fsyncs: the ratio is ours, the rest the disk's, by its load. Trial and commit: two switches."
)


def measure(folder: Path, scale: Scale) -> Section:
    store = Store(folder / "device" / "store")
    pair = [models.put(store, f"1.{n}.0", {"model.onnx": models.small(n + 2.0)})[0] for n in range(2)]
    plain = folder / "plain.json"
    size = len(_state(store, pair[0]))
    switches, writes = [], []
    for number in range(scale.switches):
        switches.append(_ms(lambda at=number: _switch(store, pair[at % 2])) / 2)
        writes.append(_ms(lambda: _replace(plain, b"x" * size)))
    against = "the same bytes: write, fsync, rename, fsync of the directory"
    p50, p99 = statistics.median(switches), percentile(switches, 99)
    base50, base99 = statistics.median(writes), percentile(writes, 99)
    return Section("Store: one state switch (begin_trial, commit)", [
        Row("p50", p50, "ms", base50, against, f"<= {LIMIT:g} ms", p50 <= LIMIT),
        Row("p99", p99, "ms", base99, against),
    ], [NOTE])  # fmt: skip


def _state(store: Store, sha: str) -> bytes:
    _switch(store, sha)
    return (store._directory / "state.json").read_bytes()  # noqa: SLF001  its size is the baseline's


def _switch(store: Store, sha: str) -> None:
    store.begin_trial(models.MODEL, sha)
    store.commit(models.MODEL)


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)


def _ms(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3
