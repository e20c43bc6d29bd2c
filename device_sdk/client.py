"""The public face: open a device's directory, run its models, keep them up to date.

One process at a time updates a directory, by a lock file. The others follow it, and one of them takes over when
it ends. A forked child is one of the others: it opens everything anew.
"""

import atexit
import fcntl
import json
import logging
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from secrets import token_hex
from threading import RLock
from typing import Any, Self

from device_sdk import __version__
from device_sdk.config import Home, Identity, Provision, write_durably
from device_sdk.download import Fetched, fetch
from device_sdk.errors import DeviceError, ModelError, SetupError, TransferError, is_retryable
from device_sdk.install import Clock, Installer, Parts, Swap
from device_sdk.journal import Journal
from device_sdk.mirror import BAD_MIRROR, open_mirror
from device_sdk.outbox import Outbox
from device_sdk.patching import Patcher
from device_sdk.peers import Board, Served, Uncollected
from device_sdk.probes import Probe, Probes
from device_sdk.protocol import events, fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import Manifest
from device_sdk.protocol.names import check_name
from device_sdk.protocol.polls import ENROL, EnrolRequest, check_labels
from device_sdk.rehearsal import Rules
from device_sdk.runtime import Model, RuntimeOptions, Slot, end_plainly
from device_sdk.spool import Redact, Spool
from device_sdk.store import Store
from device_sdk.traffic import Clock as TrafficClock
from device_sdk.traffic import Limits, Traffic
from device_sdk.transport import Transport
from device_sdk.trust import Trust, View
from device_sdk.updater import Counts, State, backoff
from device_sdk.uploader import Report, Uploader
from device_sdk.worker import Context, Loop, PollState, Settings, Worker

log = logging.getLogger("device_sdk")

_ENROL_DEADLINE = 30.0
_HOLD_CHARS = 100


@dataclass(frozen=True)
class Options:
    """How a device behaves, apart from what the server decides. Sizes in bytes, times in seconds.

    `redact` gets each sample's inputs and returns what may be written; it runs on the spool's thread, before the first
    write, and a sample for which it raises is lost. `session_options` makes an onnxruntime.SessionOptions per session.
    `stall_seconds`: a download that brings less than 1 KiB a second over so long is broken off, and resumed later.
    `rehearse`: a new release is loaded first in a process of its own, which takes about 50 MB more for a moment, under
    `rehearsal_bytes` (0: by its manifest) and `rehearsal_seconds`.
    `probes`: what the host is like, by name (`unmetered`, `charging`, `idle`: true or false; `free_disk`,
    `free_memory`: bytes), for rollouts that wait for it; the defaults are Linux's, and `unmetered` has none.
    `max_bytes_per_second`, `max_bytes_per_day`: of downloads, 0: no limit but the server's; the smaller counts.
    `mirror`: address of a cache that is asked for files first (None: the provisioned one, "": none).
    `swap`: "beside", "unload-first" or "auto" (by what memory is free): how a release takes another's place. Where it
    is unloaded first, up to `held_calls` calls wait for it, each for up to `held_seconds`; others get HeldError.
    `on_update(model, release)` is called when another release serves, `on_rollback(model, release, reason)` after
    `release` was left because it is bad. On a thread of the SDK's, or the one that calls `update_once`, outside of
    locks; what they raise is logged.
    `read_only`: serve what is installed, change nothing, whoever holds the lock; never take over.
    `follow_seconds`: how often a process that does not update looks what the one that does serves.
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
    stall_seconds: float = 60.0
    rehearse: bool = True
    rehearsal_bytes: int = 0
    rehearsal_seconds: float = 300.0
    probes: Mapping[str, Probe] = field(default_factory=dict)
    max_bytes_per_second: int = 0
    max_bytes_per_day: int = 0
    mirror: str | None = None
    swap: str = "beside"
    held_calls: int = 64
    held_seconds: float = 30.0
    on_update: Callable[[str, str], object] | None = None
    on_rollback: Callable[[str, str, str], object] | None = None
    read_only: bool = False
    follow_seconds: float = 0.5
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
        self._options = options
        self._lock = None if options.read_only else _Lock.take(home.path / "lock")
        self._slots = {name: Slot() for name in provision.models}
        self._models = {name: Model(name, slot) for name, slot in self._slots.items()}
        self._outbox: Outbox | None = None
        self._worker: Worker | None = None
        self._follower: Loop | None = None
        self._is_running = False  # between `start` and `stop`
        self._is_closed = False
        self._is_forked = False
        self._opening = RLock()
        self._uncollected: dict[str, Uncollected] = {}
        self._drops: dict[str, int] = {}
        self._holds: list[str] = []
        self._noted: dict[str, tuple[str, str]] = {}  # what the program knows to serve: sha256 and release
        self._assemble()
        if self._lock:
            self._outbox = Outbox(home.outbox)
            self._journal.take_over(self._outbox)
            self._board.sweep()
            self._worker = self._make_worker()
        _FLEETS.add(self)

    def _assemble(self) -> None:
        """Make everything but the slots, which models hold: at the start, and in a forked child."""
        options, provision, home = self._options, self._provision, self._home
        self._restoring = RLock()
        self._restored: set[str] = set()
        self._board = Board(home.peers)
        self._journal = Journal(home.path / "progress.json", None, now=options.clock.now)
        self._transport = options.transport or Transport(
            provision.server, provision.blob_hosts, self._identity.credential, stall_seconds=options.stall_seconds
        )
        address = provision.mirror if options.mirror is None else options.mirror
        self._mirror = open_mirror(address, stall_seconds=options.stall_seconds) if address else None
        self._store = Store(home.store)
        self._parts = self._make_parts(options)
        self._installers = {name: Installer(name, self._parts, slot) for name, slot in self._slots.items()}

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
        if options.get("swap", "beside") not in {"beside", "unload-first", "auto"}:
            raise SetupError(f"swap: expected beside, unload-first or auto; got {options['swap']!r}")
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
        """Poll, update and upload in the background; where another process does, follow it, and take over when it ends.
        Call `stop` at the end, also on SIGTERM: a process that ends without it in the middle of a probation counts as
        crashed.
        """
        self._reopen()
        self._restore_all()
        self._is_running = True
        if self._worker is None:
            log.info("%s is updated by another process; this one follows it", self._home.path)
            self._start_following()
        else:
            self._tell_peers()
            self._worker.start()
        _stop_at_exit(self)

    def stop(self) -> None:
        """End what `start` began and release the directory. Models go on serving; the object updates no more."""
        self._is_closed, self._is_running = True, False
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.stop()
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()
            self._tell_peers()
        self._board.leave()
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

    @contextmanager
    def hold(self, reason: str) -> Iterator[None]:
        """Put off every activation: `with fleet.hold("driving"):`. Downloads go on, urgent releases too; a release is
        put off for no longer than its assignment allows (24 h, if it says nothing). In the process that updates.
        """
        self._holds.append(reason[:_HOLD_CHARS] or "asked")
        try:
            yield
        finally:
            self._holds.remove(reason[:_HOLD_CHARS] or "asked")
            if self._worker is not None:
                self._worker.wake()

    def health(self) -> dict[str, Any]:
        """For a `/healthz`: `ok` while each model with a release serves it and the server does not turn us away."""
        status = self.status()
        models = {
            name: {
                "serves": self._slots[name].current is not None, "release": each.release, "state": each.state,
                "reason": each.reason, "calls": each.counts.calls, "errors": each.counts.errors,
            }
            for name, each in status.models.items()
        }  # fmt: skip
        poll = status.poll
        return {
            "ok": all(each["serves"] or not each["release"] for each in models.values())
            and not (poll and poll.stopped),
            "updates": status.updates,
            "hold": self._hold_reason(),
            "poll": {"last_answer": poll.last_answer, "error": poll.error, "stopped": poll.stopped} if poll else None,
            "models": models,
        }

    def status(self) -> Status:
        self._reopen()
        worker = self._worker
        if worker is None:
            self._journal.reload()
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

    def _make_parts(self, options: Options) -> Parts:
        patcher = Patcher(self._transport, self._store)
        today = lambda: datetime.fromtimestamp(options.clock.now()).astimezone().date()  # noqa: E731
        traffic = Traffic(
            self._home.traffic_file,
            Limits(options.max_bytes_per_second, options.max_bytes_per_day),
            TrafficClock(today=today),
        )

        def bring(manifest: Manifest, on_progress: Callable[..., None]) -> Fetched:
            about = self._journal.get(manifest.path.model)
            patcher.on_refused = lambda error: self._journal.note(
                events.REFUSED, about, reason=error.code, detail={"message": str(error)[:200]}
            )
            if self._mirror:
                self._mirror.on_bad = lambda error: self._journal.note(
                    events.REFUSED, about, reason=BAD_MIRROR, detail={"message": str(error)[:200]}
                )
            return fetch(
                self._transport, self._store, manifest, on_progress=on_progress, deadline=options.download_seconds,
                patcher=patcher, traffic=traffic, mirror=self._mirror,
            )  # fmt: skip

        return Parts(
            device=self._identity.device,
            sdk=__version__,
            store=self._store,
            journal=self._journal,
            fetch=bring,
            probes=Probes(options.probes, disk=self._store.free_bytes),
            traffic=traffic,
            options=RuntimeOptions(options.intra_op_threads, options.providers, options.session_options),
            rehearsal=Rules(options.rehearsal_bytes, options.rehearsal_seconds) if options.rehearse else None,
            swap=Swap(options.swap, options.held_calls, options.held_seconds),
            clock=options.clock,
            tidy=self._tidy,
            writes=self._lock is not None,
            seen=self._board.seen,
            held=self._hold_reason,
            wake=self._wake_follower,
        )

    def _make_worker(self) -> Worker:
        parts, options = self._parts, self._options
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
            journal=self._journal, installers=self._installers, clock=options.clock, on_change=self._tell_peers,
            on_settled=self._tell_program, missed=self._board.take_drops,
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

    # The program

    def _hold_reason(self) -> str:
        return self._holds[-1] if self._holds else ""

    def _serving(self, name: str) -> tuple[str, str]:
        loaded = self._slots[name].current
        return (loaded.sha256, loaded.path.running) if loaded else ("", "")

    def _tell_program(self) -> None:
        for name in list(self._noted):
            before, now = self._noted[name], self._serving(name)
            if before == now:
                continue
            self._noted[name] = now
            if before[0] and self._store.is_bad(before[0]):
                self._call(self._options.on_rollback, name, before[1], self._bad_reason(before[0]))
            elif now[0]:
                self._call(self._options.on_update, name, now[1])

    def _bad_reason(self, sha: str) -> str:
        try:
            return self._store.bad_reason(sha)
        except DeviceError:
            return ""

    def _call(self, hook: Callable[..., object] | None, *arguments: str) -> None:
        if hook is None:
            return
        try:
            hook(*arguments)
        except Exception:
            log.exception("%s of the program failed", getattr(hook, "__name__", "a hook"))

    # Several processes

    def _tell_peers(self) -> None:
        try:
            self._board.tell({name: each.served() for name, each in self._installers.items() if name in self._restored})
        except OSError as error:
            log.warning("other processes are not told what to serve: %s", error.strerror)

    def _start_following(self) -> None:
        if self._follower is None:
            self._follower = Loop("fleet-follow", self._follow_step)
            self._follower.start()

    def _wake_follower(self) -> None:
        if self._follower is not None:
            self._follower.wake()

    def _follow_step(self) -> float | None:
        """One look at what the updater does. None: this process has become it."""
        self._reopen()
        with self._restoring:
            if self._is_closed or self._take_over():
                return None
            if (news := self._board.news()) is not None:
                self._follow(news)
            self._tell_updater()
        self._tell_program()
        return self._options.follow_seconds

    def _follow(self, news: Mapping[str, Served]) -> None:
        self._store.reload()
        self._journal.reload()
        for name in news.keys() & self._restored:
            self._follow_sampling(name, news[name].rate)
            try:
                self._installers[name].follow(news[name])
            except ModelError as error:
                log.error("%s: %s does not load here: %s", name, news[name].sha256, error)  # noqa: TRY400
            except DeviceError as error:
                log.warning("%s: it is tried again: %s", name, error)
                self._board.look_again()

    def _follow_sampling(self, name: str, rate: float) -> None:
        """One process writes the spool. The others count what it would have kept of theirs."""
        uncollected = self._uncollected.setdefault(name, Uncollected(rate))
        uncollected.rate = rate
        self._slots[name].sampler = uncollected if rate > 0 else None

    def _tell_updater(self) -> None:
        seen = {name: told for name, each in self._installers.items() if (told := each.seen())}
        for name, uncollected in self._uncollected.items():
            if count := uncollected.take():
                self._drops[name] = self._drops.get(name, 0) + count
        try:
            self._board.report(seen)
            if self._drops and self._board.hand_over_drops(self._drops):
                self._drops = {}
        except OSError as error:
            log.warning("the updating process is not told what this one sees: %s", error.strerror)

    def _take_over(self) -> bool:
        """Become the one that updates, if nobody is. Whether this process is."""
        if self._worker is not None:
            return True
        if self._options.read_only or self._is_closed:
            return False
        lock = _Lock.take(self._home.path / "lock")
        if lock is None:
            return False
        try:
            self._become_updater()
        except BaseException:
            self._parts.writes = False
            self._worker = None
            lock.release()
            raise
        self._lock = lock
        log.info("%s is updated by this process from now on", self._home.path)
        if self._is_running and self._worker is not None:
            self._worker.start()
        return True

    def _become_updater(self) -> None:
        self._store.reload()
        self._outbox = Outbox(self._home.outbox)
        self._journal.take_over(self._outbox)
        self._parts.writes = True
        self._board.leave()
        self._board.sweep()
        for slot in self._slots.values():
            slot.sampler = None
        self._worker = self._make_worker()
        for name in self._restored:
            try:
                self._installers[name].take_over()
            except DeviceError as error:
                log.error("%s: %s", name, error)  # noqa: TRY400
        self._tell_peers()

    # Fork

    def _after_fork(self) -> None:
        """In the child: use nothing of the parent's threads, locks and sessions. Does no IO; see `_reopen`."""
        if self._lock is not None:
            self._lock.release()  # our copy; the parent holds it by its own
            self._lock = None
        self._board.forget()
        self._worker = self._follower = self._outbox = None
        self._drops, self._uncollected = {}, {}
        self._is_forked = True
        self._opening = RLock()
        for name, slot in self._slots.items():
            slot.forget(partial(self._restore, name))
        if self._is_running:
            self._start_following()

    def _reopen(self) -> None:
        if not self._is_forked:
            return
        with self._opening:
            if self._is_forked:
                self._assemble()
                self._is_forked = False

    def _restore(self, name: str) -> None:
        self._reopen()
        if name in self._restored:
            return
        with self._restoring:
            if name not in self._restored:
                if self._worker is None:
                    self._store.reload()
                    self._journal.reload()
                self._installers[name].restore()
                self._restored.add(name)
                self._noted[name] = self._serving(name)
                self._board.look_again()

    def _restore_all(self) -> None:
        for name in self._models:
            self._restore(name)

    def _require_worker(self) -> Worker:
        self._reopen()
        with self._restoring:
            if self._worker is None:
                self._take_over()
        if self._worker is None:
            raise SetupError(f"{self._home.path} is updated by another process (see {self._home.path / 'lock'})")
        return self._worker

    def _model_status(self, name: str) -> ModelStatus:
        progress, release = self._journal.get(name), self._models[name].release
        if release is None and progress.state is not State.STOPPED:
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
    path: str | os.PathLike[str],
    name: str,
    labels: Mapping[str, str] | None = None,
    *,
    transport: Any = None,
    patience: float = 0.0,
    wait: Callable[[float], object] = time.sleep,
) -> str:
    """Make a provisioned directory a device of the fleet. Returns "active", or "pending" until someone approves.

    Safe to repeat: the nonce is on disk before the first request, and the server answers the same to the same nonce.
    A server that asks to come back later (429, 503 with Retry-After) is asked again for up to `patience` seconds.
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
    body = fields.canonical(request.to_json())
    return _keep_identity(home, provision, identity, _ask_in(client, identity.device, body, patience, wait))


def _ask_in(client: Any, device: str, body: bytes, patience: float, wait: Callable[[float], object]) -> bytes:
    """Ask until the answer is not "later", or patience runs out. Never sooner than the server says."""
    failures = 0
    while True:
        try:
            headers = {"Content-Type": "application/json"}
            answer = client.request(
                "POST", ENROL, headers=headers, body=body, limit=64 * limits.KIB, deadline=_ENROL_DEADLINE
            )
        except TransferError as error:
            if error.retry_after is None or not is_retryable(error):
                raise
            failures += 1
            delay = backoff(device, failures, first=1.0, retry_after=error.retry_after)
            if delay > patience:
                raise
            log.warning("the server asks to come back later (%s): waiting %.0f s", error.code or error.status, delay)
            patience -= delay
            wait(delay)
        else:
            return bytes(answer.body)


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
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SetupError(f"cannot lock {path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
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


_FLEETS: "weakref.WeakSet[Fleet]" = weakref.WeakSet()


def _after_fork() -> None:
    fleets = list(_FLEETS)
    if fleets:
        end_plainly()
    for fleet in fleets:
        fleet._after_fork()  # noqa: SLF001  this module's own


os.register_at_fork(after_in_child=_after_fork)


def _stop_at_exit(fleet: Fleet) -> None:
    """A process that ends by itself ends cleanly, also without `stop`."""
    reference = weakref.ref(fleet)

    def stop() -> None:
        alive = reference()
        if alive is not None:
            alive.stop()

    atexit.register(stop)
