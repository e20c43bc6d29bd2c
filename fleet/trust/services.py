"""Accept the roles that CI signed, keep those that too few have signed as proposals, sign the view of each device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256

from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils import timezone
from tuf.api.metadata import Targets

from device_sdk.protocol.assignment import Assignment
from fleet import sql
from fleet.audit.services import record
from fleet.devices.changes import policy_changed
from fleet.devices.models import Device
from fleet.errors import Conflict, FleetError, NotFound, Unavailable
from fleet.trust import inputs, keys, repository, selectors
from fleet.trust.models import DeviceView, PendingRole, RoleMetadata

AHEAD = timedelta(days=1)
_RACES = 20  # writers that may be faster before we give up


@dataclass(frozen=True, slots=True)
class Change:
    """A role that came, and what it changes. Paths are `<model>/<version>/<variant>`.

    `row` is None while too few have signed: then it is kept as a proposal, and changes nothing yet.
    """

    row: RoleMetadata | None
    version: int
    expires: datetime
    signatures: repository.Signatures
    added: Mapping[str, tuple[int, str]]  # path to the manifest's length and sha256
    removed: frozenset[str]

    @property
    def is_pending(self) -> bool:
        return self.row is None


def accept_role(model: str, content: bytes) -> RoleMetadata:
    """Verify and store the next version of a model's role, with all signatures that it needs. See `receive_role`."""
    with transaction.atomic():
        change = receive_role(model, content)
        if change.row is None:
            raise repository.below_threshold(model, change.signatures)
    return change.row


@transaction.atomic
def receive_role(model: str, content: bytes, *, by: str = "", only_add: bool = False) -> Change:
    """Take in the next version of a model's role, or signatures of one that is proposed.

    1. verify it: version, expiry, paths, and that at least one key of the role has signed it
    2. a proposal with the very same signed part: put the signatures of both together
    3. enough keys have signed: it is the role, and no proposal is left
    4. too few: it is the proposal, in place of another one. But a mere renewal never takes the place of a proposal
       that changes releases: the monthly job must not throw away what waits for a person

    `only_add`: signatures of the proposal and nothing else. Raises unknown_model, malformed_role, bad_signature,
    stale_role, role_expired, foreign_target, pending_changed, no_pending_role, proposal_waits, and `target_changed`
    when a release that stays has other bytes: what is published never changes.
    """
    for _ in range(_RACES):
        change = _receive(model, content, by, only_add=only_add)
        if change is not None:
            return change
    raise Conflict("pending_changed", f"role {model!r}: its proposal changes all the time; try again")


def withdraw_proposal(*, model: str, signed_sha256: str) -> PendingRole:
    """Forget a proposal: the one that was looked at, with whatever signatures it has by now."""
    row = PendingRole.objects.filter(role=model, signed_sha256=signed_sha256).first()
    if row is None or not PendingRole.objects.filter(pk=row.pk, signed_sha256=signed_sha256).delete()[0]:
        raise Conflict("pending_changed", f"role {model!r}: that proposal is not there any more")
    return row


def _receive(model: str, content: bytes, by: str, *, only_add: bool) -> Change | None:
    """None: another writer changed the proposal meanwhile."""
    current, delegator = selectors.newest(model), selectors.delegator()
    checked = _check(model, content, current, delegator)
    there = PendingRole.objects.filter(role=model).first()  # looked at once: what it was then is compared and set
    held = there if there is not None and there.version == checked.version else None
    same = held is not None and held.signed_sha256 == checked.signed_sha256
    if only_add and not same:
        raise _nothing_to_sign(model, held)
    if held is not None and same:
        content = repository.merge_signatures(held.content.encode(), content, model=model, delegator=delegator)
        checked = _check(model, content, current, delegator)
    old = selectors.entries(model, current.content if current else "")
    _check_unchanged(model, old, checked.targets)
    added = {path: entry for path, entry in checked.targets.items() if path not in old}
    removed = frozenset(old.keys() - checked.targets.keys())
    row = None
    if checked.signatures.is_enough:
        row = store_role(model, checked.version, content, checked.expires)
        PendingRole.objects.filter(role=model, version__lte=checked.version).delete()
    else:
        if held is not None and not same and not added and not removed:
            _check_replaceable(held, old)
        if not _propose(there, model, content, checked, by):
            return None
        detail = {"version": checked.version, "signed_by": list(checked.signatures.signed), "by": by}
        record("trust.role_proposed", target=model, kind="role", detail=detail)
    return Change(row, checked.version, checked.expires, checked.signatures, added, removed)


def _check(model: str, content: bytes, current: RoleMetadata | None, delegator: Targets) -> repository.CheckedRole:
    held = current.version if current else 0
    return repository.check_role(content, model=model, delegator=delegator, current=held, now=timezone.now())


def _check_unchanged(model: str, old: Mapping[str, tuple[int, str]], new: Mapping[str, tuple[int, str]]) -> None:
    changed = sorted(path for path in old.keys() & new.keys() if old[path] != new[path])
    if changed:
        raise Conflict("target_changed", f"role {model!r}: releases never change; got other bytes for {changed[0]!r}")


def _check_replaceable(held: PendingRole, old: Mapping[str, tuple[int, str]]) -> None:
    if selectors.entries(held.role, held.content) != old:
        message = f"role {held.role!r}: version {held.version} waits for signatures and changes releases; sign it, "
        raise Conflict("proposal_waits", message + "or withdraw it, before the role is merely renewed")


def _nothing_to_sign(model: str, held: PendingRole | None) -> FleetError:
    if held is None:
        return NotFound("no_pending_role", f"role {model!r}: nothing waits for a signature")
    return Conflict("pending_changed", f"role {model!r}: another proposal has taken the place of the one you signed")


def _propose(row: PendingRole | None, model: str, content: bytes, checked: repository.CheckedRole, by: str) -> bool:
    """Keep it as the proposal in place of `row`, by compare-and-set. False: another writer was faster."""
    values = {
        "version": checked.version,
        "content": content.decode(),
        "sha256": sha256(content).hexdigest(),
        "expires_at": checked.expires,
    }
    if row is None or row.signed_sha256 != checked.signed_sha256:
        values |= {"signed_sha256": checked.signed_sha256, "proposed_by": by[:200], "created_at": timezone.now()}
    if row is not None:
        return bool(PendingRole.objects.filter(pk=row.pk, sha256=row.sha256).update(**values))
    try:
        with transaction.atomic():
            PendingRole.objects.create(role=model, **values)
    except IntegrityError:
        return False
    return True


def store_role(role: str, version: int, content: bytes, expires: datetime) -> RoleMetadata:
    """Store signed bytes as they are. A version that is there already is another writer's: `stale_role`."""
    try:
        with transaction.atomic():
            row = RoleMetadata.objects.create(
                role=role,
                version=version,
                content=content.decode(),
                sha256=sha256(content).hexdigest(),
                length=len(content),
                expires_at=expires,
            )
            detail = {"version": version, "sha256": row.sha256, "expires": expires}
            record("trust.role_stored", target=role, kind="role", detail=detail)
            policy_changed()
            return row
    except IntegrityError as error:
        raise Conflict("stale_role", f"role {role!r} version {version} is there already; fetch it again") from error


def current_view(device: Device, assignments: Sequence[Assignment], *, held: int = 0) -> DeviceView:
    """What the device should run, signed; signed anew only when that changed or its time runs out.

    1. nothing changed and enough lifetime left: the stored view, without a lock and without a write
    2. else take the row's lock and look again: roles must not go back within one device's history
    3. sign under the next version, which is the time, and never below the last one plus one

    `held`: the version that the device says it has. It knows a newer one than this server after a restored backup, and
    would refuse everything below. A version more than a day ahead is no honest one: only another online key helps.
    """
    held = held if held <= (timezone.now() + AHEAD).timestamp() else 0
    view, assigned = selectors.view_of(device), inputs.of_assignments(assignments)
    if view is not None and _is_current(view, _digest(device, assigned, selectors.in_force()), held):
        return view
    with transaction.atomic():
        view = selectors.view_of(device, lock=True) or _first_view(device)
        trusted = selectors.in_force()
        digest = _digest(device, assigned, trusted)
        if not _is_current(view, digest, held):
            _sign(view, device, assignments, trusted, digest, above=held)
    return view


def _first_view(device: Device) -> DeviceView:
    return DeviceView.objects.select_for_update().get_or_create(device=device)[0]


def _is_current(view: DeviceView, digest: str, held: int) -> bool:
    if view.inputs_digest != digest or view.expires_at is None or view.version < held:
        return False
    return view.expires_at - timezone.now() > settings.VIEW_RENEW_BEFORE


def _digest(device: Device, assigned: str, trusted: selectors.InForce) -> str:
    return inputs.of_view(device.name, assigned, inputs.of_trust(trusted))


def _sign(
    view: DeviceView,
    device: Device,
    assignments: Sequence[Assignment],
    trusted: selectors.InForce,
    digest: str,
    *,
    above: int,
) -> None:
    holders = _check_set_up(trusted)
    now = timezone.now().replace(microsecond=0)
    version = max(int(now.timestamp()), view.version + 1, above + 1)
    expires = now + settings.VIEW_LIFETIME
    signed = repository.build_view(
        device=device.name,
        assignments=assignments,
        roles=trusted.roles,
        signer=keys.online_signer(holders),
        version=version,
        expires=expires,
    )
    values: dict[str, str | int | datetime] = {
        "version": version,
        "inputs_digest": digest,
        "expires_at": expires,
        "signed_at": now,
        "director": signed.director.decode(),
        "snapshot": signed.snapshot.decode(),
        "timestamp": signed.timestamp.decode(),
    }
    sql.update(view, values)
    for name, value in values.items():
        setattr(view, name, value)


def _check_set_up(trusted: selectors.InForce) -> frozenset[str]:
    """The root must name a key that we have, or devices would refuse all that it signs. Returns whom it names."""
    if trusted.root is None or not any(ref.role == selectors.TARGETS for ref in trusted.roles):
        raise Unavailable("no_trust_root", "there is no trust root yet; run trust_init, or trust_import")
    holders = selectors.holders(trusted)
    if keys.online_public(holders).keyid not in holders:
        wanted = ", ".join(sorted(holders))
        message = (
            f"root {trusted.root.version} does not name this online key; devices would refuse its views. "
            f"Set FLEET_ONLINE_KEY_URI and FLEET_ONLINE_KEY_PUBLIC to the key {wanted:.64}"
        )
        raise Unavailable("bad_online_key", message)
    return holders
