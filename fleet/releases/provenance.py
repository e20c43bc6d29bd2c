"""What is attached to a release: read when it comes, kept, and shown. And the keys whose model signatures are believed.

Everything here is for people to look at. Nothing of it lets a release be installed, and no device ever gets it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction

from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import (
    ATTACHMENT_KINDS,
    ML_BOM,
    MODEL_SIGNATURE,
    Manifest,
)
from device_sdk.protocol.manifest import (
    Attachment as Listed,
)
from fleet.audit.services import record
from fleet.errors import Conflict, Invalid
from fleet.releases import bom, model_signing, storage
from fleet.releases.model_signing import State, Verdict
from fleet.releases.models import Attachment, Model, ProvenanceKey, Variant

REFUSED = {State.FORGED: "bad_model_signature", State.MISMATCH: "model_signature_mismatch"}


@dataclass(frozen=True, slots=True)
class Read:
    """An attachment whose file was read."""

    listed: Listed
    summary: dict[str, Any]
    signature: str = ""


def read(manifest: Manifest, model: Model) -> list[Read]:
    """Read a variant's attachments, whose files were uploaded.

    Raises `unknown_attachment`, `bad_bom`, `bad_model_signature`, `unsupported_model_signature`, and
    `model_signature_mismatch` for a signature of other files than the variant's.
    """
    return [_read(listed, manifest, model) for listed in manifest.attachments]


def keep(variant: Variant, attached: Sequence[Read]) -> None:
    Attachment.objects.bulk_create(
        Attachment(
            variant=variant,
            kind=item.listed.kind,
            name=item.listed.name,
            artifact_id=item.listed.sha256,
            summary=item.summary,
            signature=item.signature,
        )
        for item in attached
    )


def content_of(sha256: str) -> bytes:
    """An attachment's bytes, never more than one may have."""
    with storage.open_object(storage.blob_name(sha256)) as file:
        return file.read(limits.ATTACHMENT)


def verdict(item: Attachment) -> Verdict | None:
    """What a model signature is worth by the keys that are trusted today; None for other kinds."""
    if item.kind != MODEL_SIGNATURE:
        return None
    try:
        manifest = Manifest.parse(item.variant.manifest.encode())
        return _judge(item.signature.encode(), manifest, item.variant.release.model)
    except (Invalid, ProtocolError) as error:
        return Verdict(State.MISMATCH, "", error.message)


@transaction.atomic
def add_key(*, model: Model, name: str, pem: str, actor: User | str) -> ProvenanceKey:
    """Believe the model signatures of a key. Raises `bad_key`, and `key_exists`."""
    key = model_signing.read_key(pem.encode(), name)
    if not 1 <= len(name) <= 100:
        raise Invalid("bad_key", f"name: expected 1 to 100 characters; got {len(name)}")
    row, created = ProvenanceKey.objects.get_or_create(
        model=model,
        fingerprint=key.fingerprint,
        defaults={"name": name, "pem": key.pem, "added_by": str(actor)[:150]},
    )
    if not created:
        raise Conflict("key_exists", f"{model} trusts this key already, as {row.name!r}")
    record("provenance_key.added", target=model.name, kind="model", detail={"key": row.fingerprint, "name": name})
    return row


@transaction.atomic
def remove_key(*, key: ProvenanceKey) -> None:
    """Believe it no more: what it signed is shown as unverified from now on."""
    if ProvenanceKey.objects.filter(pk=key.pk).delete()[0]:
        detail = {"key": key.fingerprint, "name": key.name}
        record("provenance_key.removed", target=key.model.name, kind="model", detail=detail)


def _read(listed: Listed, manifest: Manifest, model: Model) -> Read:
    if listed.kind not in ATTACHMENT_KINDS:
        expected = ", ".join(ATTACHMENT_KINDS)
        raise Invalid("unknown_attachment", f"{listed.name}: expected one of {expected}; got {listed.kind!r}")
    content = content_of(listed.sha256)
    if listed.kind == MODEL_SIGNATURE:
        found = _judge(content, manifest, model)
        if found.state in REFUSED:
            raise Invalid(REFUSED[found.state], f"{manifest.path.variant}: {listed.name}: {found.detail}")
        return Read(listed, {}, content.decode())
    return Read(listed, bom.read_bom(content) if listed.kind == ML_BOM else bom.read_free(content))


def _judge(content: bytes, manifest: Manifest, model: Model) -> Verdict:
    keys = [model_signing.PublicKey(key.name, key.pem, key.fingerprint) for key in model.provenance_keys.all()]
    files = {file.name: file.sha256 for file in manifest.files}
    return model_signing.judge(model_signing.read_signature(content), files, keys)
