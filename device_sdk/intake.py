"""Samples in memory: copied out of a call, waiting in a bounded queue for the spool's thread."""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from device_sdk.protocol import limits
from device_sdk.protocol.names import ReleasePath

log = logging.getLogger("device_sdk")

Array = np.ndarray[Any, Any]

QUEUE_SAMPLES = 64
QUEUE_BYTES = 64 * limits.MIB


@dataclass(frozen=True, slots=True)
class Sample:
    """One inference, copied."""

    model: str
    at: float
    release: ReleasePath
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]

    @property
    def size(self) -> int:
        return sum(a.nbytes for a in (*self.inputs.values(), *self.outputs.values()))


class Inbox:
    """A bounded queue between calls and the spool's thread. Full: the sample is not taken, and counted."""

    def __init__(self) -> None:
        self._waiting: deque[Sample] = deque()
        self._bytes = 0
        self._missed: dict[str, int] = {}
        self._changed = threading.Condition()

    def put(self, sample: Sample) -> None:
        size = sample.size
        with self._changed:
            if len(self._waiting) >= QUEUE_SAMPLES or self._bytes + size > QUEUE_BYTES:
                self._missed[sample.model] = self._missed.get(sample.model, 0) + 1
                return
            self._waiting.append(sample)
            self._bytes += size
            self._changed.notify()

    def miss(self, model: str) -> None:
        with self._changed:
            self._missed[model] = self._missed.get(model, 0) + 1

    def has_room(self) -> bool:
        return len(self._waiting) < QUEUE_SAMPLES

    def get(self, timeout: float) -> Sample | None:
        with self._changed:
            if not self._waiting and not self._changed.wait_for(lambda: bool(self._waiting), timeout):
                return None
            sample = self._waiting.popleft()
            self._bytes -= sample.size
            return sample

    def take_missed(self) -> dict[str, int]:
        with self._changed:
            missed, self._missed = self._missed, {}
            return missed


class Intake:
    """What a model's calls hand samples to. See `runtime.Sampler`."""

    def __init__(self, model: str, inbox: Inbox) -> None:
        self.model = model
        self.rate = 0.0
        self._inbox = inbox

    def offer(self, release: ReleasePath, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Copy, because the caller may reuse its buffers; never raise, because an inference is not to fail by this."""
        try:
            if not self._inbox.has_room():
                self._inbox.miss(self.model)
                return
            taken = {name: np.array(value) for name, value in inputs.items()}
            sample = Sample(self.model, time.time(), release, taken, arrays(outputs))
            self._inbox.put(sample)
        except Exception:
            log.exception("a sample of %s was lost", self.model)
            self._inbox.miss(self.model)


def arrays(tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Copies, of arrays only: sequences and maps, which some classifiers give beside scores, have no `.npy` form."""
    return {name: np.array(value) for name, value in tensors.items() if isinstance(value, np.ndarray)}
