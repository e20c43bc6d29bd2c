"""The load generator: bounded, for this machine alone, and honest about what failed."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from deploy.load.polls import Plan, RefusedError, run

REQUESTS = [b"GET /poll/%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(7)]
ANSWER = b"HTTP/1.1 304 Not Modified\r\nContent-Length: 0\r\n\r\n"


@contextmanager
def server(answers_each: int) -> Iterator[tuple[str, set[bytes]]]:
    """Answers so many requests on a connection, and hangs up. Collects what was asked."""
    asked: set[bytes] = set()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            for _ in range(answers_each):
                data = connection.recv(4_096)
                if not data:
                    return
                asked.add(data)
                connection.sendall(ANSWER)

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=[connection], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=[listening], daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        listening.shutdown(socket.SHUT_RDWR)


def test_kept_connections_carry_every_devices_poll() -> None:
    with server(answers_each=1_000_000) as (url, asked):
        result = run(Plan(url, 3, 0.3), REQUESTS, 1)
    assert asked == set(REQUESTS)
    assert result.connections == 3
    assert result.statuses == {304: result.polls}
    assert result.polls > 20
    assert len(result.latencies) == result.polls
    assert not result.errors


def test_a_connection_for_each_poll_says_so_and_is_counted() -> None:
    with server(answers_each=1) as (url, asked):
        result = run(Plan(url, 3, 0.3, keep_alive=False), REQUESTS, 1)
    assert all(request.endswith(b"\r\nConnection: close\r\n\r\n") for request in asked)
    assert result.polls <= result.connections <= result.polls + 3
    assert result.polls > 20


def test_who_hangs_up_in_the_middle_is_an_error_and_not_a_poll() -> None:
    with server(answers_each=2) as (url, _):
        result = run(Plan(url, 3, 0.3), REQUESTS, 1)
    assert sum(result.errors.values()) > 5
    assert result.polls > 10


@pytest.mark.parametrize(
    "plan",
    [
        Plan("http://192.0.2.1:80", 1, 1.0), Plan("http://fleet.example", 1, 1.0), Plan("https://127.0.0.1", 1, 1.0),
        Plan("http://127.0.0.1", 1_000_000, 1.0), Plan("http://127.0.0.1", 1, 1e9), Plan("http://127.0.0.1", 0, 1.0),
    ],
)  # fmt: skip
def test_nobody_elses_server_is_put_under_load_and_no_run_is_endless(plan: Plan) -> None:
    with pytest.raises(RefusedError):
        run(plan, REQUESTS, 1)
