"""Read releases."""

from collections.abc import Iterable
from typing import Any

from django.db.models import QuerySet

from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import Manifest
from device_sdk.protocol.names import ReleasePath
from fleet.releases import provenance
from fleet.releases.models import Artifact, Attachment, Model, Patch, Release, Variant
from fleet.trust import selectors as trust_selectors


def release(model: str, version: str) -> Release | None:
    return Release.objects.filter(model__name=model, version=version).select_related("model").first()


def manifest(path: ReleasePath) -> Variant | None:
    """The variant behind a release path, whatever its release's state."""
    found = Variant.objects.filter(
        release__model__name=path.model, release__version=path.version, name=path.variant
    ).select_related("release__model")
    return found.first()


def manifests(paths: Iterable[str]) -> dict[str, str]:
    """The manifests of release paths, as they came; a path that nobody has published is left out."""
    found = {path: manifest(ReleasePath.parse(path)) for path in paths}
    return {path: variant.manifest for path, variant in found.items() if variant is not None}


def states(model: str, paths: Iterable[str]) -> dict[str, dict[str, str]]:
    """State and reason of the releases that release paths belong to, by version."""
    versions = {ReleasePath.parse(path).version for path in paths}
    rows = Release.objects.filter(model__name=model, version__in=versions)
    return {row.version: {"state": row.state, "reason": row.reason} for row in rows}


def servable_blob(sha256: str, models: list[str]) -> Artifact | None:
    """What a device may fetch: a file of a valid release of one of these models, or a patch to one."""
    rows = Artifact.objects.filter(sha256=sha256)
    whole = rows.filter(variants__release__state=Release.State.VALID, variants__release__model__name__in=models).first()
    if whole is not None:
        return whole
    return rows.filter(
        patch_of__state=Patch.State.READY,
        patch_of__target__variants__release__state=Release.State.VALID,
        patch_of__target__variants__release__model__name__in=models,
    ).first()


def mirrored_blob(sha256: str, models: list[str]) -> Artifact | None:
    """What a mirror of these models may fetch; no models: of all."""
    return servable_blob(sha256, models or list(Model.objects.values_list("name", flat=True)))


def patches_to(sha256: str) -> QuerySet[Patch]:
    """Ready patches that give this file, the smallest first. Whether the caller may have it, `servable_blob` says."""
    ready = Patch.objects.filter(target_id=sha256, state=Patch.State.READY, artifact__isnull=False)
    return ready.select_related("artifact").order_by("artifact__length", "pk")


def said_of(waits: trust_selectors.Proposal | None) -> str:
    """What a proposal changes, in a few words."""
    if waits is None:
        return "nothing"
    added = sorted({ReleasePath.parse(path).version for path in waits.added})
    removed = sorted({ReleasePath.parse(path).version for path in waits.removed})
    parts = [f"add {', '.join(added)}"] if added else []
    parts += [f"revoke {', '.join(removed)}"] if removed else []
    return "; ".join(parts) or "renew it, no release changes"


def standing(item: Release) -> str:
    """What a release is, as the reason why it is refused; for a pending one, whose signature is missing."""
    waits = trust_selectors.proposal(item.model.name) if item.state == Release.State.PENDING else None
    if waits is None:
        return f"{item} is {item.state}"
    missing = ", ".join(key[:16] for key in waits.signatures.missing) or "no other key"
    return f"{item} has {waits.signatures}; missing: {missing}"


def describe(item: Release) -> dict[str, Any]:
    """A release as CI reads it; `signatures` while some are missing."""
    waits = trust_selectors.proposal(item.model.name) if item.state == Release.State.PENDING else None
    return {
        **({"signatures": _describe_signatures(waits)} if waits else {}),
        "model": item.model.name,
        "version": item.version,
        "state": item.state,
        "reason": item.reason,
        "signed_by": item.signed_by,
        "created_at": item.created_at.isoformat(),
        "variants": {variant.name: _describe_variant(variant) for variant in item.variants.all()},
    }


def _describe_signatures(waits: trust_selectors.Proposal) -> dict[str, Any]:
    found = waits.signatures
    return {"signed": list(found.signed), "missing": list(found.missing), "threshold": found.threshold}


def _describe_variant(variant: Variant) -> dict[str, Any]:
    return {
        "state": variant.state,
        "reason": variant.reason,
        "manifest": variant.manifest,
        "manifest_sha256": variant.manifest_sha256,
        "size": variant.size,
        "inputs": variant.inputs,
        "outputs": variant.outputs,
        "opset": variant.opset,
        "acceptance": variant.acceptance,
        "attachments": [describe_attachment(item) for item in variant.attachments.select_related("artifact")],
    }


def metadata(variant: Variant) -> dict[str, str]:
    """What CI signed besides, by key."""
    try:
        return dict(Manifest.parse(variant.manifest.encode()).metadata)
    except ProtocolError:
        return {}


def describe_attachment(item: Attachment) -> dict[str, Any]:
    """An attachment as CI and operators read it; `verdict` is of a model signature, by the keys of today."""
    return {
        "kind": item.kind,
        "name": item.name,
        "length": item.artifact.length,
        "sha256": item.artifact_id,
        "verdict": str(provenance.verdict(item) or ""),
        "summary": item.summary,
    }


def attachment(release: Release, sha256: str) -> Attachment | None:
    return Attachment.objects.filter(variant__release=release, artifact_id=sha256).select_related("artifact").first()
