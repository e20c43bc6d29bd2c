"""How one model goes from assigned to committed: states, signals, one table, and the verdict on a probation.

Pure: no IO, no clock, no randomness. `install.py` does what the states say and persists each step before it is told.
"""

from collections.abc import Mapping
from dataclasses import field, replace
from enum import StrEnum

from device_sdk.comparison import Compared, compare, is_asked, is_worth_waiting
from device_sdk.counts import Counts
from device_sdk.protocol import events
from device_sdk.protocol.assignment import Probation
from device_sdk.protocol.cohorts import jitter
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.names import ReleasePath

EARLY_CALLS = 5  # a probation may be failed after so many calls, it need not wait for all of them
MAX_STARTS = 2  # a release on trial whose process ended so often without a word is not started once more
MAX_TESTS = 2  # likewise a release whose test came to no end so often
MAX_DELAY = 3_600.0  # seconds; nothing is retried less often than this
NOTHING = Counts()


class State(StrEnum):
    """Where a model stands. Except for `idle`, the values are the kinds of the events that report them."""

    IDLE = "idle"
    WAITING = events.WAITING
    DOWNLOADING = events.DOWNLOADING
    VERIFYING = events.VERIFYING
    TESTING = events.TESTING
    ACTIVATING = events.ACTIVATING
    PROBATION = events.PROBATION
    COMMITTED = events.COMMITTED
    ROLLED_BACK = events.ROLLED_BACK
    FAILED = events.FAILED
    WITHDRAWN = events.WITHDRAWN
    STOPPED = events.STOPPED


class Signal(StrEnum):
    """What moves a model on."""

    HOLD = "hold"  # a condition is not met; the reason says which
    START = "start"  # every condition is met
    DOWNLOADED = "downloaded"
    VERIFIED = "verified"
    TESTED = "tested"
    ACTIVATED = "activated"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    FAIL = "fail"
    RUNS = "runs"  # the assigned release is the committed one: nothing to do
    WITHDRAW = "withdraw"  # the view names another release, or none
    STOP = "stop"  # nothing may run, and the policy is to run nothing
    INTERRUPT = "interrupt"  # the process ended in the middle; whatever was downloaded is kept


class Why(StrEnum):
    """Reasons of `waiting` and `failed` that are no error's code."""

    WINDOW = "window"
    METERED = "metered"
    CHARGING = "charging"
    IDLE = "idle"
    BUDGET = "budget"  # today's bytes are spent
    HELD = "hold"  # the program that runs the model asks to wait; its own reason follows
    NETWORK = "network"
    DISK = "disk"
    MEMORY = "memory"  # too little is free to try the release
    STALE = "stale"  # the view has expired: an outage, or someone who holds back what is new
    KNOWN_BAD = "known_bad"
    CRASHED_IN_TEST = "crashed_in_test"
    CRASH_LOOP = "crash_loop"
    REQUIRES_SDK = "requires_sdk"
    REQUIRES_RUNTIME = "requires_runtime"
    NOTHING_MAY_RUN = "nothing_may_run"


_S, _E = State, Signal
TRANSITIONS: dict[tuple[State, Signal], State] = {
    (_S.IDLE,        _E.HOLD):       _S.WAITING,
    (_S.IDLE,        _E.START):      _S.DOWNLOADING,
    (_S.IDLE,        _E.RUNS):       _S.COMMITTED,
    (_S.IDLE,        _E.FAIL):       _S.FAILED,       # known bad, or this device lacks what it requires
    (_S.IDLE,        _E.ACTIVATED):  _S.PROBATION,    # a trial was found on disk, its history was lost
    (_S.IDLE,        _E.WITHDRAW):   _S.IDLE,
    (_S.IDLE,        _E.STOP):       _S.STOPPED,
    (_S.IDLE,        _E.INTERRUPT):  _S.IDLE,
    (_S.WAITING,     _E.HOLD):       _S.WAITING,      # for another reason
    (_S.WAITING,     _E.START):      _S.DOWNLOADING,
    (_S.WAITING,     _E.FAIL):       _S.FAILED,
    (_S.WAITING,     _E.RUNS):       _S.COMMITTED,
    (_S.WAITING,     _E.WITHDRAW):   _S.WITHDRAWN,
    (_S.WAITING,     _E.INTERRUPT):  _S.WAITING,
    (_S.DOWNLOADING, _E.DOWNLOADED): _S.VERIFYING,
    (_S.DOWNLOADING, _E.HOLD):       _S.WAITING,      # the network or the disk; the partial file stays
    (_S.DOWNLOADING, _E.FAIL):       _S.FAILED,
    (_S.DOWNLOADING, _E.WITHDRAW):   _S.WITHDRAWN,
    (_S.DOWNLOADING, _E.INTERRUPT):  _S.IDLE,
    (_S.VERIFYING,   _E.VERIFIED):   _S.TESTING,
    (_S.VERIFYING,   _E.HOLD):       _S.WAITING,
    (_S.VERIFYING,   _E.FAIL):       _S.FAILED,
    (_S.VERIFYING,   _E.WITHDRAW):   _S.WITHDRAWN,
    (_S.VERIFYING,   _E.INTERRUPT):  _S.IDLE,
    (_S.TESTING,     _E.TESTED):     _S.ACTIVATING,
    (_S.TESTING,     _E.HOLD):       _S.WAITING,
    (_S.TESTING,     _E.FAIL):       _S.FAILED,
    (_S.TESTING,     _E.WITHDRAW):   _S.WITHDRAWN,
    (_S.TESTING,     _E.INTERRUPT):  _S.IDLE,
    (_S.ACTIVATING,  _E.ACTIVATED):  _S.PROBATION,
    (_S.ACTIVATING,  _E.HOLD):       _S.WAITING,
    (_S.ACTIVATING,  _E.FAIL):       _S.FAILED,
    (_S.ACTIVATING,  _E.INTERRUPT):  _S.IDLE,
    (_S.PROBATION,   _E.HEALTHY):    _S.COMMITTED,
    (_S.PROBATION,   _E.UNHEALTHY):  _S.ROLLED_BACK,
    (_S.PROBATION,   _E.WITHDRAW):   _S.WITHDRAWN,
    (_S.PROBATION,   _E.INTERRUPT):  _S.PROBATION,    # the trial goes on, and its starts are counted
}  # fmt: skip

RESTING = frozenset({State.IDLE, State.COMMITTED, State.ROLLED_BACK, State.FAILED, State.WITHDRAWN, State.STOPPED})


def step(state: State, signal: Signal) -> State:
    """The next state. A pair that the table does not have is a bug, and says so."""
    key = (State.IDLE if state in RESTING else state, signal)
    if key not in TRANSITIONS:
        raise ValueError(f"no transition from {state} by {signal}")
    return TRANSITIONS[key]


@frozen
class Progress:
    """Where one model stands, and about which release; what is persisted and reported at each transition.

    `id` names the event that reports it, so that it may be reported again after a restart. `tests`: how often the
    test of this release was begun, counted before each, so that one that takes the process down is not begun for ever.
    """

    model: str
    state: State = State.IDLE
    reason: str = ""
    sha256: str = ""
    release: ReleasePath | None = None
    rollout: str = ""
    tests: int = 0
    id: str = ""
    at: float = 0.0
    held_at: float = 0.0  # unix seconds since when the program puts this release off; 0: it does not

    def about(self, sha256: str, release: ReleasePath | None, rollout: str) -> "Progress":
        """The same place in the lifecycle, turned to another release."""
        tests = self.tests if sha256 == self.sha256 else 0
        held_at = self.held_at if sha256 == self.sha256 else 0.0
        return replace(self, sha256=sha256, release=release, rollout=rollout, tests=tests, held_at=held_at)

    def after(self, signal: Signal, reason: str = "") -> "Progress":
        state = step(self.state, signal)
        tests = self.tests
        if state is State.TESTING:
            tests += 1
        elif self.state is State.TESTING and signal is not Signal.INTERRUPT:
            tests = 0  # it came to an end, good or bad
        held_at = self.held_at if state is State.WAITING and reason.startswith(Why.HELD) else 0.0
        return replace(self, state=state, reason=reason, tests=tests, held_at=held_at)

    def says(self, other: "Progress") -> bool:
        """Whether both tell the same of the same release: then one report is enough."""
        return (self.state, self.reason, self.sha256, self.rollout) == (
            other.state, other.reason, other.sha256, other.rollout,
        )  # fmt: skip


@frozen
class Verdict:
    """The end of a probation: HEALTHY or UNHEALTHY, and why. `detail`: how it compared with the release before."""

    signal: Signal
    reason: str = ""
    detail: Mapping[str, float | str] = field(default_factory=dict)


def judge(rules: Probation, counts: Counts, seconds: float, baseline: Counts = NOTHING) -> Verdict | None:
    """Judge a release on trial for `seconds`. None: not yet. Failure is looked for before success.

    `baseline`: what the previous release did on this device. Where the rules ask for a comparison and it has done
    enough, a trial goes on until the new one has done enough too.
    """
    finished = counts.calls >= rules.calls and seconds >= rules.seconds
    compared = compare(rules, counts, baseline) if is_asked(rules) else Compared()
    if finished or counts.calls >= min(rules.calls, EARLY_CALLS):
        reason = (
            _excess("error_rate", counts.errors, counts.calls, rules.max_error_rate)
            or _excess("invalid_rate", counts.invalid, counts.checked, rules.max_invalid_rate)
            or compared.reason
        )
        if reason:
            return Verdict(Signal.UNHEALTHY, reason, compared.detail)
    if not finished or is_worth_waiting(rules, counts, baseline):
        return None
    return Verdict(Signal.HEALTHY, detail=compared.detail)


def _excess(what: str, bad: int, total: int, allowed: float) -> str:
    if not total or bad / total <= allowed:
        return ""
    return f"{what}: {bad} of {total} calls, allowed {allowed:g}"


def backoff(device: str, failures: int, *, first: float, retry_after: float | None = None) -> float:
    """Seconds until the next try after `failures` in a row: doubling from `first`, shifted by the device's jitter.

    A server's Retry-After is a floor, and is spread too: all the fleet was told the same number.
    """
    delay = min(MAX_DELAY, first * 2.0 ** min(failures - 1, 20))
    return max(delay, min(retry_after or 0.0, MAX_DELAY)) * (1 + 0.25 * jitter(device, "backoff"))
