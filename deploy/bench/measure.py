"""How things are measured: CPU time, interleaved with the baseline, medians of rounds. And what a result looks like."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

Action = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure beside its baseline. `met` None: there is no bar, or it is another machine's absolute."""

    what: str
    value: float
    unit: str
    baseline: float
    against: str
    bar: str = ""
    met: bool | None = None
    difference: bool = False  # compare by what was added rather than by the ratio

    @property
    def compared(self) -> str:
        if self.difference:
            return f"{self.value - self.baseline:+.2f} {self.unit}"
        return f"x {self.value / self.baseline:.2f}"

    @property
    def verdict(self) -> str:
        return {None: "", True: "met", False: "**missed**"}[self.met]


@dataclass(frozen=True, slots=True)
class Section:
    """`beside`: a second table, its head first: what others do, in words of its own."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    beside: Sequence[tuple[str, ...]] = ()


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. `TINY` proves that the benchmarks run, and measures nothing."""

    rounds: int
    calls: int  # of microseconds each, in a round
    requests: int  # of milliseconds each, in a round
    swaps: int
    layer: int  # width of the hot-swapped model; its bytes are about 8 times the square
    switches: int
    hundred: int  # swaps in a row
    devices: int  # of the large fleet


FULL = Scale(
    rounds=41, calls=2_000, requests=30, swaps=12, layer=2_048, switches=200, hundred=100, devices=1_000_000
)  # fmt: skip
# For a machine that has no hour: everything is measured, on less.
SMALL = replace(FULL, rounds=11, requests=10, swaps=4, layer=1_024, hundred=20, devices=50_000)
TINY = Scale(rounds=1, calls=20, requests=2, swaps=1, layer=64, switches=2, hundred=4, devices=50)


def interleaved(
    actions: Mapping[str, Action],
    *,
    rounds: int,
    calls: int,
    clock: Callable[[], float] = time.process_time,
    between: Action = lambda: None,
) -> dict[str, float]:
    """CPU microseconds a call, by name: the median of rounds. Each round has a turn of every action, so that whatever
    slows the machine slows all of them alike. `between` runs untimed after each turn.
    """
    turns: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            spent = _turn(action, calls, clock)
            between()
            if number:  # the first round warms up
                turns[name].append(spent / calls * 1e6)
    return {name: statistics.median(values) for name, values in turns.items()}


def _turn(action: Action, calls: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(calls):
        action()
    return clock() - started


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def memory(field: str = "VmRSS") -> float:
    """MB of this process: `VmRSS` now, `VmHWM` at most since the last `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
