"""Golden vectors: server, SDK and docs must never disagree about who is in a cohort."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_sdk.protocol.cohorts import COHORTS, cohort, jitter

GOLDEN = [
    ("", "a", 7944),
    ("salt", "cam-1", 8943),
    ("salt", "cam-2", 7469),
    ("0123456789abcdef0123456789abcdef", "berlin-0042", 4557),
    ("detector", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", 6432),
]
names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,30}", fullmatch=True)


@pytest.mark.parametrize(("salt", "device", "expected"), GOLDEN)
def test_cohorts_are_those_of_the_golden_vectors(salt: str, device: str, expected: int) -> None:
    assert cohort(salt, device) == expected


@given(salt=names, device=names)
def test_a_cohort_is_within_bounds_and_the_same_for_ever(salt: str, device: str) -> None:
    assert 0 <= cohort(salt, device) < COHORTS
    assert cohort(salt, device) == cohort(salt, device)


def test_salt_and_device_do_not_run_into_each_other() -> None:
    assert cohort("ab", "c") != cohort("a", "bc")


@pytest.mark.parametrize("salt", ["one", "two", "0f" * 16])
def test_cohorts_are_uniform(salt: str) -> None:
    """Chi squared over 20 cells of 20,000 devices; 19 degrees of freedom pass 60 with a chance below 1e-5."""
    cells = [0] * 20
    for number in range(20_000):
        cells[cohort(salt, f"device-{number}") * 20 // COHORTS] += 1
    assert sum((count - 1_000) ** 2 / 1_000 for count in cells) < 60


def test_cohorts_of_different_salts_are_independent() -> None:
    """Of those in the first tenth by one salt, about a tenth are in the first tenth by another."""
    first = [name for name in (f"device-{n}" for n in range(20_000)) if cohort("one", name) < COHORTS // 10]
    both = sum(cohort("two", name) < COHORTS // 10 for name in first)
    assert 0.07 < both / len(first) < 0.13


def test_jitter_is_a_fixed_fraction() -> None:
    assert jitter("cam-1", "poll") == 0.3479
    assert all(0 <= jitter(f"d{n}", "poll") < 1 for n in range(1_000))
