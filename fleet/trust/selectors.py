"""Read signed metadata. Nothing is cached: rows are small, and every process must see a new role at once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache

from django.conf import settings
from django.db.models import Exists, OuterRef, QuerySet
from tuf.api.metadata import Targets

from device_sdk.protocol.names import DIRECTOR
from device_sdk.protocol.polls import Bundle
from fleet import sql
from fleet.devices.models import Device
from fleet.errors import Unavailable
from fleet.trust import repository
from fleet.trust.models import DeviceView, PendingRole, RoleMetadata

ROOT, TARGETS = "root", "targets"
# A quarter of each role's lifetime: 365 days for people's keys, 180 for CI's.
WARN_BEFORE = {ROOT: timedelta(days=91), TARGETS: timedelta(days=91)}
WARN_MODEL_BEFORE = timedelta(days=45)


def newest(role: str) -> RoleMetadata | None:
    return RoleMetadata.objects.filter(role=role).order_by("-version").first()


def newest_roles() -> QuerySet[RoleMetadata]:
    """The newest version of every role, root included."""
    newer = RoleMetadata.objects.filter(role=OuterRef("role"), version__gt=OuterRef("version"))
    return RoleMetadata.objects.filter(~Exists(newer)).order_by("role")


@dataclass(frozen=True, slots=True)
class InForce:
    """The newest root and all that a snapshot lists, as one query saw them: a view is never made of two times."""

    root: repository.RoleRef | None
    roles: list[repository.RoleRef]


_IN_FORCE = """
    SELECT role, version, length, sha256 FROM trust_rolemetadata AS r
    WHERE NOT EXISTS (SELECT 1 FROM trust_rolemetadata AS n WHERE n.role = r.role AND n.version > r.version)
    ORDER BY role
"""  # as `newest_roles`; each signing asks twice


def in_force() -> InForce:
    refs = [repository.RoleRef(*row) for row in sql.fetch(_IN_FORCE)]
    root = next((ref for ref in refs if ref.role == ROOT), None)
    return InForce(root, [ref for ref in refs if ref.role != ROOT])


def online_holders(root: repository.RoleRef) -> frozenset[str]:
    """Ids of the keys that this root lets sign views."""
    return _online_holders(root.version, root.sha256)


def holders(trusted: InForce) -> frozenset[str]:
    """`online_holders` of the root in force; nobody where there is none."""
    return online_holders(trusted.root) if trusted.root else frozenset()


@lru_cache(maxsize=4)  # by hash: what a root says never changes
def _online_holders(version: int, sha256: str) -> frozenset[str]:
    content = RoleMetadata.objects.values_list("content", flat=True).get(role=ROOT, version=version, sha256=sha256)
    return frozenset(repository.read_root(content.encode()).roles["timestamp"].keyids)


def snapshot_roles() -> list[repository.RoleRef]:
    """What a snapshot lists: targets and every model role. A role once listed stays, delegated or not."""
    return in_force().roles


def delegator() -> Targets:
    """The newest targets, which names the keys of every model. Raises `no_trust_root`."""
    row = newest(TARGETS)
    if row is None:
        raise Unavailable("no_trust_root", "there is no trust root yet; run trust_init")
    return repository.read_targets(row.content.encode())


def is_delegated(model: str) -> bool:
    return repository.is_delegated(delegator(), model)


def delegated_models() -> list[str]:
    delegations = delegator().delegations
    names = delegations.roles if delegations and delegations.roles else {}
    return sorted(name for name in names if name != DIRECTOR)


def delegated_keys(targets: Targets, model: str) -> tuple[int, set[str]] | None:
    """Threshold and key ids of a model's role, or None."""
    if not repository.is_delegated(targets, model):
        return None
    role = targets.get_delegated_role(model)
    return role.threshold, set(role.keyids)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A proposed role, what it would change, and who has signed it."""

    row: PendingRole
    signatures: repository.Signatures
    added: Mapping[str, tuple[int, str]]  # path to the manifest's length and sha256
    removed: frozenset[str]


def sign_command(model: str) -> str:
    """What the second person runs, with files of their own."""
    server = f"--server {settings.PUBLIC_URL}"
    return f"fleet-publish sign --model {model} {server} --key YOUR-KEY.pem --role-key CI.pub.json"


def pending_row(model: str) -> PendingRole | None:
    """The proposal upon the version that is held; one that was overtaken is none."""
    row = PendingRole.objects.filter(role=model).first()
    current = newest(model)
    return row if row is not None and row.version == (current.version if current else 0) + 1 else None


def proposal(model: str) -> Proposal | None:
    row = pending_row(model)
    return _proposal(row, delegator()) if row is not None else None


def proposals() -> list[Proposal]:
    """Of every model, by name."""
    names = list(PendingRole.objects.values_list("role", flat=True))
    rows = [row for name in names if (row := pending_row(name)) is not None]
    targets = delegator() if rows else None
    return [_proposal(row, targets) for row in rows] if targets else []


def entries(model: str, content: str) -> dict[str, tuple[int, str]]:
    """Path to length and sha256 of each manifest that a model's role lists; `content` empty: none."""
    return repository.read_entries(repository.read_targets(content.encode()), model) if content else {}


def _proposal(row: PendingRole, targets: Targets) -> Proposal:
    current = newest(row.role)
    old, new = entries(row.role, current.content if current else ""), entries(row.role, row.content)
    if repository.is_delegated(targets, row.role):
        signatures = repository.signatures_of(row.content.encode(), model=row.role, delegator=targets)
    else:  # nobody may sign for it any more
        signatures = repository.Signatures((), (), 1)
    added = {path: entry for path, entry in new.items() if path not in old}
    return Proposal(row, signatures, added, frozenset(old.keys() - new.keys()))


def root_text() -> str:
    """The newest root, for the provisioning file. Raises `no_trust_root`."""
    row = newest(ROOT)
    if row is None:
        raise Unavailable("no_trust_root", "there is no trust root yet; run trust_init")
    return row.content


def view_of(device: Device, *, lock: bool = False) -> DeviceView | None:
    """`lock`: in a transaction, and others wait for its end."""
    statement = "SELECT * FROM trust_deviceview WHERE device_id = %s"
    return sql.one(DeviceView.objects.raw(f"{statement} {sql.for_update()}" if lock else statement, [device.pk]))


def metadata_file(device: Device, name: str) -> str | None:
    """One file of a device's view by its plain TUF name, such as `7.detector.json`; None where there is none."""
    prefix, _, role = name.removesuffix(".json").partition(".")
    if name == "timestamp.json":
        return DeviceView.objects.filter(device=device).values_list("timestamp", flat=True).first()
    if not name.endswith(".json") or not prefix.isascii() or not prefix.isdigit() or len(prefix) > 18:
        return None
    version = int(prefix)
    if role in {DIRECTOR, "snapshot"}:
        return DeviceView.objects.filter(device=device, version=version).values_list(role, flat=True).first()
    return RoleMetadata.objects.filter(role=role, version=version).values_list("content", flat=True).first()


def bundle_for(view: DeviceView, device: Device, *, root_version: int, manifests: Mapping[str, str]) -> Bundle:
    """All that a device at `root_version` needs to verify `view`: versions are those that its snapshot names."""
    versions = _snapshot_versions(view)
    metadata = {f"{version}.root.json": content for version, content in _roots_after(root_version)}
    metadata["timestamp.json"] = view.timestamp
    metadata[f"{view.version}.snapshot.json"] = view.snapshot
    metadata[f"{view.version}.{DIRECTOR}.json"] = view.director
    for role in {TARGETS, *device.model_names} & versions.keys():
        metadata[f"{versions[role][0]}.{role}.json"] = _content(role, *versions[role])
    return Bundle(metadata=metadata, manifests=dict(manifests))


@dataclass(frozen=True, slots=True)
class Expiring:
    role: str
    expires_at: datetime
    expired: bool


def warn_before(role: str) -> timedelta:
    """How long before its end a role's expiry is announced."""
    return WARN_BEFORE.get(role, WARN_MODEL_BEFORE)


def expiring(now: datetime) -> list[Expiring]:
    """Roles with a quarter of their lifetime left or less: for the admin, the metrics and the system checks."""
    return [
        Expiring(row.role, row.expires_at, row.expires_at <= now)
        for row in newest_roles().only("role", "expires_at")
        if row.expires_at - now <= warn_before(row.role)
    ]


def _roots_after(version: int) -> list[tuple[int, str]]:
    """Version and content."""
    statement = "SELECT version, content FROM trust_rolemetadata WHERE role = %s AND version > %s ORDER BY version"
    return sql.fetch(statement, ROOT, version)


def _snapshot_versions(view: DeviceView) -> dict[str, tuple[int, str]]:
    """Version and sha256 of each role."""
    meta = json.loads(view.snapshot)["signed"]["meta"]
    return {name.removesuffix(".json"): (item["version"], item["hashes"]["sha256"]) for name, item in meta.items()}


@lru_cache(maxsize=256)  # by hash: what was signed never changes
def _content(role: str, version: int, sha256: str) -> str:
    return RoleMetadata.objects.values_list("content", flat=True).get(role=role, version=version, sha256=sha256)
