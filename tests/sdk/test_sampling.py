"""Chance and time as arguments: what is kept, how probable that was, when it travels."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_sdk.protocol.assignment import Sampling, Window
from device_sdk.sampling import Reservoir, decide, upload_open


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.3, 1.0])
def test_inferences_are_kept_at_their_rate(rate):
    rng, total = Random(7), 50_000
    kept = sum(decide(rng.random(), rate) for _ in range(total))
    assert abs(kept / total - rate) < 0.01


def test_rate_of_zero_keeps_none_and_rate_of_one_keeps_all():
    assert not decide(0.0, 0.0)
    assert decide(1 - 2**-53, 1.0)


def fill(capacity, offered, rng):
    """Keep numbers as the spool keeps samples."""
    reservoir, kept = Reservoir(capacity), []
    for number in range(offered):
        reservoir, slot = reservoir.place(rng.random())
        if slot is None:
            continue
        if slot < len(kept):
            kept.pop(slot)
        kept.append(number)
    return reservoir, kept


def test_reservoir_keeps_all_until_it_is_full():
    reservoir, kept = fill(10, 10, Random(1))
    assert kept == list(range(10))
    assert reservoir.probability(0.5) == 0.5


def test_every_offered_sample_is_equally_likely_to_stay():
    rng, hits, rounds = Random(3), [0] * 40, 4_000
    for _ in range(rounds):
        reservoir, kept = fill(10, 40, rng)
        assert len(kept) == 10
        for number in kept:
            hits[number] += 1
    assert reservoir.probability(1.0) == 0.25
    assert all(abs(hit / rounds - 0.25) < 0.04 for hit in hits)


def test_probability_weighs_samples_back_to_the_number_of_inferences():
    rng, rate, inferences = Random(5), 0.1, 20_000
    reservoir = Reservoir(100)
    for _ in range(inferences):
        if decide(rng.random(), rate):
            reservoir, _ = reservoir.place(rng.random())
    estimate = reservoir.kept / reservoir.probability(rate)
    assert abs(estimate / inferences - 1) < 0.1


def test_lost_samples_lower_the_probability():
    reservoir = Reservoir(10)
    for _ in range(5):
        reservoir, _ = reservoir.place(0.0)
    for _ in range(5):
        reservoir = reservoir.lose()
    assert reservoir.probability(1.0) == 0.5


def test_lack_of_room_makes_the_reservoir_smaller_for_good():
    reservoir, _ = fill(10, 10, Random(1))
    reservoir = reservoir.shrink()
    assert (reservoir.kept, reservoir.capacity) == (9, 9)
    after, slot = reservoir.place(0.999)
    assert slot is None
    assert after.probability(1.0) == 9 / 11


def campaign(window, jitter=0):
    return Sampling("c", 0.1, 100, 2**33, window, jitter)


def test_upload_stays_within_the_window():
    night = campaign(Window(23 * 60, 4 * 60))
    assert upload_open(night, "cam-1", 23 * 3600)
    assert upload_open(night, "cam-1", 2 * 3600)
    assert not upload_open(night, "cam-1", 4 * 3600)
    assert not upload_open(night, "cam-1", 12 * 3600)


def test_jitter_spreads_the_fleet_over_the_beginning_of_the_window():
    night = campaign(Window(120, 300), jitter=3_600)
    at_half = sum(upload_open(night, f"cam-{n}", 120 * 60 + 1_800) for n in range(1_000))
    assert 400 < at_half < 600
    assert all(upload_open(night, f"cam-{n}", 120 * 60 + 3_600) for n in range(1_000))


@given(start=st.integers(0, 1439), end=st.integers(0, 1439), jitter=st.integers(0, 86_400), n=st.integers(0, 1000))
def test_every_device_gets_a_turn_in_every_window(start, end, jitter, n):
    sampling = campaign(Window(start, end), jitter)
    last_minute = (end - 1) % 1440
    assert upload_open(sampling, f"cam-{n}", last_minute * 60 + 59)
