"""Read signed metadata. Nothing is cached: rows are small, and every process must see a new role at once."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db.models import Exists, OuterRef, QuerySet
from tuf.api.metadata import Targets

from device_sdk.protocol.names import DIRECTOR
from device_sdk.protocol.polls import Bundle
from fleet.devices.models import Device
from fleet.errors import Unavailable
from fleet.trust import repository
from fleet.trust.models import DeviceView, RoleMetadata

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


def snapshot_roles() -> list[repository.RoleRef]:
    """What a snapshot lists: targets and every model role. A role once listed stays, delegated or not."""
    rows = newest_roles().exclude(role=ROOT).values_list("role", "version", "length", "sha256")
    return [repository.RoleRef(*row) for row in rows]


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


def root_text() -> str:
    """The newest root, for the provisioning file. Raises `no_trust_root`."""
    row = newest(ROOT)
    if row is None:
        raise Unavailable("no_trust_root", "there is no trust root yet; run trust_init")
    return row.content


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
    metadata = {f"{row.version}.root.json": row.content for row in _roots_after(root_version)}
    metadata["timestamp.json"] = view.timestamp
    metadata[f"{view.version}.snapshot.json"] = view.snapshot
    metadata[f"{view.version}.{DIRECTOR}.json"] = view.director
    for role in {TARGETS, *device.model_names} & versions.keys():
        row = RoleMetadata.objects.get(role=role, version=versions[role])
        metadata[f"{row.version}.{role}.json"] = row.content
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


def _roots_after(version: int) -> Iterable[RoleMetadata]:
    return RoleMetadata.objects.filter(role=ROOT, version__gt=version).order_by("version")


def _snapshot_versions(view: DeviceView) -> dict[str, int]:
    meta = json.loads(view.snapshot)["signed"]["meta"]
    return {name.removesuffix(".json"): item["version"] for name, item in meta.items()}
