"""The address of a mirror as a view may name it: a scheme, a host, maybe a port. No path, so that only files are asked
for; no user name, for it would be sent to whoever answers.
"""

import re
from contextlib import suppress

from device_sdk.protocol.errors import ProtocolError

MIRROR_CHARS = 200
_HOST = r"(?:([a-z0-9][a-z0-9._-]*)|\[([0-9a-f:.]+)\])"
_ADDRESS = re.compile(rf"https?://{_HOST}(?::([1-9][0-9]{{0,4}}))?/?", re.IGNORECASE | re.ASCII)


def check_mirror(text: object) -> str:
    """In its one form: small letters, no slash at its end. Raises ProtocolError."""
    match = _ADDRESS.fullmatch(text) if isinstance(text, str) and len(text) <= MIRROR_CHARS else None
    if match is None or int(match[3] or 1) > 65_535 or not (match[1] or _is_v6(match[2])):
        wanted = f"http(s)://host or http(s)://host:port, of at most {MIRROR_CHARS} characters"
        raise ProtocolError("malformed", f"mirror: expected {wanted}; got {text!r:.80}")
    return match[0].lower().rstrip("/")


def mirror_or_none(value: object) -> str:
    """Of a view: what is no address as we know them is no mirror, and no reason to refuse what the view assigns."""
    with suppress(ProtocolError):
        return check_mirror(value)
    return ""


def _is_v6(text: str) -> bool:
    from ipaddress import IPv6Address  # a device's start names none

    with suppress(ValueError):
        return bool(IPv6Address(text))
    return False
