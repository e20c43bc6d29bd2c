"""Device credentials: a mac over who the device is and which epoch, so that checking one needs no look-up.

It proves only that this server issued it. Whether the device is still welcome, and whether the epoch is still the
present one, is for `services.authenticate` to say. A leaked secret lets nobody install a model (trust is TUF's).
"""

import hmac
import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from hashlib import sha256

from django.conf import settings

from fleet.devices.models import Device
from fleet.errors import Unauthorized

CREDENTIAL, VIEW = "credential", "view"  # purposes: a mac made for one is worth nothing for the other
MAC_BYTES = 24

_CREDENTIAL = re.compile(r"([0-9]{1,18})\.([0-9]{1,9})\.([A-Za-z0-9_-]{1,32})\.([A-Za-z0-9_-]{32})")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a genuine credential says."""

    device: int
    epoch: int


def secrets() -> dict[str, bytes]:
    """Secrets by key id, newest first. `checks` has seen to their form."""
    pairs = (item.partition(":") for item in settings.DEVICE_SECRETS)
    return {key_id: bytes.fromhex(secret) for key_id, _, secret in pairs}


def credential_for(device: Device) -> str:
    """`<device pk>.<epoch>.<key id>.<mac>`, signed by the newest secret."""
    key_id, secret = next(iter(secrets().items()))
    return f"{device.pk}.{device.epoch}.{key_id}.{_mac(secret, CREDENTIAL, device.pk, device.epoch)}"


def verify(header: str | None) -> Claim:
    """Read `Authorization: Bearer <credential>`. Raises Unauthorized without saying what was wrong with it."""
    scheme, _, value = (header or "").partition(" ")
    match = _CREDENTIAL.fullmatch(value.strip())
    if scheme.lower() != "bearer" or not match:
        raise refused()
    claim = Claim(device=int(match[1]), epoch=int(match[2]))
    secret = secrets().get(match[3])
    if secret is None or not hmac.compare_digest(_mac(secret, CREDENTIAL, claim.device, claim.epoch), match[4]):
        raise refused()
    return claim


def refused() -> Unauthorized:
    return Unauthorized("unauthorized", "expected a device's valid credential as a bearer token")


def view_key(device: Device) -> str:
    """The part of a plain TUF address that lets its bearer read this device's view, and nothing else."""
    return _mac(next(iter(secrets().values())), VIEW, device.pk, device.epoch)


def check_view_key(device: Device, key: str) -> bool:
    expected = [_mac(secret, VIEW, device.pk, device.epoch) for secret in secrets().values()]
    given = key.encode("utf-8", "replace")
    return any(hmac.compare_digest(good.encode(), given) for good in expected)


def _mac(secret: bytes, purpose: str, device: int, epoch: int) -> str:
    digest = hmac.new(secret, f"{purpose}|{device}|{epoch}".encode(), sha256).digest()
    return urlsafe_b64encode(digest[:MAC_BYTES]).decode()
