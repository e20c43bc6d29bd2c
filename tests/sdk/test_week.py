"""A device's age shows in nothing: a week of virtual time, with a poll each half an hour."""

from dataclasses import replace

import pytest

from tests.survival import week
from tests.survival.week import Week


@pytest.fixture(scope="module")
def lived():
    return Week.lived_apart(1_800)


def test_a_week_makes_nothing_grow(lived):
    last = lived.evenings[-1]
    assert (last.day, last.updates, last.rollbacks) == (7, 28, 14)
    assert last.polls > 7 * 40
    assert last.spooled > 0.9 * week.SPOOL  # its bound was reached
    assert lived.grown() == []


@pytest.mark.parametrize(
    ("what", "by"),
    [("files", 60), ("kept", 100_000), ("threads", 1), ("descriptors", 1), ("lines", 9_999), ("traced", 10**6)],
)
def test_growth_would_be_noticed(lived, what, by):
    older = replace(lived.evenings[-1], **{what: getattr(lived.evenings[-1], what) + by})
    assert len(Week([*lived.evenings[:-1], older], lived.broken).grown()) == 1
