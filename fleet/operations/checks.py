"""Misconfiguration, caught before the server starts: system checks with ids and hints.

Keys and the demonstration's secrets are the business of `fleet.trust.checks`; here are E010 and W010 upward.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register  # noqa: A004  # Django's names

from fleet.accounts import limits
from fleet.audit import comments

MIN_SECRET_BYTES = 32
DEVICE_SECRET = re.compile(rf"[a-z0-9-]{{1,16}}:(?:[0-9a-f]{{2}}){{{MIN_SECRET_BYTES},}}")
POSITIVE = (
    "POLL_INTERVAL", "LAST_SEEN_FLUSH", "MAX_ARTIFACT_BYTES", "VALIDATION_SECONDS", "VALIDATION_MEMORY",
    "PRESIGNED_SECONDS", "BATCH_RETENTION_DAYS", "TICK_SECONDS", "SWEEP_SECONDS",
    "WEB_WORKERS", "WEB_THREADS", "TASK_WORKERS",
)  # fmt: skip
Findings = Iterator[CheckMessage]


def register_all() -> None:
    for check in (secrets, addresses, parts, intervals, rates, people):
        register(_as_check(check), Tags.security)


def _as_check(find: Callable[[], Findings]) -> Callable[..., list[CheckMessage]]:
    def run(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
        return list(find())

    return run


def secrets() -> Findings:
    malformed = [number for number, item in enumerate(settings.DEVICE_SECRETS) if not DEVICE_SECRET.fullmatch(item)]
    names = [item.partition(":")[0] for item in settings.DEVICE_SECRETS]
    if malformed or not names or len(set(names)) != len(names):
        yield Error(
            "FLEET_DEVICE_SECRETS is malformed.",
            hint=f"Newest first, comma-separated: <id>:<hex of {MIN_SECRET_BYTES} or more random bytes>, each id once.",
            id="fleet.E010",
        )
    if settings.PRODUCTION and settings.DEBUG:
        yield Error("FLEET_DEBUG is on in production.", hint="It shows settings to strangers.", id="fleet.E011")


def addresses() -> Findings:
    public = urlsplit(settings.PUBLIC_URL)
    if public.scheme not in {"http", "https"} or not public.hostname:
        yield Error(
            f"FLEET_PUBLIC_URL is {settings.PUBLIC_URL!r}, which is no address.",
            hint="The address that devices and CI reach, such as https://fleet.example.org",
            id="fleet.E012",
        )
    elif settings.BEHIND_TLS and public.scheme != "https":
        yield Error(
            "FLEET_PUBLIC_URL is not https, but FLEET_BEHIND_TLS is on: devices would be redirected, and refuse.",
            hint="Set FLEET_PUBLIC_URL to the https address of the proxy.",
            id="fleet.E013",
        )
    if settings.PRODUCTION and not settings.BEHIND_TLS:
        yield Warning(
            "FLEET_BEHIND_TLS is off in production: credentials travel in the clear.",
            hint="Put a proxy with TLS in front. Models stay safe without it (they are signed), log-ins do not.",
            id="fleet.W010",
        )
    if settings.PRODUCTION and "*" in settings.ALLOWED_HOSTS:
        yield Error("FLEET_ALLOWED_HOSTS allows every host.", hint="Name the public host.", id="fleet.E014")


def parts() -> Findings:
    """What runs on one machine only. A small production site may want that: warnings, not errors."""
    if not settings.PRODUCTION:
        return
    if database_engine().endswith("sqlite3"):
        yield Warning(
            "The database is SQLite.", hint="Set FLEET_DATABASE_URL=postgres://… for several machines.", id="fleet.W011"
        )
    if not settings.REDIS_URL:
        yield Warning("The broker is a folder.", hint="Set FLEET_REDIS_URL for several machines.", id="fleet.W012")
    if not settings.S3_BUCKET:
        yield Warning("Objects live in a local folder.", hint="Set FLEET_S3_BUCKET and its friends.", id="fleet.W013")


def intervals() -> Findings:
    for name in POSITIVE:
        if getattr(settings, name) <= 0:
            yield Error(f"FLEET_{name} must be over 0.", hint="Leave it out for the default.", id="fleet.E015")


def rates() -> Findings:
    for name in limits.ALL:
        if not limits.readable(getattr(settings, name)):
            yield Error(
                f"FLEET_{name} is {getattr(settings, name)!r}, which is no limit.",
                hint="Such as 5/10 minutes; empty for no limit.",
                id="fleet.E016",
            )
    if settings.PROXIES < 0:
        yield Error("FLEET_PROXIES must be 0 or more.", hint="How many proxies of yours are in front.", id="fleet.E017")


def people() -> Findings:
    for pattern in comments.unknown():
        yield Error(
            f"FLEET_COMMENTS names {pattern!r}, which is no action that takes a comment.",
            hint=f"Some of: {', '.join(sorted(comments.TAKEN))}; * stands for any characters.",
            id="fleet.E018",
        )
    if settings.PRODUCTION and settings.WEBHOOK_PRIVATE:
        yield Warning(
            "FLEET_WEBHOOK_PRIVATE is on: webhooks may go to addresses inside your network.",
            hint="Leave it out unless the receiver is in there, and let only superusers subscribe.",
            id="fleet.W018",
        )


def database_engine() -> str:
    return str(settings.DATABASES["default"]["ENGINE"])
