"""Fixtures of this folder."""

import resource
from collections.abc import Iterator

import pytest
from django.core.cache import cache

from fleet.accounts import limits
from fleet.devices import seen
from fleet.feedback import selectors as feedback
from fleet.rollouts import snapshots
from fleet.rollouts.counting import admission, tallies
from tests.registry import own_folder, registry  # noqa: F401
from tests.server.batch_world import feedback_world, local_objects  # noqa: F401

GIGABYTES_8 = 8 << 30


@pytest.fixture(autouse=True)
def nothing_kept_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread writes marks into a test's database, and no test sees another's marks, policy or pages."""
    cache.clear()  # a page that took long is kept for a while: on a busy machine, into the next test
    monkeypatch.setattr(seen, "_buffer", seen.SeenBuffer())
    monkeypatch.setattr(seen.Flusher, "ensure", lambda self: None)
    monkeypatch.setattr(snapshots, "_kept", None)
    monkeypatch.setattr(feedback, "_kept", feedback.NOTHING)
    monkeypatch.setattr(tallies.Tallies, "_kept", {})
    monkeypatch.setattr(admission, "_cohorts", admission.Cohorts())
    limits.forget_all()


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """What grows without end fails its test, and does not take the machine down with it. Child processes inherit it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    limits_set = [limit for limit in (GIGABYTES_8, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits_set), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
