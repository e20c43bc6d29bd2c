"""A product that embeds the SDK, as a process: it infers all the time, and answers questions on standard input.

`python -m tests.attacks.host HOME MODEL [OPTIONS]`. OPTIONS is JSON, for `Fleet.open`; in it `exchange_seconds`
shortens the overall deadline of a poll, and `frames` is the number of differing inputs, over and over (one of ones).
One command a line, one line of JSON as the answer; the SDK's log goes to standard error. `status`: what runs and how
inference goes. `poll`: poll now; the code of the refusal, or "". `clock S`: the device's wall clock is S seconds off
from now on. `skip`: a back-off is over. End of input: stop.
"""

import json
import logging
import sys
import threading
import time
from itertools import cycle
from typing import Any

import numpy as np

from device_sdk import Fleet, install, worker
from device_sdk.errors import DeviceError
from device_sdk.install import Clock

NEVER = 3_600.0  # seconds: what failed is tried again when a test says `skip`, not when it happens to be time
PAUSE = 0.005  # between two inferences: often enough to see a gap, on a machine that does much else


class Host:
    def __init__(self, home: str, model: str, options: str = "{}") -> None:
        self.offset = self.skipped = 0.0
        install.FIRST_RETRY = NEVER
        clock = Clock(now=lambda: time.time() + self.offset, monotonic=lambda: time.monotonic() + self.skipped)
        chosen = json.loads(options)
        worker._DEADLINE = chosen.pop("exchange_seconds", worker._DEADLINE)
        many = chosen.pop("frames", 0)
        self.frames = np.random.default_rng(1).normal(size=(many, 1, 4)) if many else np.ones((1, 1, 4))
        # The server tells the real interval with its first answer.
        self.fleet = Fleet.open(home, poll_seconds=1.0, clock=clock, intra_op_threads=1, rehearsal_nice=0, **chosen)
        self.model = self.fleet.model(model)
        self.calls = 0
        self.failures: list[str] = []
        self.answer: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._infer)

    def run(self) -> None:
        with self.fleet:
            self.fleet.start()
            self._thread.start()
            try:
                for line in sys.stdin:
                    name, _, rest = line.strip().partition(" ")
                    sys.stdout.write(json.dumps(getattr(self, f"do_{name}")(rest)) + "\n")
                    sys.stdout.flush()
            finally:
                self._over.set()
                self._thread.join()

    def do_status(self, _: str) -> dict[str, Any]:
        return {
            "status": self.fleet.status().to_json(),
            "calls": self.calls,
            "failures": self.failures[:5],
            "answer": self.answer,
        }

    def do_poll(self, _: str) -> str:
        try:
            self.fleet.update_once()
        except DeviceError as error:
            return error.code
        return ""

    def do_clock(self, seconds: str) -> float:
        self.offset = float(seconds)
        return time.time() + self.offset

    def do_skip(self, _: str) -> float:
        self.skipped += 7_200.0
        return self.skipped

    def _infer(self) -> None:
        frames = cycle(self.frames.astype(np.float32))
        while not self._over.wait(PAUSE):
            if self.answer is None and self.model.release is None:
                continue  # a new device: nothing to run yet; later on, nothing to run is a failure
            try:
                self.answer = float(self.model.run({"x": next(frames)})["y"][0, 0])
            except Exception as error:  # noqa: BLE001  whatever it is, a test must hear of it
                self.failures.append(f"{type(error).__name__}: {error}")
            self.calls += 1


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    Host(*sys.argv[1:]).run()
