"""What people may change of root and targets, said in plain words, and whether it is signed. Pure: no files, no clock.

The ceremony and the embedded keystore edit by the same functions, the ceremony and the server check by the same ones.
Metadata of any other shape than these functions make is refused: what nobody was shown must not be signed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, TypeVar

from securesystemslib.signer import Key
from tuf.api.metadata import DelegatedRole, Metadata, Root, Targets, VerificationResult
from tuf.api.serialization import DeserializationError

from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import ASSIGN, DIRECTOR, check_model, check_name
from fleet.errors import Conflict, Invalid, NotFound
from fleet.trust import repository
from fleet.trust.repository import COMPACT

ROOT, TARGETS, ONLINE = "root", "targets", ("snapshot", "timestamp")
Signed = TypeVar("Signed", Root, Targets)
NAMES = "x-names"  # key id to the name people know it by; signed, so that a file on a stick cannot rename a key


@dataclass(frozen=True, slots=True)
class Named:
    """A public key and what people call it; without a name it goes by its id."""

    name: str
    key: Key


@dataclass(frozen=True, slots=True)
class Standing:
    """Who has signed one version and who could. `needs` says in words what is missing; empty: it is complete."""

    signed: tuple[str, ...]
    missing: tuple[str, ...]
    needs: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not self.needs


# --- edits: each changes the metadata given; `next_version` comes first ---


def first_root(
    roots: Sequence[Named],
    targets: Sequence[Named],
    online: Named,
    *,
    root_threshold: int,
    targets_threshold: int,
    expires: datetime,
) -> Root:
    root = Root(version=1, expires=expires.replace(microsecond=0), consistent_snapshot=True)
    _change_keys(root, ROOT, (), roots, root_threshold)
    _change_keys(root, TARGETS, (), targets, targets_threshold)
    _set_online_root(root, online)
    check_root(root)
    return root


def first_targets(online: Named, *, expires: datetime) -> Targets:
    targets = repository.build_targets(director=online.key, expires=expires.replace(microsecond=0))
    _rename(targets, [online])
    return targets


def next_version(signed: Signed, expires: datetime) -> Signed:
    """A copy with the next number, which nobody has signed yet."""
    copy: Signed = type(signed).from_dict(signed.to_dict())
    copy.version, copy.expires = signed.version + 1, expires.replace(microsecond=0)
    return copy


def change_keys(
    root: Root, role: str, *, remove: Iterable[str] = (), add: Sequence[Named] = (), threshold: int | None = None
) -> None:
    """Who signs root, or targets. `remove` names keys by name or by the beginning of their id."""
    _change_keys(root, role, remove, add, root.roles[role].threshold if threshold is None else threshold)
    check_root(root)


def set_online(root: Root, targets: Targets, online: Named) -> None:
    """One online key for snapshot, timestamp and director, in place of the one before."""
    for role in ONLINE:
        for keyid in list(root.roles[role].keyids):
            root.revoke_key(keyid, role)
    _set_online_root(root, online)
    for keyid in list(targets.get_delegated_role(DIRECTOR).keyids):
        targets.revoke_key(keyid, DIRECTOR)
    targets.add_key(online.key, DIRECTOR)
    _rename(targets, [online])
    check_root(root)
    check_targets(targets)


def set_model(targets: Targets, model: str, keys: Sequence[Named], threshold: int) -> None:
    """Let `keys` and no others say which releases of `model` may run."""
    repository.delegate(targets, model=model, keys=[named.key for named in keys], threshold=threshold)
    _rename(targets, keys)
    check_targets(targets)


def remove_model(targets: Targets, model: str) -> None:
    """End the delegation. The role's file stays in every snapshot: TUF knows no way to take one out."""
    if not repository.is_delegated(targets, model):
        raise NotFound("unknown_model", f"model {model!r} is not delegated")
    for keyid in list(targets.get_delegated_role(model).keyids):
        targets.revoke_key(keyid, model)
    del _roles(targets)[model]
    _rename(targets, [])


# --- reading what others wrote ---


def read_root(content: bytes) -> Metadata[Root]:
    metadata = _parse(content, Root)
    check_root(metadata.signed)
    return metadata


def read_targets(content: bytes) -> Metadata[Targets]:
    metadata = _parse(content, Targets)
    check_targets(metadata.signed)
    return metadata


def check_root(root: Root) -> None:
    """Nothing in it that `describe` would not say. Raises Invalid."""
    if root.consistent_snapshot is not True:
        raise Invalid("malformed_root", "root: expected consistent_snapshot")
    _check_fields(root, "root")
    used = {keyid for role in root.roles.values() for keyid in role.keyids}
    if set(root.keys) != used:
        raise Invalid("malformed_root", "root: expected the keys that hold a role, and no others")
    for name, role in root.roles.items():
        if role.unrecognized_fields:
            raise Invalid("malformed_root", f"root: role {name!r} has fields that nobody knows")
        repository.check_keys([root.keys[keyid] for keyid in role.keyids], role.threshold, f"role {name!r}")
    if root.roles["snapshot"].keyids != root.roles["timestamp"].keyids:
        raise Invalid("malformed_root", "root: expected one online key for snapshot and timestamp")


def check_targets(targets: Targets) -> None:
    """Delegations only: the director first, then one terminating role a model. Raises Invalid."""
    _check_fields(targets, "targets")
    if targets.targets or targets.delegations is None or targets.delegations.roles is None:
        raise Invalid("malformed_targets", "targets: expected delegations and nothing else")
    if targets.delegations.unrecognized_fields or next(iter(_roles(targets)), None) != DIRECTOR:
        raise Invalid("malformed_targets", "targets: expected the director as the first delegation")
    used = {keyid for role in _roles(targets).values() for keyid in role.keyids}
    if set(targets.delegations.keys) != used:
        raise Invalid("malformed_targets", "targets: expected the keys that hold a role, and no others")
    for name, role in _roles(targets).items():
        _check_delegation(targets, name, role)


def check_pair(root: Root, targets: Targets) -> None:
    """Both name the same online key: a view signed by one key must be good for all three of its files."""
    if targets.get_delegated_role(DIRECTOR).keyids != root.roles["timestamp"].keyids:
        message = f"root {root.version} and targets {targets.version} name different online keys; run set-online again"
        raise Conflict("online_mismatch", message)


def find_key(signed: Root | Targets, among: Iterable[str], who: str) -> str:
    """The id of the one key with this name, or whose id begins so. Raises NotFound."""
    names, among = names_of(signed), list(among)
    found = [keyid for keyid in among if names.get(keyid) == who]
    found = found or [keyid for keyid in among if len(who) >= 8 and keyid.startswith(who)]
    if len(found) != 1:
        held = ", ".join(label(keyid, names) for keyid in among)
        raise NotFound("unknown_key", f"expected one of the keys {held}; got {who!r:.80}")
    return found[0]


def names_of(*signed: Root | Targets) -> dict[str, str]:
    return {keyid: name for item in signed for keyid, name in item.unrecognized_fields.get(NAMES, {}).items()}


def label(keyid: str, names: Mapping[str, str]) -> str:
    return f"{names[keyid]} ({keyid[:12]})" if keyid in names else keyid[:12]


# --- signatures ---


def root_standing(metadata: Metadata[Root], previous: Root | None) -> Standing:
    """Root N+1 needs the threshold of the keys of root N and of its own. Raises Conflict for a gap."""
    root = metadata.signed
    if previous is not None and root.version != previous.version + 1:
        raise Conflict("root_gap", f"root: expected version {previous.version + 1}; got {root.version}")
    result = root.get_root_verification_result(previous, metadata.signed_bytes, metadata.signatures)
    names = names_of(*filter(None, (previous, root)))
    needs = [*_needs(result.second, f"of the keys of root {root.version}", names)]
    if previous is not None:
        needs = [*_needs(result.first, f"of the keys of root {previous.version}", names), *needs]
    return _standing(result.signed, result.unsigned, needs, names)


def targets_standing(metadata: Metadata[Targets], root: Root) -> Standing:
    result = root.get_verification_result(TARGETS, metadata.signed_bytes, metadata.signatures)
    names = names_of(root)
    needs = [*_needs(result, f"of the targets keys of root {root.version}", names)]
    return _standing(result.signed, result.unsigned, needs, names)


def with_good_signatures(metadata: Metadata[Any], *delegators: Root | None, role: str) -> bytes:
    """The bytes to store: signatures by keys without a say, and broken ones, are left out."""
    good: set[str] = set()
    for delegator in filter(None, delegators):
        good |= delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures).signed.keys()
    for keyid in set(metadata.signatures) - good:
        del metadata.signatures[keyid]
    return metadata.to_bytes(COMPACT)


def mark(metadata: Metadata[Any]) -> str:
    """What is signed, in 16 digits that two people can compare by telephone."""
    digest = sha256(metadata.signed_bytes).hexdigest()
    return "-".join(digest[at : at + 4] for at in range(0, 16, 4))


# --- in plain words ---


def describe(new: Root | Targets, old: Root | Targets | None) -> list[str]:
    """What changes, one sentence a line. The first version says all."""
    lines = [f"{new.type} version {new.version}, good until {new.expires:%Y-%m-%d %H:%M} UTC"]
    if old is not None:
        lines[0] += f" (version {old.version}: until {old.expires:%Y-%m-%d %H:%M})"
    names = names_of(*([old] if old is not None else []), new)
    before = _rules(old) if old is not None else {}
    after = _rules(new)
    changes = [
        line for role in [*after, *(role for role in before if role not in after)]
        for line in _role_changes(role, before.get(role), after.get(role), names)
    ]  # fmt: skip
    changes += _renamings(old, new)
    return [*lines, *(changes or ["nothing else changes"])]


_Rule = tuple[int, tuple[str, ...]]


def _rules(signed: Root | Targets) -> dict[str, _Rule]:
    """What each role is called here, to its threshold and keys."""
    if isinstance(signed, Root):
        titles = {ROOT: "root", TARGETS: "targets", "timestamp": "online key (snapshot, timestamp)"}
        return {title: (signed.roles[r].threshold, tuple(signed.roles[r].keyids)) for r, title in titles.items()}
    return {
        "online key (director)" if name == DIRECTOR else f"model {name}": (role.threshold, tuple(role.keyids))
        for name, role in _roles(signed).items()
    }


def _role_changes(role: str, old: _Rule | None, new: _Rule | None, names: Mapping[str, str]) -> Iterator[str]:
    if new is None:
        yield f"- {role}: no longer exists; none of its releases may run any more"
        return
    before, after = old[1] if old else (), new[1]
    yield from (f"+ {role}: key {label(keyid, names)} may sign" for keyid in after if keyid not in before)
    yield from (f"- {role}: key {label(keyid, names)} may no longer sign" for keyid in before if keyid not in after)
    if old is None or old[0] != new[0] or len(before) != len(after):
        yield f"  {role}: {new[0]} of {len(after)} must sign" + (f" (was {old[0]} of {len(before)})" if old else "")


def _renamings(old: Root | Targets | None, new: Root | Targets) -> list[str]:
    before, after = names_of(old) if old is not None else {}, names_of(new)
    return [
        f"  key {keyid[:12]}: is called {after[keyid]}, was {before[keyid]}"
        for keyid in after
        if keyid in before and before[keyid] != after[keyid]
    ]


# --- within ---


def _change_keys(root: Root, role: str, remove: Iterable[str], add: Sequence[Named], threshold: int) -> None:
    for who in remove:
        root.revoke_key(find_key(root, root.roles[role].keyids, who), role)
    for named in add:
        _check_new(root.roles[role].keyids, named)
        root.add_key(named.key, role)
    root.roles[role].threshold = threshold
    _rename(root, add)


def _set_online_root(root: Root, online: Named) -> None:
    for role in ONLINE:
        root.add_key(online.key, role)
        root.roles[role].threshold = 1
    _rename(root, [online])


def _check_new(among: Sequence[str], named: Named) -> None:
    if named.key.keyid in among:
        raise Invalid("same_key_twice", f"the key {named.name or named.key.keyid[:12]} has this role already")


def _rename(signed: Root | Targets, added: Sequence[Named]) -> None:
    names = {**names_of(signed), **{named.key.keyid: named.name for named in added if named.name}}
    held = {keyid: name for keyid, name in sorted(names.items()) if keyid in keys_of(signed)}
    if len(set(held.values())) != len(held):
        raise Invalid("name_taken", "two keys would have one name; give the new one its own")
    signed.unrecognized_fields[NAMES] = held


def keys_of(signed: Root | Targets) -> dict[str, Key]:
    return signed.keys if isinstance(signed, Root) else signed.delegations.keys if signed.delegations else {}


def _check_fields(signed: Root | Targets, what: str) -> None:
    names = signed.unrecognized_fields.get(NAMES, {})
    if set(signed.unrecognized_fields) - {NAMES} or not isinstance(names, dict):
        raise Invalid(f"malformed_{what}", f"{what}: expected no fields but those of TUF and {NAMES}")
    if len(set(map(str, names.values()))) != len(names) or not names.keys() <= keys_of(signed).keys():
        raise Invalid(f"malformed_{what}", f"{what}: expected one name for one key")
    if any(key.unrecognized_fields for key in keys_of(signed).values()):
        raise Invalid(f"malformed_{what}", f"{what}: a key has fields that nobody knows")
    try:
        for name in names.values():
            check_name(name, "key name")
    except ProtocolError as error:
        raise Invalid(f"malformed_{what}", f"{what}: {error}") from error


def _check_delegation(targets: Targets, name: str, role: DelegatedRole) -> None:
    expected = f"{ASSIGN}/*/*" if name == DIRECTOR else f"{name}/*/*"
    try:
        if name != DIRECTOR:
            check_model(name)
    except ProtocolError as error:
        raise Invalid("malformed_targets", f"targets: {error}") from error
    plain = role.terminating and role.path_hash_prefixes is None and not role.unrecognized_fields
    if not plain or role.paths != [expected]:
        raise Invalid("malformed_targets", f"targets: expected {name!r} to speak of {expected} alone, terminating")
    repository.check_keys([targets.get_key(keyid) for keyid in role.keyids], role.threshold, f"role {name!r}")


def _parse(content: bytes, kind: type[Signed]) -> Metadata[Signed]:
    if len(content) > limits.METADATA:
        raise Invalid("malformed_role", f"{kind.type}: expected at most {limits.METADATA} bytes; got {len(content)}")
    try:
        metadata = Metadata[Signed].from_bytes(content)
    except (DeserializationError, RecursionError) as error:
        raise Invalid("malformed_role", f"expected TUF {kind.type} metadata; {error!r:.200}") from error
    if not isinstance(metadata.signed, kind) or metadata.unrecognized_fields:
        raise Invalid("malformed_role", f"expected TUF {kind.type} metadata; got {metadata.signed.type!r:.80}")
    return metadata


def _needs(result: VerificationResult, of: str, names: Mapping[str, str]) -> Iterator[str]:
    if result.verified:
        return
    who = ", ".join(label(keyid, names) for keyid in result.unsigned)
    yield f"{result.missing} more {of}: {who}"


def _standing(
    signed: Mapping[str, Key], unsigned: Mapping[str, Key], needs: Sequence[str], names: Mapping[str, str]
) -> Standing:
    return Standing(
        signed=tuple(label(keyid, names) for keyid in signed),
        missing=tuple(label(keyid, names) for keyid in unsigned if keyid not in signed),
        needs=tuple(needs),
    )


def _roles(targets: Targets) -> dict[str, DelegatedRole]:
    if targets.delegations is None or targets.delegations.roles is None:
        return {}
    return targets.delegations.roles
