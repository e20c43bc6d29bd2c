"""The device's model store: content-addressed blobs, manifests, and one small state file that is switched atomically.

    blobs/<sha256>             appears only by rename, after the hash check and an fsync
    incoming/<sha256>.part     a download in progress; resumable, never loaded
    manifests/<sha256>.json    the bytes that CI signed, named by their own hash; <sha256>.bad: rejected, until forgiven
    loading/<n>/<file name>    hard links by which a runtime finds a release's files under their own names
    state.json                 {generation, models: {active, previous, trial, starts}} and a checksum
    hashed.json                what blobs were when they were last hashed; see `hashed`

The order is blobs, manifest, state; each is written aside, synced, renamed, and its directory synced, so that a power
cut leaves the old or the new, never a mixture. Every file operation goes through `FileOps`, so that a test can cut
after each. One process writes; the client sees to that.

Refuses: names from the wire as paths, symbolic links, anything whose hash is not its name. Knows nothing of trust.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from io import FileIO
from pathlib import Path
from threading import RLock, Thread
from typing import Self

from device_sdk.errors import ModelError, StorageError, UntrustedError
from device_sdk.hashed import Hashed
from device_sdk.naming import token_hex
from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.manifest import FileEntry, Manifest, digest
from device_sdk.protocol.names import check_model, check_sha256

CHUNK = 1024 * 1024
_HASHED = 256 * limits.KIB  # at a time: stays in the processor's cache, and takes the GIL rarely
ENTRY_BYTES_LIMIT = 64 * limits.MIB  # above it, holding the file beside the session costs more than it protects
_MARK_LIMIT = 4 * limits.KIB
_STATE_LIMIT = 1024 * 1024
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.ENOSYS})


class FileOps:
    """Every operation by which the store touches the disk. Plain, unbuffered, following no symbolic link."""

    def mkdir(self, path: Path) -> None:
        path.mkdir(mode=0o700, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """Create or replace the content of `path`; durable only after `sync`."""
        _write_all(path, data, os.O_TRUNC)

    def append(self, path: Path, data: bytes) -> None:
        _write_all(path, data, os.O_APPEND)

    def sync(self, path: Path) -> None:
        _fsync(path, os.O_RDONLY | os.O_NOFOLLOW)

    def sync_directory(self, path: Path) -> None:
        _fsync(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """What every start removes is flat. The rest is for `shutil`, which brings three compressors with it."""
        try:
            _remove_flat(path)
        except OSError:
            import shutil

            shutil.rmtree(path, ignore_errors=True)

    def open(self, path: Path) -> FileIO:
        """Open a regular file for reading. Non-blocking, so that a planted pipe cannot hang the device."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return FileIO(descriptor, "rb")

    def names(self, path: Path) -> list[str]:
        return sorted(entry.name for entry in path.iterdir())


@frozen
class ModelState:
    """Manifests by sha256. `trial`: in probation, not yet kept; `starts`: process starts that the trial has seen."""

    active: str | None = None
    previous: str | None = None
    trial: str | None = None
    starts: int = 0

    @property
    def kept(self) -> frozenset[str]:
        return frozenset(sha for sha in (self.active, self.previous, self.trial) if sha)

    @classmethod
    def parse(cls, value: object) -> "ModelState":
        item = fields.as_object(value, "state")
        names = {name: item.get(name) for name in ("active", "previous", "trial")}
        checked = {name: None if sha is None else check_sha256(sha, name) for name, sha in names.items()}
        return cls(**checked, starts=fields.take_int(item, "starts", high=2**31))

    def to_json(self) -> dict[str, object]:
        return {"active": self.active, "previous": self.previous, "trial": self.trial, "starts": self.starts}


@frozen
class LoadedFiles:
    """A release's files, verified just now. Load at once, then `close`: an open session needs the links no more.

    `unhashed`: they are as they were when they were last hashed, by their identity, and were not hashed again.

    As a context it raises UntrustedError `hash_mismatch` at its end if a file was touched since it was hashed: a
    runtime that reads from `entry_path` reads later than we hashed. What was loaded meanwhile must not be used.
    `pending`: files that are still being hashed, beside the loading; that they are not what was signed is said there.

    `entry_bytes` are the very bytes that were hashed; None where the entry is large or refers to files beside it, and
    is to be loaded from `entry_path`.
    """

    sha256: str
    manifest: Manifest
    manifest_path: Path
    directory: Path
    entry_path: Path
    entry_bytes: bytes | None
    store: "Store"
    identities: Mapping[Path, tuple[int, ...]]  # of the files by path, taken before they were hashed
    pending: "_Hashing | None" = None
    unhashed: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.pending is not None:
                self.pending.finish()
            if self.entry_bytes is None:
                self.store.check_untouched(self)
        finally:
            self.close()

    def close(self) -> None:
        self.store.release_files(self.directory)


class _Hashing:
    """Files that are checked on a thread of their own. `finish` raises what it found."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, name="fleet-hash", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._check()
        except Exception as error:  # noqa: BLE001  raised where the files are let go of
            self._error = error

    def finish(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


class Store:
    """See the module's docstring. Raises StorageError (`disk_full`, `missing`, `storage`) and UntrustedError."""

    def __init__(self, directory: Path, ops: FileOps | None = None) -> None:
        self._ops = ops or FileOps()
        self._directory = directory
        self._blobs = directory / "blobs"
        self._incoming = directory / "incoming"
        self._manifests = directory / "manifests"
        self._loading = directory / "loading"
        self._state_file = directory / "state.json"
        self._hashed = Hashed(directory / "hashed.json", self._ops)
        self._lock = RLock()
        self._verified: dict[str, tuple[int, ...]] = {}  # blob to the file identity that was hashed, in this process
        self._open: dict[Path, int] = {}  # with the descriptor that tells other processes to leave it alone
        self._spared: set[str] = set()
        with _storage_errors("prepare the store"):
            self._prepare()
        self._generation, self._states = self._read_state()

    # State

    def models(self) -> frozenset[str]:
        """Every model that the state knows or that a manifest on disk is of."""
        with self._lock:
            return frozenset(self._states) | {manifest.path.model for _, manifest in self._manifests_newest_first()}

    def state(self, model: str) -> ModelState:
        return self._states.get(check_model(model), ModelState())

    def reload(self) -> None:
        """Take up what another process wrote. A state that does not parse now is no news."""
        with self._lock:
            generation, states = self._read_state()
            if generation:
                self._generation, self._states = generation, states

    def begin_trial(self, model: str, sha: str, *, starts: int = 0) -> None:
        """Make `sha` what `current` answers, on trial. Raises unless it is whole, of this model and not rejected.

        `starts`: processes that have begun to serve it and have not ended cleanly.
        """
        with self._lock:
            if self.manifest(sha).path.model != model:
                raise UntrustedError(f"{sha} is not a release of {model}", code="wrong_model")
            if self.is_bad(sha):
                raise ModelError(f"{sha} was rejected on this device: {self.bad_reason(sha)}", code="bad_release")
            if not self.has(sha):
                raise StorageError(f"cannot try {sha}: not all its files are here", code="missing")
            self._switch(model, replace(self.state(model), trial=sha, starts=starts))

    def count_start(self, model: str) -> int:
        """Count one process start against the trial, durably, before it is loaded. 0 where there is no trial."""
        with self._lock:
            state = self.state(model)
            if state.trial is None:
                return 0
            self._switch(model, replace(state, starts=state.starts + 1))
            return state.starts + 1

    def commit(self, model: str) -> None:
        """Keep the trial: it becomes active, and what was active becomes the one to fall back to."""
        with self._lock:
            state = self.state(model)
            if state.trial is None:
                raise ValueError(f"commit: no trial of {model}")
            previous = state.previous if state.active == state.trial else state.active
            self._switch(model, ModelState(active=state.trial, previous=previous))

    def reject(self, model: str, sha: str, reason: str, rollout: str = "") -> None:
        """Never run `sha` again until it is forgiven, and switch back from it. `rollout`: by which it had come.

        The mark comes first: were the state switched first and lost later, recovery would take the rejected release
        for the newest good one.
        """
        with self._lock, _storage_errors(f"reject {sha}"):
            mark = self._manifests / f"{check_sha256(sha)}.bad"
            manifest = self._try_manifest(sha)
            lines = [reason.replace("\n", " ")[: limits.REASON_CHARS], rollout, str(manifest.path) if manifest else ""]
            self._write_durably(mark, "\n".join(lines).encode())
            state = _without(self.state(model), sha)
            if state != self.state(model):
                self._switch(model, state)

    def is_bad(self, sha: str) -> bool:
        return os.path.lexists(self._manifests / f"{check_sha256(sha)}.bad")

    def bad_reason(self, sha: str) -> str:
        return self._mark(sha)[0]

    def bad_path(self, sha: str) -> str:
        """Which release it is: its manifest goes with the garbage, the mark stays."""
        return self._mark(sha)[2]

    def bad(self) -> list[str]:
        """Every rejected manifest."""
        with _storage_errors("list what was rejected"):
            names = [name.removesuffix(".bad") for name in self._ops.names(self._manifests) if name.endswith(".bad")]
        return [name for name in names if _is_sha(name)]

    def bad_rollout(self, sha: str) -> str:
        """By which rollout it had come when it was rejected; "": none, or an older SDK marked it."""
        return self._mark(sha)[1]

    def _mark(self, sha: str) -> tuple[str, str, str]:
        """Reason, rollout, release. An older SDK wrote the reason alone."""
        with _storage_errors(f"read why {sha} is bad"):
            content = self._read(self._manifests / f"{check_sha256(sha)}.bad", _MARK_LIMIT)
        lines = [*content.decode(errors="replace").split("\n"), "", ""]
        return lines[0], lines[1], lines[2]

    def forgive(self, sha: str) -> None:
        """Lift a rejection: someone wants it tried once more. A cut leaves it rejected, or not."""
        with self._lock, _storage_errors(f"forgive {sha}"):
            self._ops.unlink(self._manifests / f"{check_sha256(sha)}.bad")
            self._ops.sync_directory(self._manifests)

    def current(self, model: str, may: Callable[[str], bool] = lambda _: True, *, unhashed: bool = False) -> str | None:
        """What to run now: the trial, else active, else previous, else the newest manifest that is whole.

        `may` leaves out what trust lets run no more. Each candidate's files are hashed (once in this process, while the
        files stay as they are); rejected ones are passed over. None: nothing here can be run, fetch again.
        `unhashed`: for someone who opens it next, which hashes its files anyway.
        """
        with self._lock:
            for sha in self._candidates(check_model(model)):
                if may(sha) and not self.is_bad(sha) and (self.has(sha) if unhashed else self._is_sound(sha)):
                    return sha
            return None

    # Files

    def add_manifest(self, data: bytes) -> str:
        """Keep a manifest under its own hash. The caller has verified that it is signed."""
        try:
            Manifest.parse(data)
        except ProtocolError as error:
            raise UntrustedError(f"manifest: {error.message}", code="bad_manifest") from error
        sha = digest(data)
        with self._lock, _storage_errors(f"keep manifest {sha}"):
            if self._try_manifest(sha) is None:
                self._write_durably(self._manifests / f"{sha}.json", data)
        return sha

    def manifest(self, sha: str) -> Manifest:
        """Read a manifest; its bytes must still have the hash that names it."""
        with _storage_errors(f"read manifest {sha}"):
            data = self._read(self._manifests / f"{check_sha256(sha)}.json", limits.MANIFEST)
        if digest(data) != sha:
            raise UntrustedError(f"manifest {sha} was changed on disk to {digest(data)}", code="hash_mismatch")
        return Manifest.parse(data)

    def has(self, sha: str) -> bool:
        """Whether the manifest and all its files are here, whole. Cheap: a file gets its name only after its hash."""
        manifest = self._try_manifest(sha)
        return manifest is not None and all(self.has_blob(file) for file in manifest.files)

    def has_all(self, sha: str) -> bool:
        """As `has`, and the acceptance bundle too: without it a release may run, but is not tried."""
        manifest = self._try_manifest(sha)
        return manifest is not None and all(self.has_blob(file) for file in manifest.fetched)

    def has_blob(self, file: FileEntry) -> bool:
        try:
            status = os.lstat(self._blobs / file.sha256)
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == file.length

    def blob_length(self, sha: str) -> int | None:
        """How long a blob is, by its name alone; None where it is not here."""
        try:
            status = os.lstat(self._blobs / check_sha256(sha, "blob"))
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def blob(self, sha: str) -> Path:
        """Where a blob lies. Whoever reads it hashes what they read."""
        return self._blobs / check_sha256(sha, "blob")

    def read_blob(self, file: FileEntry) -> bytes:
        """A small file, hashed just now. One that was changed is deleted, so that it is fetched again."""
        with self._lock, _storage_errors(f"read {file.name}"):
            data = self._read(self.blob(file.sha256), file.length)
            if digest(data) != file.sha256:
                self._drop(file, digest(data))
            return data

    def open_blob(self, sha: str) -> FileIO:
        """A blob to read from. Not hashed: whatever is made of it must be."""
        with _storage_errors(f"open {sha}"):
            return self._ops.open(self._blobs / check_sha256(sha, "blob"))

    def open_partial(self, sha: str) -> FileIO:
        """A partial download to read from."""
        with _storage_errors(f"open what came of {sha}"):
            return self._ops.open(self.incoming(sha))

    def keep_partial(self, sha: str) -> None:
        """Until it is discarded, spare a partial download that no manifest names."""
        with self._lock:
            self._spared.add(check_sha256(sha, "blob"))

    def free_bytes(self) -> int:
        """What the disk still takes."""
        import shutil  # see `FileOps.remove_tree`

        with _storage_errors("look at the free space"):
            return shutil.disk_usage(self._directory).free

    def incoming(self, sha: str) -> Path:
        return self._incoming / f"{check_sha256(sha, 'blob')}.part"

    def partial_length(self, sha: str) -> int:
        """How many bytes of a blob have come so far; what is not a plain file counts as nothing and is removed."""
        path = self.incoming(sha)
        with _storage_errors(f"look at {path.name}"):
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                return 0
            if stat.S_ISREG(status.st_mode):
                return status.st_size
            self._ops.unlink(path)
            return 0

    def has_come(self, sha: str) -> bool:
        """Whether a partial download is whole, by its hash. It stays partial: only `admit` makes it a blob."""
        with _storage_errors(f"look at what came of {sha}"):
            return self._hash(self.incoming(sha))[0] == sha

    def append(self, sha: str, data: bytes) -> None:
        """Add to a partial download. StorageError `disk_full` leaves what has come, to be resumed."""
        with _storage_errors(f"write {sha}"):
            self._ops.append(self.incoming(sha), data)

    def discard(self, sha: str) -> None:
        with self._lock, _storage_errors(f"discard {sha}"):
            self._ops.unlink(self.incoming(sha))
            self._spared.discard(sha)

    def admit(self, sha: str, length: int) -> None:
        """Turn a complete download into a blob: hash the whole file, sync, rename, sync the directory.

        Raises UntrustedError `hash_mismatch`, and deletes the partial file, when it is not what was signed.
        """
        path = self.incoming(sha)
        with self._lock, _storage_errors(f"admit {sha}"):
            found, size = self._hash(path)
            if (found, size) != (sha, length):
                self._ops.unlink(path)
                message = f"expected {length} bytes with sha256 {sha}; got {size} bytes with {found}"
                raise UntrustedError(message, code="hash_mismatch")
            self._ops.sync(path)
            self._ops.rename(path, self._blobs / sha)
            self._ops.sync_directory(self._blobs)

    def open(self, sha: str, *, beside: bool = False, unchanged: bool = False) -> LoadedFiles:
        """Hash every file of a release again and lay them out under their own names, in a fresh private directory.

        `beside`: files other than the entry are hashed while they are loaded, which halves the time of a start. They
        are weights: the runtime copies them, and parses only the entry. As a context only: its end waits for them.
        `unchanged`: hash none of them now if all are as they were when they were last hashed. Follow it by `verify`.

        Raises UntrustedError `hash_mismatch` when a file was changed since it was admitted; that file is deleted, so
        that it is fetched again.
        """
        with self._lock:
            manifest = self.manifest(sha)
            directory = self._loading / f"{os.getpid()}-{token_hex(4)}"  # numbers of processes differ by container
            with _storage_errors(f"open {sha}"):
                self._ops.mkdir(directory)
                self._open[directory] = _hold(directory)
                try:
                    return self._lay_out(sha, manifest, directory, beside=beside, unchanged=unchanged)
                except BaseException:
                    self.release_files(directory)
                    raise

    def verify(self, sha: str) -> None:
        """Hash every file of a release. Raises UntrustedError, and deletes the file, as `open` does."""
        with self._lock, _storage_errors(f"hash {sha}"):
            for file in self.manifest(sha).files:
                self._check_blob(self._blobs / file.sha256, file)

    def remember_hashed(self, files: LoadedFiles) -> None:
        """Once the links are gone, which change a file's ctime. Of a file that is still what was looked at before."""
        with self._lock, contextlib.suppress(OSError):
            found = {}
            for file in files.manifest.files:
                with contextlib.suppress(FileNotFoundError):
                    now = _exact_identity(os.lstat(self._blobs / file.sha256))
                    if now[:-1] == files.identities[files.directory / file.name][:-1]:
                        found[file.sha256] = now
            self._hashed.keep(found, present=frozenset(self._ops.names(self._blobs)))

    def check_untouched(self, files: LoadedFiles) -> None:
        """See `LoadedFiles`. A file that was written to is deleted, so that it is fetched again."""
        with self._lock, _storage_errors(f"look at {files.sha256} again"):
            for file in files.manifest.files:
                path = files.directory / file.name
                before, after = files.identities[path], _exact_identity(os.lstat(path))
                if before[:-1] != after[:-1]:
                    self._drop(file, "another, while it was loaded")
                if before != after:  # linked by another process, most likely: nothing was written
                    self._check_blob(path, file)

    def release_files(self, directory: Path) -> None:
        with self._lock:
            self._ops.remove_tree(directory)
            if (descriptor := self._open.pop(directory, None)) is not None:
                os.close(descriptor)

    def collect_garbage(self, *, wanted: Iterable[Manifest] = ()) -> None:
        """Delete what no model runs, tries, or could fall back to. `wanted`: releases whose download goes on."""
        with self._lock, _storage_errors("collect garbage"):
            kept = self._kept()
            blobs = {f.sha256 for sha in kept for f in self._files_of(sha)}
            expected = blobs | {file.sha256 for manifest in wanted for file in manifest.fetched}
            self._sweep(self._blobs, expected)
            self._sweep(self._incoming, {f"{sha}.part" for sha in expected | self._spared})
            marks = {name for name in self._ops.names(self._manifests) if name.endswith(".bad")}
            self._sweep(self._manifests, {f"{sha}.json" for sha in kept} | marks)
            for name in self._ops.names(self._loading):
                if self._loading / name not in self._open and not _is_held(self._loading / name):
                    self._ops.remove_tree(self._loading / name)

    # Parts

    def _prepare(self) -> None:
        self._directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self._directory, self._blobs, self._incoming, self._manifests, self._loading):
            self._ops.mkdir(folder)
            status = os.lstat(folder)
            if not stat.S_ISDIR(status.st_mode):
                raise OSError(errno.ENOTDIR, "expected a directory of our own, not a link", str(folder))
            if stat.S_IMODE(status.st_mode) & 0o077:
                folder.chmod(0o700)
        self._ops.sync_directory(self._directory)
        self._ops.sync_directory(self._directory.parent)

    def _read_state(self) -> tuple[int, dict[str, ModelState]]:
        """A state that is missing or fails its checksum is no state: `current` recovers from the manifests."""
        try:
            item = fields.parse_object(self._read(self._state_file, _STATE_LIMIT), limit=_STATE_LIMIT, what="state")
            body = fields.take_object(item, "state")
            if item.get("sha256") != digest(fields.canonical(body)):
                return 0, {}
            models = fields.take_object(body, "models")
            states = {check_model(model): ModelState.parse(value) for model, value in models.items()}
            return fields.take_int(body, "generation", high=2**62), states
        except (OSError, ProtocolError):
            return 0, {}

    def _switch(self, model: str, state: ModelState) -> None:
        """Replace one model's state on disk, then in memory: what could not be written has not happened."""
        states: Mapping[str, ModelState] = {**self._states, check_model(model): state}
        models = {name: each.to_json() for name, each in states.items()}
        body = {"generation": self._generation + 1, "models": models}
        with _storage_errors(f"switch the state of {model}"):
            data = fields.canonical({"state": body, "sha256": digest(fields.canonical(body))})
            self._write_durably(self._state_file, data)
        self._generation, self._states = self._generation + 1, dict(states)

    def _write_durably(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        self._ops.unlink(temporary)  # a planted link must not be what gets written through
        self._ops.write(temporary, data)
        self._ops.sync(temporary)
        self._ops.rename(temporary, path)
        self._ops.sync_directory(path.parent)

    def _candidates(self, model: str) -> Iterator[str]:
        state = self.state(model)
        known = [sha for sha in (state.trial, state.active, state.previous) if sha]
        yield from known
        for sha, manifest in self._manifests_newest_first():
            if manifest.path.model == model and sha not in known:
                yield sha

    def _manifests_newest_first(self) -> list[tuple[str, Manifest]]:
        """By the time of writing, as a last resort only: it is asked when state is lost."""
        with _storage_errors("list manifests"):
            names = [name for name in self._ops.names(self._manifests) if name.endswith(".json")]
        found = []
        for name in names:
            sha = name.removesuffix(".json")
            manifest = self._try_manifest(sha)
            if manifest is not None:
                found.append((os.lstat(self._manifests / name).st_mtime_ns, sha, manifest))
        return [(sha, manifest) for _, sha, manifest in sorted(found, key=lambda item: item[:2], reverse=True)]

    def _try_manifest(self, sha: str) -> Manifest | None:
        try:
            return self.manifest(sha)
        except (StorageError, UntrustedError, ProtocolError):
            return None

    def _files_of(self, sha: str) -> tuple[FileEntry, ...]:
        manifest = self._try_manifest(sha)
        return manifest.fetched if manifest else ()

    def _is_sound(self, sha: str) -> bool:
        manifest = self._try_manifest(sha)
        return manifest is not None and all(self._blob_is_sound(file) for file in manifest.files)

    def _blob_is_sound(self, file: FileEntry) -> bool:
        if not self.has_blob(file):
            return False
        path = self._blobs / file.sha256
        try:
            identity = _identity(os.lstat(path))
            if self._verified.get(file.sha256) != identity:
                self._check_blob(path, file)
                self._verified[file.sha256] = identity
        except (OSError, UntrustedError):
            return False
        return True

    def _check_blobs(self, files: Iterable[tuple[Path, FileEntry]]) -> None:
        with _storage_errors("hash the files of a release"):
            for path, file in files:
                self._check_blob(path, file)

    def _check_blob(self, path: Path, file: FileEntry) -> None:
        found, size = self._hash(path)
        if (found, size) != (file.sha256, file.length):
            self._drop(file, found)

    def _drop(self, file: FileEntry, found: str) -> None:
        """A blob that is not its name is worth nothing: delete it, so that the next update fetches it again."""
        self._verified.pop(file.sha256, None)
        self._ops.unlink(self._blobs / file.sha256)
        raise UntrustedError(f"{file.name}: expected sha256 {file.sha256}; the disk gave {found}", code="hash_mismatch")

    def _is_unchanged(self, manifest: Manifest) -> bool:
        blobs = {file.sha256: self._blobs / file.sha256 for file in manifest.files}
        return all(self._hashed.holds(sha, _exact_identity(os.lstat(path))) for sha, path in blobs.items())

    def _lay_out(self, sha: str, manifest: Manifest, directory: Path, *, beside: bool, unchanged: bool) -> LoadedFiles:
        unhashed = unchanged and self._is_unchanged(manifest)
        in_memory = len(manifest.files) == 1 and manifest.length <= ENTRY_BYTES_LIMIT
        entry_bytes: bytes | None = None
        identities, later = {}, []
        for file in manifest.files:
            target = directory / file.name
            self._link(self._blobs / file.sha256, target)
            identities[target] = _exact_identity(os.lstat(target))
            if in_memory:
                entry_bytes = self._read(target, file.length)
                if not unhashed and digest(entry_bytes) != file.sha256:
                    self._drop(file, digest(entry_bytes))
            elif unhashed:
                continue
            elif beside and file.name != manifest.entry:
                later.append((target, file))
            else:
                self._check_blob(target, file)
        return LoadedFiles(
            sha256=sha,
            manifest=manifest,
            manifest_path=self._manifests / f"{sha}.json",
            directory=directory,
            entry_path=directory / manifest.entry,
            entry_bytes=entry_bytes,
            store=self,
            identities=identities,
            pending=_Hashing(lambda: self._check_blobs(later)) if later else None,
            unhashed=unhashed,
        )

    def _link(self, source: Path, target: Path) -> None:
        """A hard link, or a copy where the file system has none."""
        try:
            self._ops.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._ops.write(target, b"")
            with self._ops.open(source) as file:
                for chunk in _chunks(file):
                    self._ops.append(target, chunk)

    def _kept(self) -> set[str]:
        """Also what `current` answers: after a lost state it stands in no state."""
        kept = {sha for state in self._states.values() for sha in state.kept}
        current = {self.current(model) for model in self.models()}
        return kept | {sha for sha in current if sha}

    def _sweep(self, folder: Path, keep: set[str]) -> None:
        for name in self._ops.names(folder):
            if name not in keep:
                self._ops.unlink(folder / name)

    def _read(self, path: Path, limit: int) -> bytes:
        with self._ops.open(path) as file:
            return b"".join(_chunks(file, limit + 1))[: limit + 1]

    def _hash(self, path: Path) -> tuple[str, int]:
        hasher, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_HASHED))
        with self._ops.open(path) as file:
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                size += count
        return hasher.hexdigest(), size


def _without(state: ModelState, sha: str) -> ModelState:
    """The state after `sha` was rejected: the trial is dropped, or the active release gives way to the previous."""
    if state.trial == sha:
        state = replace(state, trial=None, starts=0)
    if state.active == sha:
        state = replace(state, active=state.previous, previous=None)
    if state.previous == sha:
        state = replace(state, previous=None)
    return state


def _is_sha(name: str) -> bool:
    try:
        return bool(check_sha256(name))
    except ProtocolError:
        return False


def _chunks(file: FileIO, limit: int | None = None) -> Iterator[bytes]:
    left = limit
    while left is None or left > 0:
        chunk = file.read(CHUNK if left is None else min(CHUNK, left))
        if not chunk:
            return
        left = None if left is None else left - len(chunk)
        yield chunk


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _exact_identity(status: os.stat_result) -> tuple[int, ...]:
    """With the time of the last change of any kind, which no program can set back."""
    return (*_identity(status), status.st_ctime_ns)


def _hold(directory: Path) -> int:
    """Mark a folder as in use, by a lock that ends with the process."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a file system without locks: then it may be swept, and is laid out again
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_held(directory: Path) -> bool:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _write_all(path: Path, data: bytes, how: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | how, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def _remove_flat(path: Path) -> None:
    """A directory of files; no link is followed, planted ones neither."""
    directory = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(directory):  # noqa: PTH208  what was opened, not what the path names by now
            os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)
    path.rmdir()


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(what: str) -> Iterator[None]:
    """The border: no OSError leaves the store."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"cannot {what}: {error.filename} is not there", code="missing") from error
    except OSError as error:
        code = "disk_full" if error.errno in _FULL else "storage"
        raise StorageError(f"cannot {what}: {error.strerror or error}", code=code) from error
