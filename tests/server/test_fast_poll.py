"""The fast poll's promises: what it answers, what it leaves to Django, and how soon it learns."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from device_sdk.protocol import polls
from device_sdk.protocol.abilities import Abilities
from device_sdk.protocol.polls import Tag, running_digest
from fleet import wsgi as entry_point
from fleet.api.fastpoll import feed as feeds
from fleet.api.fastpoll import wsgi
from fleet.devices import changes, credentials, seen
from fleet.devices import services as devices
from fleet.devices.changes import Position
from fleet.devices.models import Change, Device, Revision
from fleet.feedback import services as feedback
from fleet.releases import services as releases
from fleet.releases.models import Model
from fleet.rollouts import services as rollouts
from fleet.trust import services as trust
from fleet.trust.models import DeviceView
from tests.fleet_world import MODEL, completed, device, event, group, post, release, running, running_set
from tests.registry import Registry
from tests.server.fast_world import Clock, Server, request, tag_of

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("bounded_memory")]
RUNS = {MODEL: "1.0.0/default"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def entry(registry: Registry) -> Device:
    completed(release("1.0.0"))
    return device(runs=RUNS)


@pytest.fixture
def server(entry: Device) -> Server:
    return Server()


@pytest.fixture
def idle(server: Server, entry: Device) -> dict[str, Any]:
    """The poll of a device at rest, answered once from memory already."""
    return at_rest(server, entry)


def at_rest(server: Server, entry: Device) -> dict[str, Any]:
    answer, _ = server.poll(request(entry, str(Tag(0, running_digest(RUNS))), query="root=1"))
    environ = request(entry, tag_of(answer, RUNS), query="root=1")
    for _ in range(2):
        server.look()  # learns of the running set and of the view
        server.poll(environ)
    assert server.poll(environ)[1]
    return environ


def test_an_idle_poll_asks_the_database_nothing(
    server: Server, idle: dict[str, Any], django_assert_num_queries: Any
) -> None:
    with django_assert_num_queries(0):
        answer, from_memory = server.poll(idle)
    assert (answer.status, answer.body, from_memory) == (304, b"", True)


def test_a_304_carries_little(server: Server, idle: dict[str, Any], settings: Any) -> None:
    """Each byte of it is sent by every device every few minutes. The interval goes without saying where it is 300 s."""
    assert server.poll(idle)[0].headers == {"ETag": idle["HTTP_IF_NONE_MATCH"], "Server": "Fleet"}
    settings.POLL_INTERVAL = 42.5
    other = Server()
    other.look()
    other.poll(idle)
    other.look()
    answer, from_memory = other.poll(idle)
    assert (answer.headers[polls.INTERVAL_HEADER], from_memory) == ("42.5", True)


def test_a_device_that_cannot_use_its_bundle_gets_it_from_memory(
    server: Server, entry: Device, idle: dict[str, Any], django_assert_num_queries: Any
) -> None:
    """It asks for the whole view again and again."""
    again = request(entry, str(Tag(0, running_digest(RUNS))), query="root=1")
    first, _ = server.poll(again)
    with django_assert_num_queries(0):
        second, from_memory = server.poll(again)
    assert (second.told, from_memory) == (first.told, True)
    assert server.poll(request(entry, again["HTTP_IF_NONE_MATCH"], query="root=0"))[1] is False


def test_a_poll_answered_from_memory_marks_the_device_and_what_it_runs(
    server: Server, entry: Device, idle: dict[str, Any]
) -> None:
    seen.flush_seen()
    Device.objects.update(last_seen=timezone.now() - timedelta(days=1), runs=None)
    server.poll(idle)
    assert seen.flush_seen() == 1
    entry.refresh_from_db()
    assert entry.last_seen is not None
    assert (timezone.now() - entry.last_seen).total_seconds() < 60
    assert entry.runs == running_set(RUNS)


def test_what_a_killed_process_loses_comes_back_with_the_next_poll(
    entry: Device, idle: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loses marks of a second, and nothing else: all that it answers by comes from the database, where its own
    next look or another process finds it. The marks tell when, and what runs; each poll tells both again.
    """
    monkeypatch.setattr(seen, "_buffer", seen.SeenBuffer())  # killed before it wrote
    Device.objects.update(last_seen=None, runs=None)
    successor = Server()
    successor.fast.feed.want(entry.pk, running_digest(RUNS))
    successor.look()
    answer, from_memory = successor.poll(idle)
    assert (answer.status, from_memory) == (304, True)
    seen.flush_seen()
    entry.refresh_from_db()
    assert entry.last_seen is not None
    assert entry.runs == running_set(RUNS)


def test_polls_are_counted_where_django_counts_them(server: Server, idle: dict[str, Any]) -> None:
    counter = wsgi.Metrics.get_instance().responses_by_status_view_method.labels("304", "device-poll", "GET")
    server.fast.tally.flush()
    before = counter._value.get()
    for _ in range(3):
        server.poll(idle)
    server.fast.tally.flush()
    assert counter._value.get() - before == 3


def test_a_poll_from_memory_writes_no_line_of_the_log(server: Server, idle: dict[str, Any], caplog: Any) -> None:
    caplog.set_level("DEBUG")
    caplog.clear()
    server.poll(idle)
    assert not caplog.records


# --- who is let in -----------------------------------------------------------------------------------------------


def test_a_revoked_device_is_turned_away_at_the_next_look(server: Server, entry: Device, idle: dict[str, Any]) -> None:
    devices.revoke(device=entry, actor="ann")
    server.look()
    answer, from_memory = server.poll(idle)
    assert (answer.status, from_memory) == (401, False)


def test_a_credential_that_was_good_dies_with_its_epoch(server: Server, entry: Device, idle: dict[str, Any]) -> None:
    devices.reissue(device=entry, actor="ann")
    server.look()
    assert server.poll(idle)[0].status == 401
    entry.refresh_from_db()
    renewed = {**idle, "HTTP_AUTHORIZATION": f"Bearer {credentials.credential_for(entry)}"}
    assert (server.poll(renewed)[0].status, server.poll(renewed)[1]) == (304, True)


def test_a_credential_that_was_verified_while_the_device_was_revoked_is_not_remembered(
    server: Server, entry: Device, idle: dict[str, Any]
) -> None:
    """The look came between the check and the memo of it."""
    claim = credentials.verify(idle["HTTP_AUTHORIZATION"])
    devices.revoke(device=entry, actor="ann")
    server.look()
    assert not server.fast.feed.table.admit(claim.device, claim.epoch, idle["HTTP_AUTHORIZATION"])
    assert server.poll(idle)[0].status == 401


@pytest.mark.parametrize("where", [6, 8, 10, -1])
def test_a_credential_that_differs_in_one_place_is_nobodys(server: Server, idle: dict[str, Any], where: int) -> None:
    text = idle["HTTP_AUTHORIZATION"]
    where %= len(text)
    forged = text[:where] + chr(ord(text[where]) ^ 1) + text[where + 1 :]
    answer, from_memory = server.poll({**idle, "HTTP_AUTHORIZATION": forged})
    assert (answer.status, from_memory) == (401, False)


# --- how it learns -----------------------------------------------------------------------------------------------


def test_every_process_learns_of_views_that_another_one_signed(
    server: Server, entry: Device, idle: dict[str, Any]
) -> None:
    other = Server()
    running(release("2.0.0"))
    server.look()
    answer, _ = server.poll(idle)
    assert answer.status == 200
    moved = {**idle, "HTTP_IF_NONE_MATCH": tag_of(answer, RUNS)}
    other.fast.feed.table.know({running_digest(RUNS): RUNS})
    other.look()
    assert (other.poll(moved)[0].status, other.poll(moved)[1]) == (304, True)


def test_a_device_that_changes_is_looked_at_anew_though_its_new_kind_is_known(
    server: Server, entry: Device, idle: dict[str, Any]
) -> None:
    """First it gets the labels of another that is at rest, then it fails where that one goes on."""
    newer = running(release("2.0.0"), group=group("berlin", site=["berlin"]))
    other = at_rest(server, device("cam-2", labels={"site": "berlin"}, runs=RUNS))
    assert server.poll(idle)[1]
    devices.set_labels(device=entry, labels={"site": "berlin"}, actor="ann")
    server.look()
    assert server.poll(idle)[0].status == 200
    moved = at_rest(server, entry)
    rollouts.note_events(entry, [event("failed", newer.release, rollout=newer)])
    server.look()
    assert server.poll(moved)[0].status == 200
    assert server.poll(other)[1]


def test_whatever_may_alter_an_answer_stands_in_the_log(registry: Registry) -> None:
    first, second = release("1.0.0"), release("2.0.0")
    one, two, site = device(), device("cam-2", state=Device.State.PENDING), group()
    started = running(first)
    line = Model.objects.get()
    campaign = feedback.create_campaign(name="n", model=line, expires_at=timezone.now() + timedelta(days=1))
    of_all = (
        lambda: running(second), lambda: rollouts.pause(rollout=started, actor="a"),
        lambda: rollouts.resume(rollout=started, actor="a"), lambda: rollouts.cancel(rollout=started, actor="a"),
        lambda: releases.revoke(release=second, reason="bad"), lambda: feedback.end_campaign(campaign=campaign),
        lambda: releases.set_when_nothing(model=line, policy="stop"),
        lambda: devices.save_group(group=site, name="site", selector="a=b"),
        lambda: devices.delete_group(group=site),
        lambda: trust.store_role("other", 1, b"{}", timezone.now()),
    )  # fmt: skip
    of_one = (
        lambda: devices.set_labels(device=one, labels={"a": "b"}, actor="a"),
        lambda: rollouts.pin(device=one, model=MODEL, version="1.0.0", actor="a"),
        lambda: devices.reissue(device=one, actor="a"), lambda: devices.revoke(device=one, actor="a"),
        lambda: devices.record_events(one, post(sdk="9"), exists=lambda runs: True),
        lambda: devices.record_events(one, replace(post(sdk="9"), abilities=Abilities(opset=9)), exists=bool),
    )  # fmt: skip
    failing = running(first)
    fails = (lambda: rollouts.note_events(one, [event("failed", first, rollout=failing)]),)
    for act in (*of_one[:1], *fails, *of_one[1:]):
        assert _news(act) == (False, {one.pk})
    assert _news(lambda: devices.approve(device=two, actor="a")) == (False, {two.pk})
    for act in of_all:
        assert _news(act) == (True, set())


def _news(act: Callable[[], object]) -> tuple[bool, set[int]]:
    before = changes.newest()
    act()
    news = changes.since(before)
    assert news is not None
    return news.policy, set(news.devices)


def test_what_does_not_alter_an_answer_does_not_wake_every_process(registry: Registry) -> None:
    entry, rollout = device(sdk="0.1.0"), running(release("1.0.0"))
    before = changes.newest()
    devices.record_events(entry, post(event("downloading")), exists=lambda runs: True)
    rollouts.note_events(entry, [event("downloading", rollout.release, rollout=rollout)])
    devices.mark_seen(entry.pk)
    devices.flush_seen()
    assert changes.newest() == before


def test_a_rollout_locks_the_counters_row_at_its_end_alone(registry: Registry) -> None:
    """A start that counted devices after its stamp would hold up every revocation meanwhile."""
    device(runs=RUNS)
    plans = [rollouts.StagePlan(percent=50), rollouts.StagePlan(percent=100)]
    made = rollouts.create(release=release("1.0.0"), group=None, stages=plans, actor="ann")
    for act in (lambda: rollouts.start(rollout=made, actor="ann"), lambda: rollouts.pause(rollout=made, actor="ann")):
        with CaptureQueriesContext(connection) as queries:
            act()
        told = [query["sql"] for query in queries]
        first = next(place for place, sql in enumerate(told) if "devices_revision" in sql)
        after = [sql for sql in told[first:] if "SAVEPOINT" not in sql]
        assert all("devices_revision" in sql or "devices_change" in sql for sql in after), after
        assert any("devices_change" in sql for sql in after)


def test_a_log_that_was_thinned_or_restored_is_not_read_on(db: None) -> None:
    for number in (1, 2, 3):
        changes.device_changed(number)
    second = Position(2, Change.objects.get(revision=2).key)
    assert changes.since(second).devices == {3}
    assert changes.since(Position(2, "another")) is None  # a restored backup went another way
    assert changes.since(Position(9, "ahead")) is None  # it is older than what was read
    Change.objects.filter(revision__lt=3).delete()
    assert changes.since(second) is None
    assert changes.since(Position()) is None


def test_the_log_is_thinned_but_for_what_processes_have_yet_to_read(db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "KEPT", 2)
    for number in range(1, 6):
        changes.device_changed(number)
    changes.thin()
    assert list(Change.objects.values_list("revision", flat=True)) == [3, 4, 5]


def test_a_restored_database_is_read_anew(server: Server, entry: Device, idle: dict[str, Any]) -> None:
    """The table knows a device as it was after the backup."""
    devices.set_labels(device=entry, labels={"site": "berlin"}, actor="ann")
    server.look()
    table = server.fast.feed.table
    Change.objects.all().delete()
    Revision.objects.all().delete()
    Device.objects.update(state=Device.State.REVOKED)
    server.look()
    assert server.fast.feed.table is not table
    assert server.poll(idle)[0].status == 401


# --- when in doubt, Django ---------------------------------------------------------------------------------------


def test_a_process_that_cannot_read_the_log_stops_answering_from_memory(
    server: Server, idle: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: object) -> None:
        raise DatabaseError("away")

    monkeypatch.setattr(changes, "since", away)
    server.fast.feed._look_quietly()
    assert server.poll(idle)[1]  # for the moment
    late = server.fast.feed.good_until + 0.001
    monkeypatch.setattr(wsgi, "monotonic", lambda: late)
    answer, from_memory = server.poll(idle)
    assert (answer.status, from_memory) == (304, False)


def test_without_a_trust_root_the_fleet_is_not_read_in_vain(db: None, own_folder: Any) -> None:
    device()
    process = feeds.Feed()
    with CaptureQueriesContext(connection) as queries:
        process._look_quietly()
    assert process.good_until == 0
    assert not any("devices_device" in query["sql"] for query in queries)


def test_a_view_is_left_to_django_when_its_time_comes(
    server: Server, clock: Clock, idle: dict[str, Any], settings: Any
) -> None:
    lifetime = (settings.VIEW_LIFETIME - settings.VIEW_RENEW_BEFORE).total_seconds() / 3600
    clock.wait(lifetime - 0.01)
    assert server.poll(idle)[1]
    clock.wait(0.02)
    answer, from_memory = server.poll(idle)
    assert (answer.status, from_memory) == (200, False)


def test_keys_far_apart_do_not_fill_the_memory(entry: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.api.fastpoll.table.SPARSE", 1_000)
    far = device("far", pk=10_000_000)
    process = Server()
    assert len(process.fast.feed.table.epoch) < 10_000
    assert process.poll(request(far))[0].status == 200


def test_the_setting_leaves_it_out(settings: Any) -> None:
    told = []
    for settings.FAST_POLL in (False, True):
        told.append(type(importlib.reload(entry_point).application).__name__)
    assert told == ["WSGIHandler", "FastPoll"]


# --- traps of others ---------------------------------------------------------------------------------------------


def test_trap_9_a_poll_writes_nothing_and_so_holds_no_rollout_up(server: Server, idle: dict[str, Any]) -> None:
    """hawkBit's polls wrote rows, and stood in the way of rollout transactions. The marks' statement is on its own."""
    running(release("2.0.0"))  # also one that has to be decided anew, and signed
    server.look()
    for environ, written in ((idle, {"trust_deviceview"}), (request(None), set())):
        with CaptureQueriesContext(connection) as queries:
            server.poll(environ)
        writes = {part.split('"')[1] for part in (query["sql"] for query in queries) if part.startswith(("UPD", "INS"))}
        assert writes == written
    signed = DeviceView.objects.get().version
    server.look()
    with CaptureQueriesContext(connection) as queries:
        server.poll({**idle, "HTTP_IF_NONE_MATCH": str(Tag(signed, running_digest(RUNS)))})
    assert len(queries) == 0


def test_trap_13_what_is_looked_at_now_and_then_does_not_grow_with_the_fleet(server: Server) -> None:
    """hawkBit's periodic scan of all devices loaded the database at 1.2 million. Here changes are read, not devices."""

    def looked() -> tuple[int, list[str]]:
        with CaptureQueriesContext(connection) as queries:
            server.look()
        return len(queries), [query["sql"] for query in queries if 'FROM "devices_device"' in query["sql"]]

    server.look()
    few = looked()
    for number in range(30):
        device(f"more-{number}")
    assert looked() == few == (few[0], [])
    changes.device_changed(Device.objects.last().pk)
    number, of_devices = looked()
    assert (number - few[0], len(of_devices)) == (2, 1)  # that one, by its key, and its failures
    assert "IN (" in of_devices[0]
