"""Misconfiguration of keys and secrets, told at start with an id and a hint.

E001 demonstration secrets in production · W002 no online key · E003 the online key cannot be used ·
E004 offline keys on a production server · W005 a role runs out · W006 a role has run out.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, register
from django.core.checks import Warning as Caution
from django.db import DatabaseError
from django.utils import timezone

from fleet.errors import Unavailable
from fleet.trust import keys, selectors

DEMO_DEVICE_SECRET = "00" * 32


@register(Tags.security)
def check_secrets(**_: Any) -> list[CheckMessage]:
    """fleet.E001. Outside production the demonstration keys are what makes the first look need nothing."""
    if not settings.PRODUCTION:
        return []
    found: list[CheckMessage] = []
    if settings.SECRET_KEY == settings.DEMO_SECRET:
        found.append(_demonstration("SECRET_KEY", "FLEET_SECRET_KEY"))
    secrets = [entry.partition(":")[2] for entry in settings.DEVICE_SECRETS]
    if not secrets or DEMO_DEVICE_SECRET in secrets:
        found.append(_demonstration("DEVICE_SECRETS", "FLEET_DEVICE_SECRETS"))
    return found


@register(Tags.security)
def check_online_key(**_: Any) -> list[CheckMessage]:
    """fleet.W002, E003, E004."""
    return [*_missing_key(), *_unusable_key(), *_offline_keys()]


@register(Tags.database)
def check_role_expiry(*, databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """fleet.W005 and W006, by `check --database default` and by `migrate`."""
    if not databases:
        return []
    try:
        return [_expiry(found) for found in selectors.expiring(timezone.now())]
    except DatabaseError:  # not migrated yet
        return []


def _missing_key() -> Iterator[CheckMessage]:
    if settings.ONLINE_KEY_PUBLIC.exists():
        return
    message = f"There is no online key ({settings.ONLINE_KEY_PUBLIC}): no device gets a view."
    hint = "Run trust_init, or set FLEET_ONLINE_KEY_URI and FLEET_ONLINE_KEY_PUBLIC."
    yield Caution(message, hint=hint, id="fleet.W002")  # no error: `migrate` comes before trust_init, and runs checks


def _unusable_key() -> Iterator[CheckMessage]:
    if not settings.ONLINE_KEY_PUBLIC.exists():
        return
    try:
        keys.online_signer()
    except Unavailable as error:
        hint = "FLEET_ONLINE_KEY_URI must be readable by the server and belong to FLEET_ONLINE_KEY_PUBLIC."
        yield Error(f"The online key cannot be used: {error.message}", hint=hint, id="fleet.E003")


def _offline_keys() -> Iterator[CheckMessage]:
    """Whoever takes this machine must not get the keys that say what may run."""
    if not settings.PRODUCTION:
        return
    folders = {settings.VAR / "keystore", Path(urlsplit(settings.ONLINE_KEY_URI).path).parent}
    found = sorted(path for folder in folders for name in ("root-*.pem", "targets-*.pem") for path in folder.glob(name))
    if found:
        hint = f"Move {', '.join(path.name for path in found)} to offline media; commands take --keystore DIR."
        yield Error(f"Offline keys lie on this server, in {found[0].parent}.", hint=hint, id="fleet.E004")


def _demonstration(setting: str, variable: str) -> CheckMessage:
    return Error(f"{setting} is the demonstration's, which everybody knows.", hint=f"Set {variable}.", id="fleet.E001")


def _expiry(found: selectors.Expiring) -> CheckMessage:
    offline = found.role in selectors.WARN_BEFORE
    who = (
        f"Run trust_renew {found.role}." if offline else f"CI signs it anew: fleet-publish renew --model {found.role}."
    )
    if found.expired:
        return Caution(f"Role {found.role!r} has expired: no device updates.", hint=who, id="fleet.W006")
    return Caution(f"Role {found.role!r} expires at {found.expires_at:%F %H:%M} UTC.", hint=who, id="fleet.W005")
