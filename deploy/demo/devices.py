"""One process of the demonstration: a handful of devices, each the real SDK with a directory of its own.

Every device runs two models all the time and counts what happens to its calls. The counts are written to a file that
the demonstration reads. Nothing here knows of rollouts: it is what a device engineer would write, times n.
"""

import argparse
import json
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import numpy as np

from deploy.demo.training import Digits, field_frames, wine_measurements
from device_sdk import Fleet, NoModelError
from device_sdk.config import write_durably
from device_sdk.enrolment import enrol

SITES = ("berlin", "hamburg", "lyon")
HARDWARE = ("jetson", "rpi5", "x86")
FIRST_MODEL_DEADLINE = 60.0  # seconds for the first install


@dataclass
class Counts:
    """What became of the calls of one feed. `failed`: run() raised. `began`: of the call in flight, or 0."""

    attempted: int = 0
    answered: int = 0
    failed: int = 0
    invalid: int = 0  # answered with NaN: the release's fault, seen by probation
    slowest_ms: float = 0.0
    began: float = 0.0  # time.monotonic(), which all processes of a machine share
    error: str = ""
    serving: str = ""  # the release that answered last
    by_release: dict[str, int] = field(default_factory=dict)


class Feed(threading.Thread):
    """Calls one model of one device at a steady rate, as a camera loop does."""

    def __init__(self, fleet: Fleet, model: str, inputs: Iterator[dict[str, np.ndarray]], rate: float) -> None:
        super().__init__(daemon=True)
        self.model = fleet.model(model)
        self.inputs = inputs
        self.pause = 1 / rate
        self.counts = Counts()
        self.stopping = threading.Event()

    def run(self) -> None:
        if not self._wait_for_first_release():
            return
        while not self.stopping.wait(self.pause):
            self._call(next(self.inputs))

    def _wait_for_first_release(self) -> bool:
        deadline = time.monotonic() + FIRST_MODEL_DEADLINE
        while not self.stopping.wait(0.1):
            try:
                self.model.run(next(self.inputs))
                return True
            except NoModelError as error:
                if time.monotonic() > deadline:
                    self.counts.error = f"no release within {FIRST_MODEL_DEADLINE:g} s: {error}"
                    return False
        return False

    def _call(self, inputs: dict[str, np.ndarray]) -> None:
        counts = self.counts
        counts.attempted += 1
        counts.began = begin = time.monotonic()
        try:
            release, outputs = self.model.run_on(inputs)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is a failed call, and is counted as one
            counts.failed += 1
            counts.error = f"{type(error).__name__}: {error}"
            return
        finally:
            counts.began = 0.0
        counts.slowest_ms = max(counts.slowest_ms, (time.monotonic() - begin) * 1e3)
        counts.answered += 1
        counts.invalid += bool(np.isnan(outputs["probabilities"]).any())
        counts.serving = release.version
        counts.by_release[release.version] = counts.by_release.get(release.version, 0) + 1


def main() -> None:
    options = _options()
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    digits, wine = Digits.load(), wine_measurements()
    fleets, feeds = [], []
    for number in options.numbers:
        name = f"camera-{number:03d}"
        home = options.homes / name
        labels = {"site": SITES[number % 3], "hardware": HARDWARE[number // 3 % 3]}
        home.mkdir(parents=True, exist_ok=True)
        write_durably(home / "provision.json", options.provision.read_bytes())
        enrol(home, name, labels)
        fleet = Fleet.open(home, intra_op_threads=1, rehearsal_nice=0)  # thirty devices share this machine
        fleet.start()
        fleets.append(fleet)
        rng = np.random.default_rng(number)
        frames = field_frames(digits.field_images, rng)
        feeds.append(Feed(fleet, "digits", cycle({"image": frame[None]} for frame in frames), options.rate))
        rows = wine[rng.permutation(len(wine))]
        feeds.append(Feed(fleet, "wine", cycle({"measurements": row[None]} for row in rows), options.rate / 4))
    for feed in feeds:
        feed.start()
    while not stop.wait(0.5):
        _write(options.counters, feeds)
    for feed in feeds:
        feed.stopping.set()
    for feed in feeds:
        feed.join(timeout=10)
    _write(options.counters, feeds)
    for fleet in fleets:
        fleet.stop()


def _write(path: Path, feeds: list[Feed]) -> None:
    rows = [{**vars(feed.counts), "model": feed.model.name, "alive": feed.is_alive()} for feed in feeds]
    write_durably(path, json.dumps(rows).encode())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--homes", type=Path, required=True)
    parser.add_argument("--provision", type=Path, required=True)
    parser.add_argument("--counters", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=10.0, help="calls a second of each camera")
    parser.add_argument("numbers", type=int, nargs="+")
    return parser.parse_args()


if __name__ == "__main__":
    main()
