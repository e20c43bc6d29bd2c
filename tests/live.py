"""The real server as processes, `manage.py serve`, on a free port: embedded (SQLite, folders) or production.

Production means PostgreSQL, Redis, S3, two web processes and `FLEET_PRODUCTION`. A test that takes the fixture `live`
runs on both; `embedded` and `production` are each one of them. A server is started once for each xdist worker and
shared, so a test names its own models, devices and rollouts. While no test asks for one, it is stopped: a server
without work still ticks, and cores are few.
"""

import json
import os
import secrets
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError

import psutil
import pytest

from tests.manager import Manager
from tests.services import S3, Postgres, Redis, free_port, running, temporary_folder

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("embedded", "production")
USER = "admin"
# Fast clocks: what takes minutes in the field takes a second here.
FAST = {
    "FLEET_POLL_INTERVAL": "1", "FLEET_TICK_SECONDS": "0.5", "FLEET_SWEEP_SECONDS": "1",
    "FLEET_WEBHOOK_PRIVATE": "1",  # receivers are on this machine
}  # fmt: skip

KNOWN = 1.1  # seconds: what one process changes, every process that answers polls knows within one


@dataclass(frozen=True)
class LiveServer:
    backend: str
    url: str
    env: dict[str, str]
    password: str  # of the superuser `admin`
    log: Path
    keystore: Path  # of the offline keys: `trust_add_model NAME --keystore …`
    manage: Manager  # runs `manage.py` against this server's database, and returns what it printed
    pid: int
    user: str = USER

    def logged(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture(scope="session", params=BACKENDS)
def live(request: pytest.FixtureRequest) -> LiveServer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def embedded() -> Iterator[LiveServer]:
    with serving("embedded", {}) as server, shared(server):
        yield server


@pytest.fixture(scope="session")
def production(postgres: Postgres, redis_server: Redis, s3: S3) -> Iterator[LiveServer]:
    environment = production_environment(postgres, redis_server, s3)
    with serving("production", environment, "--workers", "2") as server, shared(server):
        yield server


NAMES = {"live", *BACKENDS}  # of the fixtures
_shared: list[psutil.Process] = []


@contextmanager
def shared(server: LiveServer) -> Iterator[None]:
    _shared.append(psutil.Process(server.pid))
    yield
    _shared.pop()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    wake_or_rest(is_asked_for=bool(NAMES & set(getattr(item, "fixturenames", ()))))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    if nextitem is None:
        wake_or_rest(is_asked_for=True)  # what has been stopped does not end


def wake_or_rest(*, is_asked_for: bool) -> None:
    """Let the shared servers of this process go on, or stop them, with all their processes, where they stand."""
    for server in _shared:
        if is_asked_for == (server.status() != psutil.STATUS_STOPPED):
            continue
        for process in (server, *server.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.resume() if is_asked_for else process.suspend()


def production_environment(postgres: Postgres, redis_server: Redis, s3: S3) -> dict[str, str]:
    return {
        "FLEET_PRODUCTION": "1",
        "FLEET_BEHIND_TLS": "0",
        "FLEET_SECRET_KEY": secrets.token_urlsafe(48),
        "FLEET_DEVICE_SECRETS": f"test-1:{secrets.token_hex(32)}",
        "FLEET_DATABASE_URL": postgres.new_database(),
        "FLEET_REDIS_URL": redis_server.url,
        "FLEET_S3_BUCKET": s3.new_bucket(),
        "FLEET_S3_ENDPOINT": s3.endpoint,
        "FLEET_S3_ACCESS_KEY": s3.access_key,
        "FLEET_S3_SECRET_KEY": s3.secret_key,
    }


@contextmanager
def serving(backend: str, extra: dict[str, str], *options: str) -> Iterator[LiveServer]:
    """Migrate, set trust up, make the superuser, serve; all ends with the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with temporary_folder(backend) as folder:
        env = environment(folder / "var", url) | extra
        keystore = folder / "var" / "keystore"
        if "FLEET_PRODUCTION" in extra:
            keystore = folder / "offline"
            env |= online_key(folder / "online")
        with closing(Manager(env)) as manage:
            prepare(manage, keystore)
            log = folder / "serve.log"
            command = [sys.executable, "manage.py", "serve", "--port", str(port), "--no-migrate", *options]
            with running(command, log, ready=lambda: probe(f"{url}/readyz"), cwd=ROOT, env=env) as process:
                password = env["DJANGO_SUPERUSER_PASSWORD"]
                yield LiveServer(backend, url, env, password, log, keystore, manage, process.pid)


def online_key(folder: Path) -> dict[str, str]:
    """In production the server gets this key alone; `fleet.E004` refuses to start beside the others."""
    return {
        "FLEET_ONLINE_KEY_URI": f"file2:{folder / 'online.pem'}",
        "FLEET_ONLINE_KEY_PUBLIC": str(folder / "online.pub.json"),
    }


def environment(var: Path, url: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FLEET_", "DJANGO_"))}
    return {
        **inherited,
        **FAST,
        "FLEET_VAR": str(var),
        "FLEET_PUBLIC_URL": url,
        "FLEET_METRICS_TOKEN": secrets.token_hex(),
        "DJANGO_SUPERUSER_PASSWORD": secrets.token_urlsafe(12),
    }


def prepare(manage: Manager, keystore: Path) -> None:
    """The database, the static files, the superuser and the keys of a new server."""
    manage("migrate", "-v0")
    manage("collectstatic", "-v0", "--noinput")
    manage("createsuperuser", "--username", USER, "--email", "a@example.org", "--noinput", "-v0")
    manage("trust_init", "--keystore", str(keystore))
    online = Path(manage.env.get("FLEET_ONLINE_KEY_PUBLIC", keystore / "online.pub.json")).parent
    if online != keystore:
        online.mkdir()
        for path in keystore.glob("online.*"):
            path.rename(online / path.name)


def probe(url: str) -> dict[str, str]:
    """What a health endpoint says; OSError while it is not well."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return dict(json.load(answer))
    except HTTPError as error:
        with error:
            raise URLError(error.read().decode()) from error
