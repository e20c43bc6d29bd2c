"""CPU of an idle poll in granian, beside the same server's hello world and a poll done by the book; at three sizes."""

import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from deploy.bench.measure import Row, Scale, Section
from deploy.bench.server import Server
from deploy.bench.wire import granian

ROOT = Path(__file__).resolve().parent.parent.parent
CONNECTIONS = 8
TURNS = 9
REST = 1.2  # marks are written every second
CORES = sorted(os.sched_getaffinity(0))
NOTES = (
    "CPU of granian with all its threads, HTTP included. The servers are held to one core, and who asks to another.",
    "SQLite, which writes in the same process. A turn is 1,000 different devices, each once, over 8 kept connections.",
    "Afterwards: what a process does by itself in the next 1.2 s: two looks at the change log, marks of last seen.",
    "The plain poll is DRF with its token look-up, the ORM and an UPDATE, through the same middleware and server.",
    "100 rollouts: 99 that admit a tenth of a percent each stand before the one that admits all.",
)


@dataclass(frozen=True)
class Spent:
    """CPU microseconds for each call: in the turn, and in the rest after it."""

    asked: float
    after: float


@dataclass
class Target:
    """A server that answers, and what is asked of it."""

    port: int
    pid: int
    requests: Iterator[bytes]
    expected: bytes

    def turn(self, calls: int, rest: float = 0) -> "Spent":
        """Over connections of this turn: the server closes those that rest."""
        rounds = max(1, calls // CONNECTIONS)
        with ExitStack() as stack:
            connections = [
                stack.enter_context(socket.create_connection(("127.0.0.1", self.port), 60)) for _ in range(CONNECTIONS)
            ]
            self._ask_each(connections)
            before = cpu(self.pid)
            for _ in range(rounds):
                self._ask_each(connections)
            asked = cpu(self.pid)
        time.sleep(rest)
        per_call = rounds * CONNECTIONS * 1_000
        return Spent((asked - before) / per_call, (cpu(self.pid) - asked) / per_call)

    def until_from_memory(self, number: int) -> None:
        """Every device has polled, and is answered without Django; which says so in its Server header."""
        for _ in range(200):
            time.sleep(0.3)
            with socket.create_connection(("127.0.0.1", self.port), 60) as connection:
                answers = self._ask_each([connection])
            if b"server: Fleet\r\n" in answers[0]:
                break
        else:
            raise RuntimeError(f"the table is not used: {answers[-1]!r}")
        self.turn(number)

    def _ask_each(self, connections: Sequence[socket.socket]) -> list[bytes]:
        for connection in connections:
            connection.sendall(next(self.requests))
        return [self._receive(connection) for connection in connections]

    def _receive(self, connection: socket.socket) -> bytes:
        answer = b""
        while b"\r\n\r\n" not in answer:  # each answer comes in one piece
            part = connection.recv(4_096)
            if not part:
                raise ConnectionError(f"the server hung up after {answer!r}")
            answer += part
        if not answer.startswith(self.expected):
            raise RuntimeError(f"expected {self.expected!r}; got {answer[:300]!r}")
        return answer


def measure(folder: Path, scale: Scale, _server: Server) -> Section:
    sizes = {"few": (1_000, 1), "rollouts": (1_000, 100), "many": (scale.devices, 1)}
    if scale.devices < 1_000:
        sizes = {"few": (scale.devices, 3)}  # it proves that it runs
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, CORES)
        fleets = {name: stack.enter_context(resting_fleet(folder / name, *size)) for name, size in sizes.items()}
        few = fleets["few"]
        targets = {
            "hello": few.target(few.hello, b"HTTP/1.1 200"),
            "plain": few.target([few.plain], b"HTTP/1.1 304"),
            **{name: fleet.target(fleet.polls, b"HTTP/1.1 304") for name, fleet in fleets.items()},
        }
        for name, fleet in fleets.items():
            targets[name].until_from_memory(len(fleet.polls))
        turns = _turns(targets, scale)
        size, devices = fleets.get("many", few).table()
    asked = {name: statistics.median(turn.asked for turn in each) for name, each in turns.items()}
    after = {name: statistics.median(turn.after for turn in each) for name, each in turns.items()}
    largest, crowded = ("many", "rollouts") if "many" in fleets else ("few", "few")
    hello, plain, few_us, many, crowd = (asked[name] for name in ("hello", "plain", "few", largest, crowded))
    return Section("An idle poll, answered 304", [
        Row("CPU of a poll", few_us, "us", hello, "hello world, same server", "<= 1.6 x", few_us <= 1.6 * hello),
        Row("CPU of the plain poll: DRF, token look-up, ORM, UPDATE", plain, "us", few_us, "ours", ">= 40 x",
            plain >= 40 * few_us),
        Row(f"with {scale.devices:,} devices", many, "us", few_us, "with 1,000", "<= 1.1 x", many <= 1.1 * few_us),
        Row("with 100 rollouts", crowd, "us", few_us, "with 1", "<= 1.5 x", crowd <= 1.5 * few_us),
        Row("looks and marks afterwards, for each poll", after[largest], "us", after["hello"], "looks alone"),
        Row(f"memory of the table, {devices:,} devices", size / devices, "B a device", 2, "a cohort alone"),
    ], NOTES)  # fmt: skip


def _turns(targets: dict[str, Target], scale: Scale) -> dict[str, list[Spent]]:
    """Each target's in every round, but for the first, which warms up. The first and the last rest afterwards."""
    turns: dict[str, list[Spent]] = {name: [] for name in targets}
    calls, rest = scale.calls // 2, REST if scale.calls >= 1_000 else 0.6
    first, *_, last = targets
    for number in range(min(TURNS, scale.rounds) + 1):
        for name, target in targets.items():
            spent = target.turn(calls // 10 if name == "plain" else calls, rest if name in {first, last} else 0)
            if number:
                turns[name].append(spent)
    return turns


@dataclass
class Fleet:
    port: int
    pid: int
    polls: Sequence[bytes]
    plain: bytes

    @property
    def hello(self) -> list[bytes]:
        """With the same headers, which cost granian the same."""
        return [re.sub(rb"^GET \S+", b"GET /hello", request) for request in self.polls]

    def target(self, requests: Sequence[bytes], expected: bytes) -> Target:
        return Target(self.port, self.pid, cycle(requests), expected)

    def table(self) -> tuple[int, int]:
        """Bytes and devices."""
        asked = re.sub(rb"^GET \S+", b"GET /bench/table", self.polls[0]).replace(
            b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.port), 20) as connection:
            connection.sendall(asked)
            answer = b"".join(iter(lambda: connection.recv(4_096), b""))
        size, devices = answer.partition(b"\r\n\r\n")[2].split()
        return int(size), int(devices)


@contextmanager
def resting_fleet(
    folder: Path, devices: int, rollouts: int, application: str = "deploy.bench.hello:application"
) -> Iterator[Fleet]:
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "deploy.bench.crowd", str(folder), str(devices), str(rollouts)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    made = json.loads((folder / "requests.json").read_text())
    own = {"FLEET_VAR": str(folder), "FLEET_DATABASE_URL": f"sqlite:///{folder / 'fleet.sqlite3'}"}
    os.sched_setaffinity(0, CORES[-1:])  # which the server inherits. Left alone, threads that wait for each other
    # across cores make one process cost twice what its twin does
    with granian({**os.environ, **own}, application) as (port, pid):
        os.sched_setaffinity(0, CORES[:-1] or CORES)
        yield Fleet(port, pid, [request.encode() for request in made["polls"]], made["plain"].encode())


def cpu(pid: int) -> int:
    """Nanoseconds of a process and its children, all threads."""
    return sum(
        int(path.read_text().split()[0])
        for each in _tree(pid)
        for path in Path(f"/proc/{each}/task").glob("*/schedstat")
    )


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from _tree(int(child))
