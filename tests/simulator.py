"""An honest TUF repository and director in memory, and the ways to make them lie. Builds the Bundles a device gets.

Shared by the SDK's tests; signs by python-tuf's Metadata API, as the server does, but shares no code with it.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

from securesystemslib.signer import CryptoSigner, Key
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.manifest import FileEntry, Manifest, digest
from device_sdk.protocol.names import ReleasePath, assign_path
from device_sdk.protocol.polls import BINDING, Bundle

START = 1_800_000_000  # unix seconds: the simulator's clock at birth
DAY = 86_400
_COMPACT = JSONSerializer(compact=True)


@cache
def signer(name: str) -> CryptoSigner:
    """One key per name and process: making keys is not what the tests are about."""
    return CryptoSigner.generate_ed25519()


def release(
    path: str, files: Mapping[str, bytes] | None = None, *, entry: str = "", metadata: Mapping[str, str] | None = None
) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest and its blobs by sha256. Without `files`: one file whose content is the path."""
    files = files or {"model.onnx": f"weights of {path}".encode()}
    entries = tuple(FileEntry(name, len(data), digest(data)) for name, data in files.items())
    manifest = Manifest(
        path=ReleasePath.parse(path), files=entries, entry=entry or entries[0].name, metadata=metadata or {}
    )
    return manifest, {digest(data): data for data in files.values()}


@dataclass
class Simulator:
    """`publish` as CI does, `assign` as the director does, then take a `bundle`. Each bundle is a new view.

    To tamper: wrong keys and fields by `view`'s arguments, a `copy` that a thief works on, or `resigned` files.
    `edit` changes each file's text after signing and before the next file vouches for it.
    """

    device: str = "cam-1"
    models: tuple[str, ...] = ("detector",)
    now: int = START
    roots: list[Metadata[Root]] = field(default_factory=list)
    targets: Metadata[Targets] = field(init=False)
    roles: dict[str, Metadata[Targets]] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    assigned: dict[str, Assignment] = field(default_factory=dict)
    online: str = "online"
    root_keys: tuple[str, ...] = ("root-1", "root-2")
    version: int = 0
    lifetime: int = DAY
    threshold: dict[str, int] = field(default_factory=dict)  # of a model's role; 1 where unsaid

    def __post_init__(self) -> None:
        self.targets = Metadata(Targets(1, expires=self.at(365 * DAY), targets={}, delegations=self._delegations()))
        self.targets.sign(signer("targets"))
        self.rotate_root()
        for model in self.models:
            self.assigned[model] = Assignment(model)

    # What people and CI do

    def at(self, seconds: int) -> datetime:
        return datetime.fromtimestamp(self.now + seconds, UTC)

    def rotate_root(
        self, *, keys: tuple[str, ...] | None = None, online: str | None = None, signed_by: tuple[str, ...] = ()
    ) -> None:
        """Sign the next root by the old keys and the new, or by whom it is said."""
        old, self.root_keys, self.online = self.root_keys, keys or self.root_keys, online or self.online
        root = Root(len(self.roots) + 1, expires=self.at(365 * DAY), consistent_snapshot=True)
        root.roles["root"] = Role([], len(self.root_keys))
        for name in self.root_keys:
            root.add_key(signer(name).public_key, "root")
        root.add_key(signer("targets").public_key, "targets")
        for role in ("snapshot", "timestamp"):
            root.add_key(signer(self.online).public_key, role)
        metadata = Metadata(root)
        for name in signed_by or dict.fromkeys((*old, *self.root_keys)):
            metadata.sign(signer(name), append=True)
        self.roots.append(metadata)
        if online and len(self.roots) > 1:
            self.sign_targets()

    def sign_targets(self) -> None:
        """The next targets: the admin says anew who may sign what."""
        targets = Targets(
            self.targets.signed.version + 1, expires=self.at(365 * DAY), targets={}, delegations=self._delegations()
        )
        self.targets = Metadata(targets)
        self.targets.sign(signer("targets"))

    def publish(
        self, path: str, files: Mapping[str, bytes] | None = None, *, key: str = "", entry: str = ""
    ) -> Manifest:
        manifest, blobs = release(path, files, entry=entry)
        self.list_release(manifest, key=key)
        self.blobs |= blobs
        return manifest

    def release(self, path: str, files: Mapping[str, bytes] | None = None) -> tuple[Manifest, dict[str, bytes]]:
        return release(path, files)

    def list_release(self, manifest: Manifest, *, path: str = "", key: str = "", role: str = "") -> None:
        """Put a manifest into its model's role, as CI does; or under another path, key or role."""
        data, path, model = manifest.to_bytes(), path or str(manifest.path), role or manifest.path.model
        self.manifests[digest(data)] = data
        targets = dict(self.roles[model].signed.targets) if model in self.roles else {}
        targets[path] = TargetFile(len(data), {"sha256": digest(data)}, path)
        self.sign_role(model, targets, key=key)

    def withdraw(self, path: str) -> None:
        """CI takes a release off its list: revocation."""
        model = path.split("/", maxsplit=1)[0]
        targets = {name: target for name, target in self.roles[model].signed.targets.items() if name != path}
        self.sign_role(model, targets)

    def sign_role(self, model: str, targets: dict[str, TargetFile], *, key: str = "") -> None:
        version = self.roles[model].signed.version + 1 if model in self.roles else 1
        self.roles[model] = Metadata(Targets(version, expires=self.at(180 * DAY), targets=targets))
        self.roles[model].sign(signer(key or f"ci-{model}"))

    def assign(self, manifest: Manifest | None, *, model: str = "", **changes: Any) -> Assignment:
        """The director's word for one model; `changes` are fields of the Assignment, right or wrong."""
        model = model or (manifest.path.model if manifest else self.models[0])
        values: dict[str, Any] = {"model": model}
        if manifest:
            data = manifest.to_bytes()
            values |= {"release": manifest.path, "length": len(data), "sha256": digest(data)}
        self.assigned[model] = Assignment(**{**values, **changes})
        return self.assigned[model]

    # What a device gets

    def pinned_root(self) -> bytes:
        return self.roots[0].to_bytes(_COMPACT)

    def bundle(self, *, root: int = 1, tick: int = 1, **changes: Any) -> Bundle:
        """Sign the next view and pack it. `changes`: see `view`."""
        self.now += tick
        files = self.view(**changes)
        later = {f"{m.signed.version}.root.json": _text(m) for m in self.roots if m.signed.version > root}
        wanted = {assignment.sha256 for assignment in self.assigned.values() if assignment.release}
        manifests = {sha: data.decode() for sha, data in self.manifests.items() if sha in wanted}
        return Bundle(metadata={**later, **files}, manifests=manifests)

    def view(
        self,
        *,
        version: int | None = None,
        device: str | None = None,
        director_targets: Mapping[str, TargetFile] | None = None,
        director_key: str = "",
        snapshot_key: str = "",
        timestamp_key: str = "",
        snapshot_versions: Mapping[str, int] | None = None,
        edit: Callable[[str, str], str] = lambda _, text: text,
    ) -> dict[str, str]:
        """Director, snapshot and timestamp, and the roles they name. Everything honest unless told otherwise."""
        version = version if version is not None else max(self.now, self.version + 1)
        self.version = max(self.version, version)
        entries = self._director_targets(device or self.device) if director_targets is None else director_targets
        director = Metadata(Targets(version, expires=self.at(self.lifetime), targets=dict(entries)))
        director.sign(signer(director_key or self.online))
        texts = {name: edit(name, _text(each)) for name, each in self._listed(director).items()}
        versions = {name: each.signed.version for name, each in self._listed(director).items()}
        meta = {name: _meta(versions[name], text) for name, text in texts.items()}
        for name, other in (snapshot_versions or {}).items():
            meta[name].version = other
        snapshot = Metadata(
            Snapshot(
                version, expires=self.at(self.lifetime), meta={f"{name}.json": each for name, each in meta.items()}
            )
        )
        snapshot.sign(signer(snapshot_key or self.online))
        files = {f"{versions[name]}.{name}.json": text for name, text in texts.items()}
        files[f"{version}.snapshot.json"] = edit("snapshot", _text(snapshot))
        timestamp = Timestamp(
            version, expires=self.at(self.lifetime), snapshot_meta=_meta(version, files[f"{version}.snapshot.json"])
        )
        timestamp.unrecognized_fields[BINDING] = device or self.device
        signed = Metadata(timestamp)
        signed.sign(signer(timestamp_key or self.online))
        return {**files, "timestamp.json": edit("timestamp", _text(signed))}

    def copy(self) -> "Simulator":
        """The same repository, to go another way: what a thief of its keys can make of it."""
        return deepcopy(self)

    def _listed(self, director: Metadata[Targets]) -> dict[str, Metadata[Targets]]:
        return {"director": director, "targets": self.targets, **self.roles}

    def _director_targets(self, device: str) -> dict[str, TargetFile]:
        entries = {}
        for model, assignment in self.assigned.items():
            path = assign_path(device, model)
            sha = assignment.sha256 if assignment.release else digest(b"")
            entries[path] = TargetFile(assignment.length, {"sha256": sha}, path, {"custom": assignment.to_custom()})
        return entries

    def _delegations(self) -> Delegations:
        keys: dict[str, Key] = {}
        roles: dict[str, DelegatedRole] = {}
        names = {"director": (self.online, "assign/*/*"), **{m: (f"ci-{m}", f"{m}/*/*") for m in self.models}}
        for name, (holder, pattern) in names.items():
            key = signer(holder).public_key
            keys[key.keyid] = key
            roles[name] = DelegatedRole(
                name, [key.keyid], self.threshold.get(name, 1), terminating=name == "director", paths=[pattern]
            )
        return Delegations(keys, roles)


def resigned(text: str, key: str, **changes: Any) -> str:
    """Change fields of a signed file and sign it again by `key`: what a thief of that key can do."""
    metadata: Metadata[Any] = Metadata.from_bytes(text.encode())
    for name, value in changes.items():
        setattr(metadata.signed, name, value)
    metadata.sign(signer(key))
    return _text(metadata)


def unsigned(text: str) -> str:
    metadata: Metadata[Any] = Metadata.from_bytes(text.encode())
    metadata.signatures.clear()
    return _text(metadata)


def digest_of(manifest: Manifest) -> str:
    return digest(manifest.to_bytes())


def _text(metadata: Metadata[Any]) -> str:
    return metadata.to_bytes(_COMPACT).decode()


def _meta(version: int, text: str) -> MetaFile:
    return MetaFile.from_data(version, text.encode(), ["sha256"])
