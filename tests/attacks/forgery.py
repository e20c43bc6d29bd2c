"""What a thief signs who holds this key or that. Everything is built from an honest bundle, and signed for real.

The test server's keystore holds the online, targets and root keys; the shop holds CI's. Which of them an attack needs
is what a row is about, so each forgery names its keys.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Metadata, MetaFile, Root, TargetFile, Targets
from tuf.api.serialization.json import JSONSerializer

from device_sdk.protocol.manifest import Manifest, digest
from device_sdk.protocol.names import assign_path
from device_sdk.protocol.polls import Bundle
from tests.attacks.world import Shop

Edit = Callable[[Any], object]
_COMPACT = JSONSerializer(compact=True)
ONLINE = ("director", "snapshot", "timestamp")


def keep(_: Any) -> None:
    return


@dataclass
class Forger:
    """`online` signs director, snapshot and timestamp; it may be replaced, as by a root rotation."""

    shop: Shop
    online: CryptoSigner = field(init=False)
    ci: CryptoSigner = field(init=False)
    other_ci: CryptoSigner = field(init=False)
    targets: CryptoSigner = field(init=False)
    roots: list[CryptoSigner] = field(init=False)

    def __post_init__(self) -> None:
        keystore = self.shop.server.keystore
        self.online, self.targets = _key(keystore / "online.pem"), _key(keystore / "targets-1.pem")
        self.ci, self.other_ci = _key(self.shop.key), _key(self.shop.other_key)
        self.roots = [_key(keystore / f"root-{number}.pem") for number in (1, 2, 3)]

    def view(
        self,
        honest: Bundle,
        *,
        version: int = 0,
        director: Edit = keep,
        snapshot: Edit = keep,
        timestamp: Edit = keep,
        roles: Mapping[str, str] | None = None,
        keys: Mapping[str, CryptoSigner | None] | None = None,
    ) -> Bundle:
        """The next view, as `honest` but for the edits; all that vouches for what is edited is signed anew.

        `version`: of all three, else one more than before. `roles`: texts of targets, a model's role, or the
        director's. `keys`: who signs director, snapshot or timestamp instead of the online key; None: nobody.
        """
        signers = {**dict.fromkeys(ONLINE, self.online), **(keys or {})}
        parts = {name: part(honest, name) for name in ONLINE}
        version = version or parts["timestamp"].signed.version + 1
        texts = {role: text for role in ("targets", self.shop.model) for text in [text_of(honest, role)]}
        director(parts["director"].signed)
        texts["director"] = _signed(parts["director"], version, signers["director"])
        texts |= roles or {}
        meta = parts["snapshot"].signed.meta
        for role in {"director", *(roles or {})}:
            meta[f"{role}.json"] = _meta(texts[role])
        snapshot(parts["snapshot"].signed)
        texts["snapshot"] = _signed(parts["snapshot"], version, signers["snapshot"])
        parts["timestamp"].signed.snapshot_meta = _meta(texts["snapshot"])
        timestamp(parts["timestamp"].signed)
        texts["timestamp"] = _signed(parts["timestamp"], version, signers["timestamp"])
        metadata = {name: text for name, text in honest.metadata.items() if name.endswith(".root.json")}
        for role, text in texts.items():
            metadata["timestamp.json" if role == "timestamp" else f"{_version(text)}.{role}.json"] = text
        return replace(honest, metadata=metadata)

    # What people and CI sign

    def role(self, honest: Bundle, edit: Edit, *keys: CryptoSigner, name: str = "") -> str:
        """The next version of a model's role, signed by CI or by whom it is said."""
        metadata = part(honest, name or self.shop.model)
        edit(metadata.signed)
        return _signed(metadata, metadata.signed.version + 1, *(keys or (self.ci,)))

    def new_targets(self, honest: Bundle, edit: Edit, *keys: CryptoSigner) -> str:
        metadata = part(honest, "targets")
        edit(metadata.signed)
        return _signed(metadata, metadata.signed.version + 1, *(keys or (self.targets,)))

    def redirected(self, honest: Bundle, online: CryptoSigner) -> str:
        """Targets that name another director."""

        def edit(targets: Targets) -> None:
            old = list(targets.delegations.roles["director"].keyids)
            for keyid in old:
                targets.revoke_key(keyid, "director")
            targets.add_key(online.public_key, "director")

        return self.new_targets(honest, edit)

    def pinned_root(self, home: Path) -> Metadata[Root]:
        return Metadata[Root].from_bytes(json.loads((home / "provision.json").read_bytes())["root"].encode())

    def next_root(
        self,
        root: Metadata[Root],
        *,
        online: CryptoSigner | None = None,
        holders: Sequence[CryptoSigner] = (),
        signed_by: Sequence[CryptoSigner] = (),
        version: int = 0,
    ) -> Metadata[Root]:
        """The root after `root`: with another online key, other holders (threshold 2), signed by all or by some."""
        made: Metadata[Root] = Metadata.from_bytes(root.to_bytes(_COMPACT))
        if online is not None:
            for role in ("timestamp", "snapshot"):
                for keyid in list(made.signed.roles[role].keyids):
                    made.signed.revoke_key(keyid, role)
                made.signed.add_key(online.public_key, role)
        if holders:
            for keyid in list(made.signed.roles["root"].keyids):
                made.signed.revoke_key(keyid, "root")
            for signer in holders:
                made.signed.add_key(signer.public_key, "root")
        made.signed.version = version or root.signed.version + 1
        made.signatures.clear()
        for signer in signed_by or (*self.roots, *holders):
            made.sign(signer, append=True)
        return made


# Pieces of bundles


def name_of(bundle: Bundle, role: str) -> str:
    return next(name for name in bundle.metadata if name == f"{role}.json" or name.endswith(f".{role}.json"))


def text_of(bundle: Bundle, role: str) -> str:
    return bundle.metadata[name_of(bundle, role)]


def part(bundle: Bundle, role: str) -> Metadata[Any]:
    return Metadata.from_bytes(text_of(bundle, role).encode())


def with_files(bundle: Bundle, **texts: str) -> Bundle:
    """The same bundle, with the texts of some files exchanged."""
    return replace(
        bundle, metadata={**bundle.metadata, **{name_of(bundle, role): text for role, text in texts.items()}}
    )


def with_roots(bundle: Bundle, *roots: Metadata[Root]) -> Bundle:
    texts = {f"{root.signed.version}.root.json": root.to_bytes(_COMPACT).decode() for root in roots}
    return replace(bundle, metadata={**texts, **bundle.metadata})


def unsigned(text: str) -> str:
    metadata: Metadata[Any] = Metadata.from_bytes(text.encode())
    metadata.signatures.clear()
    return metadata.to_bytes(_COMPACT).decode()


def stranger() -> CryptoSigner:
    """A key that nobody has heard of."""
    return CryptoSigner.generate_ed25519()


def assigning(device: str, manifest: Manifest, *, model: str = "", **changes: Any) -> Edit:
    """An edit of the director: the device is to run this. `changes`: of the entry's length, sha256, or `custom`."""
    path = assign_path(device, model or manifest.path.model)
    data = manifest.to_bytes()

    def edit(targets: Targets) -> None:
        entry = targets.targets[path]
        custom = {**entry.custom, "release": str(manifest.path), **changes.get("custom", {})}
        entry.length = changes.get("length", len(data))
        entry.hashes = {"sha256": changes.get("sha256", digest(data))}
        entry.unrecognized_fields["custom"] = custom

    return edit


def listing(manifest: Manifest, *, path: str = "") -> Edit:
    """An edit of a model's role: this may run."""
    data = manifest.to_bytes()

    def edit(targets: Targets) -> None:
        name = path or str(manifest.path)
        targets.targets[name] = TargetFile(len(data), {"sha256": digest(data)}, name)

    return edit


def carrying(bundle: Bundle, *manifests: Manifest) -> Bundle:
    texts = {digest(each.to_bytes()): each.to_bytes().decode() for each in manifests}
    return replace(bundle, manifests={**bundle.manifests, **texts})


def of_threshold(model: str, number: int, *keys: CryptoSigner) -> Edit:
    """An edit of targets: so many of these keys must sign the model's role."""

    def edit(targets: Targets) -> None:
        for keyid in list(targets.delegations.roles[model].keyids):
            targets.revoke_key(keyid, model)
        targets.delegations.roles[model] = DelegatedRole(model, [], number, True, paths=[f"{model}/*/*"])
        for key in keys:
            targets.add_key(key.public_key, model)

    return edit


def in_days(days: float) -> datetime:
    return (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)


def _key(path: Path) -> CryptoSigner:
    return CryptoSigner(load_pem_private_key(path.read_bytes(), None))


def _signed(metadata: Metadata[Any], version: int, *signers: CryptoSigner | None) -> str:
    metadata.signed.version = version
    metadata.signatures.clear()
    for signer in signers:
        if signer is not None:
            metadata.sign(signer, append=True)
    return metadata.to_bytes(_COMPACT).decode()


def _meta(text: str) -> MetaFile:
    return MetaFile.from_data(_version(text), text.encode(), ["sha256"])


def _version(text: str) -> int:
    return int(json.loads(text)["signed"]["version"])  # of what tuf itself would not read, too
