"""What every request passes: the log's view of it, and what browsers are told to refuse."""

from collections.abc import Callable

import structlog
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse
from django_structlog.middlewares import RequestMiddleware

from fleet.audit.addresses import client_address

# unfold brings Alpine.js, which evaluates the expressions in its attributes ('unsafe-eval'), and inline scripts and
# styles without nonces ('unsafe-inline'). So this policy does not stop a script that got into a page, which is what
# Django's escaping is for; it does keep such a script from loading more or sending anything elsewhere, and it forbids
# frames, plugins, foreign forms and another base.
_PAGE = (
    "default-src 'self'",
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data:",
    "font-src 'self' data:",
    "connect-src 'self'",
    "worker-src 'self' blob:",
    "object-src 'none'",
    "base-uri 'none'",
    "form-action 'self'",
    "frame-ancestors 'none'",
)
PAGE_POLICY = "; ".join(_PAGE)
OTHER_POLICY = "default-src 'none'; frame-ancestors 'none'"


class LoggedRequests(RequestMiddleware):
    @classmethod
    def bind_ip(cls, request: HttpRequest) -> None:
        """Its own would believe any X-Forwarded-For."""
        structlog.contextvars.bind_contextvars(ip=client_address(request))

    @classmethod
    def bind_user_id(cls, request: HttpRequest) -> None:
        """Who it is takes the session's table: where that is what broke, the failure must be logged all the same."""
        try:
            super().bind_user_id(request)
        except DatabaseError:
            structlog.contextvars.bind_contextvars(user_id=None)

    @staticmethod
    def format_request(request: HttpRequest) -> str:
        """Without what a query says: it may be anything, and people put tokens there."""
        names = "&".join(sorted(request.GET))
        return f"{request.method} {request.path}{'?' if names else ''}{names}"


class ContentPolicy:
    """A Content-Security-Policy on every answer; pages of the admin and of the API's documentation may run scripts."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        page = response.get("Content-Type", "").startswith("text/html")
        response.headers.setdefault("Content-Security-Policy", PAGE_POLICY if page else OTHER_POLICY)
        return response
