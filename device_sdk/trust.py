"""Turn a bundle into a view that may be obeyed, or refuse it by a named code. No network here, and no models.

The work is stock `tuf.ngclient`'s; this module owns what stands around it:

1. the timestamp's binding is checked before ngclient sees a byte: a validly signed view of another device would
   otherwise be persisted and make every honest view look like a rollback
2. ngclient runs in a scratch directory, seeded from the last accepted view: what is refused leaves no trace, but for
   newer roots, which are verified by themselves
3. what the director assigns must be what CI listed: same length, same hash, a release of that very model
4. every pinned model is assigned something; an empty director is nothing to obey
5. versions never go below a floor that is kept apart from the view and synced before the view is
6. time never runs backwards past what a signed view has attested; expiry stops updates, never inference
7. a model whose own role has expired is refused by itself, and the other models of the view go on; only when none is
   left is the whole view refused

On disk: `floor.json`, `roots.json`, `view.json`, each with a checksum. A damaged one counts as missing; the view is
verified again, signatures and all, when it is first read.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from threading import RLock
from typing import Any
from urllib.parse import unquote

from securesystemslib.exceptions import Error as SecuresystemslibError
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

from device_sdk.config import read_plainly, write_durably
from device_sdk.errors import DeviceError, SetupError, StorageError, UntrustedError
from device_sdk.protocol import fields, limits
from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import Manifest, digest
from device_sdk.protocol.names import DIRECTOR, assign_path, check_model, check_name
from device_sdk.protocol.polls import BINDING, Bundle

TIMESTAMP = "timestamp.json"
_BASE = "bundle:/"
_LAST_SECOND = datetime(9999, 12, 30, tzinfo=UTC).timestamp()
_RECORD_LIMIT = 4 * limits.BUNDLE
_LARGEST_VERSION = 2**63  # of what the floor's file can hold: a larger one would empty it at the next start
_CONFIG = UpdaterConfig(
    root_max_length=limits.METADATA,
    timestamp_max_length=limits.METADATA,
    snapshot_max_length=limits.METADATA,
    targets_max_length=limits.METADATA,
)

# The first that fits names the refusal.
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (tuf_errors.ExpiredMetadataError, "expired"),
    (tuf_errors.UnsignedMetadataError, "bad_signature"),
    (tuf_errors.BadVersionNumberError, "replayed"),
    (tuf_errors.LengthOrHashMismatchError, "hash_mismatch"),
    (tuf_errors.DownloadLengthMismatchError, "too_large"),
    (tuf_errors.DownloadError, "incomplete"),
    (DeserializationError, "malformed"),
    (tuf_errors.RepositoryError, "inconsistent"),
    (SecuresystemslibError, "malformed"),
)


@dataclass(frozen=True, slots=True)
class Verified:
    """One model's assignment, and the manifest that CI signed for it (None, b"" where nothing is assigned).

    `listed`: sha256 of every manifest that CI lets run; None where its role could not be read.
    """

    assignment: Assignment
    manifest: Manifest | None
    manifest_bytes: bytes
    listed: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What this device was last told. `expires`, unix seconds: after it the view is stale, and still obeyed.

    `refused`: models whose CI let their role expire, and why. They are assigned nothing: what runs there goes on.
    """

    version: int
    expires: float
    assignments: Mapping[str, Verified]
    refused: Mapping[str, UntrustedError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Floor:
    """The newest versions seen. `keys` names the online keys that `roles` were signed by: when a new root replaces
    them, versions start afresh (the specification's way out of a fast-forward attack). `clock` in unix seconds.
    """

    root: int = 0
    clock: int = 0
    keys: str = ""
    roles: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"root": self.root, "clock": self.clock, "keys": self.keys, "roles": dict(self.roles)}

    @classmethod
    def parse(cls, value: object) -> "Floor":
        item = fields.as_object(value, "floor")
        roles = fields.take_object(item, "roles")
        return cls(
            root=fields.take_int(item, "root", high=_LARGEST_VERSION),
            clock=fields.take_int(item, "clock", high=_LARGEST_VERSION),
            keys=fields.take_text(item, "keys", limit=64),
            roles={role: fields.take_int(roles, role, high=_LARGEST_VERSION) for role in roles},
        )

    def check(self, seen: "Floor") -> None:
        """Raise `replayed` when `seen` lies below."""
        if seen.root < self.root:
            raise UntrustedError(f"expected root {self.root} or later; got {seen.root}", code="replayed")
        if seen.keys != self.keys:
            return
        for role, version in self.roles.items():
            if seen.roles.get(role, 0) < version:
                message = f"expected {role} {version} or later; got {seen.roles.get(role, 'none')}"
                raise UntrustedError(message, code="replayed")


def _files(item: fields.Json, name: str, limit: int) -> dict[str, str]:
    """Texts by plain file names: they are about to be written under these."""
    files = fields.take_object(item, name)
    for key in files:
        if "/" in key or key in {"", ".", ".."}:
            raise ProtocolError("invalid_name", f"{name}: expected a plain file name; got {key!r:.80}")
        fields.take_text(files, key, limit=limit)
    return files


@dataclass(frozen=True, slots=True)
class _Record:
    """The last accepted view, as bytes: ngclient's files by their local names, manifests by sha256."""

    metadata: Mapping[str, str]
    manifests: Mapping[str, str]
    reference: float
    floor: Floor
    refused: Mapping[str, str] = field(default_factory=dict)  # model to the reason, see `View`

    def to_json(self) -> dict[str, Any]:
        return {
            "metadata": dict(self.metadata),
            "manifests": dict(self.manifests),
            "reference": self.reference,
            "floor": self.floor.to_json(),
            "refused": dict(self.refused),
        }

    @classmethod
    def parse(cls, item: fields.Json) -> "_Record":
        return cls(
            metadata=_files(item, "metadata", limits.METADATA),
            manifests=_files(item, "manifests", limits.MANIFEST),
            reference=fields.take_number(item, "reference", low=0, high=_LAST_SECOND),
            floor=Floor.parse(item.get("floor")),
            refused=fields.take_object(item, "refused") if "refused" in item else {},
        )


class Trust:
    """`root`: the pinned root metadata. `clock_floor`, unix seconds: no honest clock shows an earlier time.

    Refusals are UntrustedError with a stable code: `wrong_device`, `expired`, `replayed`, `bad_signature`,
    `hash_mismatch`, `incomplete`, `inconsistent`, `too_large`, `malformed`, `invalid_name`, `empty_director`,
    `missing_model`, `wrong_model`, `unlisted_release`, `disagreement`, `bad_manifest`. A full disk is a StorageError.
    """

    def __init__(self, directory: Path, device: str, models: Sequence[str], root: bytes, *, clock_floor: int) -> None:
        self._directory = directory
        self._device = check_name(device, "device")
        self._models = tuple(check_model(model) for model in models)
        self._root = root
        self._pinned_version = _root_version(root)
        self._clock_floor = clock_floor
        self._lock = RLock()
        with _disk_errors():
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._roots = self._read_roots()
        self._record = self._read_record()
        self._floor = self._read_floor()
        self._view: View | None = None

    @property
    def root_version(self) -> int:
        """The newest root this device holds: what to ask the server to start after."""
        return self._pinned_version + len(self._roots)

    def view(self) -> View | None:
        """The last accepted view, from disk, without network and whatever the time; None where there is none."""
        with self._lock:
            if self._view is None and self._record is not None:
                self._view = self._reread(self._record)
            return self._view

    def accept(self, bundle: Bundle, now: float) -> View:
        """Verify a bundle at `now` (unix seconds) and make it the view; or raise, and nothing has changed.

        A bundle under the version already held is no news: it is the held view that comes back.
        """
        with self._lock:
            current = self.view()
            seed = self._record if current else None
            manifests = {**(seed.manifests if seed else {}), **bundle.manifests}
            reference = min(max(now, self._clock_floor, self._floor.clock), _LAST_SECOND)
            check = self._verify(seed.metadata if seed else {}, bundle.metadata, manifests, reference)
            self._floor.check(check.floor)
            if current is not None and current.version == check.view.version:
                return current
            return self._keep(check, reference)

    def _verify(
        self,
        seed: Mapping[str, str],
        source: Mapping[str, str],
        manifests: Mapping[str, str],
        reference: float,
        refused: Mapping[str, str] | None = None,
    ) -> "_Check":
        """Let ngclient update from `seed` by what `source` serves, then hold its answer to our own rules.

        `refused`: models that were refused when this view came, and stay so: an expired role is not kept.
        """
        fetcher = _BundleFetcher(source, self._device)
        with self._scratch(seed) as scratch, tuf_client(scratch, fetcher, self._root, reference) as updater:
            trusted = _trusted(updater)
            try:
                updater.refresh()
                found = _Found(updater, self._device, manifests, dict(refused or {}))
                assignments = {model: found.verified(model) for model in self._models}
                found.check_any_is_left(assignments)
            finally:
                self._keep_roots(scratch, trusted.root.version)
            errors = {model: UntrustedError(text, code="expired") for model, text in found.refused.items()}
            view = View(trusted.timestamp.version, trusted.timestamp.expires.timestamp(), assignments, errors)
            return _Check(view, seen_by(updater), _local_files(scratch))

    @contextmanager
    def _scratch(self, seed: Mapping[str, str]) -> Iterator[Path]:
        scratch = self._directory / "scratch"
        with _disk_errors():
            _remove(scratch)
            (scratch / "root_history").mkdir(parents=True, mode=0o700)
            for name, text in seed.items():
                (scratch / name).write_bytes(text.encode())
            for version, text in enumerate(self._roots, self._pinned_version + 1):
                (scratch / "root_history" / f"{version}.root.json").write_bytes(text.encode())
        try:
            yield scratch
        finally:
            _remove(scratch)

    def _keep_roots(self, scratch: Path, newest: int) -> None:
        """A root is signed by its predecessor: what ngclient verified stays, whatever came of the rest."""
        with _disk_errors():
            history = scratch / "root_history"
            versions = range(self._pinned_version + 1, newest + 1)
            roots = [(history / f"{version}.root.json").read_bytes().decode() for version in versions]
            if roots == self._roots:
                return
            self._write("roots.json", {"pinned": self._pinned_version, "roots": roots})
        self._roots = roots

    def _keep(self, check: "_Check", reference: float) -> View:
        """The floor first: a power cut between the two leaves an old view that cannot be replayed into."""
        # A version is the server's time of signing: with it, a clock that is set ahead once does no lasting harm.
        clock = max(self._floor.clock, min(int(reference), check.view.version))
        floor = replace(check.floor, clock=clock)
        used = (v.manifest_bytes for v in check.view.assignments.values() if v.manifest is not None)
        record = _Record(
            metadata=check.files,
            manifests={digest(data): data.decode() for data in used},
            reference=reference,
            floor=floor,
            refused={model: str(error) for model, error in check.view.refused.items()},
        )
        with _disk_errors():
            self._write("floor.json", floor.to_json())
            self._floor = floor
            self._write("view.json", record.to_json())
        self._record, self._view = record, check.view
        return check.view

    def _reread(self, record: _Record) -> View | None:
        """Verify our own record as if it came from outside; what fails is forgotten and asked for again."""
        source = {TIMESTAMP: record.metadata.get(TIMESTAMP, "")}
        try:
            return self._verify(record.metadata, source, record.manifests, record.reference, record.refused).view
        except StorageError:
            return None
        except UntrustedError:
            self._record = None
            return None

    def _write(self, name: str, body: Mapping[str, Any]) -> None:
        text = json.dumps(body, sort_keys=True)
        write_durably(self._directory / name, json.dumps({"body": text, "sha256": digest(text.encode())}).encode())

    def _read(self, name: str) -> dict[str, Any]:
        """Raises ProtocolError or OSError; an answer has passed its checksum."""
        data = read_plainly(self._directory / name, limit=_RECORD_LIMIT)
        item = fields.parse_object(data, limit=_RECORD_LIMIT, what=name)
        text = fields.take_text(item, "body", limit=_RECORD_LIMIT)
        if digest(text.encode()) != item.get("sha256"):
            raise ProtocolError("malformed", f"{name}: checksum mismatch")
        return fields.parse_object(text, limit=_RECORD_LIMIT, what=name)

    def _read_roots(self) -> list[str]:
        """The chain after the pinned root. A newer pinned root makes the beginning of the chain superfluous."""
        try:
            body = self._read("roots.json")
            roots = [str(text) for text in fields.take_list(body, "roots", limit=1_000_000)]
            skipped = self._pinned_version - fields.take_int(body, "pinned", high=_LARGEST_VERSION)
        except (OSError, ValueError):
            return []
        return roots[skipped:] if skipped >= 0 else []

    def _read_record(self) -> _Record | None:
        try:
            return _Record.parse(self._read("view.json"))
        except (OSError, ValueError):
            return None

    def _read_floor(self) -> Floor:
        """A lost floor is made anew from the view's own copy at once: were that lost next, nothing would hold."""
        try:
            return Floor.parse(self._read("floor.json"))
        except (OSError, ValueError):
            if self._record is None:
                return Floor()
        with suppress(OSError):
            self._write("floor.json", self._record.floor.to_json())
        return self._record.floor


@dataclass(frozen=True, slots=True)
class _Check:
    view: View
    floor: Floor
    files: Mapping[str, str]


@contextmanager
def tuf_client(folder: Path, fetcher: "Fetcher", root: bytes, reference: float) -> Iterator[Updater]:
    """ngclient as a device runs it, over the metadata in `folder`: pinned root, our caps, our reference time.

    Whatever fails inside comes out as a named refusal. `tests/conformance` runs the public suite against this.
    """
    with _refusals(reference):
        updater = Updater(str(folder), _BASE, fetcher=fetcher, config=_CONFIG, bootstrap=root)
        # ngclient has no parameter for it; `test_reference_time_is_ours` fails if the attribute moves.
        _trusted(updater).reference_time = datetime.fromtimestamp(reference, UTC)
        yield updater


def seen_by(updater: Updater) -> Floor:
    """The versions that a refreshed client trusts: what the floor is held to, and raised to."""
    return _floor_of(_trusted(updater))


def _trusted(updater: Updater) -> TrustedMetadataSet:
    return updater._trusted_set  # noqa: SLF001


class Fetcher(FetcherInterface):
    """Serves ngclient in memory from `read`; stock `download_bytes` would go by a file in TMPDIR.

    `read`: a file by its plain name and the most bytes it may have; None where there is none. `device`: whose
    timestamps alone are let through; None lets all through, which no device does.
    """

    def __init__(self, read: Callable[[str, int], bytes | None], device: str | None) -> None:
        self._read = read
        self._device = device

    def download_bytes(self, url: str, max_length: int) -> bytes:
        name = unquote(url.removeprefix(_BASE))
        data = self._read(name, max_length)
        if data is None:
            raise tuf_errors.DownloadHTTPError(f"there is no {name}", 404)
        if len(data) > max_length:
            raise tuf_errors.DownloadLengthMismatchError(f"{url}: expected {max_length} bytes; got {len(data)}")
        if name == TIMESTAMP and self._device is not None:
            _check_binding(data, self._device)
        return data

    def _fetch(self, url: str) -> Iterator[bytes]:
        return iter([self.download_bytes(url, limits.METADATA)])


class _BundleFetcher(Fetcher):
    def __init__(self, metadata: Mapping[str, str], device: str) -> None:
        super().__init__(lambda name, _limit: metadata[name].encode() if name in metadata else None, device)


def _check_binding(text: bytes, device: str) -> None:
    signed = fields.take_object(fields.parse_object(text, limit=limits.METADATA, what=TIMESTAMP), "signed")
    if signed.get(BINDING) != device:
        message = f"expected a view of {device!r}; got one of {signed.get(BINDING)!r:.80}"
        raise UntrustedError(message, code="wrong_device")


@dataclass(frozen=True, slots=True)
class _Found:
    """What ngclient found to be signed, held together. `refused` grows by the models whose role has expired."""

    updater: Updater
    device: str
    manifests: Mapping[str, str]
    refused: dict[str, str]

    def verified(self, model: str) -> Verified:
        """Look up both what the server says runs here and what CI says may run, and hold the one to the other."""
        entry = self.updater.get_targetinfo(assign_path(self.device, model))
        if entry is None:
            raise _not_listed(self.updater, self.device, model)
        assignment = Assignment.parse(model, entry.length, entry.hashes.get("sha256", ""), entry.custom)
        if assignment.release is None:
            return Verified(assignment, None, b"", _listed(self.updater, model))
        release = self._released(assignment)
        if model in self.refused:  # nothing to install; the rest of the assignment is the server's to say
            return Verified(replace(assignment, release=None, length=0, sha256=digest(b"")), None, b"", None)
        if release is None:
            raise UntrustedError(f"{assignment.release} is assigned but CI does not list it", code="unlisted_release")
        if (release.length, release.hashes.get("sha256")) != (assignment.length, assignment.sha256):
            message = f"{assignment.release}: assigned {assignment.length} bytes with sha256 {assignment.sha256}; "
            raise UntrustedError(message + f"CI listed {release.length} with {release.hashes}", code="disagreement")
        return _with_manifest(assignment, self.manifests.get(assignment.sha256), _listed(self.updater, model))

    def check_any_is_left(self, assignments: Mapping[str, Verified]) -> None:
        """A view in which nothing may be installed but what has expired is worth nothing: keep the last one."""
        if self.refused and all(verified.assignment.release is None for verified in assignments.values()):
            raise UntrustedError("; ".join(self.refused.values()), code="expired")

    def _released(self, assignment: Assignment) -> TargetFile | None:
        """CI's entry. The director and targets are not expired, or we were not here: only this model's role can be."""
        if assignment.model in self.refused:
            return None
        try:
            return self.updater.get_targetinfo(str(assignment.release))
        except tuf_errors.ExpiredMetadataError as error:
            self.refused[assignment.model] = f"{assignment.release}: CI has not renewed its role: {error!s:.200}"
            return None


def _listed(updater: Updater, model: str) -> frozenset[str] | None:
    """What CI lets run of `model`. Where nothing is assigned its role is not needed: an expired one is no refusal."""
    trusted = updater._trusted_set  # noqa: SLF001  ngclient lists no targets
    if f"{model}.json" not in trusted.snapshot.meta:
        return frozenset()  # CI has never published any
    with suppress(tuf_errors.ExpiredMetadataError, tuf_errors.DownloadError):
        updater.get_targetinfo(f"{model}/-/-")  # no legal release: the look-up loads and verifies the role
        role = trusted.get(model)
        targets = role.targets if isinstance(role, Targets) else {}
        return frozenset(target.hashes.get("sha256", "") for target in targets.values())
    return None


def _with_manifest(assignment: Assignment, text: str | None, listed: frozenset[str] | None) -> Verified:
    if text is None:
        raise UntrustedError(f"{assignment.release}: its manifest is not in the bundle", code="bad_manifest")
    data = text.encode()
    if (len(data), digest(data)) != (assignment.length, assignment.sha256):
        message = f"{assignment.release}: expected a manifest of {assignment.length} bytes with sha256 "
        raise UntrustedError(message + f"{assignment.sha256}; got {len(data)} with {digest(data)}", code="bad_manifest")
    try:
        manifest = Manifest.parse(data)
    except ProtocolError as error:
        raise UntrustedError(f"{assignment.release}: {error.message}", code="bad_manifest") from error
    if manifest.path != assignment.release:
        message = f"{assignment.release}: its manifest says that it is {manifest.path}"
        raise UntrustedError(message, code="bad_manifest")
    return Verified(assignment, manifest, data, listed)


def _not_listed(updater: Updater, device: str, model: str) -> UntrustedError:
    director = updater._trusted_set.get(DIRECTOR)  # noqa: SLF001  only to name the refusal
    if not isinstance(director, Targets) or not director.targets:
        return UntrustedError(f"the director assigns {device} nothing at all", code="empty_director")
    return UntrustedError(f"the director says nothing of model {model}", code="missing_model")


def _floor_of(trusted: TrustedMetadataSet) -> Floor:
    keyids = [sorted(trusted.root.roles[role].keyids) for role in ("timestamp", "snapshot")]
    roles = {name.removesuffix(".json"): meta.version for name, meta in trusted.snapshot.meta.items()}
    roles |= {"timestamp": trusted.timestamp.version, "snapshot": trusted.snapshot.version}
    for role, version in {**roles, "root": trusted.root.version}.items():
        if version > _LARGEST_VERSION:
            raise UntrustedError(f"expected {role} {_LARGEST_VERSION} at most; got {version}", code="malformed")
    return Floor(root=trusted.root.version, keys=sha256(fields.canonical(keyids)).hexdigest(), roles=roles)


def _local_files(scratch: Path) -> dict[str, str]:
    return {path.name: path.read_bytes().decode() for path in scratch.glob("*.json") if not path.is_symlink()}


def _root_version(root: bytes) -> int:
    try:
        return Metadata[Root].from_bytes(root).signed.version
    except Exception as error:
        raise SetupError(f"the pinned root does not parse: {error}") from error


def _remove(scratch: Path) -> None:
    if scratch.is_symlink():
        scratch.unlink()
    shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _refusals(reference: float) -> Iterator[None]:
    """The border to ngclient: hostile metadata makes it fail in ways of any type; all come out as a named refusal."""
    try:
        yield
    except DeviceError:
        raise
    except ProtocolError as error:
        raise UntrustedError(error.message, code=error.code) from error
    except OSError as error:
        raise StorageError(f"cannot write metadata: {error.strerror or error}") from error
    except Exception as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), "malformed")
        message = f"{type(error).__name__}: {error!s:.300}"
        if code == "expired":
            message += f" (by this device's clock, {datetime.fromtimestamp(reference, UTC):%FT%TZ})"
        raise UntrustedError(message, code=code) from error


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot keep the view: {error.strerror or error}") from error
