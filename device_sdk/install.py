"""Take one model from assigned to committed, or back. Does what `updater` says; owns no thread and no network loop.

The order of an update: fetch, verify, test beside the release that serves, switch the store, publish, watch, keep.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from device_sdk import runtime
from device_sdk.counts import Counts
from device_sdk.errors import (
    DeviceError,
    ModelError,
    ShortageError,
    StorageError,
    TransferError,
    UntrustedError,
    is_retryable,
)
from device_sdk.journal import Journal
from device_sdk.ledger import Done, Ledger
from device_sdk.peers import Seen, Served, total
from device_sdk.probes import IDLE, Probes
from device_sdk.protocol import events, limits
from device_sdk.protocol.assignment import Assignment, Probation
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.manifest import Manifest
from device_sdk.protocol.versions import older
from device_sdk.room import Rules, Swap
from device_sdk.runtime import RuntimeOptions
from device_sdk.slot import Gate, Loaded, Slot, told
from device_sdk.store import LoadedFiles, Store
from device_sdk.traffic import BudgetError, Limits, Traffic, local_second_of_day
from device_sdk.updater import (
    MAX_STARTS,
    MAX_TESTS,
    RESTING,
    Progress,
    Signal,
    State,
    Verdict,
    Why,
    backoff,
    judge,
)

if TYPE_CHECKING:
    from device_sdk.acceptance import Exam
    from device_sdk.download import Fetched

log = logging.getLogger("device_sdk")

WATCH_SECONDS = 0.25  # between two looks at a release in probation
LOOK_SECONDS = 30.0  # between two looks at a condition that is not met
FIRST_RETRY = 5.0
FORGIVEN_SECONDS = 60.0  # between two looks whether a person at the device has forgiven a release
DAMAGED = "damaged"  # the code of what was installed here and is no longer whole
RETIRE_SECONDS = 5.0  # a follower waits so long for a slow call before it goes on with what comes next
STEP = 64 * limits.KIB  # a download that brings so much before it fails has got on


class Verified(Protocol):
    """What trust vouches for: the assignment, and the manifest that it names (None: nothing to install)."""

    @property
    def assignment(self) -> Assignment: ...
    @property
    def manifest(self) -> Manifest | None: ...
    @property
    def manifest_bytes(self) -> bytes | None: ...
    @property
    def listed(self) -> frozenset[str] | None: ...


@frozen
class Clock:
    """Time as the device sees it: wall (unix seconds), monotonic, and seconds since local midnight."""

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    second_of_day: Callable[[], float] = local_second_of_day


class Come(Protocol):
    """How much of a release is here, in bytes."""

    @property
    def done(self) -> int: ...


class WithdrawnError(Exception):
    """The view changed, or the device stops, in the middle of a download. What has come is kept."""


class UnmetError(Exception):
    """A condition ceased to hold in the middle of a download. What has come is kept."""


@dataclass(eq=False, repr=False)  # there is one; comparing and showing it would be compiled at every start
class Parts:
    """What all installers of a device share."""

    device: str
    sdk: str
    store: Store
    journal: Journal
    fetch: Callable[[Manifest, str, Callable[..., None]], "Fetched"]  # the mirror that the view names, progress
    probes: Probes
    traffic: Traffic
    ledger: Ledger
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    rehearsal: Rules | None = field(default_factory=Rules)  # None: load without a test beforehand
    swap: Swap = field(default_factory=Swap)
    clock: Clock = field(default_factory=Clock)
    wake: Callable[[], None] = lambda: None
    tidy: Callable[[], None] = lambda: None
    is_stale: Callable[[], bool] = lambda: False  # whether the view that is obeyed has expired
    hash_first: bool = False  # hash before a start serves, whatever the files' identities say
    writes: bool = True  # False: another process updates this directory
    held: Callable[[], str] = lambda: ""  # why the program asks to put off activations; "": it does not
    seen: Callable[[str, str], list[Seen]] = lambda *_: []  # what other processes see of a model's release


class Installer:
    """One model. Not thread-safe: one thread at a time calls it; calls of the model run beside it."""

    def __init__(self, model: str, parts: Parts, slot: Slot | None = None) -> None:
        self.model = model
        self.slot = slot or Slot()
        self.failure: Seen | None = None  # of the release that the updater serves, and this process cannot load
        self.latest: Verified | None = None  # set by whoever polls; read again during a download
        self.stopping: Callable[[], bool] = lambda: False
        self._parts = parts
        self._store = parts.store
        self._journal = parts.journal
        self._failures = 0
        self._began_at: int | None = None  # bytes that were here when this download began
        self._brought = 0  # bytes since
        self._looked_at = 0.0  # when the conditions of a download were last looked at, monotonic
        self._retry_at = 0.0
        self._retry_for = ""
        self._verdict: Verdict | None = None  # reached, and not yet on disk
        self._unhashed: str | None = None  # what serves, of files that were hashed by an earlier process only
        self._unloaded: str | None = None  # what was, to make room, and is to come back if nothing else does
        self._held_since: tuple[str, float] | None = None  # which release the program puts off, since when (monotonic)
        self._held_at = 0.0  # the same in unix seconds, which a restart survives
        self._found: dict[str, float | str] = {}  # what the acceptance bundle of the release under test showed
        self._since = 0.0  # when the trial began to serve, monotonic

    @property
    def progress(self) -> Progress:
        return self._journal.get(self.model)

    # Start

    def restore(self) -> None:
        """Serve the last good release, without a network: the trial, else the kept one, else the one before.

        Never one that the view took back, unless it is what served last and the policy is to keep that.
        """
        if self._parts.writes:
            self._reconcile()
        if self._is_to_stop():
            self.slot.clear(_STOPPED)
            return
        state = self._store.state(self.model)
        wanted = state.trial or state.active
        tried: set[str] = set()
        while (sha := self._store.current(self.model, self._may_serve, unhashed=True)) and sha not in tried:
            tried.add(sha)
            if wanted and wanted not in tried and self._may_serve(wanted):
                self._tell_damage(wanted)
            wanted = None
            if self._revive(sha):
                return
        self._revive_another(tried)

    def _start_with(self, sha: str, *, on_trial: bool) -> Loaded:
        """Load at the start of a process, where all wait for the first answer.

        What this onnxruntime has answered by before is not asked first. If its files are as they were when they were
        last hashed, they are hashed again once it serves: that would slow down the loading by a third.
        """
        proven = not on_trial and self._parts.ledger.get(self.model, sha).runtime == runtime.RUNTIME
        if proven and self._parts.writes and not self._parts.hash_first:
            with contextlib.suppress(ModelError):  # the disk may be why it does not load: then it is hashed first
                return self._start_at_once(sha)
        with self._opened(sha, beside=True) as files:
            return self._make(sha, files, proven=proven)

    def _start_at_once(self, sha: str) -> Loaded:
        with self._opened(sha, beside=True, unchanged=True) as files:
            loaded = self._make(sha, files, proven=True)
        self._unhashed = sha if files.unhashed else None
        return loaded

    def _hash_late(self) -> None:
        """What the start has put off. Where the disk gave something else, what went before serves, and calls wait."""
        while sha := self._unhashed:  # what takes a damaged one's place may have been put off, too
            self._unhashed = None
            try:
                self._store.verify(sha)
            except UntrustedError:
                self._replace_damaged()
            except StorageError as error:
                log.warning("%s: %s is not hashed: %s", self.model, sha, error)

    def _replace_damaged(self) -> None:
        self.slot.unload(self._gate(), timeout=RETIRE_SECONDS)
        try:
            self.restore()
        finally:
            self.slot.open_gate()
        if self.slot.current is None:
            self.slot.clear(self.slot.stopped)

    def _tell_damage(self, sha: str) -> None:
        """What was installed is passed over: it is not whole any more, or not what was verified."""
        message = f"{sha}: its files are not those that were verified; they are fetched again"
        log.error("refused (%s): %s", DAMAGED, message)
        if self._parts.writes:
            self._journal.note(events.REFUSED, self.progress, reason=DAMAGED, detail={"message": message})

    def close(self) -> None:
        """A clean end is not held against a trial: its starts are counted anew."""
        self.note_counts()
        trial = self._store.state(self.model).trial
        if self._parts.writes and trial and self.slot.current is not None:
            try:
                self._store.begin_trial(self.model, trial)
            except DeviceError as error:
                log.warning("%s: the end of the process counts as a crash: %s", self.model, error)

    def _reconcile(self) -> None:
        """Bring progress in line with the store, which was switched first, and tell the last transition again."""
        progress, trial = self.progress, self._store.state(self.model).trial
        self._journal.repeat(self.model)
        if trial:
            if trial != progress.sha256 or progress.state is not State.PROBATION:
                self._adopt(trial, progress)
        elif progress.state is State.PROBATION:
            self._settle_lost_trial(progress)
        else:
            after = progress.after(Signal.INTERRUPT) if progress.state not in _SETTLED else progress
            if after != progress:
                self._journal.record(after)

    def _adopt(self, trial: str, progress: Progress) -> None:
        if progress.state not in _SETTLED:
            progress = progress.after(Signal.INTERRUPT)
        if progress.state in {State.WAITING, State.PROBATION}:
            progress = progress.after(Signal.WITHDRAW)
        about = progress.about(trial, self._store.manifest(trial).path, progress.rollout)
        self._journal.record(about.after(Signal.ACTIVATED))

    def _settle_lost_trial(self, progress: Progress) -> None:
        if self._store.state(self.model).active == progress.sha256:
            self._journal.record(progress.after(Signal.HEALTHY))
        elif progress.sha256 and self._store.is_bad(progress.sha256):
            reason = self._store.bad_reason(progress.sha256)
            self._journal.record(progress.after(Signal.UNHEALTHY, reason))
        else:
            self._journal.record(progress.after(Signal.WITHDRAW))

    def _revive(self, sha: str) -> bool:
        """Load what the store calls current. Whether something serves now."""
        on_trial = False
        try:
            on_trial = self._parts.writes and self._put_on_trial(sha)
            if on_trial and self._store.count_start(self.model) > MAX_STARTS:
                self._reject(sha, Verdict(Signal.UNHEALTHY, Why.CRASH_LOOP))
                return self.slot.current is not None
        except StorageError as error:
            log.warning("%s: starts are not counted: %s", self.model, error)
        try:
            self._serve(self._start_with(sha, on_trial=on_trial), on_trial=on_trial)
        except UntrustedError:
            self._tell_damage(sha)
        except DeviceError as error:
            log.error("%s: %s does not load: %s", self.model, sha, error)  # noqa: TRY400
            if on_trial and isinstance(error, ModelError):
                self._reject(sha, Verdict(Signal.UNHEALTHY, error.code))
        return self.slot.current is not None

    def _put_on_trial(self, sha: str) -> bool:
        """Whether `sha` is unproven. One that stands in no state (the state was lost) is put on trial again."""
        state = self._store.state(self.model)
        if sha not in state.kept:
            tests = self.progress.tests if self.progress.sha256 == sha else 0  # it may have died of the test
            self._store.begin_trial(self.model, sha, starts=tests)
            self._adopt(sha, self.progress)
            return True
        return sha == state.trial

    def _revive_another(self, tried: set[str]) -> None:
        """What is current does not load, though its bytes are right: serve what went before it, and mark nothing."""
        state = self._store.state(self.model)
        for sha in (state.active, state.previous):
            if not sha or sha in tried or not self._may_serve(sha):
                continue
            if self._store.has(sha) and not self._store.is_bad(sha) and self._revive(sha):
                return

    # Several processes

    def served(self) -> Served:
        """What the other processes of this directory are to do."""
        current, sampler = self.slot.current, self.slot.sampler
        return Served(
            sha256=current.sha256 if current else "",
            trial=current is not None and current.sha256 == self._store.state(self.model).trial,
            stopped=self.slot.stopped,
            rate=sampler.rate if sampler else 0.0,
        )

    def follow(self, told: Served) -> None:
        """Serve what the updater serves, swapped in as it does it: beside the old one. Raises DeviceError."""
        self.failure = Seen(told.sha256) if told.sha256 else None
        if told.stopped:
            self.slot.drop_previous(timeout=RETIRE_SECONDS)
            self.slot.clear(told.stopped)
        elif not told.sha256:
            self._follow_to_nothing()
        elif self._serves(told.sha256) or (self._holds(told.sha256) and self.slot.fall_back()):
            self._settle(on_trial=told.trial)
        else:
            self._follow_to(told)

    def _follow_to(self, told: Served) -> None:
        try:
            manifest = self._store.manifest(told.sha256)
            exam = self._exam(manifest) if told.trial else None
            self._make_room(manifest)
            loaded = self._load(told.sha256, exam)
            self.slot.publish(loaded)
        except ModelError as error:
            self.failure = Seen(told.sha256, failure=error.code)
            raise
        finally:
            self._bring_back()
        del loaded
        self._settle(on_trial=told.trial)

    def _exam(self, manifest: Manifest) -> "Exam | None":
        if manifest.acceptance is None:
            return None
        from device_sdk import testing

        return testing.warm_up(self._store, manifest)

    def _follow_to_nothing(self) -> None:
        """Nothing is there to fall back to. What the updater merely could not load may go on here."""
        if self.slot.current and self._store.is_bad(self.slot.current.sha256):
            self.slot.drop_previous(timeout=RETIRE_SECONDS)
            self.slot.clear()

    def _serves(self, sha: str) -> bool:
        return self.slot.current is not None and self.slot.current.sha256 == sha

    def _holds(self, sha: str) -> bool:
        return self.slot.previous is not None and self.slot.previous.sha256 == sha

    def _settle(self, *, on_trial: bool) -> None:
        if self.slot.current:
            self.slot.current.watch(each_call=on_trial)
        self.slot.alarm = self._parts.wake if on_trial else _nothing
        if not on_trial:
            self.slot.drop_previous(timeout=RETIRE_SECONDS)

    def seen(self) -> Seen | None:
        """What this process sees of a release on trial: evidence for whoever updates."""
        if self.failure is not None and self.failure.failure:
            return self.failure
        current = self.slot.current
        if current is None or current.check_mask:
            return None
        return Seen(current.sha256, current.stats.counts())

    def take_over(self) -> None:
        """This process updates the directory from now on. The one that did has ended, perhaps by the trial."""
        self.failure = None
        self._reconcile()
        if self._is_to_stop():
            self.slot.clear(_STOPPED)
            return
        trial = self._store.state(self.model).trial
        try:
            if trial and self._store.count_start(self.model) > MAX_STARTS:
                self._reject(trial, Verdict(Signal.UNHEALTHY, Why.CRASH_LOOP))
                return
        except StorageError as error:
            log.warning("%s: starts are not counted: %s", self.model, error)
        sha = self._store.current(self.model, self._may_serve)
        if sha and (self._serves(sha) or (self._holds(sha) and self.slot.fall_back())):
            self._settle(on_trial=sha == trial)
        elif sha:
            self._serve(self._load(sha), on_trial=sha == trial)

    # Update

    def pursue(self) -> float | None:
        """Do what can be done now. Returns seconds until the next look, None: not before the view changes."""
        self._hash_late()
        verified = self.latest
        names_release = verified is not None and verified.assignment.release is not None
        if self._is_to_stop():
            self._stop()
            return None
        trial = self._store.state(self.model).trial
        wanted = verified.assignment.sha256 if verified and names_release else self._kept_trial()
        if trial and trial == wanted and self._is_watched(trial):
            return self._watch(verified.assignment.probation if verified else Probation())
        if verified is None or not names_release:
            if self.progress.state is State.WAITING:
                self._signal(Signal.WITHDRAW)
            if trial and verified and not wanted:
                self._abandon()
            return None
        if trial:
            self._abandon()
        return self._approach(verified)

    def _is_watched(self, trial: str) -> bool:
        return self._verdict is not None or (self.slot.current is not None and self.slot.current.sha256 == trial)

    def _approach(self, verified: Verified) -> float | None:
        assignment = verified.assignment
        if self.progress.state not in _SETTLED:  # an attempt ended by an error that nobody foresaw
            self._signal(Signal.INTERRUPT)
        if self._turn_to(assignment):
            self._failures, self._retry_at = 0, 0.0
        current = self.slot.current
        if current and current.sha256 == assignment.sha256 == self._store.state(self.model).active:
            self._tell_once(Signal.RUNS)
            return None
        del current
        if reason := self._obstacle(verified):
            if not (reason == Why.KNOWN_BAD and self._told_the_end(assignment)) and not self._was_stopped():
                self._tell_once(Signal.FAIL, reason)
            if assignment.stop and not self._may_go_on():
                self._stop()
            return FORGIVEN_SECONDS if reason == Why.KNOWN_BAD else None
        left = self._retry_at - self._parts.clock.monotonic()
        if left > 0:
            return left
        if hold := self._condition(verified):
            self._tell_once(Signal.HOLD, hold)
            return LOOK_SECONDS
        if self._store.has_all(assignment.sha256) and (hold := self._held(assignment)):
            self._tell_once(Signal.HOLD, hold, held_at=self._held_at)
            return WATCH_SECONDS
        return self._install(verified)

    def _held(self, assignment: Assignment) -> str:
        """Why the program wants no swap now. It may put off one release for so long as the assignment allows."""
        reason = self._parts.held()
        if not reason or assignment.urgent:
            self._held_since = None
            return ""
        now = self._parts.clock.monotonic()
        if self._held_since is None or self._held_since[0] != assignment.sha256:
            self._held_since = (assignment.sha256, now - self._held_before(assignment))
        return f"{Why.HELD}: {reason}" if now - self._held_since[1] < assignment.max_hold else ""

    def _held_before(self, assignment: Assignment) -> float:
        """For how long an earlier process put off this release already: a restart is no new deadline.

        By the wall clock: a device that was off for a night has waited that night. One set back begins anew.
        """
        progress, now = self.progress, self._parts.clock.now()
        is_same = progress.sha256 == assignment.sha256 and 0 < progress.held_at <= now
        self._held_at = progress.held_at if is_same else now
        return now - self._held_at

    # What the view took back

    def _is_listed(self, sha: str) -> bool:
        """Whether CI lets it run. What is not known is no reason to serve nothing: offline, a device goes on."""
        listed = self.latest.listed if self.latest else None
        return listed is None or sha in listed

    def _may_serve(self, sha: str) -> bool:
        """Whether to serve `sha` unasked: CI lists it, or nothing has served since."""
        return self._is_listed(sha) or sha == self._served_last()

    def _served_last(self) -> str | None:
        state = self._store.state(self.model)
        left = self.progress.state is State.ROLLED_BACK and self._store.is_bad(self.progress.sha256 or _NONE)
        return state.trial or (None if left else state.active)

    def _kept_trial(self) -> str | None:
        """The trial, where nothing is assigned: it goes on, unless CI took it back and lists what went before."""
        state = self._store.state(self.model)
        taken_back = state.trial and not self._is_listed(state.trial)
        return None if taken_back and state.active and self._is_listed(state.active) else state.trial

    def _is_to_stop(self) -> bool:
        """Nothing may run, and the policy is to run nothing. Without a view, as it was when the last process ended."""
        if self.latest is None:
            return self._was_stopped()
        return self.latest.assignment.release is None and self.latest.assignment.stop

    def _was_stopped(self) -> bool:
        return self.progress.state is State.STOPPED

    def _may_go_on(self) -> bool:
        current = self.slot.current
        return current is not None and self._is_listed(current.sha256) and not self._store.is_bad(current.sha256)

    def _stop(self) -> None:
        """Serve nothing, and say so once. What is on disk stays: it is served again when it may be."""
        progress, current = self.progress, self.slot.current
        served = current.sha256 if current else self._served_last()
        path = current.path if current else None
        del current
        self._verdict = None
        self.slot.alarm = _nothing
        self.slot.drop_previous()
        self.slot.clear(_STOPPED)
        if self._was_stopped() or not served:
            return
        if progress.state not in _SETTLED:
            self._signal(Signal.INTERRUPT)
        if self.progress.state in {State.WAITING, State.PROBATION}:
            self._signal(Signal.WITHDRAW)
        about = self.progress.about(served, path or self._store.manifest(served).path, "")
        self._journal.record(about.after(Signal.STOP, Why.NOTHING_MAY_RUN))

    def _condition(self, verified: Verified) -> str:
        """What an update has to wait for. Nothing is installed by an expired view."""
        if self._parts.is_stale():
            return Why.STALE
        self._looked_at = self._parts.clock.monotonic()
        return self._unmet(verified)

    def _unmet(self, verified: Verified, *, spare: Iterable[str] = ()) -> str:
        """Urgent releases skip all but room on the disk and in memory."""
        assignment, asked = verified.assignment, verified.assignment.conditions
        minute = int(self._parts.clock.second_of_day() // 60)
        urgent = assignment.urgent or self._runs_what_was_revoked()
        if not urgent and not assignment.window.contains(minute):
            return Why.WINDOW
        missing = self._missing(verified.manifest)
        self._parts.traffic.obey(Limits(asked.rate, asked.daily), urgent=urgent)
        if missing and self._parts.traffic.left() == 0:
            return Why.BUDGET
        return self._parts.probes.unmet(asked, urgent=urgent, missing=missing, spare=spare)

    def _runs_what_was_revoked(self) -> bool:
        """Whatever takes its place is urgent: what CI has taken back must not run until tonight."""
        current = self.slot.current
        return current is not None and not self._is_listed(current.sha256)

    def _missing(self, manifest: Manifest | None) -> int:
        """Bytes of the release that are not here."""
        files = [file for file in manifest.fetched if not self._store.has_blob(file)] if manifest else []
        return sum(max(file.length - self._store.partial_length(file.sha256), 0) for file in files)

    def _told_the_end(self, assignment: Assignment) -> bool:
        """Whether the server knows already how this assignment went."""
        progress = self.progress
        same = (progress.sha256, progress.rollout) == (assignment.sha256, assignment.rollout)
        return same and progress.state in {State.FAILED, State.ROLLED_BACK}

    def _turn_to(self, assignment: Assignment) -> bool:
        """Whether the assignment is another than the one that progress is about; then nothing waits for the old."""
        progress = self.progress
        if (progress.sha256, progress.rollout) == (assignment.sha256, assignment.rollout):
            return False
        if progress.state is State.WAITING:
            self._signal(Signal.WITHDRAW)
        return True

    def _obstacle(self, verified: Verified) -> str:
        """Why this release will not run here, whatever is tried."""
        manifest = verified.manifest
        if self._store.is_bad(verified.assignment.sha256) and not self._forgive(verified.assignment):
            return Why.KNOWN_BAD
        if manifest and older(self._parts.sdk, manifest.requires.sdk):
            return Why.REQUIRES_SDK
        if manifest and older(runtime.RUNTIME, manifest.requires.runtime):
            return Why.REQUIRES_RUNTIME
        return ""

    def _forgive(self, assignment: Assignment) -> bool:
        """A signed view may ask for one more try: once for each rollout that says so."""
        sha = assignment.sha256
        try:
            if not assignment.forgive or self._store.bad_rollout(sha) == assignment.rollout:
                return False
            log.warning("%s: %s is tried again; it was rejected: %s", self.model, sha, self._store.bad_reason(sha))
            self._store.forgive(sha)
        except StorageError as error:
            log.warning("%s: it stays rejected: %s", self.model, error)
        return not self._store.is_bad(sha)

    def _install(self, verified: Verified) -> float | None:
        """One attempt; each kind of failure has its own end."""
        try:
            try:
                self._try_install(verified)
            finally:
                self._bring_back()
        except WithdrawnError:
            self._signal(Signal.WITHDRAW)
            return 0.0
        except UnmetError as held:
            self._signal(Signal.HOLD, str(held))
            return LOOK_SECONDS
        except BudgetError:
            self._signal(Signal.HOLD, Why.BUDGET)
            return LOOK_SECONDS
        except DeviceError as error:
            return self._fail(verified.assignment.sha256, error)
        self._failures = 0
        return WATCH_SECONDS

    def _fail(self, sha: str, error: DeviceError) -> float | None:
        """Bad for ever (it does not run), failed (tried again, rarely), or held (tried again soon)."""
        if isinstance(error, ModelError):
            self._mark_bad(sha, error)
            return None
        if isinstance(error, StorageError):
            return self._retry_later(Signal.HOLD, _named(Why.DISK, error), error)
        if isinstance(error, ShortageError):
            return self._retry_later(Signal.HOLD, Why.MEMORY, error)
        if is_retryable(error):
            return self._retry_later(Signal.HOLD, _named(Why.NETWORK, error), error)
        if isinstance(error, UntrustedError):
            log.error("refused (%s): %s", error.code, error)
            self._journal.note(events.REFUSED, self.progress, reason=error.code, detail={"message": str(error)[:200]})
        return self._retry_later(Signal.FAIL, error.code, error)

    def _try_install(self, verified: Verified) -> None:
        from device_sdk.download import Fetched

        assignment, manifest = verified.assignment, verified.manifest
        if manifest is None:
            raise UntrustedError("an assignment without its manifest", code="no_manifest")
        about = self.progress.about(assignment.sha256, assignment.release, assignment.rollout)
        self._journal.record(about.after(Signal.START), {"bytes": manifest.length})
        sha = self._store.add_manifest(verified.manifest_bytes or b"")
        if sha != assignment.sha256:
            raise UntrustedError(f"manifest: expected {assignment.sha256}; got {sha}", code="hash_mismatch")
        self._began_at, self._brought = None, 0
        has_all = self._store.has_all(sha)
        fetched = Fetched() if has_all else self._parts.fetch(manifest, assignment.mirror, self._go_on)
        self._signal(Signal.DOWNLOADED, detail=fetched.detail())
        if hold := self._held(assignment):
            self._tell_once(Signal.HOLD, hold, held_at=self._held_at)
            return
        self._found = {}
        loaded = self._test(sha)
        self._go_on()
        self._signal(Signal.TESTED, detail=self._found)
        self.note_counts()
        self._store.begin_trial(self.model, sha, starts=1)
        self._serve(loaded, on_trial=True)
        self._signal(Signal.ACTIVATED)

    def _test(self, sha: str) -> Loaded:
        """Load and warm up beside the release that serves: first in a process that may die of it, then in this one.

        The store hashes the files right before, and says right after whether they have been left alone.
        """
        from device_sdk import testing

        with self._opened(sha) as files:
            self._signal(Signal.VERIFIED)
            if self.progress.tests > MAX_TESTS:
                raise ModelError("its test took the process down", code=Why.CRASHED_IN_TEST)
            bundle = testing.bundle_of(self._store, files.manifest)
            rules = self._parts.rehearsal
            if rules and self.slot.current is None:
                rules = replace(rules, nice=0)  # there are no calls to give way to
            self._make_room(files.manifest)
            loaded, self._found = testing.test(
                files, bundle, rules=rules, options=self._parts.options, go_on=self._go_on,
                make=lambda exam: self._make(sha, files, exam),
            )  # fmt: skip
            return loaded

    def _go_on(self, come: Come | None = None) -> None:
        """Called by the download and by the test: stop it when nobody wants it any more, or not now."""
        if come is not None:
            self._began_at = come.done if self._began_at is None else self._began_at
            self._brought = come.done - self._began_at
        wanted = self.latest.assignment.sha256 if self.latest else ""
        if self.stopping() or wanted != self.progress.sha256:
            raise WithdrawnError
        if come is not None:
            self._look_again()

    def _look_again(self) -> None:
        """A laptop is unplugged, a window ends: a download that takes long asks again. Not whether the host is idle:
        the download itself sees to that.
        """
        now = self._parts.clock.monotonic()
        if self.latest is None or now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        if reason := self._unmet(self.latest, spare=(IDLE,)):
            raise UnmetError(reason)

    def _retry_later(self, signal: Signal, reason: str, error: DeviceError) -> float:
        # A slow link that is broken off again and again gets there, so long as each try brings something.
        self._failures = 1 if self._brought >= STEP else self._failures + 1
        after = error.retry_after if isinstance(error, TransferError) else None
        delay = backoff(self._parts.device, self._failures, first=FIRST_RETRY, retry_after=after)
        self._retry_at = self._parts.clock.monotonic() + delay
        log.warning("%s: %s; again in %.0f s", self.model, error, delay)
        self._signal(signal, reason)
        return delay

    def _mark_bad(self, sha: str, error: ModelError) -> None:
        from device_sdk.testing import told as told_of

        log.error("%s: %s is never tried again: %s", self.model, self.progress.release, error)
        try:
            self._store.reject(self.model, sha, error.code, self.progress.rollout)
        except StorageError as full:
            log.warning("%s: %s could not be marked: %s", self.model, sha, full)
        self._signal(Signal.FAIL, told_of(error), detail={"message": str(error)[:200]})

    # Probation

    def _serve(self, loaded: Loaded, *, on_trial: bool) -> None:
        loaded.watch(each_call=on_trial)
        self._since = self._parts.clock.monotonic()
        self._verdict = None
        self.slot.alarm = self._parts.wake if on_trial else _nothing
        self.slot.publish(loaded)
        if not on_trial:
            self.slot.drop_previous()

    def _watch(self, rules: Probation) -> float | None:
        """Judge the trial. A verdict that could not be written is carried out again at the next look."""
        state, current = self._store.state(self.model), self.slot.current
        trial = state.trial or ""
        own = current.stats.counts() if current else Counts()
        counts = total(own, self._parts.seen(self.model, trial))
        before = current.before if current else Done()
        whole = before.and_then(counts, self.seconds())
        baseline = self._parts.ledger.get(self.model, state.active).counts
        del current
        self._verdict = self._verdict or judge(rules, whole.counts, whole.seconds, baseline)
        if self._verdict is None:
            return WATCH_SECONDS
        try:
            if self._verdict.signal is Signal.HEALTHY:
                self._commit(self._verdict, counts, whole)
            else:
                self._reject(trial, self._verdict, counts, whole.seconds)
        except StorageError as error:
            log.warning("%s: the verdict waits for the disk: %s", self.model, error)
            return LOOK_SECONDS
        return 0.0

    def seconds(self) -> float:
        """How long what serves has served, in this process."""
        return max(self._parts.clock.monotonic() - self._since, 0.0)

    def note_counts(self) -> None:
        """Keep what the release that serves did so far, for a later comparison and for a later process."""
        current = self.slot.current
        if current is None or not self._parts.writes:
            return
        kept = self._store.state(self.model).kept
        if current.sha256 in kept:
            done = current.before.and_then(current.stats.counts(), self.seconds(), runtime.RUNTIME)
            self._parts.ledger.keep(self.model, current.sha256, done, kept=kept)

    def _commit(self, verdict: Verdict, counts: Counts, whole: Done) -> None:
        self._store.commit(self.model)
        self._verdict = None
        self.note_counts()
        self._signal(Signal.HEALTHY, detail={**told(self.slot.current, counts, whole.seconds), **verdict.detail})
        if self.slot.current:
            self.slot.current.watch(each_call=False)
        self.slot.alarm = _nothing
        self.slot.drop_previous()
        self._parts.tidy()

    def _reject(self, sha: str, verdict: Verdict, counts: Counts | None = None, seconds: float = 0.0) -> None:
        """Back to the release before: first in memory, which cannot fail, then on disk (bad before switched).

        Where CI lists none to go back to, it stays in memory until the server, which now knows, says what to do.
        """
        served = self.slot.current if self._serves(sha) else None
        numbers = {**told(served, counts or Counts(), seconds), **verdict.detail}
        del served  # leaving it counts references
        self._leave(sha)
        self._store.reject(self.model, sha, verdict.reason, self.progress.rollout)
        self._verdict = None
        self._signal(Signal.UNHEALTHY, verdict.reason, detail=numbers)
        self.slot.alarm = _nothing
        self._serve_kept()
        self._parts.tidy()

    def _abandon(self) -> None:
        """The view took the trial back. It is not bad: what was active is active again."""
        state = self._store.state(self.model)
        self._verdict = None
        if self.progress.state is State.PROBATION:
            self._signal(Signal.WITHDRAW)
        if state.active and not self._is_listed(state.active):
            return  # both were taken back, or what went before: the trial serves until the assigned one does
        if state.trial:
            self._leave(state.trial)
        if state.active:
            self._store.begin_trial(self.model, state.active)
            self._store.commit(self.model)
        self._serve_kept()

    def _leave(self, sha: str) -> None:
        """Stop serving `sha`, if something better is in memory that may run, and free it."""
        current, before = self.slot.current, self.slot.previous
        if current is None or current.sha256 != sha or (before and not self._is_listed(before.sha256)):
            return
        del current, before  # retiring counts references
        if self.slot.fall_back():
            self.slot.drop_previous()

    def _serve_kept(self) -> None:
        """After a trial that began in an earlier process: its predecessor is not in memory, load it from disk."""
        sha, current = self._store.current(self.model, self._is_listed), self.slot.current
        if sha is None and current and self._store.current(self.model):
            log.error("%s: nothing to fall back to that CI still lists; %s goes on", self.model, current.path)
            return
        if sha is None or (current and current.sha256 == sha):
            if sha is None:
                self.slot.clear()
            return
        del current
        try:
            self._make_room(self._store.manifest(sha))
            self._unloaded = None  # it was rejected
            self._serve(self._load(sha), on_trial=False)
        except DeviceError as error:
            log.error("%s: no release to fall back to: %s", self.model, error)  # noqa: TRY400
            self.slot.clear()
        finally:
            self._bring_back()

    # Room for one

    def _make_room(self, manifest: Manifest) -> None:
        """Unload what serves, where memory has no room for two: calls wait until `_bring_back`, or what comes next."""
        current = self.slot.current
        if current is None or not self._parts.swap.is_tight(manifest):
            return
        self.note_counts()
        self._unloaded = current.sha256
        log.info("%s: %s is unloaded to make room", self.model, current.path)
        del current
        self.slot.unload(self._gate(), timeout=RETIRE_SECONDS)

    def _gate(self) -> Gate:
        return Gate(calls=self._parts.swap.calls, seconds=self._parts.swap.seconds)

    def _bring_back(self) -> None:
        """However it went, no call waits any longer: what was unloaded serves again, if nothing took its place."""
        sha, self._unloaded = self._unloaded, None
        try:
            if sha and self.slot.current is None and not self._store.is_bad(sha):
                self._serve(self._load(sha), on_trial=False)
        except DeviceError as error:
            log.error("%s: %s does not come back: %s", self.model, sha, error)  # noqa: TRY400
        finally:
            self.slot.open_gate()

    # Parts

    def _load(self, sha: str, exam: "Exam | None" = None) -> Loaded:
        with self._opened(sha) as files:
            return self._make(sha, files, exam)

    @contextlib.contextmanager
    def _opened(self, sha: str, *, beside: bool = False, unchanged: bool = False) -> Iterator[LoadedFiles]:
        """As `Store.open`, and what was hashed is remembered for the next start."""
        with self._store.open(sha, beside=beside, unchanged=unchanged) as files:
            yield files
        if self._parts.writes:
            self._store.remember_hashed(files)

    def _make(self, sha: str, files: LoadedFiles, exam: "Exam | None" = None, *, proven: bool = False) -> Loaded:
        entry = files.entry_path if files.entry_bytes is None else files.entry_bytes
        options = self._parts.options
        loaded = runtime.load(files.manifest, sha256=sha, entry=entry, options=options, exam=exam, proven=proven)
        loaded.before = self._parts.ledger.get(self.model, sha)
        return loaded

    def _signal(self, signal: Signal, reason: str = "", detail: dict[str, float | str] | None = None) -> None:
        self._journal.record(self.progress.after(signal, reason), detail)

    def _tell_once(self, signal: Signal, reason: str = "", *, held_at: float = 0.0) -> None:
        """Record an outcome that every look at the same view finds again."""
        verified = self.latest
        if verified is None:
            return
        assignment = verified.assignment
        about = self.progress.about(assignment.sha256, assignment.release, assignment.rollout)
        after = replace(about.after(signal, reason), held_at=held_at)
        if not after.says(self.progress):
            self._journal.record(after)


_SETTLED = RESTING | {State.WAITING}
_STOPPED = "nothing of it may run any more, and the server's policy is to run nothing; a new release starts it again"
_NONE = "0" * 64


def _named(why: Why, error: DeviceError) -> str:
    """A reason that says more, where the error does: `network: too_slow`."""
    return why if error.code == type(error).code else f"{why}: {error.code}"


def _nothing() -> None:
    return
