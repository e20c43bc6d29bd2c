"""`fleet-publish sign` and `status`: the second person's part, on their own machine, with their own key.

The server is not believed. It hands over a proposal; what is signed are those very bytes, after it was seen that
1. a key that we were given (`--role-key`, CI's) has signed the proposal, and one that we know the role in force
2. it is the next version of that role, speaks of this model only, and changes no release that stays
3. each manifest that is shown, and each file of `--files` and `--manifest`, has the sha256 that stands in those bytes
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path
from typing import Any

from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, Targets
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from device_sdk.errors import SetupError, TransferError, UntrustedError
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import Manifest, digest
from device_sdk.protocol.names import ReleasePath
from device_sdk.publish import OK, PENDING, known_keys, say_pending, server_arguments, signing_arguments
from device_sdk.publishing.console import say
from device_sdk.publishing.roles import trusted
from device_sdk.publishing.server import Server

# What the server says when the proposal is not the one that was looked at, or not there any more.
_GONE = frozenset({"stale_role", "no_pending_role", "pending_changed"})


@dataclass(frozen=True, slots=True)
class Review:
    """A proposal that may be shown: everything in it stands in bytes that a key we know has signed."""

    metadata: Metadata[Targets]
    added: Mapping[str, Manifest]  # by path
    removed: Sequence[str]
    kept: int

    @property
    def changes(self) -> bool:
        return bool(self.added or self.removed)


def sign(options: argparse.Namespace, server: Server, signer: Signer) -> int:
    """Look at the proposal, ask, add our signature to the very same bytes."""
    proposal = server.proposal(options.model)
    if proposal is None:
        say(f"nothing of {options.model} waits for a signature")
        return OK
    review = _review(options, server, proposal, signer.public_key)
    for line in describe(options.model, review, proposal):
        _tell(line)
    _check_files(options, review)
    own = signer.public_key.keyid
    if own not in {*proposal["signed"], *proposal["missing"]}:
        raise SetupError(f"this key, {own}, is none of the keys of {options.model}")
    if own in proposal["signed"]:
        say("this key has signed it already")
        say_pending(options, proposal)
        return PENDING
    if not options.yes and not _agreed():
        say("not signed")
        return PENDING
    review.metadata.sign(signer, append=True)
    return _conclude(options, _post(options, server, review.metadata))


def status(options: argparse.Namespace, server: Server, _signer: None) -> int:
    """What is in force, what waits, who has signed and who has not. As the server says: nothing is verified here."""
    current, proposal = server.role(options.model), server.proposal(options.model)
    if current is None:
        say(f"{options.model}: no role yet")
    else:
        metadata = _parse(current)
        role = metadata.signed
        say(
            f"{options.model}: role version {role.version}, {_count(len(role.targets), 'variant')}, expires "
            f"{_until(role.expires)}, signed by {', '.join(sorted(metadata.signatures))}"
        )
    if proposal is None:
        say("nothing waits for a signature")
        return OK
    expires = _parse(str(proposal["role"]).encode()).signed.expires
    _tell(f"version {proposal['version']} is proposed by {proposal['proposed_by']}, expires {_until(expires)}")
    for keyid in proposal["signed"]:
        say(f"  signed   {keyid}")
    for keyid in proposal["missing"]:
        say(f"  missing  {keyid}")
    for version, found in sorted(proposal["releases"].items()):
        _tell(f"  release {version} is {found['state']}{found['reason'] and ': ' + found['reason']}")
    say_pending(options, proposal)
    return PENDING


def describe(model: str, review: Review, proposal: Mapping[str, Any]) -> Iterator[str]:
    """What the proposal changes, in plain words."""
    role = review.metadata.signed
    yield f"Version {role.version} of the role of {model}, proposed by {proposal['proposed_by']}, would"
    for path, manifest in sorted(review.added.items()):
        where = ReleasePath.parse(path)
        target = role.targets[path]
        yield f"  let run  {where.model} {where.version}, variant {where.variant}"
        yield f"           manifest: {target.length:,} bytes, sha256 {target.hashes['sha256']}"
        for file in manifest.fetched:
            what = "acceptance bundle" if file == manifest.acceptance else "file"
            yield f"           {what} {file.name}: {file.length:,} bytes, sha256 {file.sha256}"
        for name, value in sorted(manifest.metadata.items()):
            yield f"           {name}: {value}"
        found = proposal["releases"].get(where.version, {})
        yield f"           the server says: {_validation(found)}"
    for path in review.removed:
        yield f"  revoke   {path}"
    if not review.changes:
        yield "  change no release"
    yield f"  keep     {_count(review.kept, 'variant')} of other releases as they are"
    yield f"  expire   {_until(role.expires)}"
    yield f"Signed by {', '.join(proposal['signed'])}: {len(proposal['signed'])} of {proposal['threshold']}."


def _validation(found: Mapping[str, str]) -> str:
    if found.get("reason"):
        return f"{found['state']}: {found['reason']}"
    return "it waits for signatures" if found.get("state") == "pending" else found.get("state", "nothing")


def add_commands(commands: Any) -> None:
    signing = commands.add_parser("sign", help="add your signature to what CI proposes")
    server_arguments(signing)
    signing_arguments(signing, "your own private key: a PEM file or a securesystemslib URI")
    signing.add_argument(
        "--files", type=Path, metavar="DIR", help="the files you reviewed: they must be those proposed"
    )
    signing.add_argument("--manifest", type=Path, action="append", default=[], help="a manifest that you reviewed")
    signing.add_argument("--yes", action="store_true", help="do not ask")
    signing.set_defaults(run=sign)
    looking = commands.add_parser("status", help="what is in force, what waits for signatures, and whose")
    server_arguments(looking)
    looking.set_defaults(run=status)


def _review(options: argparse.Namespace, server: Server, proposal: Mapping[str, Any], own: Key) -> Review:
    """Everything that must hold before a person is shown anything. Raises UntrustedError."""
    keys = known_keys(options)
    if not keys:
        raise SetupError("give --role-key: the public key of whoever proposes, as you got it from them")
    content = str(proposal["role"]).encode()
    trusted(content, keys)  # not our own: what we are about to sign must come from somebody whom we know
    current = server.role(options.model)
    held = trusted(current, [own, *keys]) if current is not None else None
    metadata = _parse(content)
    role = metadata.signed
    expected = (held.version if held else 0) + 1
    if role.version != expected:
        raise UntrustedError(f"expected a proposal of version {expected}; got {role.version}", code="stale_role")
    if role.delegations is not None or role.is_expired():
        raise UntrustedError("the proposal delegates to others, or has expired", code="malformed_role")
    old = held.targets if held else {}
    changed = [path for path in role.targets if path in old and role.targets[path] != old[path]]
    if changed:
        raise UntrustedError(f"releases never change; the proposal has other bytes for {changed[0]}", code="changed")
    added = {path: _manifest(options.model, path, role, proposal) for path in role.targets if path not in old}
    return Review(metadata, added, sorted(old.keys() - role.targets.keys()), len(role.targets) - len(added))


def _manifest(model: str, path: str, role: Targets, proposal: Mapping[str, Any]) -> Manifest:
    """The manifest that goes with a path, by the hash that is to be signed."""
    data, target = str(proposal["manifests"].get(path, "")).encode(), role.targets[path]
    if (len(data), digest(data)) != (target.length, target.hashes.get("sha256")) or set(target.hashes) != {"sha256"}:
        raise UntrustedError(f"{path}: the server's manifest is not the one that is proposed", code="bad_manifest")
    try:
        manifest = Manifest.parse(data)
    except ProtocolError as error:
        raise UntrustedError(f"{path}: {error.message}", code="bad_manifest") from error
    if str(manifest.path) != path or manifest.path.model != model:
        raise UntrustedError(f"{path}: its manifest says that it is {manifest.path}", code="bad_manifest")
    return manifest


def _check_files(options: argparse.Namespace, review: Review) -> None:
    """What was reviewed is what is proposed: each file of each added manifest, or each manifest, byte for byte."""
    proposed = {review.metadata.signed.targets[path].hashes["sha256"]: path for path in review.added}
    for path in options.manifest:
        sha256 = _sha256(path)
        if sha256 not in proposed:
            raise UntrustedError(f"{path} (sha256 {sha256}) is no manifest of the proposal", code="other_files")
        say(f"{path} is the manifest of {proposed[sha256]}")
    if options.files is None:
        return
    if not review.added:
        raise SetupError("--files: the proposal adds no release")
    for path, manifest in sorted(review.added.items()):
        for file in manifest.fetched:
            if not any(_sha256(place) == file.sha256 for place in _places(options.files, path, file.name)):
                message = f"{path}: no {file.name} with sha256 {file.sha256} in {options.files}"
                raise UntrustedError(message, code="other_files")
        say(f"{path}: its files are those in {options.files}")


def _places(folder: Path, path: str, name: str) -> Iterator[Path]:
    """`DIR/<variant>/name`, else `DIR/name`."""
    for place in (folder / ReleasePath.parse(path).variant / name, folder / name):
        if place.is_file():
            yield place


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from error


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise SetupError("nobody is there to ask: read the above and run it again with --yes")
    sys.stderr.write("Sign it? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _post(options: argparse.Namespace, server: Server, metadata: Metadata[Targets]) -> Mapping[str, Any]:
    try:
        return server.add_signatures(options.model, metadata.to_bytes(JSONSerializer(compact=True)).decode())
    except TransferError as error:
        if error.code in _GONE and _is_in_force(options, server, metadata):
            return {"version": metadata.signed.version}  # the answer got lost, or another person was faster
        raise


def _is_in_force(options: argparse.Namespace, server: Server, metadata: Metadata[Targets]) -> bool:
    current = server.role(options.model)
    return current is not None and _parse(current).signed_bytes == metadata.signed_bytes


def _conclude(options: argparse.Namespace, answer: Mapping[str, Any]) -> int:
    if answer.get("pending"):
        say("signed")
        say_pending(options, answer)
        return PENDING
    say(f"signed; version {answer['version']} of the role of {options.model} is in force")
    return OK


def _parse(content: bytes) -> Metadata[Targets]:
    try:
        metadata = Metadata[Targets].from_bytes(content)
    except DeserializationError as error:
        raise UntrustedError(f"the server's role does not parse: {error}", code="malformed_role") from error
    if not isinstance(metadata.signed, Targets):
        raise UntrustedError("the server's role is none", code="malformed_role")
    return metadata


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _until(moment: datetime) -> str:
    days = (moment - datetime.now(UTC)).days
    left = f"in {_count(days, 'day')}" if days >= 0 else "it has expired"
    return f"{moment:%F %H:%M} UTC ({left})"


def _tell(line: str) -> None:
    """Text of others must not move the cursor over what was said before."""
    say("".join(character if character.isprintable() else "?" for character in line))
