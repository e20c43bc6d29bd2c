"""Show every date in the viewer's zone: `fleet.js` stores the browser's zone in a cookie, this activates it."""

from collections.abc import Callable
from urllib.parse import unquote
from zoneinfo import ZoneInfo

from django.http import HttpRequest, HttpResponse
from django.utils import timezone

COOKIE = "fleet-zone"


class ViewerTimeZone:
    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        with timezone.override(_zone(unquote(request.COOKIES.get(COOKIE, "")))):
            return self.get_response(request)


def _zone(name: str) -> ZoneInfo | None:
    """The zone by its IANA name; None (the server's) for whatever else a cookie may hold."""
    try:
        return ZoneInfo(name) if name else None
    except (KeyError, ValueError, OSError):
        return None
