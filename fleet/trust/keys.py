"""The online key: a securesystemslib signer by URI (file, KMS, HSM), and its public half as JSON."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from django.conf import settings
from securesystemslib.signer import Key, Signer

from fleet.errors import Unavailable


def public_to_json(key: Key) -> str:
    return json.dumps({"keyid": key.keyid, **key.to_dict()}, indent=1) + "\n"


def public_from_json(text: str | bytes) -> Key:
    """Raises ValueError when it is not a public key as `public_to_json` writes it."""
    try:
        fields: dict[str, Any] = json.loads(text)
        return Key.from_dict(fields.pop("keyid"), fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected a public key as JSON; {error!r}") from error


def online_public() -> Key:
    """Read anew each time, so that a rotated key is seen by every process at its next view."""
    return _public(_read(settings.ONLINE_KEY_PUBLIC))


def online_signer() -> Signer:
    return _signer(settings.ONLINE_KEY_URI, _read(settings.ONLINE_KEY_PUBLIC))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unavailable("no_trust_root", f"no online key: {path}: {error.strerror}; run trust_init") from error


@lru_cache(maxsize=4)
def _public(content: bytes) -> Key:
    try:
        return public_from_json(content)
    except ValueError as error:
        raise Unavailable("bad_online_key", f"{settings.ONLINE_KEY_PUBLIC}: {error}") from error


@lru_cache(maxsize=4)  # by the public half: another key is another entry
def _signer(uri: str, public: bytes) -> Signer:
    try:
        return Signer.from_priv_key_uri(uri, _public(public))
    except Unavailable:
        raise
    except Exception as error:  # each KMS and HSM library has its own family
        raise Unavailable("bad_online_key", f"the online key {_shown(uri)} cannot be used: {error}") from error


def _shown(uri: str) -> str:
    """The URI without what may be secret in it."""
    return uri.split("?", maxsplit=1)[0]
