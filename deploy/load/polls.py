"""One thread, one epoll, many sockets: asks as fast as answers come. Loopback only, whatever the caller says.

It shares the machine with the server, and says what it took of it itself.
"""

import ipaddress
import select
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from urllib.parse import urlsplit

from deploy.bench.poll import cpu

MOST_CONNECTIONS, MOST_SECONDS = 20_000, 600.0
SOURCES = 200  # addresses of 127.0.0.0/8 to call from: each has its own ports to use up
PATIENCE = 10.0  # seconds without any answer at all


class RefusedError(Exception):
    """What was asked for is not what this tool is for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`keep_alive` False: a connection for each poll. It ends when the time is up."""

    url: str
    connections: int
    seconds: float
    keep_alive: bool = True

    def address(self) -> tuple[str, int]:
        """Where to connect, which must be this machine: nobody else's server is put under load."""
        parts = urlsplit(self.url)
        host = {"localhost": "127.0.0.1"}.get(parts.hostname or "", parts.hostname or "")
        try:
            loopback = ipaddress.IPv4Address(host).is_loopback
        except ValueError:
            loopback = False
        if not loopback or parts.scheme != "http":
            raise RefusedError(f"expected http:// and a loopback address such as 127.0.0.1; got {self.url!r:.80}")
        if not (1 <= self.connections <= MOST_CONNECTIONS and 0 < self.seconds <= MOST_SECONDS):
            raise RefusedError(f"expected up to {MOST_CONNECTIONS} connections and {MOST_SECONDS:g} seconds")
        return host, parts.port or 80


@dataclass(slots=True)
class Result:
    """`seconds`: of the run. Latencies in seconds, from the first byte sent (or connecting) to the last received."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    connections: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    own_cpu: float = 0.0
    server_cpu: float = 0.0

    @property
    def polls(self) -> int:
        return sum(self.statuses.values())


@dataclass(slots=True)
class _Open:
    socket: socket.socket
    began: float
    data: bytes = b""
    sent: bool = False


def run(plan: Plan, requests: Sequence[bytes], pid: int) -> Result:
    """Poll until the time is up. `pid`: the server, whose children count too. Each request keeps its connection."""
    sent = requests if plan.keep_alive else [closing(request) for request in requests]
    load = _Load(plan, sent)
    before, own, began = cpu(pid), time.process_time(), time.perf_counter()
    load.run()
    load.result.seconds = time.perf_counter() - began
    load.result.own_cpu = time.process_time() - own
    load.result.server_cpu = (cpu(pid) - before) / 1e9
    return load.result


def closing(request: bytes) -> bytes:
    return request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


class _Load:
    def __init__(self, plan: Plan, requests: Sequence[bytes]) -> None:
        self.result = Result()
        self._plan, self._address = plan, plan.address()
        self._requests = cycle(requests)
        self._epoll = select.epoll()
        self._open: dict[int, _Open] = {}

    def run(self) -> None:
        end = time.perf_counter() + self._plan.seconds
        try:
            for _ in range(self._plan.connections):
                self._connect()
            while (now := time.perf_counter()) < end and self._open:
                events = self._epoll.poll(min(PATIENCE, end - now))
                if not events and time.perf_counter() < end:
                    raise TimeoutError(f"no answer in {PATIENCE:g} s")
                for number, event in events:
                    self._happened(self._open[number], event)
        finally:
            for each in self._open.values():
                each.socket.close()
            self._epoll.close()

    def _connect(self) -> None:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.bind((f"127.0.0.{1 + self.result.connections % SOURCES}", 0))
        each = _Open(made, time.perf_counter())
        made.connect_ex(self._address)
        self.result.connections += 1
        self._open[made.fileno()] = each
        self._epoll.register(made.fileno(), select.EPOLLOUT)

    def _happened(self, each: _Open, event: int) -> None:
        try:
            if event & (select.EPOLLERR | select.EPOLLOUT) and not each.sent:
                self._send(each)
            elif not (received := each.socket.recv(65_536)):
                raise ConnectionError("closed before the answer was whole")
            else:
                each.data += received
                self._received(each)
        except OSError as error:
            self.result.errors[f"{type(error).__name__}: {error.strerror or error}"] += 1
            self._again(each)

    def _send(self, each: _Open) -> None:
        each.socket.send(next(self._requests))
        each.sent = True
        self._epoll.modify(each.socket.fileno(), select.EPOLLIN)

    def _received(self, each: _Open) -> None:
        head, end, body = each.data.partition(b"\r\n\r\n")
        if not end:
            return
        status, headers = _parsed(head)
        if len(body) < int(headers.get("content-length", 0)):
            return
        self.result.latencies.append(time.perf_counter() - each.began)
        self.result.statuses[status] += 1
        if not self._plan.keep_alive or headers.get("connection") == "close":
            self._again(each)
            return
        each.data, each.began = b"", time.perf_counter()
        self._send(each)

    def _again(self, each: _Open) -> None:
        self._close(each)
        self._connect()

    def _close(self, each: _Open) -> None:
        del self._open[each.socket.fileno()]
        self._epoll.unregister(each.socket.fileno())
        each.socket.close()


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}
