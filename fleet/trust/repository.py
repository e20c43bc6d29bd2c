"""Build and check TUF metadata. Pure: keys, names, versions and times in; signed bytes or a refusal out.

It knows neither the database nor where keys are kept. What the roles mean stands in the README under "Trust".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from device_sdk.protocol import limits
from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.names import ASSIGN, DIRECTOR, assign_path, check_model
from device_sdk.protocol.polls import BINDING
from fleet.errors import Conflict, Denied, Invalid, NotFound

COMPACT = JSONSerializer(compact=True)
EMPTY_SHA256 = sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class RoleRef:
    """One version of a role as the snapshot lists it. `length` in bytes of the file, `sha256` of the same."""

    role: str
    version: int
    length: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SignedView:
    """The three online-signed files of one device, all of one version."""

    director: bytes
    snapshot: bytes
    timestamp: bytes


def build_root(
    *, version: int, roots: Sequence[Key], threshold: int, targets: Sequence[Key], online: Key, expires: datetime
) -> Root:
    """Say who holds the top-level roles. Snapshot and timestamp are the online key's; targets needs one of its keys."""
    root = Root(version=version, expires=expires, consistent_snapshot=True)
    for key in roots:
        root.add_key(key, "root")
    root.roles["root"].threshold = threshold
    for key in targets:
        root.add_key(key, "targets")
    root.add_key(online, "snapshot")
    root.add_key(online, "timestamp")
    return root


def build_targets(*, director: Key, expires: datetime) -> Targets:
    """Delegations only. The director stands first and terminates: no model role can ever speak about `assign/`."""
    role = DelegatedRole(DIRECTOR, [], threshold=1, terminating=True, paths=[f"{ASSIGN}/*/*"])
    targets = Targets(version=1, expires=expires, delegations=Delegations({}, {DIRECTOR: role}))
    targets.add_key(director, DIRECTOR)
    return targets


def delegate(targets: Targets, *, model: str, keys: Sequence[Key], threshold: int) -> None:
    """Let `keys` say which releases of `model` may run. Replaces what was delegated for it before."""
    check_model(model)
    distinct = len({str(key.to_dict()["keyval"]) for key in keys})  # one key under two ids must not count twice
    if not 1 <= threshold <= distinct:
        raise Invalid("wrong_threshold", f"threshold: expected 1 to {distinct} (the keys given); got {threshold}")
    if distinct != len({key.keyid for key in keys}):
        raise Invalid("same_key_twice", "keys: expected different keys under different ids")
    roles = _delegated_roles(targets)
    for keyid in list(roles[model].keyids) if model in roles else []:
        targets.revoke_key(keyid, model)
    roles[model] = DelegatedRole(model, [], threshold, terminating=True, paths=[f"{model}/*/*"])
    for key in keys:
        targets.add_key(key, model)


def sign(signed: Root | Timestamp | Snapshot | Targets, signers: Sequence[Signer]) -> bytes:
    metadata: Metadata[Any] = Metadata(signed)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes(COMPACT)


def build_view(
    *,
    device: str,
    assignments: Sequence[Assignment],
    roles: Sequence[RoleRef],
    signer: Signer,
    version: int,
    expires: datetime,
) -> SignedView:
    """Sign what one device runs. `roles` is the newest of targets and of every model role.

    An empty director is refused: it could be replayed to a device as an honest "nothing to run".
    """
    if not assignments:
        raise Invalid("empty_view", f"device {device!r} has no models; an empty view is never signed")
    director = sign(_director(device, assignments, version, expires), [signer])
    snapshot = sign(_snapshot(director, roles, version, expires), [signer])
    meta = MetaFile.from_data(version, snapshot, ["sha256"])
    timestamp = Timestamp(version, expires=expires, snapshot_meta=meta, unrecognized_fields={BINDING: device})
    return SignedView(director=director, snapshot=snapshot, timestamp=sign(timestamp, [signer]))


def read_root(content: bytes) -> Root:
    return Metadata[Root].from_bytes(content).signed


def read_targets(content: bytes) -> Targets:
    return Metadata[Targets].from_bytes(content).signed


def is_delegated(targets: Targets, model: str) -> bool:
    return model != DIRECTOR and model in _delegated_roles(targets)


@dataclass(frozen=True, slots=True)
class CheckedRole:
    """A model's role whose signatures, version, expiry and paths were found good."""

    version: int
    expires: datetime
    signed_by: tuple[str, ...]
    targets: Mapping[str, tuple[int, str]]  # path to length and sha256


def check_role(content: bytes, *, model: str, delegator: Targets, current: int, now: datetime) -> CheckedRole:
    """Read a model's role as CI posted it. Raises what is wrong with it; `current` is the version held (0: none).

    1. it is a targets role, of acceptable size, without delegations of its own
    2. enough of the keys that `delegator` names have signed it
    3. it is based on the version held
    4. it has not expired
    5. it speaks of this model only
    """
    metadata = _parse_role(content)
    signed_by = _check_signatures(metadata, model, delegator)
    role = metadata.signed
    if role.version != current + 1:
        raise Conflict(
            "stale_role",
            f"role {model!r}: expected version {current + 1}; got {role.version}. Fetch the role again and re-sign",
            {"current": current},
        )
    if role.is_expired(now):
        raise Invalid("role_expired", f"role {model!r}: expected an expiry in the future; got {role.expires:%FT%TZ}")
    return CheckedRole(role.version, role.expires, signed_by, read_entries(role, model))


def read_entries(role: Targets, model: str) -> dict[str, tuple[int, str]]:
    """Path to length and sha256 of each target. Raises `foreign_target` for a path outside the model."""
    entries: dict[str, tuple[int, str]] = {}
    for path, target in role.targets.items():
        if path.split("/")[0] != model or path.count("/") != 2:
            raise Invalid("foreign_target", f"role {model!r}: expected paths {model}/<version>/<variant>; got {path!r}")
        entries[path] = _entry(target)
    return entries


def _entry(target: TargetFile) -> tuple[int, str]:
    if set(target.hashes) != {"sha256"}:
        raise Invalid("malformed_role", f"{target.path}: expected one hash, sha256; got {sorted(target.hashes)}")
    return target.length, target.hashes["sha256"]


def _parse_role(content: bytes) -> Metadata[Targets]:
    if len(content) > limits.METADATA:
        raise Invalid("malformed_role", f"role: expected at most {limits.METADATA} bytes; got {len(content)}")
    try:
        metadata = Metadata[Targets].from_bytes(content)
    except (DeserializationError, RecursionError) as error:
        raise Invalid("malformed_role", f"role: expected TUF targets metadata; {error}") from error
    if not isinstance(metadata.signed, Targets) or metadata.signed.delegations is not None:
        raise Invalid("malformed_role", "role: expected TUF targets metadata without delegations")
    return metadata


def _check_signatures(metadata: Metadata[Targets], model: str, delegator: Targets) -> tuple[str, ...]:
    if not is_delegated(delegator, model):
        raise NotFound("unknown_model", f"model {model!r} is not delegated; an operator adds it by trust_add_model")
    try:
        result = delegator.get_verification_result(model, metadata.signed_bytes, metadata.signatures)
    except (ValueError, RepositoryError) as error:
        raise Denied("bad_signature", f"role {model!r}: {error}") from error
    if not result:
        raise Denied(
            "bad_signature",
            f"role {model!r}: expected {result.threshold} valid signature(s) of its keys; got {len(result.signed)}",
            {"signed": sorted(result.signed), "threshold": result.threshold},
        )
    return tuple(sorted(result.signed))


def _director(device: str, assignments: Sequence[Assignment], version: int, expires: datetime) -> Targets:
    targets = {}
    for item in sorted(assignments, key=lambda assignment: assignment.model):
        path = assign_path(device, item.model)
        digest = item.sha256 if item.release else EMPTY_SHA256
        custom = {"custom": item.to_custom()}
        targets[path] = TargetFile(item.length if item.release else 0, {"sha256": digest}, path, custom)
    return Targets(version, expires=expires, targets=targets)


def _snapshot(director: bytes, roles: Sequence[RoleRef], version: int, expires: datetime) -> Snapshot:
    meta = {f"{ref.role}.json": MetaFile(ref.version, ref.length, {"sha256": ref.sha256}) for ref in roles}
    meta[f"{DIRECTOR}.json"] = MetaFile.from_data(version, director, ["sha256"])
    return Snapshot(version, expires=expires, meta=meta)


def _delegated_roles(targets: Targets) -> dict[str, DelegatedRole]:
    if targets.delegations is None or targets.delegations.roles is None:
        return {}
    return targets.delegations.roles
