"""A thread that does one thing over and over, and ends at once when it is told to."""

import logging
import threading
from collections.abc import Callable

from device_sdk.updater import backoff

log = logging.getLogger("device_sdk")


class Loop:
    """A daemon thread that calls `step`, which returns the seconds to wait; `wake` and `stop` cut the wait short."""

    def __init__(self, name: str, step: Callable[[], float | None]) -> None:
        self._step = step
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def stop(self, timeout: float = 10.0) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stop.is_set():
            delay = self._guarded()
            self._wake.wait(None if delay is None else max(delay, 0.0))
            self._wake.clear()

    def _guarded(self) -> float | None:
        try:
            delay = self._step()
            self._failures = 0
        except Exception:
            self._failures += 1
            log.exception("unexpected error in %s; it goes on", self._thread.name)
            return backoff(self._thread.name, self._failures, first=1.0)
        return delay
