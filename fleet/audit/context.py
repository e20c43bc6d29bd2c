"""Who acts, for as long as a request, a command or a task lasts: a context variable, so nothing leaks to the next.

It is set cheaply at the door and only read when something is recorded: a poll pays for one assignment.
"""

import getpass
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery.signals import task_postrun, task_prerun
from django.http import HttpRequest, HttpResponse

from fleet.audit.addresses import client_address

USER, TOKEN, DEVICE, COMMAND, TASK, GUARD, NOBODY = "user", "token", "device", "command", "task", "guard", "nobody"


@dataclass(frozen=True, slots=True)
class Acting:
    """`kind` one of the above; `name` of the user, token, device, OS user or task; `where` it came in."""

    kind: str
    name: str
    address: str = ""
    where: str = ""


Source = Callable[[], Acting]  # called when something is recorded: only then it is known who the caller is
_source: ContextVar[Source | None] = ContextVar("fleet_audit_source", default=None)
_silent: ContextVar[bool] = ContextVar("fleet_audit_silent", default=False)
_tasks: dict[str, Token[Source | None]] = {}


def current() -> Acting:
    source = _source.get()
    return source() if source else of_process()


@contextmanager
def acting(who: Acting | Source) -> Iterator[None]:
    token = _source.set((lambda: who) if isinstance(who, Acting) else who)
    try:
        yield
    finally:
        _source.reset(token)


@contextmanager
def by_definition() -> Iterator[None]:
    """For what a version of this server brings along, such as the permissions of its groups: nobody did it."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def is_silent() -> bool:
    return _silent.get()


def of_process() -> Acting:
    """A command, or a shell: the person at the machine. Arguments are left out, they may hold secrets."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    command = sys.argv[1] if program == "manage.py" and len(sys.argv) > 1 else ""
    return Acting(COMMAND, _os_user(), where=f"{program} {command}".strip()[:200])


def _os_user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry
        name = str(os.getuid())
    behind = os.environ.get("SUDO_USER", "")
    return f"{behind} (as {name})" if behind and behind != name else name


# --- requests ----------------------------------------------------------------------------------------------------


class ActingMiddleware:
    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        with acting(lambda: of_request(request)):
            return self.get_response(request)


def of_request(request: HttpRequest) -> Acting:
    """By the time that something is recorded, the view has authenticated: DRF notes it on Django's request, too."""
    kind, name = _caller(request)
    return Acting(kind, name, client_address(request), f"{request.method} {_door(request)}"[:200])


def _caller(request: HttpRequest) -> tuple[str, str]:
    device = getattr(request, "fleet_device", None)
    if device is not None:
        return DEVICE, str(device)
    user, token = getattr(request, "user", None), getattr(request, "auth", None)
    if user is None or not user.is_authenticated:
        return NOBODY, ""
    if token is not None:
        return TOKEN, f"{token.name} ({user.get_username()})"
    return USER, user.get_username()


def _door(request: HttpRequest) -> str:
    """The route with its names, not the address: what stands there may be secret."""
    match = request.resolver_match
    return f"/{match.route}" if match else "?"


# --- tasks -------------------------------------------------------------------------------------------------------


def follow_tasks() -> None:
    task_prerun.connect(_begin_task, dispatch_uid="fleet.audit.begin")
    task_postrun.connect(_end_task, dispatch_uid="fleet.audit.end")


def _begin_task(task_id: str = "", task: Any = None, **_: object) -> None:
    who = Acting(TASK, str(getattr(task, "name", "?")), where="task")
    _tasks[task_id] = _source.set(lambda: who)


def _end_task(task_id: str = "", **_: object) -> None:
    token = _tasks.pop(task_id, None)
    if token is not None:
        _source.reset(token)
