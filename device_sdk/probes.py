"""What the host is like just now: metered, charging, idle, how much is free. Asked before an update, bounded in time.

A probe is a callable without arguments: `unmetered`, `charging` and `idle` give true or false, `free_disk` and
`free_memory` bytes; None: it cannot tell. The host's own probes are foreign code: each runs on a thread of its own,
for at most `SECONDS`, and one that hangs is not called again before it came back.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from device_sdk.errors import SetupError
from device_sdk.protocol import limits
from device_sdk.protocol.assignment import CONDITION_FLAGS, Conditions
from device_sdk.updater import Why

log = logging.getLogger("device_sdk")

Reading = bool | float | None
Probe = Callable[[], Reading]

SECONDS = 2.0
BUSY_LOAD = 0.5  # of each processor, over a minute
BUSY_PRESSURE = 10.0  # percent of ten seconds in which something waited for a processor
FAILED = "probe_failed"
IDLE = "idle"

_WHYS = {
    "unmetered": Why.METERED,
    "charging": Why.CHARGING,
    IDLE: Why.IDLE,
    "free_disk": Why.DISK,
    "free_memory": Why.MEMORY,
}


class ProbeError(Exception):
    """A probe raised, hung, or gave what it should not."""


class Probes:
    """The probes of one device. One thread at a time asks."""

    def __init__(self, own: Mapping[str, Probe] | None = None, *, disk: Probe, seconds: float = SECONDS) -> None:
        own = own or {}
        if unknown := set(own) - set(_WHYS):
            raise SetupError(f"probes: expected some of {', '.join(_WHYS)}; got {', '.join(sorted(unknown))}")
        self._probes: dict[str, Probe] = {**_DEFAULTS, "free_disk": disk, **own}
        self._seconds = seconds
        self._asking: dict[str, _Asked] = {}
        self._told: set[str] = set()

    def unmet(self, asked: Conditions, *, urgent: bool, missing: int, spare: Iterable[str] = ()) -> str:
        """The first condition that does not hold, as the reason to report; "": none.

        `missing`: bytes that are still to come. Urgent releases wait for room only. What cannot be told does not hold
        up an update; a probe that fails does, and says so, for its host meant something by it: but no urgent one.
        """
        wanted: list[tuple[str, float]] = (
            [] if urgent else [(name, 1) for name in CONDITION_FLAGS if getattr(asked, name)]
        )
        if asked.free_disk:
            wanted.append(("free_disk", asked.free_disk + missing))
        if asked.free_memory:
            wanted.append(("free_memory", asked.free_memory))
        for name, least in wanted:
            if name not in spare and (reason := self._look(name, least, urgent=urgent)):
                return reason
        return ""

    def _look(self, name: str, least: float, *, urgent: bool) -> str:
        try:
            reading = self._ask(name)
        except ProbeError as error:
            if name not in self._told:
                self._told.add(name)
                log.error("the probe %s: %s", name, error)  # noqa: TRY400  # once, and its own traceback says nothing
            return "" if urgent else f"{_WHYS[name]}: {FAILED}"
        self._told.discard(name)
        return _WHYS[name] if reading is not None and reading < least else ""

    def _ask(self, name: str) -> Reading:
        before = self._asking.get(name)
        if before is not None and before.is_alive():
            raise ProbeError("has not come back yet")
        asked = self._asking[name] = _Asked(name, self._probes[name])
        asked.start()
        asked.join(self._seconds)
        if asked.is_alive():
            raise ProbeError(f"no answer within {self._seconds:g} s")
        del self._asking[name]
        if asked.error is not None:
            raise ProbeError(f"{type(asked.error).__name__}: {asked.error!s:.200}") from asked.error
        return asked.reading


class _Asked(threading.Thread):
    """One call of a probe."""

    def __init__(self, name: str, probe: Probe) -> None:
        super().__init__(name=f"fleet-probe-{name}", daemon=True)
        self._probe = probe
        self.reading: Reading = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            reading = self._probe()
            if reading is not None and (not isinstance(reading, (bool, int, float)) or reading != reading):  # noqa: PLR0124  # NaN
                raise TypeError(f"expected true, false, a number or None; got {reading!r:.80}")
            self.reading = reading
        except Exception as error:  # noqa: BLE001  # whatever the host's code raises is a failed probe
            self.error = error


# Linux. Each gives None where this system does not tell.


def never_tells() -> Reading:
    """The default for `unmetered`: what a network costs stands in no file.

    It does not hold up an update: most devices are on a wire, and one that asked nobody would otherwise wait for ever,
    also for what mends it. Devices on a metered link bring a probe of their own, or a daily budget.
    """
    return None


def is_charging(supplies: Path = Path("/sys/class/power_supply")) -> Reading:
    """Whether a supply is on line, or no battery is being emptied. Batteries of mice and the like do not count."""
    try:
        found = [supply for supply in supplies.iterdir() if _text(supply / "scope") != "Device"]
    except FileNotFoundError:
        return True  # a machine without any is on mains
    except OSError:
        return None
    if any(_text(supply / "online") in {"1", "2"} for supply in found):
        return True
    batteries = [_text(supply / "status") for supply in found if _text(supply / "type") == "Battery"]
    return "Discharging" not in batteries


def is_idle(proc: Path = Path("/proc"), processors: int | None = None) -> Reading:
    """Whether the load is low and little waits for a processor. A container sees its host's load: so it should."""
    load = _first_number(_text(proc / "loadavg"))
    if load is None:
        return None
    waiting = _first_number(_text(proc / "pressure" / "cpu").partition("avg10=")[2])  # not on every kernel
    return load < BUSY_LOAD * (processors or os.cpu_count() or 1) and (waiting or 0.0) < BUSY_PRESSURE


def free_memory(proc: Path = Path("/proc")) -> Reading:
    kilobytes = _first_number(_text(proc / "meminfo").partition("MemAvailable:")[2])
    return None if kilobytes is None else kilobytes * limits.KIB


_DEFAULTS: dict[str, Probe] = {
    "unmetered": never_tells,
    "charging": is_charging,
    IDLE: is_idle,
    "free_memory": free_memory,
}


def _text(path: Path) -> str:
    """A small file of the kernel's; "" where there is none."""
    with suppress(OSError, UnicodeDecodeError), path.open() as file:
        return file.read(64 * limits.KIB).strip()
    return ""


def _first_number(text: str) -> float | None:
    with suppress(ValueError, IndexError):
        return float(text.split(maxsplit=1)[0])
    return None
