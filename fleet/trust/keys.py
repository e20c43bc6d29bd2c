"""The online key: whatever `device_sdk.signing` loads, and its public half as JSON.

During a change there are two: the server signs with the one that the newest root names, so that importing the root is
the change, and no device waits for a restart. Nothing outlives a replaced file: what is kept is kept by its content.
"""

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

from django.conf import settings
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Key, Signer

from device_sdk import signing
from device_sdk.signing import public_from_json, public_to_json, write_private
from fleet.errors import Unavailable

__all__ = ["next_signer", "online_public", "online_signer", "public_from_json", "public_to_json", "write_private"]


def online_public(holders: Collection[str] | None = None) -> Key:
    """The online key that is among `holders`; else the first. Read anew each time: others may rotate it."""
    return _public(_chosen(holders)[1])


def online_signer(holders: Collection[str] | None = None) -> Signer:
    uri, public = _chosen(holders)
    return _signer(uri, public, signing.fingerprint(uri))


def next_signer() -> Signer | None:
    """The signer after the next change, where one is set: whether it works is asked before it is needed."""
    if not settings.NEXT_ONLINE_KEY_URI:
        return None
    uri, path = pairs()[1]
    return _signer(uri, _read(path), signing.fingerprint(uri))


def pairs() -> list[tuple[str, Path]]:
    """URI and public half of the online key, and of the next one where one is set."""
    both = [(settings.ONLINE_KEY_URI, settings.ONLINE_KEY_PUBLIC)]
    if settings.NEXT_ONLINE_KEY_URI:
        both.append((settings.NEXT_ONLINE_KEY_URI, settings.NEXT_ONLINE_KEY_PUBLIC))
    return both


def _chosen(holders: Collection[str] | None) -> tuple[str, bytes]:
    first, *others = pairs()
    if holders is not None:
        for uri, path in (first, *others):
            if path.exists() and _public(content := _read(path)).keyid in holders:
                return uri, content
    return first[0], _read(first[1])


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
        raise Unavailable("bad_online_key", f"the online key's public half: {error}") from error


@lru_cache(maxsize=4)  # by the public half and the private file's identity: another key is another entry
def _signer(uri: str, public: bytes, _fingerprint: str) -> Signer:
    key = _public(public)
    try:
        signer = signing.load_signer(uri, key)
    except signing.SetupError as error:
        raise Unavailable("bad_online_key", f"the online key cannot be used: {error}") from None
    if not _belongs(signer, key):
        raise Unavailable("bad_online_key", f"the online key {signing.shown(uri)} is not that of its public half")
    return signer


def _belongs(signer: Signer, key: Key) -> bool:
    """One signature to try: a KMS can be pointed at another key than the one that root names."""
    payload = b"fleet: does this key belong to its public half?"
    try:
        key.verify_signature(signer.sign(payload), payload)
    except (UnverifiedSignatureError, VerificationError):
        return False
    except Exception:  # noqa: BLE001  # each KMS and HSM library has its own family, and quotes the URI
        return False
    return True
