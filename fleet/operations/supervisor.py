"""Keep a few child processes running, and end all of them together. One thread, no shell.

A child leads its own session, so that ending it ends what it started. It asks the kernel for a SIGTERM should this
process be killed: nothing outlives the supervisor.
"""

import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

LOOK_SECONDS = 0.2
STEADY_SECONDS = 30.0  # alive so long, a child is sound, and its next fall is its first
MAX_BACKOFF_SECONDS = 30.0
GRACE_SECONDS = 20.0  # to finish requests and tasks after SIGTERM
PR_SET_PDEATHSIG = 1
CHUNK = 65536


@dataclass
class Child:
    name: str
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float = 0.0
    falls: int = 0
    pending: bytes = field(default=b"", repr=False)


@dataclass
class Supervisor:
    """`prefixed`: lines of a child go through here and get its name; else it writes to our own output."""

    children: Sequence[Child]
    environment: dict[str, str]
    prefixed: bool = True
    output: IO[bytes] = field(default_factory=lambda: sys.stdout.buffer)
    stopping: bool = False
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def run(self) -> None:
        """Until SIGINT, SIGTERM or SIGHUP. On any way out, no child is left."""
        with self._signals():
            try:
                while not self.stopping:
                    self._start_due()
                    self._forward(LOOK_SECONDS)
                    self._notice_falls()
            finally:
                self._end_all()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._stop) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def _start_due(self) -> None:
        for child in self.children:
            if child.process is None and time.monotonic() >= child.start_at and not self.stopping:
                self._start(child)

    def _start(self, child: Child) -> None:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if self.prefixed else {}
        child.process = subprocess.Popen(
            child.command,
            stdin=subprocess.DEVNULL,
            env=self.environment,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509  # safe: this process has one thread
            **streams,
        )
        child.started = time.monotonic()
        if child.process.stdout:
            os.set_blocking(child.process.stdout.fileno(), False)
            self.selector.register(child.process.stdout, selectors.EVENT_READ, child)

    def _forward(self, seconds: float) -> None:
        if not self.selector.get_map():
            time.sleep(seconds)
            return
        for key, _ in self.selector.select(seconds):
            self._read(key.data)

    def _read(self, child: Child) -> None:
        """Whole lines go out at once, so that two children do not mix within one."""
        pipe = child.process.stdout if child.process else None
        if pipe is None or pipe.closed:
            return
        content = pipe.read(CHUNK)
        if content is None:  # nothing there for now
            return
        *lines, child.pending = (child.pending + content).split(b"\n")
        if not content:
            self.selector.unregister(pipe)
            pipe.close()
            lines, child.pending = [child.pending] if child.pending else [], b""
        for line in lines:
            self._write(child.name, line)

    def _write(self, name: str, line: bytes) -> None:
        with suppress(BrokenPipeError):
            self.output.write(b"%-6s | %s\n" % (name.encode(), line))
            self.output.flush()

    def _notice_falls(self) -> None:
        for child in self.children:
            code = child.process.poll() if child.process else None
            if child.process is None or code is None:
                continue
            _signal_group(child.process.pid, signal.SIGKILL)  # what it left behind holds its port or its tasks
            self._drain(child)
            now = time.monotonic()
            child.falls = 1 if now - child.started > STEADY_SECONDS else child.falls + 1
            wait = min(2.0 ** (child.falls - 1), MAX_BACKOFF_SECONDS)
            child.process, child.start_at = None, now + wait
            self._write("serve", f"{child.name} ended with {code}; starts again in {wait:.0f} s".encode())

    def _drain(self, child: Child) -> None:
        while child.process and child.process.stdout and not child.process.stdout.closed:
            self._forward(LOOK_SECONDS)

    def _end_all(self) -> None:
        """SIGTERM to each child, which ends its own in good order; after the grace SIGKILL to all that is left."""
        running = [child for child in self.children if child.process]
        for child in running:
            _signal(child, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(child.process and child.process.poll() is None for child in running) and time.monotonic() < deadline:
            self._forward(LOOK_SECONDS / 2)
        for child in running:
            if child.process:
                _signal_group(child.process.pid, signal.SIGKILL)
                child.process.wait()
                self._drain(child)
        self.selector.close()


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process:
        with suppress(ProcessLookupError):
            child.process.send_signal(number)


def _signal_group(leader: int, number: signal.Signals) -> None:
    """Its group exists as long as one member lives, even when the leader is gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _die_with(parent: int) -> Any:
    """What a child runs before its program. Linux only; elsewhere only a `kill -9` of the supervisor leaves orphans."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGTERM)

    return ask
