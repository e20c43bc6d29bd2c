"""Does a comparison fire when it should, and only then? Streams of answers with a fixed seed; no model, no device."""

from dataclasses import replace

import numpy as np
import pytest

from device_sdk.comparison import MIN_LOOKED, compare, fixed_margin, independence, moving_margin
from device_sdk.counts import Counts, ordered
from device_sdk.protocol.assignment import Probation
from device_sdk.stats import Cell
from device_sdk.updater import Signal, judge

ALL = Probation(calls=20, seconds=0, max_slowdown=1.5, max_confidence_drop=0.1, max_class_shift=0.2)
LOOKS = [20, 50, 100, 150, 200, 300, 500, 1_000]  # answers after which a trial is judged
MIX = (0.5, 0.3, 0.15, 0.05)


def stream(seed, number, *, mix=MIX, stays=0.0, confidence=0.8, median_us=1_000.0):
    """Answers of a model: class, confidence, latency. `stays`: how likely an answer is the one before once more."""
    random = np.random.default_rng(seed)
    fresh = random.choice(len(mix), number, p=mix)
    again = random.random(number) < stays
    again[0] = False
    kinds = fresh[np.maximum.accumulate(np.where(again, 0, np.arange(number)))]
    sure = np.clip(random.normal(confidence, 0.15, number), 0, 1)
    times = np.exp(random.normal(np.log(median_us * 1e3), 0.3, number)).astype(int)
    return kinds, sure, times


def counts_of(answers, number):
    cell = Cell()
    for kind, sure, nanoseconds in zip(*(column[:number].tolist() for column in answers), strict=True):
        cell.took(nanoseconds)
        cell.answered(kind, sure)
    cell.checked = number
    return replace(cell.counts(), calls=number)


def fires(rules, baseline, answers):
    """The reason of the first look at which the trial is ended as bad; "": of none."""
    return next(filter(None, (compare(rules, counts_of(answers, n), baseline).reason for n in LOOKS)), "")


def share_that_fires(rules, *, trials=40, before=1_000, stays=0.0, **changed):
    """Of many devices, each with a baseline of its own and a trial that is looked at again and again."""
    fired = 0
    for trial in range(trials):
        baseline = counts_of(stream(2 * trial, before, stays=stays), before)
        fired += bool(fires(rules, baseline, stream(2 * trial + 1, LOOKS[-1], stays=stays, **changed)))
    return fired / trials


def test_release_that_is_as_the_one_before_passes_however_often_it_is_looked_at():
    assert share_that_fires(ALL) == 0


def test_comparison_with_nothing_allowed_still_does_not_fire_by_chance():
    strict = Probation(calls=20, seconds=0, max_slowdown=1.0, max_confidence_drop=0.0, max_class_shift=0.0)
    raw = sum(
        counts_of(stream(2 * n + 1, 100), 100).mean_confidence < counts_of(stream(2 * n, 1_000), 1_000).mean_confidence
        for n in range(40)
    )
    assert raw > 10  # what a bare comparison of two numbers would do
    assert share_that_fires(strict) == 0


@pytest.mark.parametrize(
    ("rules", "changed", "word"),
    [
        (ALL, {"mix": (0.02, 0.03, 0.15, 0.80)}, "class_shift"),
        (ALL, {"confidence": 0.35}, "confidence_drop"),
        (ALL, {"median_us": 4_000.0}, "slowdown"),
    ],
)
def test_release_that_is_much_worse_is_found_out_and_the_reason_says_how(rules, changed, word):
    baseline = counts_of(stream(1, 1_000), 1_000)
    reason = fires(rules, baseline, stream(2, 1_000, **changed))
    assert reason.startswith(f"{word}: ")
    assert "allowed" in reason
    assert share_that_fires(rules, trials=10, **changed) == 1


def test_model_that_always_says_the_same_is_found_out_in_a_few_hundred_answers():
    baseline = counts_of(stream(1, 1_000), 1_000)
    collapsed = stream(2, 300, mix=(0.0, 0.0, 0.0, 1.0))
    assert compare(ALL, counts_of(collapsed, 300), baseline).reason.startswith("class_shift: 0.9")


def test_camera_whose_scene_stays_counts_for_less_and_does_not_fire_by_chance():
    """Forty answers of one scene are one scene. Taken for forty, they would roll back good releases."""
    stays = 0.98
    baseline = counts_of(stream(0, 1_000, stays=stays), 1_000)
    assert independence(baseline) < 0.05
    assert independence(counts_of(stream(0, 1_000), 1_000)) > 0.8
    strict = Probation(calls=20, seconds=0, max_class_shift=0.0)
    assert share_that_fires(strict, stays=stays) == 0
    believed = [
        (counts_of(stream(2 * n + 1, 1_000, stays=stays), 1_000), counts_of(stream(2 * n, 1_000, stays=stays), 1_000))
        for n in range(40)
    ]
    naive = [abs(dict(now.classes).get(0, 0) - dict(before.classes).get(0, 0)) / 1_000 for now, before in believed]
    assert sum(gap > moving_margin(1_000, sets=4) + fixed_margin(1_000, sets=4) for gap in naive) > 2


def test_margins_hold_at_every_number_at_once():
    """The walk of a fair coin leaves the boundary anywhere within 2,000 steps no more often than is said."""
    random = np.random.default_rng(7)
    steps = np.arange(1, 2_001)
    errors = np.abs(np.cumsum(random.integers(0, 2, (2_000, 2_000), dtype=np.int8) - 0.5, axis=1) / steps)
    bounds = np.array([moving_margin(float(n), alarms=0.05) for n in steps])
    assert np.mean(np.any(errors > bounds, axis=1)) <= 0.05


def test_few_are_not_compared_and_the_event_says_so():
    few, many = counts_of(stream(1, 99), 99), counts_of(stream(2, 500), 500)
    assert compare(ALL, many, few).detail["class_shift"] == "not compared: 99 looked at before, 100 needed"
    assert compare(ALL, few, many).detail["slowdown"] == "not compared: 99 looked at, 100 needed"
    assert compare(ALL, many, Counts()).reason == ""


def test_labels_have_a_mix_and_no_confidence():
    before = Counts(calls=500, checked=500, scored=500, classes=((0, 250), (1, 250)), changes=250)
    now = Counts(calls=500, checked=500, scored=500, classes=((1, 500),))
    compared = compare(ALL, now, before)
    assert compared.reason.startswith("class_shift")
    assert compared.detail["confidence_drop"] == "not compared: labels have no confidence"


def test_trial_goes_on_until_there_is_enough_to_compare_and_no_longer():
    before = counts_of(stream(1, 500), 500)
    good = stream(2, 500)
    assert judge(ALL, counts_of(good, MIN_LOOKED - 1), 60, before) is None
    verdict = judge(ALL, counts_of(good, MIN_LOOKED), 60, before)
    assert verdict.signal is Signal.HEALTHY
    assert set(verdict.detail) == {"slowdown", "confidence_drop", "class_shift"}
    assert judge(ALL, counts_of(good, 20), 60, Counts(calls=3, checked=3)).signal is Signal.HEALTHY  # it never can be
    assert judge(Probation(calls=20, seconds=0), counts_of(good, 20), 60, before).signal is Signal.HEALTHY
    silent = Counts(calls=MIN_LOOKED, checked=MIN_LOOKED, times=((100, MIN_LOOKED),))
    assert judge(ALL, silent, 60, before).signal is Signal.HEALTHY  # its application asks for no scores


def test_verdict_falls_before_the_end_where_the_difference_is_plain():
    before = counts_of(stream(1, 1_000), 1_000)
    slow = counts_of(stream(2, 200, median_us=9_000.0), 200)
    verdict = judge(Probation(calls=10_000, seconds=86_400, max_slowdown=2.0), slow, 5, before)
    assert (verdict.signal, verdict.reason.split(":")[0]) == (Signal.UNHEALTHY, "slowdown")


def test_classes_beyond_the_most_frequent_are_one():
    before = Counts(scored=1_000, checked=1_000, classes=ordered(dict.fromkeys(range(100), 10)), changes=990)
    now = Counts(scored=1_000, checked=1_000, classes=ordered({n + 500: 10 for n in range(100)}), changes=990)
    assert compare(ALL, now, before).detail["class_shift"] == pytest.approx(0.08)  # the eight that were told apart
