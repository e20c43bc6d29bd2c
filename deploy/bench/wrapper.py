"""What `model.run()` adds to a raw `session.run` of a call that costs microseconds."""

import time
from functools import partial
from pathlib import Path

from deploy.bench import models
from deploy.bench.measure import Row, Scale, Section, interleaved
from device_sdk import runtime
from device_sdk.model import Model
from device_sdk.protocol.assignment import Sampling
from device_sdk.protocol.manifest import digest
from device_sdk.runtime import RuntimeOptions
from device_sdk.slot import CHECK_EVERY, Loaded, Sampler, Slot
from device_sdk.spool import Spool

RATE = 0.01
SET_AT = 4.2  # us of the raw call where the bars were set; clocks differ, and one machine's from hour to hour
LIMITS = {"committed": 0.5, "committed, sampling 1 %": 2.0}
RAW = "session.run"


def measure(folder: Path, scale: Scale) -> Section:
    loaded = _load()
    spool = Spool(folder / "spool", device="bench", max_bytes=64 << 20)
    intake = spool.configure(models.MODEL, _sampling())
    calls = {
        RAW: partial(loaded.session.run, loaded.names, models.SMALL_INPUT),
        "committed": _call(loaded, CHECK_EVERY - 1),
        "committed, sampling 1 %": _call(loaded, CHECK_EVERY - 1, intake),
        "probation": _call(loaded, 0),
    }
    # The spool is emptied between the turns: its bounded inbox must not fill up, or taking a sample looks cheap.
    spent = interleaved(calls, rounds=scale.rounds, calls=scale.calls, clock=time.thread_time, between=spool.drain)
    raw = spent.pop(RAW)
    return Section("model.run() over session.run", [_row(name, us, raw) for name, us in spent.items()], [
        "CPU of the calling thread, on a model of four multiplications: the worst case for a wrapper.",
        f"Committed: one call in {CHECK_EVERY} is timed and its outputs looked at. Probation: every call is.",
        "Sampling: what the caller pays for the copy; the spool writes on a thread of its own.",
    ])  # fmt: skip


def _row(name: str, spent: float, raw: float) -> Row:
    limit = LIMITS.get(name)
    bar = f"<= {limit:g} us added to {SET_AT:g}" if limit else ""
    met = (spent - raw) / raw <= limit / SET_AT if limit else None
    return Row(name, spent, "us", raw, RAW, bar, met, difference=True)


def _load() -> Loaded:
    data = models.small()
    signed = models.manifest("1.0.0", {"model.onnx": data})
    options = RuntimeOptions(intra_op_threads=1)
    return runtime.load(signed, sha256=digest(signed.to_bytes()), entry=data, options=options)


def _call(loaded: Loaded, mask: int, sampler: Sampler | None = None) -> "partial[object]":
    """The same session behind a slot of its own, so that the ways to call it differ in nothing else."""
    slot = Slot()
    slot.sampler = sampler
    slot.publish(Loaded(loaded.sha256, loaded.path, loaded.session, loaded.schema, mask))
    return partial(Model(models.MODEL, slot).run, models.SMALL_INPUT)


def _sampling() -> Sampling:
    return Sampling(campaign="bench", rate=RATE, max_samples=1_000, expires=int(time.time()) + 86_400)
