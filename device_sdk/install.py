"""Take one model from assigned to committed, or back. Does what `updater` says; owns no thread and no network loop.

The order of an update: fetch, verify, test beside the release that serves, switch the store, publish, watch, keep.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from device_sdk import runtime
from device_sdk.errors import (
    DeviceError,
    ModelError,
    StorageError,
    TransferError,
    UntrustedError,
    is_retryable,
)
from device_sdk.journal import Journal
from device_sdk.protocol import events
from device_sdk.protocol.assignment import Assignment, Probation
from device_sdk.protocol.manifest import Manifest
from device_sdk.runtime import Loaded, RuntimeOptions, Slot
from device_sdk.store import LoadedFiles, Store
from device_sdk.updater import (
    MAX_STARTS,
    MAX_TESTS,
    RESTING,
    Counts,
    Progress,
    Signal,
    State,
    Verdict,
    Why,
    backoff,
    judge,
    older,
)
from device_sdk.uploader import local_second_of_day

log = logging.getLogger("device_sdk")

WATCH_SECONDS = 0.25  # between two looks at a release in probation
LOOK_SECONDS = 30.0  # between two looks at a condition that is not met
FIRST_RETRY = 5.0


class Verified(Protocol):
    """What trust vouches for: the assignment, and the manifest that it names (None: nothing to install)."""

    @property
    def assignment(self) -> Assignment: ...
    @property
    def manifest(self) -> Manifest | None: ...
    @property
    def manifest_bytes(self) -> bytes | None: ...


@dataclass(frozen=True)
class Clock:
    """Time as the device sees it: wall (unix seconds), monotonic, and seconds since local midnight."""

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    second_of_day: Callable[[], float] = local_second_of_day


class WithdrawnError(Exception):
    """The view changed, or the device stops, in the middle of a download. What has come is kept."""


@dataclass
class Parts:
    """What all installers of a device share."""

    device: str
    sdk: str
    store: Store
    journal: Journal
    fetch: Callable[[Manifest, Callable[..., None]], None]
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    clock: Clock = field(default_factory=Clock)
    wake: Callable[[], None] = lambda: None
    tidy: Callable[[], None] = lambda: None
    is_stale: Callable[[], bool] = lambda: False  # whether the view that is obeyed has expired
    writes: bool = True  # False: another process updates this directory


class Installer:
    """One model. Not thread-safe: one thread at a time calls it; calls of the model run beside it."""

    def __init__(self, model: str, parts: Parts) -> None:
        self.model = model
        self.slot = Slot()
        self.latest: Verified | None = None  # set by whoever polls; read again during a download
        self.stopping: Callable[[], bool] = lambda: False
        self._parts = parts
        self._store = parts.store
        self._journal = parts.journal
        self._failures = 0
        self._retry_at = 0.0
        self._retry_for = ""
        self._verdict: Verdict | None = None  # reached, and not yet on disk
        self._since = 0.0  # when the trial began to serve, monotonic

    @property
    def progress(self) -> Progress:
        return self._journal.get(self.model)

    # Start

    def restore(self) -> None:
        """Serve the last good release, without a network: the trial, else the kept one, else the one before."""
        if self._parts.writes:
            self._reconcile()
        tried: set[str] = set()
        while (sha := self._store.current(self.model)) and sha not in tried:
            tried.add(sha)
            if self._revive(sha):
                return
        self._revive_another(tried)

    def close(self) -> None:
        """A clean end is not held against a trial: its starts are counted anew."""
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
            if on_trial and self._store.count_start(self.model) >= MAX_STARTS:
                self._reject(sha, Verdict(Signal.UNHEALTHY, Why.CRASH_LOOP))
                return self.slot.current is not None
        except StorageError as error:
            log.warning("%s: starts are not counted: %s", self.model, error)
        try:
            self._serve(self._load(sha), on_trial=on_trial)
        except DeviceError as error:
            log.error("%s: %s does not load: %s", self.model, sha, error)  # noqa: TRY400
            if on_trial and isinstance(error, ModelError):
                self._reject(sha, Verdict(Signal.UNHEALTHY, error.code))
        return self.slot.current is not None

    def _put_on_trial(self, sha: str) -> bool:
        """Whether `sha` is unproven. One that stands in no state (the state was lost) is put on trial again."""
        state = self._store.state(self.model)
        if sha not in state.kept:
            self._store.begin_trial(self.model, sha)
            self._adopt(sha, self.progress)
            return True
        return sha == state.trial

    def _revive_another(self, tried: set[str]) -> None:
        """What is current does not load, though its bytes are right: serve what went before it, and mark nothing."""
        state = self._store.state(self.model)
        for sha in (state.active, state.previous):
            if sha and sha not in tried and self._store.has(sha) and not self._store.is_bad(sha) and self._revive(sha):
                return

    # Update

    def pursue(self) -> float | None:
        """Do what can be done now. Returns seconds until the next look, None: not before the view changes."""
        verified = self.latest
        names_release = verified is not None and verified.assignment.release is not None
        trial = self._store.state(self.model).trial
        wanted = verified.assignment.sha256 if verified and names_release else trial
        if trial and trial == wanted and self._is_watched(trial):
            return self._watch(verified.assignment.probation if verified else Probation())
        if verified is None or not names_release:
            if self.progress.state is State.WAITING:
                self._signal(Signal.WITHDRAW)
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
            if not (reason == Why.KNOWN_BAD and self._told_the_end(assignment)):
                self._tell_once(Signal.FAIL, reason)
            return None
        left = self._retry_at - self._parts.clock.monotonic()
        if left > 0:
            return left
        if hold := self._condition(assignment):
            self._tell_once(Signal.HOLD, hold)
            return LOOK_SECONDS
        return self._install(verified)

    def _condition(self, assignment: Assignment) -> str:
        """What an update has to wait for. Urgent ones skip the window; nothing is installed by an expired view."""
        if self._parts.is_stale():
            return Why.STALE
        minute = int(self._parts.clock.second_of_day() // 60)
        return "" if assignment.urgent or assignment.window.contains(minute) else Why.WINDOW

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
        if self._store.is_bad(verified.assignment.sha256):
            return Why.KNOWN_BAD
        if manifest and older(self._parts.sdk, manifest.requires.sdk):
            return Why.REQUIRES_SDK
        if manifest and older(runtime.RUNTIME, manifest.requires.runtime):
            return Why.REQUIRES_RUNTIME
        return ""

    def _install(self, verified: Verified) -> float | None:
        """One attempt; each kind of failure has its own end."""
        try:
            self._try_install(verified)
        except WithdrawnError:
            self._signal(Signal.WITHDRAW)
            return 0.0
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
            return self._retry_later(Signal.HOLD, Why.DISK, error)
        if is_retryable(error):
            return self._retry_later(Signal.HOLD, Why.NETWORK, error)
        if isinstance(error, UntrustedError):
            self._journal.note(events.REFUSED, self.progress, reason=error.code)
        return self._retry_later(Signal.FAIL, error.code, error)

    def _try_install(self, verified: Verified) -> None:
        assignment, manifest = verified.assignment, verified.manifest
        if manifest is None:
            raise UntrustedError("an assignment without its manifest", code="no_manifest")
        about = self.progress.about(assignment.sha256, assignment.release, assignment.rollout)
        self._journal.record(about.after(Signal.START), {"bytes": manifest.length})
        sha = self._store.add_manifest(verified.manifest_bytes or b"")
        if sha != assignment.sha256:
            raise UntrustedError(f"manifest: expected {assignment.sha256}; got {sha}", code="hash_mismatch")
        if not self._store.has(sha):
            self._parts.fetch(manifest, self._go_on)
        self._signal(Signal.DOWNLOADED)
        loaded = self._test(sha)
        self._go_on()
        self._signal(Signal.TESTED)
        self._store.begin_trial(self.model, sha)
        self._serve(loaded, on_trial=True)
        self._signal(Signal.ACTIVATED)

    def _test(self, sha: str) -> Loaded:
        """Load and warm up beside the release that serves. The store hashes the files right before."""
        with self._store.open(sha) as files:
            self._signal(Signal.VERIFIED)
            if self.progress.tests > MAX_TESTS:
                raise ModelError("its test took the process down", code=Why.CRASHED_IN_TEST)
            return self._make(sha, files)

    def _go_on(self, *_: object) -> None:
        """Called by the download: stop it when nobody wants it any more."""
        wanted = self.latest.assignment.sha256 if self.latest else ""
        if self.stopping() or wanted != self.progress.sha256:
            raise WithdrawnError

    def _retry_later(self, signal: Signal, reason: str, error: DeviceError) -> float:
        self._failures += 1
        after = error.retry_after if isinstance(error, TransferError) else None
        delay = backoff(self._parts.device, self._failures, first=FIRST_RETRY, retry_after=after)
        self._retry_at = self._parts.clock.monotonic() + delay
        log.warning("%s: %s; again in %.0f s", self.model, error, delay)
        self._signal(signal, reason)
        return delay

    def _mark_bad(self, sha: str, error: ModelError) -> None:
        log.error("%s: %s is never tried again: %s", self.model, self.progress.release, error)
        try:
            self._store.reject(self.model, sha, error.code)
        except StorageError as full:
            log.warning("%s: %s could not be marked: %s", self.model, sha, full)
        self._signal(Signal.FAIL, error.code, detail={"message": str(error)[:200]})

    # Probation

    def _serve(self, loaded: Loaded, *, on_trial: bool) -> None:
        loaded.check_mask = 0 if on_trial else runtime.CHECK_EVERY - 1
        self._since = self._parts.clock.monotonic()
        self._verdict = None
        self.slot.alarm = self._parts.wake if on_trial else _nothing
        self.slot.publish(loaded)
        if not on_trial:
            self.slot.drop_previous()

    def _watch(self, rules: Probation) -> float | None:
        """Judge the trial. A verdict that could not be written is carried out again at the next look."""
        trial = self._store.state(self.model).trial or ""
        counts = self.slot.current.stats.counts() if self.slot.current else Counts()
        seconds = self._parts.clock.monotonic() - self._since
        self._verdict = self._verdict or judge(rules, counts, seconds)
        if self._verdict is None:
            return WATCH_SECONDS
        try:
            if self._verdict.signal is Signal.HEALTHY:
                self._commit(counts, seconds)
            else:
                self._reject(trial, self._verdict, counts, seconds)
        except StorageError as error:
            log.warning("%s: the verdict waits for the disk: %s", self.model, error)
            return LOOK_SECONDS
        return 0.0

    def _commit(self, counts: Counts, seconds: float) -> None:
        self._store.commit(self.model)
        self._verdict = None
        self._signal(Signal.HEALTHY, detail=_detail(counts, seconds))
        if self.slot.current:
            self.slot.current.check_mask = runtime.CHECK_EVERY - 1
        self.slot.alarm = _nothing
        self.slot.drop_previous()
        self._parts.tidy()

    def _reject(self, sha: str, verdict: Verdict, counts: Counts | None = None, seconds: float = 0.0) -> None:
        """Back to the release before: first in memory, which cannot fail, then on disk (bad before switched)."""
        self._leave(sha)
        self._store.reject(self.model, sha, verdict.reason)
        self._verdict = None
        self._signal(Signal.UNHEALTHY, verdict.reason, detail=_detail(counts or Counts(), seconds))
        self._serve_kept()
        self._parts.tidy()

    def _abandon(self) -> None:
        """The view took the trial back. It is not bad: what was active is active again."""
        state = self._store.state(self.model)
        if state.trial:
            self._leave(state.trial)
        if state.active:
            self._store.begin_trial(self.model, state.active)
            self._store.commit(self.model)
        self._verdict = None
        if self.progress.state is State.PROBATION:
            self._signal(Signal.WITHDRAW)
        self._serve_kept()

    def _leave(self, sha: str) -> None:
        """Stop serving `sha`, if something better is in memory, and free it."""
        current = self.slot.current
        if current is None or current.sha256 != sha:
            return
        del current  # retiring counts references
        if self.slot.fall_back():
            self.slot.drop_previous()

    def _serve_kept(self) -> None:
        """After a trial that began in an earlier process: its predecessor is not in memory, load it from disk."""
        sha, current = self._store.current(self.model), self.slot.current
        if sha is None or (current and current.sha256 == sha):
            if sha is None:
                self.slot.clear()
            return
        del current
        try:
            self._serve(self._load(sha), on_trial=False)
        except DeviceError as error:
            log.error("%s: no release to fall back to: %s", self.model, error)  # noqa: TRY400
            self.slot.clear()

    # Parts

    def _load(self, sha: str) -> Loaded:
        with self._store.open(sha) as files:
            return self._make(sha, files)

    def _make(self, sha: str, files: LoadedFiles) -> Loaded:
        entry = files.entry_path if files.entry_bytes is None else files.entry_bytes
        return runtime.load(files.manifest, sha256=sha, entry=entry, options=self._parts.options)

    def _signal(self, signal: Signal, reason: str = "", detail: dict[str, float | str] | None = None) -> None:
        self._journal.record(self.progress.after(signal, reason), detail)

    def _tell_once(self, signal: Signal, reason: str = "") -> None:
        """Record an outcome that every look at the same view finds again."""
        verified = self.latest
        if verified is None:
            return
        assignment = verified.assignment
        about = self.progress.about(assignment.sha256, assignment.release, assignment.rollout)
        after = about.after(signal, reason)
        if not after.says(self.progress):
            self._journal.record(after)


_SETTLED = RESTING | {State.WAITING}


def _detail(counts: Counts, seconds: float) -> dict[str, float | str]:
    return {
        "calls": counts.calls,
        "errors": counts.errors,
        "invalid": counts.invalid,
        "seconds": round(seconds, 1),
        "p50_us": counts.p50,
        "p95_us": counts.p95,
    }


def _nothing() -> None:
    return
