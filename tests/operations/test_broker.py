"""The broker of files between processes: nothing half-written is read, nothing is taken twice, nothing piles up."""

import json
import multiprocessing
import queue
from pathlib import Path

import pytest
from kombu import Connection, Queue

import fleet.celery

MESSAGES = 300
WRITERS = 3


def connect(folder: Path) -> Connection:
    assert fleet.celery.app
    options = {
        "data_folder_in": str(folder / "queue"),
        "data_folder_out": str(folder / "queue"),
        "control_folder": str(folder / "control"),
    }
    return Connection("fleet-files://localhost", transport_options=options)


def write(folder: Path, first: int) -> None:
    with connect(folder) as connection:
        producer = connection.Producer()
        for number in range(first, first + MESSAGES):
            producer.publish({"number": number}, routing_key="celery", declare=[Queue("celery")])


def read(folder: Path, results: multiprocessing.Queue, done: multiprocessing.Event) -> None:
    taken = []
    with connect(folder) as connection:
        channel = connection.default_channel
        while True:
            last = done.is_set()
            try:
                taken.append(channel._get("celery")["body"])
            except queue.Empty:
                if last:
                    break
    results.put(taken)


def test_writers_and_readers_in_several_processes_pass_each_message_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    results, done = context.Queue(), context.Event()
    readers = [context.Process(target=read, args=(tmp_path, results, done)) for _ in range(2)]
    writers = [context.Process(target=write, args=(tmp_path, n * MESSAGES)) for n in range(WRITERS)]
    for process in [*readers, *writers]:
        process.start()
    for process in writers:
        process.join(60)
    done.set()
    taken = [body for _ in readers for body in results.get(timeout=60)]
    for process in readers:
        process.join(60)

    assert [process.exitcode for process in [*writers, *readers]] == [0] * 5
    assert len(taken) == len(set(taken)) == WRITERS * MESSAGES
    assert list((tmp_path / "queue").iterdir()) == []


def test_a_message_can_be_taken_only_when_it_is_whole(tmp_path, monkeypatch):
    """Looked at in the worst moment: its file is there, and nothing is in it yet."""
    write_text, seen = Path.write_text, []

    def interrupted(path: Path, text: str, **options) -> int:
        path.touch()
        seen.append(channel._size("celery"))
        return write_text(path, text, **options)

    with connect(tmp_path) as connection:
        channel = connection.default_channel
        monkeypatch.setattr(Path, "write_text", interrupted)
        channel._put("celery", {"number": 1})

        assert seen == [0]
        assert channel._size("celery") == 1


def test_a_message_that_cannot_be_read_is_dropped_and_the_next_is_given(tmp_path):
    with connect(tmp_path) as connection:
        channel = connection.default_channel
        (tmp_path / "queue" / "0_cut-off.celery.msg").write_bytes(b"")
        connection.Producer().publish({"number": 1}, routing_key="celery", declare=[Queue("celery")])

        assert channel._get("celery")["properties"]["delivery_info"]["routing_key"] == "celery"
        with pytest.raises(queue.Empty):
            channel._get("celery")
    assert list((tmp_path / "queue").iterdir()) == []


def test_messages_come_in_the_order_in_which_they_were_sent_and_only_to_their_queue(tmp_path):
    with connect(tmp_path) as connection:
        channel = connection.default_channel
        for number in range(20):
            channel._put("celery", {"number": number})
            channel._put("other.celery", {"number": -1})

        assert channel._size("celery") == 20
        assert [channel._get("celery")["number"] for _ in range(20)] == list(range(20))
        assert channel._size("other.celery") == 20


def bind(folder: Path, name: str) -> None:
    with connect(folder) as connection:
        Queue(name, exchange="shared", channel=connection.default_channel).declare()


def test_bindings_made_at_once_are_all_kept(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=bind, args=(tmp_path, f"q{number}")) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    table = json.loads((tmp_path / "control" / "shared.exchange").read_text())
    assert sorted(row[2] for row in table) == [f"q{number}" for number in range(6)]
