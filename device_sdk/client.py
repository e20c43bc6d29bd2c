"""The public face: open a device's directory, run its models, keep them up to date.

One process at a time updates a directory, by a lock file. A second one serves what is there and changes nothing.
"""

import atexit
import fcntl
import json
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from secrets import token_hex
from threading import Lock
from typing import Any, Self

from device_sdk import __version__
from device_sdk.config import Home, Identity, Provision, write_durably
from device_sdk.download import fetch
from device_sdk.errors import SetupError, TransferError
from device_sdk.install import Clock, Installer, Parts
from device_sdk.journal import Journal
from device_sdk.outbox import Outbox
from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import Manifest
from device_sdk.protocol.names import check_name
from device_sdk.protocol.polls import ENROL, EnrolRequest, check_labels
from device_sdk.runtime import Model, RuntimeOptions
from device_sdk.spool import Redact, Spool
from device_sdk.store import Store
from device_sdk.transport import Transport
from device_sdk.trust import Trust, View
from device_sdk.updater import Counts
from device_sdk.uploader import Report, Uploader
from device_sdk.worker import Context, PollState, Settings, Worker

log = logging.getLogger("device_sdk")

_ENROL_DEADLINE = 30.0


@dataclass(frozen=True)
class Options:
    """How a device behaves, apart from what the server decides. Sizes in bytes, times in seconds.

    `redact` gets each sample's inputs and returns what may be written; it runs on the spool's thread, before the first
    write, and a sample for which it raises is lost. `session_options` makes an onnxruntime.SessionOptions per session.
    `read_only`: serve what is installed, change nothing, whoever holds the lock.
    """

    intra_op_threads: int | None = None
    providers: Sequence[Any] = ("CPUExecutionProvider",)
    session_options: Callable[[], Any] | None = None
    redact: Redact | None = None
    spool_bytes: int = 256 * limits.MIB
    spool_samples: int = 100_000
    poll_seconds: float = 60.0
    health_seconds: float = 60.0
    upload_seconds: float = 60.0
    download_seconds: float = 6 * 3_600.0
    read_only: bool = False
    clock: Clock = field(default_factory=Clock)
    transport: Any = None  # a stand-in for tests and simulators; else HTTP to the provisioned server


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model. `release` serves now; `state` and `reason` say where an update to `target` stands."""

    release: str
    state: str
    reason: str
    target: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class Status:
    """A device at a moment. `poll` None: this process does not update the directory, another may."""

    device: str
    server: str
    sdk: str
    updates: bool
    poll: PollState | None
    models: Mapping[str, ModelStatus]
    events_waiting: int = 0
    samples_waiting: Mapping[str, int] = field(default_factory=dict)
    samples_dropped: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Fleet:
    """A device. Use `Fleet.open`; several may be open in one process, each on a directory of its own."""

    def __init__(self, home: Home, provision: Provision, identity: Identity, options: Options) -> None:
        self._home = home
        self._provision = provision
        self._identity = identity
        self._lock = None if options.read_only else _Lock.take(home.path / "lock")
        self._worker: Worker | None = None
        self._outbox = Outbox(home.outbox) if self._lock else None
        self._journal = Journal(home.path / "progress.json", self._outbox, now=options.clock.now)
        self._transport = options.transport or Transport(provision.server, provision.blob_hosts, identity.credential)
        self._store = Store(home.store)
        parts = self._parts(options)
        self._installers = {name: Installer(name, parts) for name in provision.models}
        self._models = {name: Model(name, installer.slot) for name, installer in self._installers.items()}
        self._restored: set[str] = set()
        self._restoring = Lock()
        if self._lock:
            self._worker = self._make_worker(parts, options)

    @classmethod
    def open(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Open an enrolled directory; needs no network. Keyword arguments are the fields of `Options`.

        Raises SetupError when the directory is not provisioned, not enrolled, or its files do not parse.
        """
        home = Home(Path(path))
        with _setup_errors():
            provision, identity = home.provision(), home.identity()
        if not identity.credential:
            raise SetupError(f"{home.path}: enrolment was begun and not finished; run `fleet-device enrol` again")
        home.make()
        return cls(home, provision, identity, Options(**options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def device(self) -> str:
        return self._identity.device

    @property
    def updates(self) -> bool:
        """Whether this process updates the directory; False: another one does, or it was opened read-only."""
        return self._worker is not None

    def model(self, name: str) -> Model:
        """The model `name`, serving its last good release. Before the first update there is none: `Model.wait`."""
        if name not in self._models:
            raise SetupError(f"this device has no model {name!r}; it has {', '.join(sorted(self._models))}")
        self._restore(name)
        return self._models[name]

    def start(self) -> None:
        """Poll, update and upload in the background. Call `stop` at the end, also on SIGTERM: a process that ends
        without it in the middle of a probation counts as crashed.
        """
        if self._worker is None:
            log.warning("%s is updated by another process; this one serves what is installed", self._home.path)
            return
        self._restore_all()
        self._worker.start()
        _stop_at_exit(self)

    def stop(self) -> None:
        """End what `start` began and release the directory. Models go on serving; the object updates no more."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def update_once(self) -> Status:
        """Poll once and install what is new, in this thread. A release stays in probation until it has been called
        often enough. Raises TransferError, UnauthorizedError, UntrustedError, StorageError.
        """
        worker = self._require_worker()
        self._restore_all()
        worker.update()
        return self.status()

    def upload_now(self) -> Report:
        """Upload every sample that waits, whatever the window. Raises TransferError; repeat at will."""
        worker = self._require_worker()
        return worker.upload(force=True)

    def status(self) -> Status:
        worker = self._worker
        return Status(
            device=self._identity.device,
            server=self._provision.server,
            sdk=__version__,
            updates=worker is not None,
            poll=worker.poller.state() if worker else None,
            models={name: self._model_status(name) for name in self._models},
            events_waiting=len(self._outbox) if self._outbox is not None else 0,
            samples_waiting=worker.spool.waiting() if worker else {},
            samples_dropped=worker.spool.dropped() if worker else {},
        )

    # Parts

    def _parts(self, options: Options) -> Parts:
        def bring(manifest: Manifest, on_progress: Callable[..., None]) -> None:
            fetch(self._transport, self._store, manifest, on_progress=on_progress, deadline=options.download_seconds)

        return Parts(
            device=self._identity.device,
            sdk=__version__,
            store=self._store,
            journal=self._journal,
            fetch=bring,
            options=RuntimeOptions(options.intra_op_threads, options.providers, options.session_options),
            clock=options.clock,
            tidy=self._tidy,
            writes=self._lock is not None,
        )

    def _make_worker(self, parts: Parts, options: Options) -> Worker:
        provision, device = self._provision, self._identity.device
        trust = Trust(
            self._home.trust, device, provision.models, provision.root.encode(), clock_floor=provision.clock_floor
        )
        spool = Spool(
            self._home.spool, device=device, max_bytes=options.spool_bytes, max_samples=options.spool_samples,
            redact=options.redact,
        )  # fmt: skip
        assert self._outbox is not None  # noqa: S101  the lock comes with one
        context = Context(
            device=device, sdk=__version__, client=self._transport, trust=trust, outbox=self._outbox,
            journal=self._journal, installers=self._installers, clock=options.clock,
        )  # fmt: skip
        uploader = Uploader(self._transport, spool, device, second_of_day=options.clock.second_of_day)
        settings = Settings(options.poll_seconds, options.health_seconds, options.upload_seconds)
        worker = Worker(context, spool, uploader, settings)
        parts.wake = worker.wake
        parts.is_stale = worker.poller.is_stale
        view: View | None = trust.view()
        if view is not None:
            worker.obey(view)
        return worker

    def _tidy(self) -> None:
        """Free the disk of releases that nothing can fall back to. Those that are assigned stay, or keep coming."""
        latest = [installer.latest for installer in self._installers.values()]
        self._store.collect_garbage(wanted=[each.manifest for each in latest if each and each.manifest])

    def _restore(self, name: str) -> None:
        with self._restoring:
            if name not in self._restored:
                self._installers[name].restore()
                self._restored.add(name)

    def _restore_all(self) -> None:
        for name in self._models:
            self._restore(name)

    def _require_worker(self) -> Worker:
        if self._worker is None:
            raise SetupError(f"{self._home.path} is updated by another process (see {self._home.path / 'lock'})")
        return self._worker

    def _model_status(self, name: str) -> ModelStatus:
        progress, release = self._journal.get(name), self._models[name].release
        if release is None:
            sha = self._store.current(name)
            release = self._store.manifest(sha).path if sha else None
        return ModelStatus(
            release=release.running if release else "",
            state=progress.state,
            reason=progress.reason,
            target=progress.release.running if progress.release else "",
            counts=self._models[name].stats,
        )


def enrol(
    path: str | os.PathLike[str], name: str, labels: Mapping[str, str] | None = None, *, transport: Any = None
) -> str:
    """Make a provisioned directory a device of the fleet. Returns "active", or "pending" until someone approves.

    Safe to repeat: the nonce is on disk before the first request, and the server answers the same to the same nonce.
    Raises SetupError, and TransferError with the server's code (`device_exists`, `enrolment_expired`, ...).
    """
    home = Home(Path(path))
    with _setup_errors():
        provision = home.provision()
        identity = _identity(home, check_name(name, "device"))
        request = EnrolRequest(identity.device, identity.nonce, check_labels(dict(labels or {})), __version__)
    home.make()
    write_durably(home.identity_file, identity.to_bytes())
    client = transport or Transport(provision.server, provision.blob_hosts, provision.token)
    answer = client.request(
        "POST", ENROL, headers={"Content-Type": "application/json"}, body=fields.canonical(request.to_json()),
        limit=64 * limits.KIB, deadline=_ENROL_DEADLINE,
    )  # fmt: skip
    return _keep_identity(home, provision, identity, answer.body)


def _identity(home: Home, name: str) -> Identity:
    """The identity of an earlier try, else a new one. A directory is one device for ever."""
    if not home.identity_file.exists():
        return Identity(device=name, nonce=token_hex(16))
    identity = home.identity()
    if identity.device != name:
        raise SetupError(f"{home.path} is enrolled as {identity.device!r}; a device has a directory of its own")
    return identity


def _keep_identity(home: Home, provision: Provision, identity: Identity, body: bytes) -> str:
    try:
        answer = fields.parse_object(body, limit=64 * limits.KIB, what="enrolment")
        device = check_name(answer.get("device"), "device")
        credential = fields.take_text(answer, "credential", limit=300)
        models = fields.take_list(answer, "models", limit=limits.MODELS_PER_DEVICE)
        state = fields.take_text(answer, "state", limit=32)
    except ProtocolError as error:
        raise TransferError(f"enrolment: {error}", code="bad_answer") from error
    if differing := {str(model) for model in models} ^ set(provision.models):
        log.warning("the server and the provisioning file differ about models: %s", ", ".join(sorted(differing)))
    write_durably(home.identity_file, Identity(device, identity.nonce, credential).to_bytes())
    return state


class _Lock:
    """Who updates a directory. Held by an open file: it ends with the process, however that ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path) -> "_Lock | None":
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid()}).encode())
        return cls(descriptor)

    def release(self) -> None:
        os.close(self._descriptor)


class _setup_errors:  # noqa: N801  used as a function
    """What does not parse in the directory is a SetupError that says where."""

    def __enter__(self) -> None:
        return

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, ProtocolError):
            raise SetupError(error.message, code=error.code) from error


def _stop_at_exit(fleet: Fleet) -> None:
    """A process that ends by itself ends cleanly, also without `stop`."""
    reference = weakref.ref(fleet)

    def stop() -> None:
        alive = reference()
        if alive is not None:
            alive.stop()

    atexit.register(stop)
