"""The key ceremony: make, change and sign root and targets on machines without a network, by files on a stick.

It needs no database, no settings and no Django. Each edit writes one unsigned next version; each person then adds one
signature, on their own machine, after being told what changes. A version that somebody has signed is never edited.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, Root, Targets

from device_sdk import signing
from fleet.errors import Conflict, Denied, Invalid, NotFound
from fleet.trust import offline, repository
from fleet.trust.offline import ROOT, TARGETS, Named, Standing
from fleet.trust.stick import Stick

LIFETIME = timedelta(days=365)
RootFile = Metadata[Root]
TargetsFile = Metadata[Targets]


@dataclass(frozen=True, slots=True)
class Chain:
    """What lies on a stick: all roots from the first one on, and the two newest targets. The newest may be unsigned."""

    roots: tuple[RootFile, ...]
    targets: TargetsFile | None = None
    targets_before: TargetsFile | None = None

    @property
    def root(self) -> RootFile:
        return self.roots[-1]

    @property
    def root_before(self) -> Root | None:
        return self.roots[-2].signed if len(self.roots) > 1 else None

    @property
    def first_mark(self) -> str:
        return offline.mark(self.roots[0])


@dataclass(frozen=True, slots=True)
class Version:
    """One role's newest version, for `show` and `sign`."""

    role: str
    metadata: Metadata[Any]
    before: Root | Targets | None
    standing: Standing

    @property
    def title(self) -> str:
        return f"{self.role} version {self.metadata.signed.version}"

    @property
    def lines(self) -> list[str]:
        return offline.describe(self.metadata.signed, self.before)


# --- what lies there ---


def read(stick: Stick) -> Chain:
    """Parse and verify all of it. Every root but the newest must be complete. Raises FleetError."""
    versions = stick.versions(ROOT)
    if not versions:
        raise NotFound("empty_stick", f"there is no root in {stick.folder}; run ceremony init, or trust_export")
    if versions != list(range(1, len(versions) + 1)):
        expected = next(number for number, found in enumerate(versions, start=1) if number != found)
        raise Conflict("root_gap", f"expected {expected}.root.json; every root from the first one on must be there")
    roots = [_read_root(stick, version) for version in versions]
    for before, metadata in zip([None, *roots], roots[:-1], strict=False):
        _must_be_complete(metadata, before)
    offline.root_standing(roots[-1], roots[-2].signed if len(roots) > 1 else None)
    return Chain(tuple(roots), *_read_targets(stick, roots))


def newest(chain: Chain) -> list[Version]:
    found = [Version(ROOT, chain.root, chain.root_before, offline.root_standing(chain.root, chain.root_before))]
    if chain.targets is not None:
        before = chain.targets_before.signed if chain.targets_before else None
        standing = offline.targets_standing(chain.targets, chain.root.signed)
        found.append(Version(TARGETS, chain.targets, before, standing))
    return found


def is_settled(chain: Chain) -> bool:
    """Whether a server would take it: all signed. Expiry is the server's to judge, by its own clock."""
    if chain.targets is None or not all(version.standing.complete for version in newest(chain)):
        return False
    offline.check_pair(chain.root.signed, chain.targets.signed)
    return True


# --- edits ---


def init(
    stick: Stick,
    *,
    roots: Sequence[Named],
    root_threshold: int,
    targets: Sequence[Named],
    targets_threshold: int,
    online: Named,
    expires: datetime,
) -> None:
    if stick.versions(ROOT) or stick.versions(TARGETS):
        raise Conflict("root_exists", f"there is a root in {stick.folder} already; a second one would be another fleet")
    root = offline.first_root(
        roots,
        targets,
        online,
        root_threshold=root_threshold,
        targets_threshold=targets_threshold,
        expires=expires,
    )
    _write(stick, offline.first_targets(online, expires=expires), root)


def change_root(
    stick: Stick, *, remove: Iterable[str], add: Sequence[Named], threshold: int | None, expires: datetime
) -> None:
    root = _draft_root(read(stick), expires)
    offline.change_keys(root, ROOT, remove=remove, add=add, threshold=threshold)
    _write(stick, root)


def change_targets(
    stick: Stick, *, remove: Iterable[str], add: Sequence[Named], threshold: int | None, expires: datetime
) -> None:
    """Other targets keys: root names them, and targets is to be signed by them."""
    chain = read(stick)
    root, targets = _draft_root(chain, expires), _draft_targets(chain, expires)
    offline.change_keys(root, TARGETS, remove=remove, add=add, threshold=threshold)
    _write(stick, targets, root)


def set_online(stick: Stick, *, online: Named, expires: datetime) -> None:
    chain = read(stick)
    root, targets = _draft_root(chain, expires), _draft_targets(chain, expires)
    offline.set_online(root, targets, online)
    _write(stick, targets, root)


def edit_targets(stick: Stick, edit: Callable[[Targets], None], *, expires: datetime) -> None:
    targets = _draft_targets(read(stick), expires)
    edit(targets)
    _write(stick, targets)


def renew(stick: Stick, role: str, *, expires: datetime) -> None:
    chain = read(stick)
    _write(stick, _draft_root(chain, expires) if role == ROOT else _draft_targets(chain, expires))


# --- signatures ---


def to_sign(chain: Chain, key: Key, roles: Sequence[str] = (ROOT, TARGETS)) -> list[Version]:
    """Versions that wait for this key. Raises `no_say`, `signed_already`, or `nothing_to_sign`."""
    waiting = [found for found in newest(chain) if found.role in roles and not found.standing.complete]
    if not waiting:
        raise Conflict("nothing_to_sign", "nothing here waits for a signature")
    entitled = [found for found in waiting if _may_sign(chain, found, key)]
    if not entitled:
        titles = " and ".join(found.title for found in waiting)
        raise Denied("no_say", f"the key {key.keyid[:12]} has no say in {titles}")
    fresh = [found for found in entitled if key.keyid not in _signed_by(found, chain)]
    if not fresh:
        raise Conflict("signed_already", f"the key {key.keyid[:12]} has signed; others are missing")
    return fresh


def add_signature(stick: Stick, version: Version, signer: Signer) -> Standing:
    """Sign what was shown, not what may lie on the stick by now."""
    chain = read(stick)
    current = next((found for found in newest(chain) if found.role == version.role), None)
    if current is None or current.metadata.signed_bytes != version.metadata.signed_bytes:
        raise Conflict("changed_meanwhile", f"{version.title} changed on the stick since it was shown")
    metadata = current.metadata
    metadata.sign(signer, append=True)
    if signer.public_key.keyid not in _signed_by(current, chain):
        raise Denied("bad_signature", "the signature does not verify: the private key and its public half differ")
    content = offline.with_good_signatures(metadata, *_delegators(chain, version.role), role=version.role)
    stick.write_role(version.role, metadata.signed.version, content)
    return next(found.standing for found in newest(read(stick)) if found.role == version.role)


def public_keys(chain: Chain) -> list[Named]:
    """Every key that the newest root and targets name, for the next ceremony; by its id where it has no name."""
    signed: list[Root | Targets] = [chain.root.signed]
    if chain.targets is not None:
        signed.append(chain.targets.signed)
    names = offline.names_of(*signed)
    found = {keyid: key for item in signed for keyid, key in offline.keys_of(item).items()}
    return [Named(names.get(keyid, keyid[:12]), key) for keyid, key in found.items()]


# --- within ---


def _read_root(stick: Stick, version: int) -> RootFile:
    metadata: RootFile = _named_error(f"{version}.root.json", lambda: offline.read_root(stick.role(ROOT, version)))
    _check_number(metadata, ROOT, version)
    return metadata


def _read_targets(stick: Stick, roots: Sequence[RootFile]) -> tuple[TargetsFile | None, TargetsFile | None]:
    """The newest and the one before it, which must have been signed by enough keys of some complete root: were an
    unsigned root believed, a forged "before" would hide what changes from those who sign.
    """
    versions = stick.versions(TARGETS)
    if not versions:
        return None, None
    last = _read_targets_file(stick, versions[-1])
    if last.signed.version - 1 not in versions:
        if last.signed.version > 1 and not _was_complete(last, _complete(roots)):
            raise NotFound("no_such_file", f"expected {last.signed.version - 1}.targets.json, to see what changes")
        return last, None
    before = _read_targets_file(stick, last.signed.version - 1)
    if not _was_complete(before, _complete(roots)):
        raise Denied("bad_signature", f"{before.signed.version}.targets.json: signed by too few of the targets keys")
    return last, before


def _read_targets_file(stick: Stick, version: int) -> TargetsFile:
    name = f"{version}.targets.json"
    metadata: TargetsFile = _named_error(name, lambda: offline.read_targets(stick.role(TARGETS, version)))
    _check_number(metadata, TARGETS, version)
    return metadata


def _named_error(name: str, load: Callable[[], Any]) -> Any:
    """An error that says which file it speaks of."""
    try:
        return load()
    except Invalid as error:
        raise Invalid(error.code, f"{name}: {error.message.removeprefix(f'{name}: ')}", error.detail) from error


def _check_number(metadata: Metadata[Any], role: str, version: int) -> None:
    if metadata.signed.version != version:
        raise Invalid("wrong_version", f"{version}.{role}.json: it says that it is version {metadata.signed.version}")


def _must_be_complete(metadata: RootFile, before: RootFile | None) -> None:
    standing = offline.root_standing(metadata, before.signed if before else None)
    if not standing.complete:
        needs = "; ".join(standing.needs)
        raise Denied("bad_signature", f"{metadata.signed.version}.root.json: signed by too few: {needs}")


def _complete(roots: Sequence[RootFile]) -> Sequence[RootFile]:
    """Without the newest root where that still waits for signatures."""
    before = roots[-2].signed if len(roots) > 1 else None
    return roots if offline.root_standing(roots[-1], before).complete else roots[:-1]


def _was_complete(metadata: TargetsFile, roots: Sequence[RootFile]) -> bool:
    return any(offline.targets_standing(metadata, root.signed).complete for root in roots)


def _draft_root(chain: Chain, expires: datetime) -> Root:
    """The next root, or the unsigned draft of it that lies there, which may be edited on."""
    if offline.root_standing(chain.root, chain.root_before).complete:
        return offline.next_version(chain.root.signed, expires)
    return _unsigned(chain.root, expires)


def _draft_targets(chain: Chain, expires: datetime) -> Targets:
    if chain.targets is None:
        raise NotFound("no_such_file", "there is no N.targets.json; run trust_export to fetch it")
    if _was_complete(chain.targets, _complete(chain.roots)):
        return offline.next_version(chain.targets.signed, expires)
    return _unsigned(chain.targets, expires)


def _unsigned(metadata: Metadata[offline.Signed], expires: datetime) -> offline.Signed:
    name = f"{metadata.signed.version}.{metadata.signed.type}.json"
    if metadata.signatures:
        raise Conflict("signed_already", f"{name} is signed in part; finish it, or delete the file and start over")
    metadata.signed.expires = expires.replace(microsecond=0)
    return metadata.signed


def _write(stick: Stick, *drafts: Root | Targets) -> None:
    """Root last: `read` fails for no half of an edit."""
    for signed in drafts:
        stick.write_role(signed.type, signed.version, repository.sign(signed, []))


def _delegators(chain: Chain, role: str) -> list[Root]:
    roots = [chain.root.signed]
    return [*roots, chain.root_before] if role == ROOT and chain.root_before else roots


def _may_sign(chain: Chain, version: Version, key: Key) -> bool:
    """By the key itself: a name or an id on the stick is only a claim."""
    held = [
        root.keys[keyid] for root in _delegators(chain, version.role) for keyid in root.roles[version.role].keyids
        if keyid == key.keyid
    ]  # fmt: skip
    return any(signing.essence(one) == signing.essence(key) for one in held)


def _signed_by(version: Version, chain: Chain) -> set[str]:
    signed: set[str] = set()
    for root in _delegators(chain, version.role):
        result = root.get_verification_result(version.role, version.metadata.signed_bytes, version.metadata.signatures)
        signed |= result.signed.keys()
    return signed
