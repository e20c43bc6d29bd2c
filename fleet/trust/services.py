"""Accept roles that CI signed, and sign the view of each device with the online key."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256

from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils import timezone
from securesystemslib.signer import Key

from device_sdk.protocol import fields
from device_sdk.protocol.assignment import Assignment
from fleet.devices.models import Device
from fleet.errors import Conflict, Unavailable
from fleet.trust import keys, repository, selectors
from fleet.trust.models import DeviceView, RoleMetadata


@dataclass(frozen=True, slots=True)
class Accepted:
    """A role that was stored, and what it changed. Paths are `<model>/<version>/<variant>`."""

    row: RoleMetadata
    signed_by: tuple[str, ...]
    added: dict[str, tuple[int, str]]  # path to the manifest's length and sha256
    removed: frozenset[str]


def accept_role(model: str, content: bytes) -> RoleMetadata:
    """Verify and store the next version of a model's role. See `accept_role_change`."""
    return accept_role_change(model, content).row


@transaction.atomic
def accept_role_change(model: str, content: bytes) -> Accepted:
    """Verify and store the next version of a model's role.

    Raises unknown_model, malformed_role, bad_signature, stale_role, role_expired, foreign_target, and
    `target_changed` when a release that stays has other bytes: what is published never changes.
    """
    current = selectors.newest(model)
    checked = repository.check_role(
        content,
        model=model,
        delegator=selectors.delegator(),
        current=current.version if current else 0,
        now=timezone.now(),
    )
    old = repository.read_entries(repository.read_targets(current.content.encode()), model) if current else {}
    changed = sorted(path for path in old.keys() & checked.targets.keys() if old[path] != checked.targets[path])
    if changed:
        raise Conflict("target_changed", f"role {model!r}: releases never change; got other bytes for {changed[0]!r}")
    row = store_role(model, checked.version, content, checked.expires)
    return Accepted(
        row=row,
        signed_by=checked.signed_by,
        added={path: entry for path, entry in checked.targets.items() if path not in old},
        removed=frozenset(old.keys() - checked.targets.keys()),
    )


def store_role(role: str, version: int, content: bytes, expires: datetime) -> RoleMetadata:
    """Store signed bytes as they are. A version that is there already is another writer's: `stale_role`."""
    try:
        with transaction.atomic():
            return RoleMetadata.objects.create(
                role=role,
                version=version,
                content=content.decode(),
                sha256=sha256(content).hexdigest(),
                length=len(content),
                expires_at=expires,
            )
    except IntegrityError as error:
        raise Conflict("stale_role", f"role {role!r} version {version} is there already; fetch it again") from error


def current_view(device: Device, assignments: Sequence[Assignment]) -> DeviceView:
    """What the device should run, signed; signed anew only when that changed or its time runs out.

    1. nothing changed and enough lifetime left: the stored view, without a lock and without a write
    2. else take the row's lock and look again: roles must not go back within one device's history
    3. sign under the next version, which is the time, and never below the last one plus one
    """
    key = keys.online_public()
    view = DeviceView.objects.filter(device=device).first()
    if view is not None and _is_current(view, _digest(device, assignments, key, selectors.snapshot_roles())):
        return view
    with transaction.atomic():
        view, _ = DeviceView.objects.select_for_update().get_or_create(device=device)
        roles = selectors.snapshot_roles()
        digest = _digest(device, assignments, key, roles)
        if not _is_current(view, digest):
            _sign(view, device, assignments, roles, digest)
    return view


def _is_current(view: DeviceView, digest: str) -> bool:
    if view.inputs_digest != digest or view.expires_at is None:
        return False
    return view.expires_at - timezone.now() > settings.VIEW_RENEW_BEFORE


def _digest(device: Device, assignments: Sequence[Assignment], key: Key, roles: Sequence[repository.RoleRef]) -> str:
    """Name everything that a view is made of, but for time."""
    ordered = sorted(assignments, key=lambda item: item.model)
    parts = {
        "device": device.name,
        "assignments": [[item.model, item.length, item.sha256, item.to_custom()] for item in ordered],
        "key": key.keyid,
        "roles": [[ref.role, ref.version, ref.sha256] for ref in roles],
    }
    return sha256(fields.canonical(parts)).hexdigest()


def _sign(
    view: DeviceView,
    device: Device,
    assignments: Sequence[Assignment],
    roles: Sequence[repository.RoleRef],
    digest: str,
) -> None:
    _check_set_up(roles)
    now = timezone.now().replace(microsecond=0)
    version = max(int(now.timestamp()), view.version + 1)
    expires = now + settings.VIEW_LIFETIME
    signed = repository.build_view(
        device=device.name,
        assignments=assignments,
        roles=roles,
        signer=keys.online_signer(),
        version=version,
        expires=expires,
    )
    view.version, view.inputs_digest, view.expires_at, view.signed_at = version, digest, expires, now
    view.director, view.snapshot = signed.director.decode(), signed.snapshot.decode()
    view.timestamp = signed.timestamp.decode()
    view.save()


def _check_set_up(roles: Sequence[repository.RoleRef]) -> None:
    """The root must know the online key, or devices would refuse every view that it signs."""
    root = selectors.newest(selectors.ROOT)
    if root is None or not any(ref.role == selectors.TARGETS for ref in roles):
        raise Unavailable("no_trust_root", "there is no trust root yet; run trust_init")
    holders = repository.read_root(root.content.encode()).roles["timestamp"].keyids
    if keys.online_public().keyid not in holders:
        raise Unavailable("bad_online_key", "the root does not name this online key; devices would refuse its views")
