"""How often a caller may fail at a door: log-in, enrolment, API tokens. Counted by `limits`, in Redis or in memory.

Failures count, successes do not: ten thousand devices may enrol by one token from one address. The same wrong token
counts once for its address, so that one device with an old token does not shut its site out; guesses differ.

Without Redis each web process counts for itself. Redis being away opens no door: only nothing is counted then, and the
log says so.
"""

import time
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from math import ceil
from threading import Lock
from typing import TypeVar

import structlog
from django.conf import settings
from limits import RateLimitItem, parse
from limits.errors import StorageError
from limits.storage import storage_from_string
from limits.strategies import FixedWindowRateLimiter

from fleet.errors import TooMany

# Names of settings, `FLEET_LIMIT_…`; an empty one is no limit.
LOGIN = "LIMIT_LOGIN"
LOGIN_USER = "LIMIT_LOGIN_USER"
LOGIN_ADDRESS = "LIMIT_LOGIN_ADDRESS"
ENROL_ADDRESS = "LIMIT_ENROL_ADDRESS"
ENROL_TOKEN = "LIMIT_ENROL_TOKEN"  # noqa: S105  # a setting's name
API_TOKEN = "LIMIT_API_TOKEN"  # noqa: S105
ALL = (LOGIN, LOGIN_USER, LOGIN_ADDRESS, ENROL_ADDRESS, ENROL_TOKEN, API_TOKEN)

Result = TypeVar("Result")
_making = Lock()
logger = structlog.get_logger(__name__)


def check(limit: str, *caller: str) -> None:
    """Raise TooMany (429) where the caller has failed too often. Counts nothing."""
    item = _item(limit)
    if item is not None and not _safely(lambda: _limiter().test(item, *_key(limit, caller)), otherwise=True):
        raise _refusal(limit, item, caller)


def claim(limit: str, *caller: str) -> None:
    """Count a try before it is known how it ends, or raise TooMany: tries at the same time share the limit."""
    item = _item(limit)
    if item is not None and not _safely(lambda: _limiter().hit(item, *_key(limit, caller)), otherwise=True):
        raise _refusal(limit, item, caller)


def failed(limit: str, *caller: str, once_for: str = "") -> None:
    """Count a failure; with `once_for`, the same one counts once in the limit's time."""
    item = _item(limit)
    if item is None:
        return
    if once_for:
        first = type(item)(1, item.multiples, namespace="FAILED")
        if not _safely(lambda: _limiter().hit(first, *_key(limit, (*caller, once_for))), otherwise=False):
            return
    _safely(lambda: _limiter().hit(item, *_key(limit, caller)), otherwise=True)


def forgive(limit: str, *caller: str) -> None:
    item = _item(limit)
    if item is not None:
        _safely(lambda: _limiter().clear(item, *_key(limit, caller)), otherwise=None)


def forget_all() -> None:
    """For tests."""
    _limiter().storage.reset()


def readable(text: str) -> bool:
    """Whether a setting is a limit, such as `5/10 minutes`, or empty."""
    try:
        return not text or bool(parse(text))
    except ValueError:
        return False


def _item(limit: str) -> RateLimitItem | None:
    text: str = getattr(settings, limit)
    return parse(text) if text else None


def _refusal(limit: str, item: RateLimitItem, caller: tuple[str, ...]) -> TooMany:
    stats = _safely(lambda: _limiter().get_window_stats(item, *_key(limit, caller)), otherwise=None)
    seconds = max(1, ceil(stats.reset_time - time.time())) if stats else 60
    return TooMany("too_many_failures", f"too many failures; try again in {words(seconds)}", retry_after=seconds)


def words(seconds: int) -> str:
    return f"{seconds} seconds" if seconds < 100 else f"{ceil(seconds / 60)} minutes"


def _key(limit: str, caller: tuple[str, ...]) -> tuple[str, str]:
    """Nobody's name, address or token is kept readable."""
    return limit, sha256("\n".join(caller).encode("utf-8", "replace")).hexdigest()[:32]


def _limiter() -> FixedWindowRateLimiter:
    """One for the process. First requests come together: one thread makes it and imports Redis's client."""
    with _making:
        return _made()


@cache
def _made() -> FixedWindowRateLimiter:
    if settings.REDIS_URL:
        return FixedWindowRateLimiter(storage_from_string(settings.REDIS_URL, wrap_exceptions=True))
    return FixedWindowRateLimiter(storage_from_string("memory://"))


def _safely(act: Callable[[], Result], *, otherwise: Result) -> Result:
    try:
        return act()
    except StorageError as error:
        logger.warning("limits_unavailable", error=repr(error.__cause__ or error))
        return otherwise
