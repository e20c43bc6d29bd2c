"""The guards' statistics and verdicts, by themselves: no database. The long version is in `make bench`."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from deploy.bench import guards as simulation
from deploy.bench.guards import Side as Devices
from fleet.rollouts import betting, guards
from fleet.rollouts.guards import AGE_WEIGHTS, Comparison, Side, Terms, Trip
from fleet.rollouts.quality import CLASSES, CONFIDENCE, ERRORS, INVALID, LATENCY, Change, Numbers, changes

ALARM = 0.01
ALL = Terms.parse({name: {} for name in guards.SCALES} | {"false_alarm": ALARM, "devices": 0})
ONE = Terms.parse({ERRORS: {}, "false_alarm": ALARM, "devices": 0})


def counts(*bad_and_good: int) -> Any:
    """A histogram of scores of 1 and 0."""
    bad, good = bad_and_good
    found = np.zeros(betting.BINS + 1)
    found[betting.BINS], found[0] = bad, good
    return found


def side(name: str, values: list[float], *, exposed: bool, now: float = 0.0) -> Side:
    made = Side()
    for value in values:
        made.add(guards.SCALES[name], Change(now, value), exposed=exposed)
    return made


def judged(name: str, exposed: list[float], unexposed: list[float], terms: Terms = ALL) -> guards.Reading:
    sides = side(name, exposed, exposed=True), side(name, unexposed, exposed=False)
    return guards.reading(name, terms, [Comparison(0, 0, *sides)], stages=3)


# --- the rate of false halts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exposed", "unexposed", "effect"), [*product((1, 3, 8), (0, 1, 4, 30), (0.0, 0.025, 0.2))])
def test_evidence_is_worth_at_most_one_on_average_whatever_the_base_rate(
    exposed: int, unexposed: int, effect: float
) -> None:
    """Exactly, over every outcome: what makes it an e-value. Healthy includes worse by the effect that is let pass."""
    bad = np.array([[(a, b) for b in range(unexposed + 1)] for a in range(exposed + 1)])
    left = np.array([[counts(a, exposed - a) for a, _ in row] for row in bad])
    right = np.array([[counts(b, unexposed - b) for _, b in row] for row in bad])
    values = np.exp(betting.log_evidence(left, right, effect))
    for rate in (0.001, 0.01, 0.05, 0.2, 0.5, 0.8):
        mean = _binomial(exposed, min(rate + effect, 1)) @ values @ _binomial(unexposed, rate)
        assert mean <= 1 + 1e-9, rate


def _binomial(number: int, rate: float) -> Any:
    return np.array([math.comb(number, k) * rate**k * (1 - rate) ** (number - k) for k in range(number + 1)])


@pytest.mark.parametrize("name", list(simulation.WORLDS))
def test_no_more_healthy_rollouts_halt_than_stated_though_looked_at_all_the_time(name: str) -> None:
    """As bad as healthy can be: the exposed are worse by all that is let pass, and have shorter spans."""
    rng = np.random.default_rng(7)
    scale = guards.SCALES[name]
    rollouts = 600
    exposed, unexposed = Devices(rollouts, 60, calls=60, shift=scale.effect), Devices(rollouts, 120, calls=200)
    halted = simulation.halted(name, rng, exposed, unexposed, looks=12, limit=simulation.bound(1))
    assert np.isfinite(halted).mean() <= ALARM


def test_no_more_healthy_updates_halt_than_stated_though_failures_are_told_first() -> None:
    """3,000 rollouts at the very share that is tolerated, looked at after each of 200 devices."""
    rng = np.random.default_rng(8)
    tolerated = guards.SCALES[guards.FAILURES].effect
    halted = simulation.failures_halted(rng, 3_000, 200, tolerated, simulation.bound(1))
    assert np.isfinite(halted).mean() <= ALARM


def test_a_test_made_for_one_look_halts_many_healthy_rollouts_in_the_same_world() -> None:
    """Why the guards do not: the same false-alarm rate, tested anew at each look as if it were the only one."""
    rng = np.random.default_rng(9)
    assert simulation.naive_halted(LATENCY, rng, 400, 200, looks=50).mean() > 4 * ALARM


def test_the_rate_is_shared_among_the_guards_that_test() -> None:
    assert ONE.bound == pytest.approx(math.log(1 / ALARM))
    assert ALL.bound == pytest.approx(math.log(6 / ALARM))
    limits_only = Terms.parse({ERRORS: {}, LATENCY: {"test": False, "limit": 20}, "false_alarm": ALARM})
    assert limits_only.bound == ONE.bound


def test_stages_and_ages_share_the_evidence_whatever_their_number() -> None:
    """A weighted mean: the weights of all comparisons of a guard never sum to more than one."""
    sides = side(ERRORS, [0.2] * 9, exposed=True), side(ERRORS, [0.0] * 90, exposed=False)
    one = Comparison(0, 0, *sides).log_evidence(ERRORS, 0.005)
    everywhere = [Comparison(stage, age, *sides) for stage in range(4) for age in range(3)]
    assert guards.reading(ERRORS, ONE, everywhere, stages=4).evidence == pytest.approx(one)
    alone = guards.reading(ERRORS, ONE, everywhere[:1], stages=4).evidence
    assert alone == pytest.approx(one + math.log(AGE_WEIGHTS[0] / 4), abs=0.01)


# --- what is seen, and within how many devices --------------------------------------------------------------------

# Regression, devices of each side that report in turn, devices within which nine of ten such rollouts are halted.
SEEN = [
    (ERRORS, 0.01, 6_000, 4_500), (ERRORS, 0.05, 400, 60), (ERRORS, 0.2, 60, 15),
    (INVALID, 0.2, 60, 15), (LATENCY, 0.2, 600, 350), (LATENCY, 0.5, 200, 50),
    (CONFIDENCE, 0.1, 200, 70), (CLASSES, 0.3, 200, 30),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shift", "devices", "within"), SEEN)
def test_a_regression_is_seen_within_the_stated_number_of_devices(
    name: str, shift: float, devices: int, within: int
) -> None:
    """With all six guards on, three stages, five unexposed devices for each exposed one (at most 5,000)."""
    rng = np.random.default_rng(10)
    rollouts = 20
    exposed, unexposed = Devices(rollouts, devices, shift=shift), Devices(rollouts, min(5 * devices, 5_000))
    limit = simulation.bound(6, streams=6)
    halted = simulation.halted(name, rng, exposed, unexposed, looks=40, limit=limit) * devices
    assert (halted <= within).sum() >= 0.9 * rollouts, halted


@pytest.mark.parametrize(("rate", "within"), [(0.05, 1_000), (0.2, 80), (1.0, 10)])
def test_failing_updates_are_seen_within_the_stated_number_of_devices(rate: float, within: int) -> None:
    halted = simulation.failures_halted(np.random.default_rng(11), 200, 1_200, rate, simulation.bound(6)) * 1_200
    assert (halted <= within).mean() >= 0.9


# --- the device is the unit ---------------------------------------------------------------------------------------


def test_one_broken_device_with_a_million_calls_is_one_device() -> None:
    """All of its million calls fail; it counts once, and no number of others that are well makes it more."""
    before, now = Numbers("a", calls=1e6, errors=0), Numbers("b", calls=1e6, errors=1e6)
    broken = changes(before, now)[ERRORS].change
    for healthy, unexposed in product((0, 3, 30, 300), (10, 100, 1_000, 100_000)):
        found = judged(ERRORS, [broken] + [0.0] * healthy, [0.0] * min(unexposed, 2_000), ONE)
        assert guards.verdict(ONE, [found]) is None, (healthy, unexposed)


def test_a_few_devices_that_fail_completely_halt_a_large_fleet() -> None:
    found = judged(ERRORS, [1.0] * 6 + [0.0] * 4, [0.0] * 1_000)
    told = guards.verdict(ALL, [found])
    assert isinstance(told, Trip)
    assert "inference errors" in told.reason


def test_rings_of_other_hardware_are_compared_with_themselves() -> None:
    """The first ring is ten times slower and errs ten times as often as the rest, before as after."""
    slow, fast = Numbers("a", calls=500, errors=50, p95_us=90_000), Numbers("a", calls=500, errors=5, p95_us=9_000)
    same = [changes(each, replace(each, load="b")) for each in (slow, fast)]
    for name in (ERRORS, LATENCY):
        found = judged(name, [same[0][name].change] * 50, [same[1][name].change] * 500)
        assert found.evidence <= 0.7, name


def test_what_changed_for_everybody_is_no_evidence() -> None:
    """Night falls: every device is less sure and errs more, exposed or not."""
    assert judged(ERRORS, [0.05] * 200, [0.05] * 200).evidence <= 0.7
    assert judged(CONFIDENCE, [0.1] * 200, [0.1] * 200).evidence <= 0.7


# --- small fleets -------------------------------------------------------------------------------------------------


def test_with_ten_devices_it_says_that_it_may_see_nothing() -> None:
    assert guards.fewest(ERRORS, ALL, 1, 9, stages=3) is None
    assert guards.fewest(ERRORS, ALL, 3, 7, stages=3) is None
    assert guards.fewest(guards.FAILURES, ALL, 10, 0, stages=3) == 4


@pytest.mark.parametrize(("exposed", "unexposed"), [(10, 100), (50, 1_000), (300, 3_000)])
def test_the_fewest_that_halt_do_halt_and_one_less_does_not(exposed: int, unexposed: int) -> None:
    bad = guards.fewest(ERRORS, ALL, exposed, unexposed, stages=3)
    assert bad is not None
    for number, halts in ((bad, True), (bad - 1, False)):
        found = judged(ERRORS, [1.0] * number + [0.0] * (exposed - number), [0.0] * unexposed)
        assert isinstance(guards.verdict(ALL, [found]), Trip) is halts
