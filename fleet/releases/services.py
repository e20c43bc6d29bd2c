"""Publish releases as CI signed them, validate them, revoke them. A published release never changes, only its state."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone

from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import Attachment, FileEntry, Manifest, digest
from device_sdk.protocol.names import ReleasePath, check_model, check_name
from fleet.audit.services import record
from fleet.devices.changes import policy_changed
from fleet.errors import Invalid, NotFound
from fleet.releases import provenance, signals, storage, uploads, validation
from fleet.releases.deltas import services as deltas
from fleet.releases.models import Artifact, Model, Release, Variant
from fleet.trust import selectors as trust_selectors
from fleet.trust import services as trust

receive_blob = uploads.receive
MAX_ATTEMPTS = 5
UNSIGNED = (Release.State.PENDING, Release.State.WITHDRAWN)  # no role has listed it yet


@dataclass(frozen=True, slots=True)
class Published:
    release: Release
    created: bool  # False: the same thing was published before
    change: "RoleChange | None" = None  # None: the role that came was not looked at


@dataclass(frozen=True, slots=True)
class RoleChange:
    """What a role that came has done, and which releases lost their place in a proposal by it."""

    role: trust.Change
    superseded: tuple[str, ...]


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
    with transaction.atomic():
        model, created = Model.objects.get_or_create(name=check_model(name), defaults={"description": description})
        if created:
            record("model.created", target=name, detail={"description": description})
    return model


@transaction.atomic
def describe_model(*, model: Model, description: str) -> None:
    model.description = description
    model.save(update_fields=["description"])
    record("model.described", target=model.name, detail={"description": description})


def publish_release(
    *, model: str, version: str, manifests: Mapping[str, str], role: str, published_by: str = ""
) -> Published:
    """Take in a release and the role that signs it, or nothing of both.

    1. manifests parse and belong to this model, version and variant
    2. the version is there already: the same bytes are harmless, others are `version_exists`
    3. every file was uploaded and has the length that the manifest states; what is attached can be read, and a model
       signature is one of these very files
    4. the role is well signed, changes no release, and adds exactly these manifests
    5. enough keys have signed: releases that the role no longer lists are revoked; too few: the release waits
    """
    offers = _parse(model, version, manifests)
    if not trust_selectors.is_delegated(model):
        raise NotFound("unknown_model", f"model {model!r} is not delegated; an operator adds it by trust_add_model")
    create_model(name=model)
    with transaction.atomic():
        line = Model.objects.select_for_update().get(name=model)  # publications of one model stand in a queue
        release = Release.objects.filter(model=line, version=version).first()
        created = release is None
        if release is not None and _same(release, offers).state not in UNSIGNED:
            return Published(release, created=False)
        artifacts = _artifacts(offers)
        attached = {offer.manifest.path.variant: provenance.read(offer.manifest, line) for offer in offers}
        change = trust.receive_role(model, role.encode(), by=published_by)
        _check_added(change.added, offers)
        if release is None:
            release = Release.objects.create(
                model=line, version=version, state=Release.State.PENDING, published_by=published_by[:200]
            )
            for offer in offers:
                provenance.keep(_create_variant(release, offer, artifacts), attached[offer.manifest.path.variant])
        done = _apply(line, change)
        detail = {
            "variants": {offer.manifest.path.variant: offer.entry[1] for offer in offers},
            "signed_by": list(change.signatures.signed),
            "role_version": change.version,
        }
        record("release.proposed" if change.is_pending else "release.published", target=release, detail=detail)
        if change.is_pending:
            wake_validation(release.pk)
    release.refresh_from_db()
    return Published(release, created, done)


@transaction.atomic
def update_role(*, model: str, role: str, by: str = "", only_add: bool = False) -> RoleChange:
    """Take in a role that lists nothing unknown: signed anew, with releases removed, or signatures of a proposal.

    `only_add`: signatures of the proposal that is there, and nothing else.
    """
    line = Model.objects.select_for_update().filter(name=model).first()
    change = trust.receive_role(model, role.encode(), by=by, only_add=only_add)
    _check_added(change.added, _unsigned_offers(line, change.added))
    return _apply(line, change) if line is not None else RoleChange(change, ())


@transaction.atomic
def withdraw_proposal(*, model: str, signed_sha256: str, by: str, comment: str) -> None:
    """Delete a proposed role, which binds nobody; its release waits no longer. The same may be proposed again."""
    if not comment.strip():
        raise Invalid("comment_missing", "comment: expected why the proposal is withdrawn; got nothing")
    line = Model.objects.select_for_update().filter(name=model).first()
    trust.withdraw_proposal(model=model, signed_sha256=signed_sha256)
    record("role.proposal_withdrawn", target=model, detail={"signed_sha256": signed_sha256}, comment=comment.strip())
    if line is not None:
        _withdraw(line, frozenset(), f"withdrawn by {by}: {comment.strip()}")


@transaction.atomic
def revoke(*, release: Release, reason: str) -> bool:
    """Withdraw a release on this server: for good, and nothing here gives it to a device again. False: it was revoked.

    It needs no CI key, so it binds this server only: devices would still install it if a stolen online key said so.
    Only CI can take that away, by leaving it out of its role; see `update_role`.
    """
    return _mark_revoked(release, reason, Release.RevokedBy.SERVER)


@transaction.atomic
def end_undelegated(*, delegated: Collection[str]) -> list[str]:
    """Revoke what nobody may sign any more, as when a key ceremony has taken a model out. The releases it ended.

    Devices that still have such a model would refuse a view that names one of its releases, and all else in it.
    """
    living = Release.objects.exclude(state=Release.State.REVOKED).exclude(model__name__in=delegated)
    reason = "targets delegates this model to nobody any more"
    return [str(row) for row in living.select_related("model") if _mark_revoked(row, reason, Release.RevokedBy.KEYS)]


@transaction.atomic
def set_when_nothing(*, model: Model, policy: str) -> None:
    """What devices do when nothing of the model may run: keep serving the last release, or stop it."""
    if policy not in Model.WhenNothing.values:
        raise Invalid("malformed", f"when_nothing: expected one of {Model.WhenNothing.values}; got {policy!r:.40}")
    if Model.objects.filter(pk=model.pk).exclude(when_nothing=policy).update(when_nothing=policy):
        record("model.when_nothing", target=model.name, detail={"policy": policy})
        signals.when_nothing_changed.send(Model, model=model)
    model.when_nothing = policy


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
    """Releases whose validation is due: nobody works on one of their variants. Also while signatures are missing:
    whoever signs second wants to know what was found, and the release is ready once it is signed.
    """
    due = Q(variants__state=Variant.State.PENDING) & (
        Q(variants__claimed_at=None) | Q(variants__claimed_at__lt=timezone.now() - _lease())
    )
    decided = ~Q(variants__state=Variant.State.PENDING)
    validating = Q(state=Release.State.VALIDATING) & (due | decided)
    pending = Q(state=Release.State.PENDING) & (due | Q(variants__state=Variant.State.INVALID))
    return list(Release.objects.filter(validating | pending).values_list("pk", flat=True).distinct())


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
    """A repeated publication is the same one, or it is refused; so is one that was revoked since."""
    if release.state == Release.State.REVOKED:
        raise Invalid("release_revoked", f"{release} was revoked; that is for good. Publish a new version")
    held = dict(release.variants.values_list("name", "manifest_sha256"))
    if held != {offer.manifest.path.variant: offer.entry[1] for offer in offers}:
        raise Invalid(
            "version_exists", f"{release}: this version was published with other content; releases never change"
        )
    return release


def _artifacts(offers: Sequence[_Offer]) -> dict[str, Artifact]:
    named: list[FileEntry | Attachment] = []
    for offer in offers:
        named += [*offer.manifest.fetched, *offer.manifest.attachments]
    files = {item.sha256: item for item in named}
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


def _unsigned_offers(line: Model | None, added: Mapping[str, tuple[int, str]]) -> list[_Offer]:
    """What the releases that `added` names were published with, as far as no role has listed them yet."""
    versions = {ReleasePath.parse(path).version for path in added}
    variants = Variant.objects.filter(
        release__model=line, release__version__in=versions, release__state__in=(*UNSIGNED, Release.State.INVALID)
    )
    return [_Offer(Manifest.parse(variant.manifest.encode()), variant.manifest) for variant in variants]


def _apply(line: Model, change: trust.Change) -> RoleChange:
    """Bring the releases in step with a role that came: listed, or proposed; what was proposed before has lost."""
    versions = frozenset(ReleasePath.parse(path).version for path in change.added)
    listed = Release.objects.filter(model=line, version__in=versions)
    listed.update(signed_by=list(change.signatures.signed))
    if change.is_pending:
        listed.filter(state=Release.State.WITHDRAWN).update(state=Release.State.PENDING, reason="")
        standing = "the proposal of"
    else:
        listed.filter(state__in=UNSIGNED).update(state=Release.State.VALIDATING, reason="")
        for pk in listed.values_list("pk", flat=True):
            wake_validation(pk)
        _revoke_removed(line, change.removed, change.version)
        standing = "the signing of"
    return RoleChange(change, _withdraw(line, versions, f"superseded by {standing} role version {change.version}"))


def _withdraw(line: Model, but: frozenset[str], reason: str) -> tuple[str, ...]:
    """Pending releases whose proposal is gone wait no longer; which they are is told, and stands on their page."""
    rows = Release.objects.filter(model=line, state=Release.State.PENDING).exclude(version__in=but)
    versions = tuple(sorted(rows.values_list("version", flat=True)))
    rows.update(state=Release.State.WITHDRAWN, reason=reason)
    return versions


def _revoke_removed(line: Model, removed: frozenset[str], version: int) -> None:
    names = {ReleasePath.parse(path).version for path in removed}
    for release in Release.objects.filter(model=line, version__in=names).select_related("model"):
        _mark_revoked(release, f"CI removed it from its role in version {version}", Release.RevokedBy.CI)


def _mark_revoked(release: Release, reason: str, by: Release.RevokedBy) -> bool:
    """Claim it, tell the rollouts. What a person withdrew here, CI may still revoke: that says more."""
    if by != Release.RevokedBy.SERVER:
        withdrawn = Release.objects.filter(pk=release.pk, state=Release.State.REVOKED)
        if withdrawn.filter(revoked_by=Release.RevokedBy.SERVER).update(revoked_by=by, reason=reason):
            record("release.revoked", target=release, detail={"was": release.state, "by": by.value}, comment=reason)
    changes = {"state": Release.State.REVOKED, "reason": reason, "revoked_by": by, "revoked_at": timezone.now()}
    if not Release.objects.filter(pk=release.pk).exclude(state=Release.State.REVOKED).update(**changes):
        return False
    record("release.revoked", target=release, detail={"was": release.state, "by": by.value}, comment=reason)
    signals.revoked.send(Release, release=release, reason=reason)
    return True


def _create_variant(release: Release, offer: _Offer, artifacts: Mapping[str, Artifact]) -> Variant:
    length, sha256 = offer.entry
    variant = Variant.objects.create(
        release=release,
        name=offer.manifest.path.variant,
        manifest=offer.text,
        manifest_sha256=sha256,
        manifest_length=length,
        size=offer.manifest.length,
        requires=offer.manifest.requires.to_json(),
    )
    variant.artifacts.set({artifacts[file.sha256] for file in offer.manifest.fetched})
    return variant


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
            acceptance=finding.acceptance,
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
    deciding = (Release.State.VALIDATING, Release.State.PENDING) if bad else (Release.State.VALIDATING,)
    waiting = Release.objects.filter(pk=release_pk, state__in=deciding)  # a good one that is unsigned goes on waiting
    with transaction.atomic():  # a release that is valid has its patches ordered
        if not waiting.update(state=state, reason="\n".join(bad)):
            return
        release = Release.objects.select_related("model").get(pk=release_pk)
        record(f"release.found_{state.value}", target=release, detail={"reason": release.reason[:500]})
        if state == Release.State.VALID:
            deltas.order(release=release)
            deltas.wake()
            policy_changed()  # a pin may have waited for it
