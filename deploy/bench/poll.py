"""CPU of an idle poll through the real WSGI application, beside a view that does nothing and one done by the book."""

import io
import sys
from functools import partial
from pathlib import Path
from typing import Any

from deploy.bench.measure import Row, Scale, Section, interleaved
from deploy.bench.server import Server, add_idle_fleet
from device_sdk.protocol import polls

WRAPPER = 22.0  # us, of the prototype that answers before Django
BAR = f"{WRAPPER:g} us (prototype)"
NOTES = (
    "In one process, without HTTP parsing, on SQLite in a temporary file: PostgreSQL costs more per query.",
    "CPU of all threads, so ours includes the one that writes last-seen marks each second.",
    "The bar is an answer before Django, still to be built; today the poll is a Django view behind all middleware.",
)


class Caller:
    """Calls the application as a WSGI server does, response closed, and checks what came."""

    def __init__(self, application: Any, path: str, expected: int, **headers: str) -> None:
        self._application = application
        self._expected = str(expected)
        self.headers: dict[str, str] = {}
        self.environ = {
            "REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": "root=1", "SCRIPT_NAME": "",
            "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "8000", "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "127.0.0.1:8000", "wsgi.version": (1, 0),
            "wsgi.input": io.BytesIO(), "wsgi.errors": sys.stderr, "wsgi.url_scheme": "http",
            "wsgi.multithread": True, "wsgi.multiprocess": True, "wsgi.run_once": False, **headers,
        }  # fmt: skip

    def __call__(self) -> None:
        response = self._application(dict(self.environ), self._start)
        b"".join(response)
        response.close()

    def _start(self, status: str, headers: list[tuple[str, str]], *_: object) -> None:
        if not status.startswith(self._expected):
            raise RuntimeError(f"{self.environ['PATH_INFO']}: expected {self._expected}; got {status}")
        self.headers = dict(headers)


def measure(_folder: Path, scale: Scale, server: Server) -> Section:
    callers = _callers(add_idle_fleet(server))
    spent = interleaved(callers, rounds=scale.rounds, calls=scale.requests)
    ours, hello, plain = (spent[name] for name in ("ours", "hello", "plain"))
    queries = {name: _queries(callers[name]) for name in ("ours", "plain")}
    return Section("An idle poll, answered 304", [
        Row("CPU of a poll", ours, "us", hello, "hello world, same middleware", BAR, ours <= WRAPPER),
        Row("CPU of a poll", ours, "us", plain, "DRF, token look-up, ORM, UPDATE"),
        Row("CPU of the plain DRF poll", plain, "us", hello, "hello world, same middleware"),
        Row("SQL queries of a poll", queries["ours"], "queries", queries["plain"], "DRF, token look-up, ORM, UPDATE"),
    ], NOTES)  # fmt: skip


def _callers(device: Any) -> dict[str, Caller]:
    from fleet.devices import credentials
    from fleet.wsgi import application

    bearer = f"Bearer {credentials.credential_for(device)}"
    first = Caller(application, polls.POLL, 200, HTTP_AUTHORIZATION=bearer)
    first()
    tag = polls.Tag(polls.Tag.parse(first.headers["ETag"]).view, device.runs.digest)
    ours = partial(Caller, application, HTTP_IF_NONE_MATCH=str(tag))
    return {
        "hello": ours("/bench/hello", 200),
        "plain": ours("/bench/poll", 304, HTTP_AUTHORIZATION=f"Token {_token(device.name)}"),
        "ours": ours(polls.POLL, 304, HTTP_AUTHORIZATION=bearer),
    }


def _token(name: str) -> str:
    from django.contrib.auth.models import User
    from rest_framework.authtoken.models import Token

    return str(Token.objects.create(user=User.objects.create(username=name)).key)


def _queries(call: Caller) -> int:
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    with CaptureQueriesContext(connection) as queries:
        call()
    return len(queries)
