"""Take root and targets from a ceremony into the database, and give them out for the next one.

What the server holds is what it believes: a stick must continue it, version by version, signed by enough of the old
and of the new keys. All or nothing; the same stick twice changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from django.db import transaction
from django.utils import timezone
from tuf.api.metadata import Metadata, Root, Targets

from device_sdk.protocol.names import DIRECTOR
from fleet.errors import Conflict, Denied, Invalid, Unavailable
from fleet.trust import ceremony, offline, selectors, services
from fleet.trust.models import RoleMetadata
from fleet.trust.offline import ROOT, TARGETS
from fleet.trust.stick import Stick


@dataclass(frozen=True, slots=True)
class Imported:
    """What changed, in words; what somebody has to do now; and every model that is delegated."""

    changes: tuple[str, ...]
    todo: tuple[str, ...]
    models: tuple[str, ...]


def import_stick(stick: Stick, *, first_root: str = "") -> Imported:
    """Raises FleetError, and then nothing was changed. `first_root`: the mark of 1.root.json as it was written down."""
    chain = ceremony.read(stick)
    if first_root and first_root != chain.first_mark:
        raise Invalid("foreign_root", f"the first root: expected {first_root}; this stick's is {chain.first_mark}")
    if chain.targets is None:
        raise Invalid("no_targets", "there is no N.targets.json on the stick")
    return accept(chain.roots, chain.targets)


def export_stick(stick: Stick) -> list[str]:
    """Every root, the newest targets and the public keys. Returns what was written; refuses to replace anything."""
    held = {(row.role, row.version): row.content.encode() for row in _rows()}
    if not held:
        raise Unavailable("no_trust_root", "there is no trust root yet; run trust_init, or trust_import")
    for role in (ROOT, TARGETS):
        newest = max(version for name, version in held if name == role)
        if stick.versions(role)[-1:] > [newest]:
            raise Conflict(
                "stick_is_ahead", f"the stick has a newer {role} than the server's {newest}: import it first"
            )
    written = []
    for (role, version), content in held.items():
        if version not in stick.versions(role):
            stick.write_role(role, version, content)
            written.append(f"{version}.{role}.json")
        elif Metadata.from_bytes(stick.role(role, version)).signed_bytes != Metadata.from_bytes(content).signed_bytes:
            raise Conflict("forked", f"{version}.{role}.json on the stick is not what the server holds")
    keys = ceremony.public_keys(ceremony.read(stick))
    return written + [f"{named.name}.pub.json" for named in keys if stick.write_public(named)]


@transaction.atomic
def accept(roots: Sequence[Metadata[Root]], targets: Metadata[Targets]) -> Imported:
    """Verify from the version held on, and store. Raises FleetError.

    1. lock the newest root: imports stand in a queue
    2. roots that are held already must be the same; each newer one follows the one before and is signed by both
    3. targets are not older than those held, and are signed by the newest root's targets keys
    4. neither has expired, and both name the same online key
    """
    held = RoleMetadata.objects.select_for_update().filter(role=ROOT).order_by("-version").first()
    now = timezone.now()
    changes = _accept_roots(roots, held, now)
    root = roots[-1].signed
    old = selectors.newest(TARGETS)
    changes += _accept_targets(targets, old, root, now)
    offline.check_pair(root, targets.signed)
    models = [name for name in _models(targets.signed) if name != DIRECTOR]
    return Imported(tuple(changes), tuple(_todo(targets.signed, models)), tuple(models))


def _accept_roots(roots: Sequence[Metadata[Root]], held: RoleMetadata | None, now: datetime) -> list[str]:
    newest = held.version if held else 0
    if roots[-1].signed.version < newest:
        raise Conflict("rollback", f"the stick's root is {roots[-1].signed.version}, the server's {newest}: export it")
    _check_same_history(roots, newest)
    previous = offline.read_root(held.content.encode()).signed if held else None
    changes: list[str] = []
    for metadata in (item for item in roots if item.signed.version > newest):
        standing = offline.root_standing(metadata, previous)
        if not standing.complete:
            raise Denied("bad_signature", f"root {metadata.signed.version} still needs {'; '.join(standing.needs)}")
        content = offline.with_good_signatures(metadata, metadata.signed, previous, role=ROOT)
        services.store_role(ROOT, metadata.signed.version, content, metadata.signed.expires)
        changes += offline.describe(metadata.signed, previous)
        previous = metadata.signed
    _check_expiry(roots[-1].signed, now)
    return changes


def _check_same_history(roots: Sequence[Metadata[Root]], newest: int) -> None:
    held = dict(RoleMetadata.objects.filter(role=ROOT, version__lte=newest).values_list("version", "content"))
    for metadata in roots:
        content = held.get(metadata.signed.version)
        if content is not None and Metadata.from_bytes(content.encode()).signed_bytes != metadata.signed_bytes:
            raise Conflict(
                "forked", f"root {metadata.signed.version} on the stick is not the one that the server holds"
            )


def _accept_targets(metadata: Metadata[Targets], held: RoleMetadata | None, root: Root, now: datetime) -> list[str]:
    targets = metadata.signed
    before = offline.read_targets(held.content.encode()) if held else None
    if before is not None and targets.version < before.signed.version:
        raise Conflict("rollback", f"the stick's targets are {targets.version}, the server's {before.signed.version}")
    standing = offline.targets_standing(metadata, root)
    if not standing.complete:
        raise Denied("bad_signature", f"targets {targets.version} still needs {'; '.join(standing.needs)}")
    _check_expiry(targets, now)
    if before is not None and targets.version == before.signed.version:
        if before.signed_bytes != metadata.signed_bytes:
            raise Conflict("forked", f"targets {targets.version} on the stick are not those that the server holds")
        return []
    content = offline.with_good_signatures(metadata, root, role=TARGETS)
    services.store_role(TARGETS, targets.version, content, targets.expires)
    return offline.describe(targets, before.signed if before else None)


def _check_expiry(signed: Root | Targets, now: datetime) -> None:
    if signed.is_expired(now):
        raise Invalid(
            "role_expired", f"{signed.type} {signed.version} expired at {signed.expires:%F %H:%M} UTC; renew it"
        )


def _todo(targets: Targets, models: Sequence[str]) -> list[str]:
    """A model's role that its new keys have not signed stops that model's updates until CI signs it anew."""
    stale = []
    for model in models:
        row = selectors.newest(model)
        if row is None:
            continue
        metadata = Metadata[Targets].from_bytes(row.content.encode())
        if not targets.get_verification_result(model, metadata.signed_bytes, metadata.signatures):
            stale.append(model)
    return [
        f"Model {model}: its role {model!r} is signed by too few of its keys now; its devices keep what they run and "
        f"install nothing until CI runs: fleet-publish renew --model {model}"
        for model in stale
    ]


def _rows() -> list[RoleMetadata]:
    newest = selectors.newest(TARGETS)
    roots = list(RoleMetadata.objects.filter(role=ROOT).order_by("version"))
    return [*roots, newest] if newest else []


def _models(targets: Targets) -> list[str]:
    roles = targets.delegations.roles if targets.delegations else None
    return sorted(roles or {})
