"""Read releases."""

from typing import Any

from device_sdk.protocol.names import ReleasePath
from fleet.releases.models import Artifact, Release, Variant


def release(model: str, version: str) -> Release | None:
    return Release.objects.filter(model__name=model, version=version).select_related("model").first()


def manifest(path: ReleasePath) -> Variant | None:
    """The variant behind a release path, whatever its release's state."""
    found = Variant.objects.filter(
        release__model__name=path.model, release__version=path.version, name=path.variant
    ).select_related("release__model")
    return found.first()


def servable_blob(sha256: str, models: list[str]) -> Artifact | None:
    """A file of a valid release of one of these models: what a device may fetch."""
    return (
        Artifact.objects.filter(
            sha256=sha256,
            variants__release__state=Release.State.VALID,
            variants__release__model__name__in=models,
        )
        .distinct()
        .first()
    )


def describe(item: Release) -> dict[str, Any]:
    """A release as CI reads it."""
    return {
        "model": item.model.name,
        "version": item.version,
        "state": item.state,
        "reason": item.reason,
        "signed_by": item.signed_by,
        "created_at": item.created_at.isoformat(),
        "variants": {variant.name: _describe_variant(variant) for variant in item.variants.all()},
    }


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
    }
