"""The admin's log-in: who fails too often waits, and is told how long."""

from collections.abc import Callable
from typing import Any

import structlog
from django import forms
from django.http import HttpRequest, HttpResponse
from unfold.forms import AuthenticationForm

from fleet.accounts import limits
from fleet.audit.addresses import caller_network, client_address
from fleet.errors import TooMany

logger = structlog.get_logger(__name__)


class LoginForm(AuthenticationForm):  # type: ignore[misc]  # unfold ships no types
    """`settings.UNFOLD["LOGIN"]["form"]`. A name that nobody has is counted like any other."""

    request: HttpRequest

    def clean(self) -> dict[str, Any]:
        username = str(self.cleaned_data.get("username", "")).strip().lower()
        network = caller_network(client_address(self.request))
        try:
            limits.check(limits.LOGIN_ADDRESS, network)
            limits.check(limits.LOGIN_USER, username)
            limits.claim(limits.LOGIN, username, network)
        except TooMany as error:
            self.request.locked_out_for = error.retry_after  # type: ignore[attr-defined]  # for the middleware
            logger.warning("login_locked_out", user=username, network=network)
            message = f"Too many failed attempts. Try again in {limits.words(error.retry_after)}."
            raise forms.ValidationError(message, code=error.code) from error
        try:
            cleaned: dict[str, Any] = super().clean()
        except forms.ValidationError:
            limits.failed(limits.LOGIN_ADDRESS, network)
            limits.failed(limits.LOGIN_USER, username)
            raise
        limits.forgive(limits.LOGIN, username, network)
        return cleaned


class LockedOutMiddleware:
    """Give the page that tells of a lock-out its status: 429, with Retry-After."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        seconds = getattr(request, "locked_out_for", 0)
        if seconds:
            response.status_code = 429
            response["Retry-After"] = str(seconds)
        return response
