"""Two probes. `/healthz`: this process answers. `/readyz`: what it needs answers too.

They come before every other middleware: a probe knows neither the public host name nor TLS.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import structlog
from django.db import connection
from django.http import HttpRequest, HttpResponse, JsonResponse

from fleet.celery import app
from fleet.releases import storage

logger = structlog.get_logger(__name__)
BROKER_SECONDS = 2


class HealthMiddleware:
    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        answer = PROBES.get(request.path_info)
        if answer is None or request.method not in {"GET", "HEAD"}:
            return self.get_response(request)
        response = answer()
        response["Cache-Control"] = "no-store"
        return response


def live() -> HttpResponse:
    return JsonResponse({"status": "ok"})


def ready() -> HttpResponse:
    """503 when a part is away. Anybody may ask, so the answer names the part, and only the log says why."""
    parts = {name: _state(name, check) for name, check in PARTS.items()}
    whole = all(state == "ok" for state in parts.values())
    return JsonResponse({"status": "ok" if whole else "unavailable", **parts}, status=200 if whole else 503)


def _state(name: str, check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:  # noqa: BLE001  # whatever it is, the part is not usable
        logger.warning("not_ready", part=name, error=repr(error))
        return "unavailable"
    return "ok"


def _database() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def _objects() -> None:
    store = cast("Any", storage.store())
    if not storage.is_local():
        store.connection.meta.client.head_bucket(Bucket=store.bucket_name)
        return
    folder = Path(store.location)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write to {folder}")


def _broker() -> None:
    with app.connection_for_write() as broker:
        broker.ensure_connection(max_retries=1, timeout=BROKER_SECONDS)
        broker.default_channel  # noqa: B018  # opening it is what talks to the broker


PARTS = {"database": _database, "objects": _objects, "broker": _broker}
PROBES = {"/healthz": live, "/readyz": ready}
