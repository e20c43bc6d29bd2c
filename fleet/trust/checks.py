"""Misconfiguration of keys and secrets, told at start with an id and a hint.

E001 demonstration secrets in production · W002 no online key · E003 the online key cannot be used ·
E004 offline keys on a production server · W005 a role runs out · W006 a role has run out ·
W007 the root names another online key · W008 the root names the next online key already.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, register
from django.core.checks import Warning as Caution
from django.db import DatabaseError
from django.utils import timezone

from fleet.errors import Unavailable
from fleet.trust import keys, selectors, standing

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


@register(Tags.database)
def check_online_key_is_named(*, databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """fleet.W007 and W008. Warnings: `migrate` runs them, and must work in the middle of a change of keys."""
    if not databases or not settings.ONLINE_KEY_PUBLIC.exists():
        return []
    try:
        root = selectors.in_force().root
        return list(_unnamed_key(root.version, selectors.online_holders(root))) if root else []
    except (DatabaseError, Unavailable):  # not migrated yet; or said by E003
        return []


def _unnamed_key(version: int, holders: Collection[str]) -> Iterator[CheckMessage]:
    wanted = ", ".join(sorted(keyid[:12] for keyid in holders))
    if keys.online_public(holders).keyid not in holders:
        message = f"Root {version} names the online key {wanted}; this server has another: no device gets a view."
        hint = "Set FLEET_ONLINE_KEY_URI and FLEET_ONLINE_KEY_PUBLIC to that key."
        yield Caution(message, hint=hint, id="fleet.W007")
    elif keys.online_public().keyid not in holders:
        message = f"Root {version} names FLEET_NEXT_ONLINE_KEY ({wanted}): it signs already, the old one no more."
        hint = "Move it to FLEET_ONLINE_KEY_URI and _PUBLIC, take FLEET_NEXT_ONLINE_KEY_URI out, destroy the old key."
        yield Caution(message, hint=hint, id="fleet.W008")


def _missing_key() -> Iterator[CheckMessage]:
    if settings.ONLINE_KEY_PUBLIC.exists():
        return
    message = f"There is no online key ({settings.ONLINE_KEY_PUBLIC}): no device gets a view."
    hint = "Run trust_init, or set FLEET_ONLINE_KEY_URI and FLEET_ONLINE_KEY_PUBLIC."
    yield Caution(message, hint=hint, id="fleet.W002")  # no error: `migrate` comes before trust_init, and runs checks


def _unusable_key() -> Iterator[CheckMessage]:
    if not settings.ONLINE_KEY_PUBLIC.exists():
        return
    for variable, load in (("FLEET_ONLINE_KEY", keys.online_signer), ("FLEET_NEXT_ONLINE_KEY", keys.next_signer)):
        try:
            load()
        except Unavailable as error:
            hint = f"{variable}_URI must be readable by the server and belong to {variable}_PUBLIC."
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
    who = f"Run: {standing.renewal_command(found.role)}"
    held_up = "no device updates" if found.role in selectors.WARN_BEFORE else "no device updates this model"
    if found.expired:
        return Caution(f"Role {found.role!r} has expired: {held_up}.", hint=who, id="fleet.W006")
    return Caution(f"Role {found.role!r} expires at {found.expires_at:%F %H:%M} UTC.", hint=who, id="fleet.W005")
