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
from pathlib import Path
from urllib.parse import urlsplit

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
    once: bool = False  # as many polls as connections, and then no more

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
class Caller:
    """A device as far as a poll goes."""

    name: str
    credential: str
    tag: str = ""

    def request(self, host: str, *, keep_alive: bool) -> bytes:
        lines = ["GET /api/device/v1/poll HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {self.credential}"]
        lines += [f"If-None-Match: {self.tag}"] if self.tag else []
        lines += [] if keep_alive else ["Connection: close"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


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
    caller: Caller
    began: float
    data: bytes = b""
    sent: bool = False


def run(plan: Plan, callers: Sequence[Caller], pids: Sequence[int] = ()) -> Result:
    """Poll until the time is up. `pids`: the server's processes, whose children count too."""
    load = _Load(plan, callers)
    before, own, began = cpu(pids), time.process_time(), time.perf_counter()
    load.run()
    load.result.seconds = time.perf_counter() - began
    load.result.own_cpu = time.process_time() - own
    load.result.server_cpu = cpu(pids) - before
    return load.result


class _Load:
    def __init__(self, plan: Plan, callers: Sequence[Caller]) -> None:
        self.result = Result()
        self._plan, self._address = plan, plan.address()
        self._host = f"{self._address[0]}:{self._address[1]}"
        self._callers = cycle(callers)
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
        each = _Open(made, next(self._callers), time.perf_counter())
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
        each.socket.send(each.caller.request(self._host, keep_alive=self._plan.keep_alive))
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
        each.caller.tag = headers.get("etag", each.caller.tag)
        if self._plan.once:
            self._close(each)
            return
        if not self._plan.keep_alive or headers.get("connection") == "close":
            self._again(each)
            return
        each.caller, each.data, each.began = next(self._callers), b"", time.perf_counter()
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


# --- what it costs the server ------------------------------------------------------------------------------------


def cpu(pids: Sequence[int]) -> float:
    """Seconds of processor time of these processes and their children, so far."""
    return sum(_spent(pid) for pid in _with_children(pids))


def _with_children(pids: Sequence[int]) -> set[int]:
    parents = {int(path.name): _stat(int(path.name))[1] for path in Path("/proc").iterdir() if path.name.isdigit()}
    found, new = set(pids), set(pids)
    while new:
        new = {pid for pid, parent in parents.items() if int(parent or 0) in new} - found
        found |= new
    return found


def _spent(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11] or 0) + int(fields[12] or 0)) / 100


def _stat(pid: int) -> list[str]:
    """Without number and name, which may hold anything; zeros of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["0"] * 20


def first_polls(url: str, callers: Sequence[Caller], *, at_once: int = 16, seconds: float = 60.0) -> Counter[int]:
    """Each caller's first, which has a view signed for it and gives it its tag."""
    statuses = Counter[int]()
    for start in range(0, len(callers), at_once):
        some = callers[start : start + at_once]
        statuses += run(Plan(url, len(some), seconds, keep_alive=False, once=True), some).statuses
    return statuses
