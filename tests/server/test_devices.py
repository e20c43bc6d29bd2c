"""Groups, labels, spread, and the marks that wait in memory."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, connection
from django.utils import timezone

from fleet.devices import seen, selectors, services, tasks
from fleet.devices.models import Device, Group, SpreadSample
from fleet.errors import Conflict, Invalid
from tests.fleet_world import device, devices, group, running_set

pytestmark = pytest.mark.django_db
ONE, TWO = {"digits": "1.0.0/default"}, {"digits": "1.1.0/int8", "wine": "1.0.0/default"}


# --- groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("", {"a", "b", "c"}),
        ("site=berlin", {"a", "b"}),
        ("site=berlin, hw=pi5", {"a"}),
        ("site in (berlin, paris)", {"a", "b", "c"}),
        ("site notin (berlin), 0!=x, @name!=a", {"c"}),
        ("odd__key.in=x", set()),
    ],
)
def test_a_group_holds_the_active_devices_with_its_labels(selector: str, names: set[str]) -> None:
    device("a", labels={"site": "berlin", "hw": "pi5"})
    device("b", labels={"site": "berlin"})
    device("c", labels={"site": "paris"})
    device("d", labels={"site": "berlin", "hw": "pi5"}, state=Device.State.REVOKED)
    device("e", labels={"site": "berlin", "hw": "pi5"}, state=Device.State.PENDING)
    made = services.save_group(name="some", selector=selector)
    assert {entry.name for entry in selectors.members(made)} == names


def test_no_group_is_every_active_device() -> None:
    devices(2)
    assert len(list(selectors.members(None))) == 2


@pytest.mark.parametrize("selector", ["Site=a", "site in ()", "site=berlin,", "a b=c", "site=="])
def test_a_selector_that_makes_no_sense_is_refused(selector: str) -> None:
    with pytest.raises(Invalid):
        services.save_group(name="some", selector=selector)
    assert not Group.objects.exists()


def test_two_groups_cannot_share_a_name() -> None:
    group("berlin")
    with pytest.raises(Conflict) as caught:
        services.save_group(name="berlin", selector="")
    assert caught.value.code == "group_exists"


def test_labels_are_checked_at_the_door() -> None:
    entry = device()
    services.set_labels(device=entry, labels={"site": "paris"}, actor="ann")
    with pytest.raises(Invalid):
        services.set_labels(device=entry, labels={"../x": "y"}, actor="ann")
    entry.refresh_from_db()
    assert entry.labels == {"site": "paris"}


# --- last seen ---------------------------------------------------------------------------------------------------


def test_marks_wait_in_memory_and_are_written_by_one_statement(django_assert_num_queries: Any) -> None:
    entries = devices(50, last_seen=None)
    known = running_set(ONE)
    with django_assert_num_queries(0):
        for entry in entries:
            services.mark_seen(entry.pk, runs=known.digest)
    with django_assert_num_queries(1):
        assert services.flush_seen() == 50
    assert Device.objects.filter(runs=known, last_seen__isnull=False).count() == 50
    with django_assert_num_queries(0):
        assert services.flush_seen() == 0


def test_many_marks_are_written_in_bounded_statements(
    monkeypatch: pytest.MonkeyPatch, django_assert_num_queries: Any
) -> None:
    entries = devices(5, last_seen=None)
    monkeypatch.setattr(seen, "ROWS", 2)
    for entry in entries:
        services.mark_seen(entry.pk)
    with django_assert_num_queries(3):
        services.flush_seen()
    assert not Device.objects.filter(last_seen=None).exists()


def test_a_mark_without_runs_leaves_them_and_so_does_an_unknown_digest() -> None:
    entry = device(runs=ONE)
    for runs in ("", "f" * 16):
        services.mark_seen(entry.pk, runs=runs)
        services.flush_seen()
        entry.refresh_from_db()
        assert entry.runs == running_set(ONE)


def test_an_older_mark_of_another_process_does_not_turn_time_back() -> None:
    later = timezone.now() + timedelta(minutes=5)
    entry = device(last_seen=later)
    services.mark_seen(entry.pk)
    services.flush_seen()
    entry.refresh_from_db()
    assert entry.last_seen == later


def test_marks_of_a_write_that_failed_are_kept_for_the_next_but_newer_ones_win(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, now = seen.SeenBuffer(), timezone.now()
    one, two = devices(2, last_seen=None)
    write = seen._write

    def fail(marks: Any) -> None:
        buffer.mark(two.pk, runs="", now=now.timestamp())  # it polls again while the write fails
        raise DatabaseError

    buffer.mark(one.pk, runs="", now=now.timestamp() - 9)
    buffer.mark(two.pk, runs="", now=now.timestamp() - 9)
    monkeypatch.setattr(seen, "_write", fail)
    with pytest.raises(DatabaseError):
        buffer.flush()
    monkeypatch.setattr(seen, "_write", write)
    assert buffer.flush() == 2
    assert list(Device.objects.order_by("name").values_list("last_seen", flat=True)) == [
        now - timedelta(seconds=9),
        now,
    ]


class Recorder(seen.SeenBuffer):
    """Counts flushes instead of writing."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed = threading.Semaphore(0)
        self.fails = False

    def flush(self) -> int:
        self.flushed.release()
        if self.fails:
            raise DatabaseError
        return 0


@pytest.fixture
def main_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A stand-in for the main thread, which ends when the event is set."""
    over = threading.Event()

    class Main:
        def is_alive(self) -> bool:
            return not over.is_set()

        def join(self, timeout: float) -> None:
            over.wait(timeout)

    monkeypatch.setattr(seen.threading, "main_thread", Main)
    yield over
    over.set()


@pytest.fixture
def real_flusher(monkeypatch: pytest.MonkeyPatch, nothing_kept_in_this_process: None) -> None:
    monkeypatch.undo()


def test_the_flusher_writes_now_and_then_and_once_more_at_the_end(main_thread: Any, settings: Any) -> None:
    settings.LAST_SEEN_FLUSH = 0.01
    buffer = Recorder()
    buffer.fails = True  # an away database ends nothing
    flusher = seen.Flusher(buffer)
    thread = threading.Thread(target=flusher._run)
    thread.start()
    assert buffer.flushed.acquire(timeout=10)
    assert buffer.flushed.acquire(timeout=10)
    settings.LAST_SEEN_FLUSH = 3600
    main_thread.set()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert buffer.flushed.acquire(blocking=False)


SHUTDOWN = """
import os, sys, django
django.setup()
from django.conf import settings
from fleet.devices import seen
settings.LAST_SEEN_FLUSH = 3600
written = []
seen._write = lambda marks: marks and print(sys.argv[1:], os.getpid() == parent, sorted(marks), flush=True)
parent = os.getpid()
seen.mark_seen(1)
if os.fork() == 0:
    seen.mark_seen(2)
    sys.exit()
os.wait()
"""


def test_an_orderly_stop_writes_what_is_left_in_every_process() -> None:
    """A forked worker has its own marks and its own thread, and not its parent's."""
    command = [sys.executable, "-W", "ignore", "-c", SHUTDOWN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert sorted(done.stdout.splitlines()) == ["[] False [2]", "[] True [1]"]


# --- spread ------------------------------------------------------------------------------------------------------


def test_the_spread_counts_active_devices_by_model_and_version() -> None:
    devices(3, runs=ONE)
    device("two", runs=TWO)
    device("other-variant", runs={"digits": "1.0.0/int8"})
    device("new")
    device("gone", runs=ONE, state=Device.State.REVOKED)
    assert selectors.spread() == {"digits": {"1.0.0": 4, "1.1.0": 1}, "wine": {"1.0.0": 1}}


def test_the_spread_is_two_queries_however_many_devices(django_assert_num_queries: Any) -> None:
    devices(20, runs=ONE)
    with django_assert_num_queries(2):
        assert selectors.spread() == {"digits": {"1.0.0": 20}}


def test_the_spread_is_recorded_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(2, runs=ONE)
    now = timezone.now()
    monkeypatch.setattr(timezone, "now", lambda: now)
    tasks.record_spread()
    tasks.record_spread()  # in the same second: one sample
    start = timezone.now() - timedelta(hours=1)
    ((at, versions),) = selectors.spread_history("digits", start)
    assert versions == {"1.0.0": 2}
    assert selectors.spread_history("digits", at + timedelta(seconds=1)) == []
    assert selectors.spread_history("wine", start) == []


def test_old_samples_are_thinned_to_one_an_hour_and_very_old_ones_go() -> None:
    hour = (timezone.now() - timedelta(days=5)).replace(minute=0, second=0, microsecond=0)
    ancient = timezone.now() - timedelta(days=500)
    fresh = timezone.now()
    for at in (
        hour,
        hour + timedelta(minutes=1),
        hour + timedelta(minutes=59),
        hour + timedelta(hours=1),
        ancient,
        fresh,
    ):
        for version in ("1.0.0", "1.1.0"):
            SpreadSample.objects.create(at=at, model="digits", version=version, devices=1)
    tasks.retention()
    tasks.retention()
    kept = SpreadSample.objects.order_by("at").values_list("at", flat=True)
    assert list(kept) == [hour, hour, hour + timedelta(hours=1), hour + timedelta(hours=1), fresh, fresh]


def test_the_statement_of_marks_names_the_tables_as_the_models_do() -> None:
    assert Device._meta.db_table in seen.STATEMENT
    assert Device._meta.get_field("runs").related_model._meta.db_table in seen.STATEMENT  # type: ignore[union-attr]
    assert connection.vendor in {"sqlite", "postgresql"}
