"""What goes on in the background: poll and report, install and watch, upload. Three threads, each waiting on an event.

Nothing that goes wrong in here ends a thread or reaches a call: it is logged, backed off from, and shown in the status.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from device_sdk.errors import DeviceError, StorageError, TransferError, UnauthorizedError, UntrustedError, is_retryable
from device_sdk.install import Clock, Installer
from device_sdk.journal import Journal
from device_sdk.loop import Loop
from device_sdk.outbox import Outbox
from device_sdk.protocol import events, fields, limits
from device_sdk.protocol.abilities import Abilities
from device_sdk.protocol.cohorts import jitter
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.polls import (
    DEFAULT_INTERVAL,
    EVENTS,
    INTERVAL_HEADER,
    POLL,
    ROOT_PARAMETER,
    WANT_HEADER,
    Bundle,
    Tag,
    running_digest,
)
from device_sdk.protocol.posts import EventPost
from device_sdk.slot import told
from device_sdk.spool import Spool
from device_sdk.updater import Progress, Why, backoff
from device_sdk.uploader import Client, Report, Uploader

log = logging.getLogger("device_sdk")

SHORTEST, LONGEST = 1.0, 86_400.0  # seconds between polls, whatever the server says
FIRST_POLL_WITHIN = 10.0  # seconds: a fleet that gets its power back at once must not arrive at once
FIRST_RETRY = 2.0  # after no answer at all; a server that did answer is left alone for an interval
REPEAT_REFUSAL = 3_600.0
NOTE_EVERY = 3_600.0  # seconds between two writings of what the releases did; a power cut costs that much
RETURN_AFTER = 3_600.0  # seconds after which a device that was turned away asks again: a 401 is not signed
_DEADLINE = 60.0
_ANSWER = 64 * limits.KIB


class Trusted(Protocol):
    """The part of `trust.Trust` that is used here."""

    @property
    def root_version(self) -> int: ...
    def view(self) -> Any: ...
    def accept(self, bundle: Bundle, now: float) -> Any: ...


@dataclass(frozen=True, slots=True)
class PollState:
    """How polling goes. `stopped`: the code by which the server turned this device away; it asks again in an hour."""

    last_answer: float = 0.0
    failures: int = 0
    error: str = ""
    stopped: str = ""
    interval: float = 60.0
    view: int = 0
    stale: bool = False


@dataclass
class Context:
    """What the poller works with."""

    device: str
    sdk: str
    abilities: Callable[[], Abilities]  # finding out takes some 10 ms: at the first report, not at the start
    client: Client
    trust: Trusted
    outbox: Outbox
    journal: Journal
    installers: Mapping[str, Installer]
    clock: Clock = field(default_factory=Clock)
    on_view: Callable[[Any], None] = lambda _: None
    on_change: Callable[[], None] = lambda: None  # after each look at a model: the other processes follow
    on_settled: Callable[[], None] = lambda: None  # after a look at all models, outside of every lock
    on_obeyed: Callable[[Any], None] = lambda _: None  # a view that trust has verified is carried out from now on
    missed: Callable[[], Mapping[str, int]] = dict  # samples that the other processes did not keep

    def runs(self) -> dict[str, str]:
        current = {name: installer.slot.current for name, installer in self.installers.items()}
        return {name: loaded.path.running for name, loaded in current.items() if loaded}


class Poller:
    """One poll at a time, and the events that go with it. No thread of its own."""

    def __init__(self, context: Context, *, interval: float) -> None:
        self._it = context
        self._lock = threading.RLock()
        self._want_runs = False
        self._told: dict[str, float] = {}  # code of a refusal to when it was told, monotonic
        self.interval = interval
        self.failures = 0
        self.last_answer = 0.0
        self.error = ""
        self.stopped = ""

    def state(self) -> PollState:
        view = self._it.trust.view()
        return PollState(
            last_answer=self.last_answer,
            failures=self.failures,
            error=self.error,
            stopped=self.stopped,
            interval=self.interval,
            view=view.version if view else 0,
            stale=self.is_stale(),
        )

    def is_stale(self) -> bool:
        view = self._it.trust.view()
        return view is not None and self._it.clock.now() > view.expires

    def first_delay(self) -> float:
        return jitter(self._it.device, "first-poll") * min(self.interval, FIRST_POLL_WITHIN)

    def poll(self) -> None:
        """Ask once, obey the answer, and send what waits to be told. Raises DeviceError.

        A refused answer is told at once, beside the failing polls: whoever attacks goes on, and no poll may succeed.
        """
        with self._lock:
            try:
                self._ask()
                self.report()
            except DeviceError as error:
                self._note_failure(error)
                if self._is_refusing():
                    self._report_if_possible()
                raise
            self.failures, self.error = 0, ""

    def step(self) -> float | None:
        """One poll of the background loop. Seconds until the next."""
        try:
            self.poll()
        except UnauthorizedError:
            return self.return_delay()
        except DeviceError as error:
            log.warning("poll: %s", error)
            return self._retry_delay(error)
        return self._period()

    def return_delay(self) -> float:
        """Seconds until a device that was turned away asks again. Rarely, each at its own time: a 401 is not
        signed, whoever sits on the line can say it, and it must not silence a device for ever.
        """
        return RETURN_AFTER * (1 + 0.25 * jitter(self._it.device, "return"))

    def report(self) -> None:
        """Post events until none are left. Raises TransferError; what was not acknowledged stays."""
        with self._lock:
            while not self.stopped and (self._want_runs or self._it.outbox.has_news):
                self._post()

    def look_at_age(self) -> None:
        """Report a view that has expired, however polls go: 304 for ever, errors and silence are all ways to freeze.

        A refusal that is known already says more than its consequence.
        """
        if self.is_stale() and self._it.journal.refusal in {"", Why.STALE}:
            self.refuse(UntrustedError("the server offers nothing newer than an expired view", code=Why.STALE))

    def refuse(self, error: UntrustedError) -> None:
        """Report what trust refused, once an hour for the same reason: an attack must not fill the outbox."""
        now = self._it.clock.monotonic()
        self._it.journal.keep_refusal(error.code)
        if now - self._told.get(error.code, -REPEAT_REFUSAL) < REPEAT_REFUSAL:
            return
        self._told[error.code] = now
        log.error("refused (%s): %s", error.code, error)
        self._it.journal.note(events.REFUSED, Progress(""), reason=error.code, detail={"message": str(error)[:200]})

    def _ask(self) -> None:
        view = self._it.trust.view()
        # Whoever refuses asks for the whole view: only what is signed ends a refusal, a mere 304 proves nothing.
        held = view.version if view and not self._is_refusing() else 0
        tag = Tag(held, running_digest(self._it.runs()))
        path = f"{POLL}?{ROOT_PARAMETER}={self._it.trust.root_version}"
        headers = {"If-None-Match": str(tag), "Accept-Encoding": ""}  # said, it would be a tenth of a poll
        try:
            answer = self._it.client.request("GET", path, headers=headers, limit=limits.BUNDLE, deadline=_DEADLINE)
            self._end_exile()
            self._heed(answer.headers)
            if answer.status != 304:
                accepted = self._it.trust.accept(_bundle(answer.body), self._it.clock.now())
                self._it.on_view(accepted)
                over = self._end_refusal()
                self._tell_refused_models(view.refused if view and not over else {}, accepted.refused)
        except UntrustedError as error:
            self.refuse(error)
            raise
        finally:
            self.look_at_age()

    def _end_exile(self) -> None:
        if self.stopped:
            log.warning("the server answers this device again, after %s", self.stopped)
            self.stopped = ""

    def _is_refusing(self) -> bool:
        return bool(self._it.journal.refusal)

    def _end_refusal(self) -> bool:
        """A view was accepted: say so if one was refused before, so that the server knows that it is over."""
        code = self._it.journal.refusal
        if not code or self.is_stale():
            return False
        log.info("a view is accepted again, after a refusal (%s)", code)
        self._told.clear()
        self._it.journal.keep_refusal("")
        self._it.journal.note(events.ACCEPTED, Progress(""), reason=code)
        return True

    def _report_if_possible(self) -> None:
        try:
            self.report()
        except DeviceError as error:
            log.info("events wait: %s", error)

    def _tell_refused_models(self, before: Mapping[str, UntrustedError], now: Mapping[str, UntrustedError]) -> None:
        """A model that is refused while the others go on: said when it begins, and when it is over."""
        for model, error in now.items():
            if model not in before:
                log.error("%s is refused (%s): %s", model, error.code, error)
                detail = {"message": str(error)[:200]}
                self._it.journal.note(events.REFUSED, self._it.journal.get(model), reason=error.code, detail=detail)
        for model in before.keys() - now.keys():
            log.info("%s is no longer refused", model)
            self._it.journal.note(events.ACCEPTED, self._it.journal.get(model), reason=before[model].code)

    def _heed(self, headers: Mapping[str, str]) -> None:
        self.last_answer = self._it.clock.now()
        self._want_runs = self._want_runs or headers.get(WANT_HEADER) == "runs"
        said = headers.get(INTERVAL_HEADER, DEFAULT_INTERVAL)
        if said.isdecimal():
            self.interval = min(max(float(said[:10]), SHORTEST), LONGEST)
        elif said:
            log.warning("%s: expected whole seconds; got %.40r", INTERVAL_HEADER, said)

    def _post(self) -> None:
        pending = self._it.outbox.pending()
        post = EventPost(pending.events, self._it.runs(), self._it.sdk, pending.dropped, self._it.abilities())
        headers = {"Content-Type": "application/json"}
        body = fields.canonical(post.to_json())
        try:
            self._it.client.request("POST", EVENTS, headers=headers, body=body, limit=_ANSWER, deadline=_DEADLINE)
        except TransferError as error:
            if not _is_poison(error):
                raise
            log.error("%d events were refused and are dropped: %s", len(pending.events), error)  # noqa: TRY400
            self._it.outbox.discard(pending)
            raise
        self._it.outbox.acknowledge(pending)
        self._want_runs = False

    def _note_failure(self, error: DeviceError) -> None:
        self.failures += 1
        self.error = f"{error.code}: {error}"
        if isinstance(error, UnauthorizedError) and not self.stopped:
            self.stopped = error.code
            log.critical(
                "the server turned this device away (%s): it asks again in an hour or so, and goes on serving", error
            )

    def _retry_delay(self, error: DeviceError) -> float:
        status = error.status if isinstance(error, TransferError) else 0
        silent = isinstance(error, TransferError) and status == 0
        if not silent and not is_retryable(error):
            return self._period()
        after = error.retry_after if isinstance(error, TransferError) else None
        first = min(FIRST_RETRY, self.interval) if silent else self.interval
        return backoff(self._it.device, self.failures, first=first, retry_after=after)

    def _period(self) -> float:
        """The server's interval, a little off for each device and always by the same amount."""
        return self.interval * (0.9 + 0.2 * jitter(self._it.device, "poll"))


class Worker:
    """Runs it all. `start` and `stop` may each be called once; the synchronous methods work without either."""

    def __init__(self, context: Context, spool: Spool, uploader: Uploader, settings: "Settings") -> None:
        self._it = context
        self.spool = spool
        self._uploader = uploader
        self._settings = settings
        self.poller = Poller(context, interval=settings.poll_seconds)
        self._installing = threading.RLock()
        self._uploading = threading.Lock()
        self._next_poll = 0.0
        self._next_health = 0.0
        self._noted_at = context.clock.monotonic()
        self._upload_failures = 0
        self._told: dict[str, tuple[str, int, int]] = {}
        self._poll_loop = Loop("fleet-poll", self._poll_step)
        self._install_loop = Loop("fleet-install", self._install_step)
        self._upload_loop = Loop("fleet-upload", self._upload_step)
        uploader.stopping = lambda: self._upload_loop.is_stopping
        self._is_running = False
        self._is_unverified = False
        context.on_view = self.obey
        context.journal.on_event = self._wake_reporter
        for model, installer in context.installers.items():
            installer.stopping = lambda: self._install_loop.is_stopping
            self._take_up(model)

    def start(self) -> None:
        """Start the threads. The first poll is put off by the device's own fraction of a few seconds."""
        now = self._it.clock.monotonic()
        self._next_poll = now + self.poller.first_delay()
        self._next_health = now + self._settings.health_seconds
        self._is_running = True
        self.spool.start()
        for loop in (self._poll_loop, self._install_loop, self._upload_loop):
            loop.start()

    def stop(self) -> None:
        """End the threads; tell the server nothing more, keep everything on disk."""
        self._is_running = False
        for loop in (self._upload_loop, self._install_loop, self._poll_loop):
            loop.stop()
        self.spool.stop()
        with self._installing:
            for installer in self._it.installers.values():
                installer.close()

    def wake(self) -> None:
        """A call went wrong or the view changed: look at the models now."""
        self._install_loop.wake()

    def take_up(self, standing: Any) -> None:
        """Go on as an earlier process did, by what it remembered of the view; without that, verify the view now."""
        self._is_unverified = True
        if standing is None:
            self._verify()
        else:
            self._hand_out(standing)

    def _verify(self) -> None:
        """Before anything is installed: the view itself, from disk, signatures and all."""
        self._is_unverified = False
        view = self._it.trust.view()
        if view is not None:
            self.obey(view)
            return
        for installer in self._it.installers.values():
            installer.latest = None

    def obey(self, view: Any) -> None:
        """Hand a view that trust has verified to those who carry it out."""
        self._is_unverified = False
        self._hand_out(view)
        self._it.on_obeyed(view)

    def _hand_out(self, view: Any) -> None:
        for model, installer in self._it.installers.items():
            verified = view.assignments.get(model)
            installer.latest = verified
            try:
                intake = self.spool.configure(model, verified.assignment.sampling if verified else None)
            except StorageError as error:
                log.warning("%s is not sampled: %s", model, error)
                continue
            installer.slot.sampler = intake if intake.rate > 0 else None
        self.wake()

    def update(self) -> None:
        """Poll once and install what is new, in this thread. Raises what the poll raises."""
        self.poller.poll()
        self.install()
        self.poller.report()

    def install(self) -> float | None:
        """Let each model do what it can now. One that fails unexpectedly does not hold up the others."""
        waits: list[float] = []
        with self._installing:
            if self._is_unverified:
                self._verify()
            for model, installer in self._it.installers.items():
                try:
                    wait = installer.pursue()
                except Exception:
                    log.exception("unexpected error with %s; it is looked at again", model)
                    wait = self._settings.look_seconds
                self._it.on_change()
                if wait is not None:
                    waits.append(wait)
        self._it.on_settled()
        return min(waits) if waits else None

    def upload(self, *, force: bool) -> Report:
        with self._uploading:
            self.spool.drain()
            self.spool.count_missed(self._it.missed())
            return self._uploader.run(force=force)

    def _take_up(self, model: str) -> None:
        """Samples of an earlier process are uploaded even if no campaign asks for more."""
        try:
            self.spool.lane(model)
        except StorageError as error:
            log.warning("%s is not sampled: %s", model, error)

    # Steps of the loops

    def _poll_step(self) -> float | None:
        now = self._it.clock.monotonic()
        if self.poller.stopped and now < self._next_poll:
            return self._next_poll - now
        if now >= self._next_health:
            self._next_health = now + self._settings.health_seconds
            self._tell_health()
        if now >= self._next_poll:
            delay = self.poller.step()
            self._next_poll = self._it.clock.monotonic() + (delay or 0.0)
        elif not self.poller.failures:
            self._report()
        self.poller.look_at_age()
        if self.poller.stopped:
            return max(self._next_poll - now, 0.0)
        return max(min(self._next_poll, self._next_health) - self._it.clock.monotonic(), 0.0)

    def _report(self) -> None:
        try:
            self.poller.report()
        except DeviceError as error:
            self._next_poll = self._it.clock.monotonic()  # the poll finds out for itself, and backs off
            log.info("events wait: %s", error)

    def _install_step(self) -> float | None:
        return self.install()

    def _upload_step(self) -> float | None:
        if self.poller.stopped:
            return self._settings.upload_seconds
        try:
            report = self.upload(force=False)
            self._upload_failures = 0
        except UnauthorizedError as error:
            log.warning("upload: %s", error)
            return self.poller.return_delay()
        except DeviceError as error:
            self._upload_failures += 1
            after = error.retry_after if isinstance(error, TransferError) else None
            log.warning("upload: %s", error)
            return backoff(
                self._it.device, self._upload_failures, first=self._settings.upload_seconds, retry_after=after
            )
        if report.sent:
            log.info("uploaded %d samples in %d batches", report.samples, report.sent)
        return self._settings.upload_seconds

    def _wake_reporter(self) -> None:
        if self._is_running:
            self._poll_loop.wake()

    def _tell_health(self) -> None:
        """Counters of each model that was called since the last time: sums since it was loaded, so that a lost event
        loses nothing.
        """
        self.spool.count_missed(self._it.missed())
        waiting, dropped = self.spool.waiting(), self.spool.dropped()
        for model, installer in self._it.installers.items():
            loaded = installer.slot.current
            if loaded is None:
                continue
            counts = loaded.stats.counts()
            now = (loaded.load, counts.calls, counts.rejected)
            if now[1:] != (0, 0) and now != self._told.get(model):
                self._told[model] = now
                about = Progress(model, release=loaded.path, rollout=installer.progress.rollout)
                samples = {"samples_waiting": waiting.get(model, 0), "samples_dropped": dropped.get(model, 0)}
                detail = told(loaded, counts, installer.seconds()) | samples
                self._it.journal.note(events.HEALTH, about, detail=detail)
        now_at = self._it.clock.monotonic()
        if now_at - self._noted_at >= NOTE_EVERY:
            self._noted_at = now_at
            for installer in self._it.installers.values():
                installer.note_counts()


@dataclass(frozen=True)
class Settings:
    """Seconds between the things that the worker does; the poll's only until the server says."""

    poll_seconds: float = 60.0
    health_seconds: float = 60.0
    upload_seconds: float = 60.0
    look_seconds: float = 30.0


def _is_poison(error: TransferError) -> bool:
    """Whether the server will never take this post, whenever it is sent."""
    return error.status in {400, 413, 422}


def _bundle(body: bytes) -> Bundle:
    try:
        return Bundle.parse(body)
    except ProtocolError as error:
        raise UntrustedError(error.message, code=error.code) from error
