"""The public face: open a device's directory, run its models, keep them up to date.

One process at a time updates a directory, by a lock file. The others follow it, and one of them takes over when
it ends. A forked child is one of the others: it opens everything anew.

What a start needs is imported above; what polls, updates, uploads and tells, with what it is first asked for.
"""

import atexit
import logging
import os
import weakref
from functools import partial
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Self

from device_sdk import __version__
from device_sdk.assembly import Bringer, make_parts, upload_traffic
from device_sdk.config import Home, Identity, Provision, setup_errors
from device_sdk.deferred import Deferred, is_made
from device_sdk.errors import DeviceError, SetupError
from device_sdk.following import Following
from device_sdk.holds import Hold, Holds
from device_sdk.hooks import Hooks
from device_sdk.install import Installer
from device_sdk.journal import Journal
from device_sdk.locking import Lock
from device_sdk.model import Model
from device_sdk.options import Options
from device_sdk.outbox import Outbox
from device_sdk.peers import Board
from device_sdk.protocol.names import check_model, check_name
from device_sdk.runtime import end_plainly
from device_sdk.slot import Slot
from device_sdk.standing import Standing, recall, remember
from device_sdk.store import Store
from device_sdk.updater import State

if TYPE_CHECKING:
    from device_sdk.loop import Loop
    from device_sdk.status import ModelStatus, Status
    from device_sdk.uploader import Report
    from device_sdk.worker import Worker

log = logging.getLogger("device_sdk")


class Fleet:
    """A device. Use `Fleet.open`; several may be open in one process, each on a directory of its own."""

    def __init__(self, home: Home, provision: Provision, identity: Identity, options: Options) -> None:
        self._home = home
        self._provision = provision
        self._identity = identity
        self._options = options
        self._lock = None if options.read_only else Lock.take(home.path / "lock")
        self._slots = {name: Slot() for name in provision.models}
        self._models = {name: Model(name, slot) for name, slot in self._slots.items()}
        self._outbox: Outbox | None = None
        self._worker: Worker | None = None
        self._follower: Loop | None = None
        self._is_running = False  # between `start` and `stop`
        self._is_closed = False
        self._is_forked = False
        self._opening = RLock()
        self._holds = Holds(self._wake_worker)
        self._hooks = Hooks(self._slots, options.on_update, options.on_rollback)
        self._assemble()
        if self._lock:
            self._outbox = Outbox(home.outbox)
            self._journal.take_over(self._outbox)
            self._board.sweep()
            self._worker = self._take_up()
        _FLEETS.add(self)

    def _assemble(self) -> None:
        """Make everything but the slots, which models hold: at the start, and in a forked child."""
        options, home = self._options, self._home
        self._restoring = RLock()
        self._restored: set[str] = set()
        self._board = Board(home.peers)
        self._journal = Journal(home.path / "progress.json", None, now=options.clock.now)
        self._transport = options.transport or Deferred(self._make_transport)
        mirrors: Any = Deferred(self._make_mirrors) if options.mirror is None else self._make_mirrors()
        self._store = Store(home.store)
        bringer = Bringer(self._transport, self._store, self._journal, mirrors, options)
        self._parts = make_parts(
            home, self._identity.device, options, store=self._store, journal=self._journal, bringer=bringer,
            tidy=self._tidy, writes=self._lock is not None, seen=self._board.seen, held=self._holds.reason,
            wake=self._wake_follower,
        )  # fmt: skip
        self._installers = {name: Installer(name, self._parts, slot) for name, slot in self._slots.items()}
        self._following = Following(self._board, self._installers)

    @classmethod
    def open(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Open an enrolled directory; needs no network. Keyword arguments are the fields of `Options`.

        Raises SetupError when the directory is not provisioned, not enrolled, or its files do not parse.
        """
        home = Home(Path(path))
        with setup_errors():
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
            self._end(worker)
            self._tell_peers()
        self._board.leave()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def update_once(self) -> "Status":
        """Poll once and install what is new, in this thread. A release stays in probation until it has been called
        often enough. Raises TransferError, UnauthorizedError, UntrustedError, StorageError.
        """
        worker = self._require_worker()
        self._restore_all()
        worker.update()
        return self.status()

    def upload_now(self) -> "Report":
        """Upload every sample that waits, whatever the window. Raises TransferError; repeat at will."""
        worker = self._require_worker()
        return worker.upload(force=True)

    def hold(self, reason: str) -> Hold:
        """Put off every activation from now on, until the hold is released: `with fleet.hold("driving"):`, or
        `hold = fleet.hold("driving")` and later `hold.release()`.

        Downloads go on, urgent releases too; a release is put off for no longer than its assignment allows (24 h, if it
        says nothing), restarts included. In the process that updates; before `start`, if it must hold from the first.
        """
        return self._holds.begin(reason)

    def forgive(self, model: str, version: str) -> int:
        """Lift the quarantine of a release that was rejected on this device, so that it is tried again if it is still
        assigned. Returns how many of its variants were lifted. Raises StorageError.
        """
        if self._options.read_only:
            raise SetupError("opened read-only: it changes nothing")
        wanted = f"{check_model(model)}/{check_name(version, 'version')}/"
        found = [sha for sha in self._store.bad() if self._store.bad_path(sha).startswith(wanted)]
        for sha in found:
            log.warning("%s%s is forgiven; it was rejected: %s", wanted, sha[:12], self._store.bad_reason(sha))
            self._store.forgive(sha)
        self._wake_worker()
        return len(found)

    def health(self) -> dict[str, Any]:
        """For a `/healthz`: `ok` while each model with a release serves it and the server does not turn us away."""
        status = self.status()
        models = {
            name: {
                "serves": self._slots[name].current is not None, "release": each.release, "state": each.state,
                "reason": each.reason, "calls": each.counts.calls, "errors": each.counts.errors,
                "missing_providers": list(each.missing_providers),
            }
            for name, each in status.models.items()
        }  # fmt: skip
        poll = status.poll
        return {
            "ok": all(each["serves"] or not each["release"] for each in models.values())
            and not (poll and poll.stopped),
            "updates": status.updates,
            "hold": self._holds.reason(),
            "poll": {"last_answer": poll.last_answer, "error": poll.error, "stopped": poll.stopped} if poll else None,
            "models": models,
        }

    def status(self) -> "Status":
        from device_sdk.status import Status

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

    def _end(self, worker: "Worker") -> None:
        if is_made(worker):
            worker.stop()
            return
        for installer in self._installers.values():
            installer.close()

    def _wake_worker(self) -> None:
        """Called within inferences, too: it makes none."""
        worker = self._worker
        if worker is not None and is_made(worker):
            worker.wake()

    # Parts

    def _take_up(self) -> "Worker":
        """Go on as an earlier process did. Where what it remembered of the view is all that a start needs, the worker
        is made when it is first asked for.
        """
        standing = recall(self._home.standing_file, self._home.view_file)
        if standing is None or any(each.assignment.sampling for each in standing.assignments.values()):
            return self._make_worker(standing)
        self._parts.wake = self._wake_worker
        for name, installer in self._installers.items():
            installer.latest = standing.assignments.get(name)

        def make() -> "Worker":
            worker = self._make_worker(standing)
            if self._worker is standin:
                self._worker = worker
            return worker

        standin: Any = Deferred(make)
        return standin  # type: ignore[no-any-return]  # a Worker when it is used

    def _make_worker(self, standing: Standing | None) -> "Worker":
        from device_sdk.packing import BATCH_BYTES
        from device_sdk.spool import Spool
        from device_sdk.uploader import Uploader
        from device_sdk.worker import Context, Settings, Worker

        parts, options = self._parts, self._options
        device, trust = self._identity.device, Deferred(self._make_trust)
        spool = Spool(
            self._home.spool, device=device, max_bytes=options.spool_bytes, max_samples=options.spool_samples,
            redact=options.redact, batch_bytes=options.max_upload_bytes_per_day // 2 or BATCH_BYTES,
        )  # fmt: skip
        assert self._outbox is not None  # noqa: S101  the lock comes with one
        context = Context(
            device=device, sdk=__version__, abilities=self._abilities, client=self._transport,
            trust=trust, outbox=self._outbox,
            journal=self._journal, installers=self._installers, clock=options.clock, on_change=self._tell_peers,
            on_settled=lambda: self._hooks.tell(self._store), missed=self._board.take_drops,
            on_obeyed=lambda view: remember(self._home.standing_file, self._home.view_file, view.assignments),
        )  # fmt: skip
        traffic = upload_traffic(self._home, options)
        uploader = Uploader(self._transport, spool, device, second_of_day=options.clock.second_of_day, traffic=traffic)
        settings = Settings(options.poll_seconds, options.health_seconds, options.upload_seconds)
        worker = Worker(context, spool, uploader, settings)
        parts.wake = worker.wake
        parts.is_stale = worker.poller.is_stale
        worker.take_up(standing)
        return worker

    def _abilities(self) -> Any:
        from device_sdk.abilities import detect

        return detect(self._options.providers)

    def _make_transport(self) -> Any:
        from device_sdk.transport import Transport

        given, seconds = self._provision, self._options.stall_seconds
        return Transport(given.server, given.blob_hosts, self._identity.credential, stall_seconds=seconds)

    def _make_mirrors(self) -> Any:
        from device_sdk.mirror import Mirrors

        options = self._options
        return Mirrors(options.mirror, self._provision.mirror, stall_seconds=options.stall_seconds)

    def _make_trust(self) -> Any:
        from device_sdk.trust import Trust

        given = self._provision
        root = given.root.encode()
        return Trust(self._home.trust, self._identity.device, given.models, root, clock_floor=given.clock_floor)

    def _tidy(self) -> None:
        """Free the disk of releases that nothing can fall back to. Those that are assigned stay, or keep coming."""
        latest = [installer.latest for installer in self._installers.values()]
        if any(each and each.assignment.release and not each.manifest for each in latest):
            return  # what is assigned is remembered, not read yet: what has come of it must stay
        self._store.collect_garbage(wanted=[each.manifest for each in latest if each and each.manifest])

    # Several processes

    def _tell_peers(self) -> None:
        try:
            self._board.tell({name: each.served() for name, each in self._installers.items() if name in self._restored})
        except OSError as error:
            log.warning("other processes are not told what to serve: %s", error.strerror)

    def _start_following(self) -> None:
        from device_sdk.loop import Loop

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
                self._store.reload()
                self._journal.reload()
                self._following.follow(news, self._restored)
            self._following.tell()
        self._hooks.tell(self._store)
        return self._options.follow_seconds

    def _take_over(self) -> bool:
        """Become the one that updates, if nobody is. Whether this process is."""
        if self._worker is not None:
            return True
        if self._options.read_only or self._is_closed:
            return False
        lock = Lock.take(self._home.path / "lock")
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
        self._worker = self._make_worker(recall(self._home.standing_file, self._home.view_file))
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
                self._hooks.note(name)
                self._board.look_again()

    def _restore_all(self) -> None:
        for name in self._models:
            self._restore(name)

    def _require_worker(self) -> "Worker":
        self._reopen()
        with self._restoring:
            if self._worker is None:
                self._take_over()
        if self._worker is None:
            raise SetupError(f"{self._home.path} is updated by another process (see {self._home.path / 'lock'})")
        return self._worker

    def _model_status(self, name: str) -> "ModelStatus":
        from device_sdk.counts import Counts
        from device_sdk.status import ModelStatus

        progress, loaded = self._journal.get(name), self._slots[name].now()
        release = loaded.path if loaded else None
        if release is None and progress.state is not State.STOPPED:
            sha = self._store.current(name)
            release = self._store.manifest(sha).path if sha else None
        return ModelStatus(
            release=release.running if release else "",
            state=progress.state,
            reason=progress.reason,
            target=progress.release.running if progress.release else "",
            counts=loaded.stats.counts() if loaded else Counts(),
            providers=loaded.providers if loaded else (),
            missing_providers=loaded.missing if loaded else (),
        )


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
