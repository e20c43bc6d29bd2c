"""A model's role: edited and signed by CI's key, and never upon one that no key of ours has signed."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, TargetFile, Targets
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from device_sdk.errors import SetupError, TransferError, UntrustedError
from device_sdk.protocol.manifest import digest
from device_sdk.publishing.server import TRIES, Server
from device_sdk.publishing.variants import Variant

ROLE_LIFETIME = timedelta(days=180)
Edit = Callable[[Targets], None]


def add_targets(variants: Sequence[Variant]) -> Edit:
    def edit(role: Targets) -> None:
        for variant in variants:
            content, path = variant.manifest.to_bytes(), str(variant.manifest.path)
            role.targets[path] = TargetFile(len(content), {"sha256": digest(content)}, path)

    return edit


def remove_release(model: str, version: str) -> Edit:
    def edit(role: Targets) -> None:
        prefix = f"{model}/{version}/"
        gone = [path for path in role.targets if path.startswith(prefix)]
        if not gone:
            raise SetupError(f"the role of {model} does not list {version}")
        for path in gone:
            del role.targets[path]

    return edit


def next_role(current: bytes | None, *, signer: Signer, known: Sequence[Key], edit: Edit) -> str:
    """The next version of a role, edited and signed. Raises UntrustedError for one that none of our keys signed."""
    role = Targets(version=1) if current is None else trusted(current, [signer.public_key, *known])
    if current is not None:
        role.version += 1
    role.expires = (datetime.now(UTC) + ROLE_LIFETIME).replace(microsecond=0)
    edit(role)
    metadata = Metadata(role)
    metadata.sign(signer)
    return metadata.to_bytes(JSONSerializer(compact=True)).decode()


def sign_and_post(server: Server, model: str, make: Callable[[bytes | None], str], post: Callable[[str], Any]) -> Any:
    """Sign upon the newest role; when another runner was faster, again upon its."""
    for attempt in range(TRIES):
        try:
            return post(make(server.role(model)))
        except TransferError as error:
            if error.code not in {"stale_role", "pending_changed"} or attempt == TRIES - 1:
                raise
    raise AssertionError("unreachable")


def trusted(content: bytes, keys: Sequence[Key]) -> Targets:
    try:
        metadata = Metadata[Targets].from_bytes(content)
    except DeserializationError as error:
        raise UntrustedError(f"the server's role does not parse: {error}", code="malformed_role") from error
    if not isinstance(metadata.signed, Targets) or not any(_has_signed(metadata, key) for key in keys):
        message = "the server's role is signed by none of our keys; after a change of keys give the old --role-key"
        raise UntrustedError(message, code="foreign_role")
    return metadata.signed


def _has_signed(metadata: Metadata[Targets], key: Key) -> bool:
    signature = metadata.signatures.get(key.keyid)
    if signature is None:
        return False
    try:
        key.verify_signature(signature, metadata.signed_bytes)
    except (UnverifiedSignatureError, VerificationError):
        return False
    return True
