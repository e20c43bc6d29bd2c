"""A fleet, the server's WSGI application with and without the fast poll, and a clock that both read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.core.handlers.wsgi import WSGIHandler
from django.db import transaction
from django.test import RequestFactory
from django.utils import timezone

from device_sdk.protocol import polls
from device_sdk.protocol.polls import Tag, running_digest
from fleet.api.fastpoll import wsgi
from fleet.api.fastpoll.wsgi import FastPoll
from fleet.devices import credentials
from fleet.devices.models import Device
from fleet.rollouts import snapshots

Headers = dict[str, str]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Headers
    body: bytes

    @property
    def told(self) -> tuple[Any, ...]:
        """What a device acts upon."""
        said = {name: self.headers.get(name) for name in ("ETag", polls.WANT_HEADER, "Location")}
        if self.status == 200:
            said |= {name: self.headers.get(name) for name in ("Content-Type", "Cache-Control", polls.INTERVAL_HEADER)}
        return self.status, said, self.body


def ask(application: Any, environ: dict[str, Any]) -> Answer:
    said: list[Any] = []
    response = application(dict(environ), lambda status, headers, *_: said.extend([int(status[:3]), dict(headers)]))
    body = b"".join(response)
    if hasattr(response, "close"):
        response.close()
    return Answer(said[0], said[1], body)


def request(
    device: Device | None, tag: str | None = None, *, query: str = "", method: str = "GET", **more: str
) -> dict[str, Any]:
    headers = {"HTTP_HOST": "localhost"}
    if device is not None:
        headers["HTTP_AUTHORIZATION"] = f"Bearer {credentials.credential_for(device)}"
    if tag is not None:
        headers["HTTP_IF_NONE_MATCH"] = tag
    made = RequestFactory().generic(method, f"{polls.POLL}?{query}", **{**headers, **more})
    return dict(made.environ)


def tag_of(answer: Answer, runs: dict[str, str]) -> str:
    return str(Tag(Tag.parse(answer.headers["ETag"]).view, running_digest(runs)))


@dataclass
class Server:
    """One web process: Django, and the same behind the fast poll. `passed` counts what went on to Django."""

    django: WSGIHandler = field(default_factory=WSGIHandler)
    passed: int = 0

    def __post_init__(self) -> None:
        self.fast = FastPoll(self._counted)
        self.fast.feed.ensure = lambda: None  # type: ignore[method-assign]  # tests look by themselves
        self.look()

    def _counted(self, *arguments: Any) -> Any:
        self.passed += 1
        return self.django(*arguments)

    def look(self) -> None:
        """As its thread does twice a second."""
        self.fast.feed.look()

    def poll(self, environ: dict[str, Any]) -> tuple[Answer, bool]:
        """The answer, and whether it came from memory."""
        before = self.passed
        return ask(self.fast, environ), self.passed == before

    def by_django(self, environ: dict[str, Any]) -> Answer:
        return ask(self.django, environ)


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._ahead, self._now = timedelta(), timezone.now
        patch.setattr(timezone, "now", self.now)
        patch.setattr(wsgi, "time", lambda: self.now().timestamp())

    def now(self) -> datetime:
        return self._now() + self._ahead

    def wait(self, hours: float) -> None:
        self._ahead += timedelta(hours=hours)

    def reset(self) -> None:
        self._ahead = timedelta()


@contextmanager
def undone() -> Iterator[None]:
    """What is written in the block is taken back; nothing that this process keeps of it is believed."""
    snapshots._kept = None
    with transaction.atomic():
        yield
        transaction.set_rollback(True)
    snapshots._kept = None
