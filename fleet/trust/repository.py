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
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import ASSIGN, DIRECTOR, assign_path, check_model, check_sha256
from device_sdk.protocol.polls import BINDING
from device_sdk.signing import essence
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


def build_targets(*, director: Key, expires: datetime) -> Targets:
    """Delegations only. The director stands first and terminates: no model role can ever speak about `assign/`."""
    role = DelegatedRole(DIRECTOR, [], threshold=1, terminating=True, paths=[f"{ASSIGN}/*/*"])
    targets = Targets(version=1, expires=expires, delegations=Delegations({}, {DIRECTOR: role}))
    targets.add_key(director, DIRECTOR)
    return targets


def delegate(targets: Targets, *, model: str, keys: Sequence[Key], threshold: int) -> None:
    """Let `keys` say which releases of `model` may run. Replaces what was delegated for it before."""
    check_model(model)
    check_keys(keys, threshold, f"model {model!r}")
    roles = _delegated_roles(targets)
    for keyid in list(roles[model].keyids) if model in roles else []:
        targets.revoke_key(keyid, model)
    roles[model] = DelegatedRole(model, [], threshold, terminating=True, paths=[f"{model}/*/*"])
    for key in keys:
        targets.add_key(key, model)


def check_keys(keys: Sequence[Key], threshold: int, what: str) -> None:
    """Enough keys, and all different: one key under two ids would count, and sign, twice."""
    try:
        distinct = len({essence(key) for key in keys})
    except Exception as error:
        raise Invalid("malformed_key", f"{what}: a public key does not parse") from error
    if not 1 <= threshold <= distinct:
        raise Invalid("wrong_threshold", f"{what}: threshold: expected 1 to {distinct} (its keys); got {threshold}")
    if distinct != len(keys):
        raise Invalid("same_key_twice", f"{what}: expected different keys under different ids")


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
class Signatures:
    """Which keys of a role have signed it well, and which have not. One key under several ids is one key."""

    signed: tuple[str, ...]
    missing: tuple[str, ...]
    threshold: int

    @property
    def is_enough(self) -> bool:
        return len(self.signed) >= self.threshold

    def __str__(self) -> str:
        return f"{len(self.signed)} of {self.threshold} signatures"

    @property
    def lacking(self) -> int:
        return max(0, self.threshold - len(self.signed))


@dataclass(frozen=True, slots=True)
class CheckedRole:
    """A model's role whose version, expiry and paths were found good, and at least one signature."""

    version: int
    expires: datetime
    signatures: Signatures
    targets: Mapping[str, tuple[int, str]]  # path to length and sha256
    signed_sha256: str  # of the part that is signed


def check_role(content: bytes, *, model: str, delegator: Targets, current: int, now: datetime) -> CheckedRole:
    """Read a model's role as CI posted it. Raises what is wrong with it; `current` is the version held (0: none).

    1. it is a targets role, of acceptable size, without delegations of its own
    2. at least one of the keys that `delegator` names has signed it; whether that is enough stands in the answer
    3. it is based on the version held
    4. it has not expired
    5. it speaks of this model only
    """
    metadata = _parse_role(content)
    signatures = _check_signatures(metadata, model, delegator)
    role = metadata.signed
    if role.version != current + 1:
        raise Conflict(
            "stale_role",
            f"role {model!r}: expected version {current + 1}; got {role.version}. Fetch the role again and re-sign",
            {"current": current},
        )
    if role.is_expired(now):
        raise Invalid("role_expired", f"role {model!r}: expected an expiry in the future; got {role.expires:%FT%TZ}")
    digest = sha256(metadata.signed_bytes).hexdigest()
    return CheckedRole(role.version, role.expires, signatures, read_entries(role, model), digest)


def signatures_of(content: bytes, *, model: str, delegator: Targets) -> Signatures:
    """Who has signed it, by the keys and the threshold that `delegator` names today."""
    return _verify(Metadata[Targets].from_bytes(content), model, delegator)


def merge_signatures(held: bytes, come: bytes, *, model: str, delegator: Targets) -> bytes:
    """The same signed part under the valid signatures of both; what is not valid is left out."""
    first, second = Metadata[Targets].from_bytes(held), Metadata[Targets].from_bytes(come)
    if first.signed_bytes != second.signed_bytes:
        raise Conflict("pending_changed", f"role {model!r}: expected signatures of the same proposal; got another one")
    valid = {
        keyid: metadata.signatures[keyid]
        for metadata in (first, second)
        for keyid in _verify(metadata, model, delegator).signed
    }
    merged = Metadata(first.signed, valid)
    kept = {keyid: valid[keyid] for keyid in _verify(merged, model, delegator).signed}
    return Metadata(first.signed, kept).to_bytes(COMPACT)


def read_entries(role: Targets, model: str) -> dict[str, tuple[int, str]]:
    """Path to length and sha256 of each target. Raises `foreign_target` for a path outside the model."""
    entries: dict[str, tuple[int, str]] = {}
    for path, target in role.targets.items():
        if path.split("/")[0] != model or path.count("/") != 2:
            raise Invalid("foreign_target", f"role {model!r}: expected paths {model}/<version>/<variant>; got {path!r}")
        entries[path] = _entry(target)
    return entries


def _entry(target: TargetFile) -> tuple[int, str]:
    """TUF's own parser looks at neither: a length of 7.5 would go out to devices, which refuse the whole role."""
    if set(target.hashes) != {"sha256"}:
        raise Invalid("malformed_role", f"{target.path}: expected one hash, sha256; got {sorted(target.hashes)}")
    if type(target.length) is not int:
        raise Invalid("malformed_role", f"{target.path}: length: expected a whole number; got {target.length!r:.40}")
    try:
        return target.length, check_sha256(target.hashes["sha256"])
    except ProtocolError as error:
        raise Invalid("malformed_role", f"{target.path}: {error.message}") from error


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


def _check_signatures(metadata: Metadata[Targets], model: str, delegator: Targets) -> Signatures:
    if not is_delegated(delegator, model):
        raise NotFound("unknown_model", f"model {model!r} is not delegated; an operator adds it by trust_add_model")
    found = _verify(metadata, model, delegator)
    if not found.signed:
        raise below_threshold(model, found)
    return found


def below_threshold(model: str, found: Signatures) -> Denied:
    return Denied(
        "bad_signature",
        f"role {model!r}: expected {found.threshold} valid signature(s) of its keys; got {len(found.signed)}",
        {"signed": list(found.signed), "threshold": found.threshold},
    )


def _verify(metadata: Metadata[Targets], model: str, delegator: Targets) -> Signatures:
    try:
        result = delegator.get_verification_result(model, metadata.signed_bytes, metadata.signatures)
    except (ValueError, RepositoryError) as error:
        raise Denied("bad_signature", f"role {model!r}: {error}") from error
    signed: dict[bytes, str] = {}  # TUF counts ids: here a key that goes by two of them counts once
    for keyid in sorted(result.signed):
        signed.setdefault(essence(result.signed[keyid]), keyid)
    missing = [keyid for keyid, key in result.unsigned.items() if essence(key) not in signed]
    return Signatures(tuple(sorted(signed.values())), tuple(sorted(missing)), result.threshold)


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
