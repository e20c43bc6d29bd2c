"""What a process holds before, during and after a hundred swaps under load: memory, threads, open files.

`python -m deploy.bench.plateau FOLDER LAYER SWAPS` prints it as JSON: a process of its own, so that its memory is too.
"""

import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from deploy.bench import models
from deploy.bench.measure import Row, Scale, Section, memory
from deploy.bench.swap import Device, Load

THREADS = 2
WARM = 10  # swaps, after which nothing is new: the allocator's arenas and onnxruntime's pools have their size
FLAT = 0.25  # of the model's size, that the rest of the swaps may add


@dataclass(frozen=True, slots=True)
class Held:
    """`resident`: MB. `calls` and `failed`: since the beginning."""

    swaps: int
    resident: float
    threads: int
    files: int
    calls: int
    failed: int


@dataclass(frozen=True, slots=True)
class Plateau:
    """Before the first swap, after the warm-up, the most of anything in between, and after the last."""

    model: float  # MB
    before: Held
    warm: Held
    during: Held
    after: Held

    @property
    def added(self) -> float:
        """MB that the swaps after the warm-up added; 0 where they added none."""
        return max(self.after.resident - self.warm.resident, 0.0)

    @property
    def is_flat(self) -> bool:
        same = (self.after.threads, self.after.files) == (self.before.threads, self.before.files)
        return same and self.added <= FLAT * self.model and not self.after.failed


def measure(folder: Path, scale: Scale) -> Section:
    found = run(folder, scale.layer, scale.hundred)
    after, before = found.after, found.before
    swaps = f"after {after.swaps} swaps under load"
    bar = f"<= {FLAT:g} x the model added"
    return Section(
        f"Memory, threads and files over {after.swaps} swaps of a model of {found.model:.1f} MB",
        [
            Row(f"resident, {swaps}", after.resident, "MB", found.warm.resident, f"after {found.warm.swaps} swaps",
                bar, found.added <= FLAT * found.model, difference=True),
            Row("resident, the most in between", found.during.resident, "MB", before.resident, "before the first",
                difference=True),
            Row(f"threads, {swaps}", after.threads, "threads", before.threads, "before the first", "+0",
                after.threads == before.threads, difference=True),
            Row(f"open files, {swaps}", after.files, "files", before.files, "before the first", "+0",
                after.files == before.files, difference=True),
            Row("calls meanwhile", after.calls, "calls", after.swaps, "swaps", f"0 failed, got {after.failed}",
                not after.failed),
        ],
        [f"{THREADS} threads call without a pause. Weights as external data; hashed, loaded, switched, judged, freed."],
    )  # fmt: skip


def run(folder: Path, layer: int, swaps: int) -> Plateau:
    command = [sys.executable, "-m", "deploy.bench.plateau", str(folder), str(layer), str(swaps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2_000:])
    said = json.loads(done.stdout)
    return Plateau(said.pop("model"), **{name: Held(**each) for name, each in said.items()})


def _swap(folder: Path, layer: int, swaps: int) -> Plateau:
    releases = [models.medium(layer, seed) for seed in range(2)]
    size = sum(map(len, releases[0].values())) / 2**20
    device = Device(folder, releases)
    del releases
    feeds = {"x": np.ones((1, layer), np.float32)}
    device.begin()
    load = Load(lambda: device.model.run(feeds))
    with load.on(THREADS):
        device.finish()
        before = warm = most = _held(load, 0)
        for number in range(1, swaps + 1):
            device.swap()
            now = _held(load, number)
            most = Held(number, *(max(getattr(most, name), getattr(now, name)) for name in Held.__slots__[1:]))
            warm = now if number <= min(WARM, swaps) else warm
        after = _held(load, swaps)
    return Plateau(size, before, warm, most, after)


def _held(load: Load, swaps: int) -> Held:
    gc.collect()
    load.forget()
    threads = len(list(Path("/proc/self/task").iterdir()))
    files = len(list(Path("/proc/self/fd").iterdir()))
    return Held(swaps, memory(), threads, files, load.count, load.errors)


if __name__ == "__main__":
    place, width, number = sys.argv[1:]
    sys.stdout.write(json.dumps(asdict(_swap(Path(place), int(width), int(number)))))
