"""What a service refuses. Each error carries a stable code, a plain message and, where it helps, a detail.

The API renders them as `{code, message, detail}`; commands and admin actions print the message.
"""

from collections.abc import Mapping
from typing import Any


class FleetError(Exception):
    """Base of what a caller did wrong or cannot have. `status` is the HTTP status at the border."""

    status = 400

    def __init__(self, code: str, message: str, detail: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.detail = dict(detail or {})


class Invalid(FleetError):
    """Well received, but not acceptable."""

    status = 422


class Unauthorized(FleetError):
    """Who calls is not known, or no longer."""

    status = 401


class Denied(FleetError):
    """The caller may not."""

    status = 403


class NotFound(FleetError):
    status = 404


class Conflict(FleetError):
    """Another state than the caller assumed: look again, then retry."""

    status = 409


class TooLarge(FleetError):
    status = 413


class TooMany(FleetError):
    """Too often; `retry_after` seconds from now the caller may try again."""

    status = 429

    def __init__(self, code: str, message: str, *, retry_after: int) -> None:
        super().__init__(code, message)
        self.retry_after = retry_after


class Unavailable(FleetError):
    """The server cannot do this now (not set up, or a part of it is away)."""

    status = 503
