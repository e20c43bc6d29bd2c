"""Publish releases as CI signed them, validate them, revoke them. A published release never changes, only its state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone

from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import Manifest, digest
from device_sdk.protocol.names import ReleasePath, check_model, check_name
from fleet.errors import Invalid, NotFound
from fleet.releases import storage, uploads, validation
from fleet.releases.models import Artifact, Model, Release, Variant
from fleet.trust import selectors as trust_selectors
from fleet.trust import services as trust

receive_blob = uploads.receive
MAX_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Published:
    release: Release
    created: bool  # False: the same thing was published before


@dataclass(frozen=True, slots=True)
class _Offer:
    """One variant as it came, parsed."""

    manifest: Manifest
    text: str

    @property
    def entry(self) -> tuple[int, str]:
        """Length and sha256, as the role must list it."""
        content = self.text.encode()
        return len(content), digest(content)


def create_model(*, name: str, description: str = "") -> Model:
    """Make a model's row, or find it. Its releases need a delegation besides: `trust_add_model`."""
    model, _ = Model.objects.get_or_create(name=check_model(name), defaults={"description": description})
    return model


def publish_release(
    *, model: str, version: str, manifests: Mapping[str, str], role: str, published_by: str = ""
) -> Published:
    """Take in a release and the role that signs it, or nothing of both.

    1. manifests parse and belong to this model, version and variant
    2. the version is there already: the same bytes are harmless, others are `version_exists`
    3. every file was uploaded and has the length that the manifest states
    4. the role is well signed, changes no release, and adds exactly these manifests
    5. releases that the role no longer lists are revoked
    """
    offers = _parse(model, version, manifests)
    if not trust_selectors.is_delegated(model):
        raise NotFound("unknown_model", f"model {model!r} is not delegated; an operator adds it by trust_add_model")
    create_model(name=model)
    with transaction.atomic():
        line = Model.objects.select_for_update().get(name=model)  # publications of one model stand in a queue
        present = Release.objects.filter(model=line, version=version).first()
        if present is not None:
            return Published(_same(present, offers), created=False)
        artifacts = _artifacts(offers)
        change = trust.accept_role_change(model, role.encode())
        _check_added(change.added, offers)
        _revoke_removed(line, change.removed, change.row.version)
        release = Release.objects.create(
            model=line, version=version, signed_by=list(change.signed_by), published_by=published_by[:200]
        )
        for offer in offers:
            _create_variant(release, offer, artifacts)
        wake_validation(release.pk)
    return Published(release, created=True)


@transaction.atomic
def update_role(*, model: str, role: str) -> trust.Accepted:
    """Take in a role that adds nothing: signed anew before it expires, or with releases removed (revoked)."""
    line = Model.objects.select_for_update().filter(name=model).first()
    change = trust.accept_role_change(model, role.encode())
    _check_added(change.added, [])
    if line is not None:
        _revoke_removed(line, change.removed, change.row.version)
    return change


def revoke(*, release: Release, reason: str) -> bool:
    """Take a release out of use on this server. False: it was revoked already.

    Only CI can revoke it for good, by leaving it out of its role: this needs no CI key and binds no device.
    """
    changed = Release.objects.filter(pk=release.pk).exclude(state=Release.State.REVOKED)
    return bool(changed.update(state=Release.State.REVOKED, reason=reason))


def validate_release(release_pk: int) -> None:
    """Validate what is pending of a release, then let its variants decide its state. Safe to repeat and to race."""
    for variant in Variant.objects.filter(release_id=release_pk, state=Variant.State.PENDING):
        validate_variant(variant)
    _conclude(release_pk)


def validate_variant(variant: Variant) -> bool:
    """Load one variant in a subprocess and note what was found. False: another worker has it, or we must try later."""
    if not _claim(variant):
        return False
    if variant.attempts >= MAX_ATTEMPTS:
        reason = f"the server did not live through validating it, {variant.attempts} times"
        return _note(variant, validation.Finding(reason=reason))
    try:
        finding = validation.examine(Manifest.parse(variant.manifest.encode()))
    except (validation.StorageAwayError, OSError) as error:  # ours, not the release's
        _release_claim(variant, f"waiting to be validated: {error}")
        return False
    return _note(variant, finding)


def unvalidated() -> list[int]:
    """Releases whose validation is due: nobody works on one of their variants."""
    due = Q(variants__state=Variant.State.PENDING) & (
        Q(variants__claimed_at=None) | Q(variants__claimed_at__lt=timezone.now() - _lease())
    )
    decided = ~Q(variants__state=Variant.State.PENDING)
    releases = Release.objects.filter(state=Release.State.VALIDATING)
    return list(releases.filter(due | decided).values_list("pk", flat=True).distinct())


def wake_validation(release_pk: int) -> None:
    """After the commit. A broker that is away loses nothing: the sweep finds the release."""
    from fleet.releases import tasks

    transaction.on_commit(lambda: tasks.validate.delay(release_pk), robust=True)


def _parse(model: str, version: str, manifests: Mapping[str, str]) -> list[_Offer]:
    check_model(model)
    check_name(version, "version")
    if not 1 <= len(manifests) <= limits.VARIANTS_PER_RELEASE:
        raise Invalid(
            "malformed", f"manifests: expected 1 to {limits.VARIANTS_PER_RELEASE} variants; got {len(manifests)}"
        )
    return [_parse_one(ReleasePath(model, version, check_name(name, "variant")), manifests[name]) for name in manifests]


def _parse_one(path: ReleasePath, text: str) -> _Offer:
    try:
        manifest = Manifest.parse(text.encode())
    except ProtocolError as error:
        raise Invalid(error.code, f"manifest of {path.variant!r}: {error.message}") from error
    if manifest.path != path:
        raise Invalid("wrong_manifest", f"manifest: expected that of {path}; got that of {manifest.path}")
    return _Offer(manifest, text)


def _same(release: Release, offers: Sequence[_Offer]) -> Release:
    """A repeated publication is the same one, or it is refused."""
    held = dict(release.variants.values_list("name", "manifest_sha256"))
    if held != {offer.manifest.path.variant: offer.entry[1] for offer in offers}:
        raise Invalid(
            "version_exists", f"{release}: this version was published with other content; releases never change"
        )
    return release


def _artifacts(offers: Sequence[_Offer]) -> dict[str, Artifact]:
    files = {file.sha256: file for offer in offers for file in offer.manifest.files}
    found = Artifact.objects.in_bulk(list(files))
    for sha256, file in files.items():
        if sha256 not in found or not storage.exists(storage.blob_name(sha256)):
            raise Invalid("missing_blob", f"file {file.name!r} ({sha256}) was not uploaded", {"sha256": sha256})
        if found[sha256].length != file.length:
            raise Invalid(
                "wrong_length", f"file {file.name!r}: expected {found[sha256].length} bytes; got {file.length}"
            )
    return found


def _check_added(added: Mapping[str, tuple[int, str]], offers: Sequence[_Offer]) -> None:
    """The role must list what is published now, and nothing else that is new."""
    expected = {str(offer.manifest.path): offer.entry for offer in offers}
    extra, missing = sorted(added.keys() - expected.keys()), sorted(expected.keys() - added.keys())
    if extra:
        raise Invalid("foreign_target", f"role: {extra[0]!r} is not published with it")
    if missing:
        raise Invalid("missing_target", f"role: expected it to list {missing[0]!r}")
    for path, entry in expected.items():
        if added[path] != entry:
            raise Invalid("wrong_target", f"role: {path!r} has not the length and sha256 of the manifest that came")


def _revoke_removed(line: Model, removed: frozenset[str], version: int) -> None:
    names = {ReleasePath.parse(path).version for path in removed}
    gone = Release.objects.filter(model=line, version__in=names).exclude(state=Release.State.REVOKED)
    gone.update(state=Release.State.REVOKED, reason=f"CI removed it from its role in version {version}")


def _create_variant(release: Release, offer: _Offer, artifacts: Mapping[str, Artifact]) -> None:
    length, sha256 = offer.entry
    variant = Variant.objects.create(
        release=release,
        name=offer.manifest.path.variant,
        manifest=offer.text,
        manifest_sha256=sha256,
        manifest_length=length,
        size=offer.manifest.length,
    )
    variant.artifacts.set({artifacts[file.sha256] for file in offer.manifest.files})


def _lease() -> timedelta:
    """How long a worker may be silent before another takes over: copying, loading, and some."""
    return timedelta(seconds=settings.VALIDATION_SECONDS + 300)


def _claim(variant: Variant) -> bool:
    """Compare-and-set: one worker, unless it has died."""
    now = timezone.now()
    free = Q(claimed_at=None) | Q(claimed_at__lt=now - _lease())
    rows = Variant.objects.filter(free, pk=variant.pk, state=Variant.State.PENDING)
    return bool(rows.update(claimed_at=now, attempts=F("attempts") + 1))


def _release_claim(variant: Variant, reason: str) -> None:
    rows = Variant.objects.filter(pk=variant.pk, state=Variant.State.PENDING)
    rows.update(claimed_at=None, attempts=F("attempts") - 1, reason=reason)


def _note(variant: Variant, finding: validation.Finding) -> bool:
    state = Variant.State.INVALID if finding.reason else Variant.State.VALID
    rows = Variant.objects.filter(pk=variant.pk, state=Variant.State.PENDING)
    return bool(
        rows.update(
            state=state,
            reason=finding.reason,
            inputs=finding.inputs,
            outputs=finding.outputs,
            opset=finding.opset,
            validated_at=timezone.now(),
            claimed_at=None,
        )
    )


def _conclude(release_pk: int) -> None:
    """One bad variant spoils the release; a pending one keeps it waiting."""
    variants = list(Variant.objects.filter(release_id=release_pk))
    bad = [f"{variant.name}: {variant.reason}" for variant in variants if variant.state == Variant.State.INVALID]
    if not bad and any(variant.state == Variant.State.PENDING for variant in variants):
        return
    state = Release.State.INVALID if bad else Release.State.VALID
    waiting = Release.objects.filter(pk=release_pk, state=Release.State.VALIDATING)
    waiting.update(state=state, reason="\n".join(bad))
