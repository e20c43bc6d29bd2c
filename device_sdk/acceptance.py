"""Ask a release what its makers asked it, before it serves anyone: golden inputs, expected outputs, a latency budget.

The calls warm the session up besides. What does not hold raises ModelError, whose message says what was expected and
what came: `acceptance_failed`, `acceptance_latency`, `acceptance_memory`, and `bad_acceptance` for a bundle that is
none, or that does not fit the model.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from device_sdk.errors import ModelError, first_line
from device_sdk.protocol.arrays.acceptance import Acceptance
from device_sdk.protocol.errors import ProtocolError
from device_sdk.runtime import MEMORY_LIMIT, is_starved
from device_sdk.schema import Schema

FAILED, SLOW, LARGE, BAD = "acceptance_failed", "acceptance_latency", "acceptance_memory", "bad_acceptance"
CODES = frozenset({FAILED, SLOW, LARGE, BAD})
CALLS = 7  # of which the median counts: three may be slow for any reason
TRIES = 3  # a device that is busy for a moment is asked again
PAUSE_SECONDS = 0.5  # before it is
WARM_SECONDS = 2.0  # for which a session is asked, of a release that has passed in a process of its own


@dataclass
class Exam:
    """What is asked of one session. Called by `runtime.load` in place of its warm-up.

    `seconds`: leave it at that; None: every sample. `timed`: measure latency, and if `judged` hold it to the budget.
    `go_on` is called between calls, and ends it by raising. What came of it: samples `asked`, and `latency_ms` of a
    call with the largest.
    """

    bundle: Acceptance
    seconds: float | None = None
    timed: bool = False
    judged: bool = True
    go_on: Callable[[], None] = lambda: None
    pause: Callable[[float], None] = time.sleep
    asked: int = field(default=0, init=False)
    latency_ms: float = field(default=0.0, init=False)

    def __call__(self, session: Any, schema: Schema) -> None:
        _check_names(self.bundle, schema)
        self._ask(session)
        if self.timed:
            self._time(session)

    def _ask(self, session: Any) -> None:
        ends = None if self.seconds is None else time.monotonic() + self.seconds
        for number, sample in enumerate(self.bundle.samples):
            self.go_on()
            if ends is not None and number and time.monotonic() > ends:
                return
            names = list(sample.outputs)
            values = _run(session, names, sample.feeds(), f"sample {number + 1}")
            if problem := self.bundle.complaint(number, dict(zip(names, values, strict=True))):
                raise ModelError(problem, code=FAILED)
            self.asked = number + 1

    def _time(self, session: Any) -> None:
        """The best of a few medians: a budget is about the release, not about what else the device does just now."""
        budget = self.bundle.budgets.latency_ms if self.judged else 0.0
        feeds = max(self.bundle.samples, key=lambda sample: sample.size).feeds()
        medians = []
        for attempt in range(TRIES):
            if attempt:
                self.pause(PAUSE_SECONDS)
            medians.append(self._median(session, feeds, budget))
            self.latency_ms = min(medians)
            if not budget or self.latency_ms <= budget:
                return
        message = f"a call takes {self.latency_ms:.3g} ms; expected at most {budget:.3g} ms (median of {CALLS} calls"
        raise ModelError(f"{message}, the best of {TRIES} times)", code=SLOW)

    def _median(self, session: Any, feeds: dict[str, Any], budget: float) -> float:
        """Milliseconds. Once most calls were too slow no more are made: the median is the fastest of these or more."""
        took: list[float] = []
        while len(took) < CALLS:
            self.go_on()
            began = time.perf_counter()
            _run(session, None, feeds, "a timed call")
            took.append((time.perf_counter() - began) * 1e3)
            slow = [each for each in took if each > budget > 0]
            if len(slow) > CALLS // 2:
                return min(slow)
        return median(took)


def read(data: bytes) -> Acceptance:
    try:
        return Acceptance.parse(data)
    except ProtocolError as error:
        raise ModelError(f"its acceptance bundle is no good: {error.message}", code=BAD) from error


def _check_names(bundle: Acceptance, schema: Schema) -> None:
    for number, sample in enumerate(bundle.samples, 1):
        unknown = [name for name in sample.outputs if name not in schema.outputs]
        problem = schema.complaint(sample.inputs) or (unknown and f"unknown output {unknown[0]!r:.80}")
        if problem:
            raise ModelError(f"its acceptance bundle does not fit: sample {number}: {problem}", code=BAD)


def _run(session: Any, names: Sequence[str] | None, feeds: dict[str, Any], what: str) -> Sequence[Any]:
    try:
        return session.run(names, feeds)  # type: ignore[no-any-return]
    except Exception as error:
        code = MEMORY_LIMIT if is_starved(str(error) or repr(error)) else FAILED
        raise ModelError(f"{what}: the model does not answer: {first_line(error)}", code=code) from error
