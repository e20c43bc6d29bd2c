"""Events on disk: none lost, none sent for ever, and what the bound pushed out is told."""

import os

import pytest

from device_sdk.errors import StorageError
from device_sdk.outbox import Outbox
from device_sdk.protocol import limits
from device_sdk.protocol.events import COMMITTED, Event
from device_sdk.protocol.names import ReleasePath


def event(number, **changes):
    values = {
        "id": f"{number:032x}", "at": 1.5e9 + number, "kind": COMMITTED, "model": "detector",
        "release": ReleasePath("detector", "1.0.0", "default"), "detail": {"calls": 20},
    }  # fmt: skip
    return Event(**{**values, **changes})


def ids(pending):
    return [int(each.id, 16) for each in pending.events]


def test_events_survive_a_restart_in_order_and_whole(tmp_path):
    outbox = Outbox(tmp_path)
    for number in range(5):
        outbox.add(event(number))
    again = Outbox(tmp_path)
    assert again.pending().events == tuple(event(number) for number in range(5))


def test_events_stay_until_they_are_acknowledged(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.add(event(1))
    sent = outbox.pending()
    outbox.add(event(2))
    assert ids(outbox.pending()) == [1, 2]
    outbox.acknowledge(sent)
    assert ids(outbox.pending()) == [2]
    assert ids(Outbox(tmp_path).pending()) == [2]


def test_same_event_is_kept_once(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.add(event(1))
    outbox.add(event(1))
    assert ids(outbox.pending()) == [1]


def test_post_takes_what_the_protocol_allows(tmp_path):
    outbox = Outbox(tmp_path)
    for number in range(limits.EVENTS_PER_POST + 20):
        outbox.add(event(number))
    assert len(outbox.pending().events) == limits.EVENTS_PER_POST
    for number in range(100):
        outbox.add(event(1_000 + number, reason="r" * 500, detail={f"k{i}": "v" * 200 for i in range(32)}))
    outbox.acknowledge(outbox.pending())
    outbox.acknowledge(outbox.pending())
    sent = outbox.pending()
    assert 0 < len(sent.events) < 100


def test_bound_drops_the_oldest_and_counts_them_across_restarts(tmp_path):
    outbox = Outbox(tmp_path, bound=10)
    for number in range(13):
        outbox.add(event(number))
    outbox = Outbox(tmp_path, bound=10)
    pending = outbox.pending()
    assert pending.dropped == 3
    assert ids(pending) == list(range(3, 13))
    outbox.acknowledge(pending)
    assert Outbox(tmp_path).pending().dropped == 0


def test_line_torn_by_a_power_cut_costs_only_itself(tmp_path):
    outbox = Outbox(tmp_path)
    for number in range(3):
        outbox.add(event(number))
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    again = Outbox(tmp_path)
    again.add(event(7))
    assert ids(Outbox(tmp_path).pending()) == [0, 1, 7]


def test_full_disk_keeps_the_event_in_memory_and_writes_it_with_the_next(tmp_path, monkeypatch):
    outbox = Outbox(tmp_path)
    outbox.add(event(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outbox.add(event(2))
    outbox.add(event(3))
    assert ids(Outbox(tmp_path).pending()) == [1, 2, 3]


def test_acknowledging_on_a_full_disk_says_so(tmp_path, monkeypatch):
    outbox = Outbox(tmp_path)
    outbox.add(event(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        outbox.acknowledge(outbox.pending())


def test_event_is_on_disk_before_add_returns(tmp_path, monkeypatch):
    synced = []
    outbox = Outbox(tmp_path)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), real(descriptor)))
    outbox.add(event(1))
    assert len(synced) == 1


def test_events_that_the_server_will_never_take_are_dropped_and_counted(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.add(event(1))
    outbox.discard(outbox.pending())
    assert outbox.pending() == type(outbox.pending())((), 1)
