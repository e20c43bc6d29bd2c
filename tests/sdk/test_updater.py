"""The pure half of an update: the table, the verdict, the backoff."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_sdk.protocol.assignment import Probation
from device_sdk.protocol.names import ReleasePath
from device_sdk.protocol.versions import older
from device_sdk.updater import (
    MAX_DELAY,
    RESTING,
    TRANSITIONS,
    Counts,
    Progress,
    Signal,
    State,
    Verdict,
    backoff,
    judge,
    step,
)

RULES = Probation(calls=20, seconds=10.0, max_error_rate=0.1, max_invalid_rate=0.0)


def test_good_update_walks_the_whole_table_in_order():
    signals = [
        Signal.START, Signal.DOWNLOADED, Signal.VERIFIED, Signal.TESTED, Signal.ACTIVATED, Signal.HEALTHY,
    ]  # fmt: skip
    state, seen = State.IDLE, []
    for signal in signals:
        state = step(state, signal)
        seen.append(state)
    assert seen == ["downloading", "verifying", "testing", "activating", "probation", "committed"]


def test_every_state_can_be_reached_and_left():
    reached = {State.IDLE}
    while True:
        more = {step(state, signal) for state in reached for signal in Signal if _allowed(state, signal)} | reached
        if more == reached:
            break
        reached = more
    assert reached == set(State)
    assert all(any(_allowed(state, signal) for signal in Signal) for state in State)


def test_every_state_before_activation_can_be_withdrawn_and_interrupted():
    for state in (State.WAITING, State.DOWNLOADING, State.VERIFYING, State.TESTING):
        assert step(state, Signal.WITHDRAW) is State.WITHDRAWN
    assert step(State.PROBATION, Signal.INTERRUPT) is State.PROBATION


@pytest.mark.parametrize("state", sorted(RESTING))
def test_outcome_is_a_place_to_start_again_from(state):
    assert step(state, Signal.START) is State.DOWNLOADING


def test_impossible_pair_is_said_to_be_one():
    with pytest.raises(ValueError, match="no transition from probation by start"):
        step(State.PROBATION, Signal.START)


def test_tests_are_counted_per_release_and_forgotten_once_one_ended_well():
    path = ReleasePath("detector", "1.0.0", "default")
    progress = Progress("detector").about("a", path, "r")
    for signal in (Signal.START, Signal.DOWNLOADED, Signal.VERIFIED):
        progress = progress.after(signal)
    assert progress.tests == 1
    progress = progress.after(Signal.INTERRUPT)
    assert progress.about("a", path, "r").tests == 1
    assert progress.about("b", path, "r").tests == 0
    for signal in (Signal.START, Signal.DOWNLOADED, Signal.VERIFIED):
        progress = progress.after(signal)
    assert progress.tests == 2
    assert progress.after(Signal.TESTED).tests == 0


@pytest.mark.parametrize(
    ("counts", "seconds", "signal"),
    [
        (Counts(), 99, None),
        (Counts(calls=19, checked=19), 99, None),
        (Counts(calls=20, checked=20), 9.9, None),
        (Counts(calls=20, checked=20), 10, Signal.HEALTHY),
        (Counts(calls=4, errors=4), 0, None),  # too few to say
        (Counts(calls=5, errors=1, checked=4), 0, Signal.UNHEALTHY),
        (Counts(calls=20, errors=2, checked=18), 10, Signal.HEALTHY),  # exactly what is allowed
        (Counts(calls=20, errors=3, checked=17), 10, Signal.UNHEALTHY),
        (Counts(calls=5, checked=5, invalid=1), 0, Signal.UNHEALTHY),
        (Counts(calls=20, checked=2, invalid=1), 10, Signal.UNHEALTHY),  # of the calls that were looked at
    ],
)
def test_probation_is_judged_by_its_rules(counts, seconds, signal):
    verdict = judge(RULES, counts, seconds)
    assert (verdict.signal if verdict else None) == signal


def test_verdict_says_what_was_seen_and_what_was_allowed():
    assert judge(RULES, Counts(calls=10, errors=4), 1) == Verdict(
        Signal.UNHEALTHY, "error_rate: 4 of 10 calls, allowed 0.1"
    )


def test_probation_without_calls_ends_by_time_alone():
    rules = Probation(calls=0, seconds=5)
    assert judge(rules, Counts(), 4) is None
    assert judge(rules, Counts(), 5) == Verdict(Signal.HEALTHY)


@given(failures=st.integers(1, 10_000), first=st.floats(0.1, 600), after=st.none() | st.floats(0, 1e9))
def test_backoff_is_bounded_and_never_shorter_than_the_server_asked(failures, first, after):
    delay = backoff("cam-1", failures, first=first, retry_after=after)
    assert min(first, MAX_DELAY) <= delay <= MAX_DELAY * 1.25
    assert delay >= min(after or 0, MAX_DELAY)


def test_backoff_doubles_and_differs_between_devices():
    assert backoff("cam-1", 2, first=3) == 2 * backoff("cam-1", 1, first=3)
    assert len({backoff(f"cam-{number}", 1, first=3) for number in range(50)}) > 40


@pytest.mark.parametrize(
    ("version", "floor", "answer"),
    [("0.1.0", "", False), ("0.1.0", "0.1", False), ("0.9.0", "0.10.0", True), ("2.0", "1.31.1", False)],
)
def test_versions_are_compared_by_number(version, floor, answer):
    assert older(version, floor) is answer


def _allowed(state, signal):
    return ((State.IDLE if state in RESTING else state), signal) in TRANSITIONS
