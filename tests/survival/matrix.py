"""The crash matrix of the store: each course is cut, failed and made to forget at each of its operations.

Whatever happens, a store that is opened afterwards must have one whole verified release, must remember what was
acknowledged, must go on with a download where it stood, and must be able to finish what was begun.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from device_sdk.errors import DeviceError, StorageError, UntrustedError
from device_sdk.protocol.manifest import Manifest, digest
from device_sdk.store import FileOps, ModelState, Store
from tests.simulator import release
from tests.survival.crashes import SILENT, WRITES, CountingOps, PowerCut, PowerLossOps, UnsyncedOps
from tests.survival.outcome import Step, Tried, thinned

MODEL = "detector"
STORE = "store"
Blobs = dict[str, bytes]
OLD, OLD_BLOBS = release(f"{MODEL}/1.0.0/default")
NEW, NEW_BLOBS = release(
    f"{MODEL}/1.1.0/default", {"model.onnx": b"graph " * 500, "model.onnx.data": b"weights " * 2500}
)
OLD_SHA, NEW_SHA = digest(OLD.to_bytes()), digest(NEW.to_bytes())
WHY = "NaN"
KINDS = {errno.ENOSPC: "disk_full", errno.EIO: "storage", errno.EROFS: "storage"}


@dataclass
class Told:
    """What was acknowledged: steps that returned, bytes of each file that were written, files that were admitted."""

    steps: list[str] = field(default_factory=list)
    came: dict[str, int] = field(default_factory=dict)
    admitted: list[str] = field(default_factory=list)
    began_again: list[str] = field(default_factory=list)  # files of which something was here, and was not used

    def copy(self) -> "Told":
        return deepcopy(self)


def receive(store: Store, manifest: Manifest, blobs: Blobs, told: Told) -> str:
    """What a download does: it goes on where it stood, and begins again only where the hash says so."""
    for file in manifest.files:
        while not store.has_blob(file):
            _receive_file(store, file.sha256, blobs[file.sha256], told)
            with suppress(UntrustedError):  # what came before was torn by the disk
                store.admit(file.sha256, file.length)
                told.admitted.append(file.sha256)
    return store.add_manifest(manifest.to_bytes())


def _receive_file(store: Store, sha: str, data: bytes, told: Told) -> None:
    start = store.partial_length(sha)
    if start < told.came.get(sha, 0):
        told.began_again.append(sha)
    for at in range(start, len(data), len(data) // 2):
        piece = data[at : at + len(data) // 2]
        store.append(sha, piece)
        told.came[sha] = at + len(piece)


def install(store: Store, manifest: Manifest, blobs: Blobs) -> str:
    sha = receive(store, manifest, blobs, Told())
    store.begin_trial(manifest.path.model, sha)
    store.commit(manifest.path.model)
    return sha


def contents(store: Store, sha: str) -> Blobs:
    with store.open(sha) as files:
        return {file.name: (files.directory / file.name).read_bytes() for file in files.manifest.files}


def expected(manifest: Manifest, blobs: Blobs) -> Blobs:
    return {file.name: blobs[file.sha256] for file in manifest.files}


RIGHT = {OLD_SHA: expected(OLD, OLD_BLOBS), NEW_SHA: expected(NEW, NEW_BLOBS)}


# The courses: what a device does, and is cut in


@dataclass(frozen=True)
class Course:
    """`before`: whether the old release stands, `rejected`: and the new one was rejected. `take` tells what it does."""

    name: str
    before: bool
    take: Callable[[Store, Told], None]
    rejected: bool = False

    def begin(self, home: Path) -> None:
        if self.before:
            install(Store(home, UnsyncedOps()), OLD, OLD_BLOBS)
        if self.rejected:
            _update_and_reject(Store(home, UnsyncedOps()), Told())

    def run(self, home: Path, ops: FileOps, kind: type[Store] = Store) -> tuple[Told, bool]:
        """Take it as far as it goes. What was acknowledged; whether it was cut."""
        self.begin(home)
        return self.go_on(home, ops, Told(), kind)

    def go_on(self, home: Path, ops: FileOps, told: Told, kind: type[Store] = Store) -> tuple[Told, bool]:
        try:
            self.take(kind(home, ops), told)
        except PowerCut:
            return told, True
        return told, False


def _try(store: Store, told: Told) -> None:
    receive(store, NEW, NEW_BLOBS, told)
    contents(store, NEW_SHA)  # as it is loaded, before the switch
    store.begin_trial(MODEL, NEW_SHA)
    told.steps.append("trial")
    store.count_start(MODEL)


def _update(store: Store, told: Told) -> None:
    _try(store, told)
    store.commit(MODEL)
    told.steps.append("committed")
    store.collect_garbage()


def _update_and_reject(store: Store, told: Told) -> None:
    _try(store, told)
    store.reject(MODEL, NEW_SHA, WHY)
    told.steps.append("rejected")
    store.collect_garbage()


def _forgive(store: Store, told: Told) -> None:
    store.forgive(NEW_SHA)
    told.steps.append("forgiven")


FIRST = Course("first install", before=False, take=_update)
UPDATE = Course("update", before=True, take=_update)
REJECT = Course("update and rollback", before=True, take=_update_and_reject)
FORGIVE = Course("forgiveness", before=True, take=_forgive, rejected=True)
COURSES = (FIRST, UPDATE, REJECT)


def recover(store: Store, told: Told) -> None:
    """What a device does after a cut: serve, tidy, and finish what was begun, unless it was rejected."""
    current = store.current(MODEL)
    if current:
        contents(store, current)
    store.collect_garbage(wanted=[NEW])
    if store.is_bad(NEW_SHA):
        store.reject(MODEL, NEW_SHA, WHY)
    elif store.state(MODEL).active != NEW_SHA:
        _update(store, told)


RECOVERY = Course("recovery", before=True, take=recover)


def verdict(course: Course, home: Path, told: Told, *, resumes: bool = True) -> str:
    """How a device finds itself after a cut; in capitals where that breaks a promise. Finishes the course."""
    store = Store(home, UnsyncedOps())
    found = _found(course, store, told)
    if found.isupper():
        return found
    if store.is_bad(NEW_SHA):
        store.reject(MODEL, NEW_SHA, WHY)
        (home / "state.json").unlink()  # lost some day later: nothing may bring the rejected release back
        back = Store(home, UnsyncedOps()).current(MODEL)
        return found if back == (OLD_SHA if course.before else None) else "REJECTED RELEASE IS BACK"
    after = told.copy()
    try:
        RECOVERY.take(store, after)
    except DeviceError as error:
        return f"RECOVERY FAILED: {error.code}".upper()
    if resumes and after.began_again:
        return "DOWNLOAD BEGAN AGAIN"
    if Store(home, UnsyncedOps()).current(MODEL) != NEW_SHA:
        return "UPDATE CANNOT BE FINISHED"
    return found


def _found(course: Course, store: Store, told: Told) -> str:
    current = store.current(MODEL)
    if current not in {OLD_SHA if course.before else None, NEW_SHA}:
        return "NO WHOLE RELEASE"
    if current and contents(store, current) != RIGHT[current]:
        return "WRONG BYTES"
    known = {None: "nothing yet", OLD_SHA: "old release", NEW_SHA: "new release"}
    return _forgotten(course, store, told, current) or known[current]


def _forgotten(course: Course, store: Store, told: Told, current: str | None) -> str:
    """What had been acknowledged, and is not so any more."""
    old, is_bad = OLD_SHA if course.before else None, store.is_bad(NEW_SHA)
    if not is_bad and any(store.blob_length(sha) is None for sha in told.admitted):
        return "ADMITTED FILE IS GONE"
    if "rejected" in told.steps and (current != old or not is_bad or store.bad_reason(NEW_SHA) != WHY):
        return "REJECTION WAS FORGOTTEN"
    if "forgiven" in told.steps and is_bad:
        return "FORGIVENESS WAS FORGOTTEN"
    if "trial" in told.steps and not is_bad and current != NEW_SHA:
        return "ACKNOWLEDGED SWITCH WAS FORGOTTEN"
    if "committed" in told.steps and store.state(MODEL) != ModelState(active=NEW_SHA, previous=old):
        return "ACKNOWLEDGED INSTALL WAS FORGOTTEN"
    return ""


# What is done to them


def operations(course: Course, home: Path) -> list[str]:
    """The operations of the course, by name."""
    ops = CountingOps()
    assert course.run(home, ops)[1] is False
    return ops.log


def kills(folder: Path, *, every: int = 1, step: Step = lambda _: None) -> Iterator[tuple[Tried, list[str]]]:
    """Cut before each operation, in the middle of each write, and after the last. Each row, and its operations."""
    for course in COURSES:
        names = operations(course, folder / f"{course.name}-count" / STORE)
        tried = Tried(course.name)
        for cut, torn in _cuts(names, every):
            step(f"{course.name}: cut {_where(names, cut, torn)}")
            home = folder / f"{course.name}-{cut}-{torn}" / STORE
            told, _ = course.run(home, CountingOps(cut_at=cut, torn=torn))
            tried.note(_where(names, cut, torn), verdict(course, home, told))
            shutil.rmtree(home, ignore_errors=True)
        yield tried, names


def nested(folder: Path, *, every: int = 1, step: Step = lambda _: None) -> Iterator[Tried]:
    """After each cut, the recovery is cut too: at each of its operations."""
    for course in COURSES:
        names = operations(course, folder / f"{course.name}-count" / STORE)
        tried = Tried(course.name)
        for cut, torn in _cuts(names, every):
            where = _where(names, cut, torn)
            step(f"{course.name}: cut {where}, then in the recovery")
            template = folder / f"{course.name}-{cut}-{torn}" / STORE
            told, _ = course.run(template, CountingOps(cut_at=cut, torn=torn))
            for at, told_then, home in _again(template, told, every):
                tried.note(f"{where}, then at {at}", verdict(course, home, told_then))
                shutil.rmtree(home)
            shutil.rmtree(template, ignore_errors=True)
        yield tried


def _again(template: Path, told: Told, every: int) -> Iterator[tuple[str, Told, Path]]:
    home = template.parent / "again" / STORE
    counter = CountingOps()
    _copy(template, home)
    RECOVERY.go_on(home, counter, told.copy())
    shutil.rmtree(home)
    for cut in thinned(range(counter.count), every):
        _copy(template, home)
        after, _ = RECOVERY.go_on(home, CountingOps(cut_at=cut), told.copy())
        yield counter.log[cut], after, home


def _copy(template: Path, home: Path) -> None:
    if template.exists():  # a first install that was cut before its first operation left nothing
        shutil.copytree(template, home)


def losses(
    folder: Path,
    *,
    every: int = 1,
    courses: tuple[Course, ...] = (*COURSES, FORGIVE),
    kind: type[Store] = Store,
    forgets: str | None = None,
    enough: int = 0,
    step: Step = lambda _: None,
) -> Iterator[Tried]:
    """Cut before each operation and after the last, and take away what was not synced, in each way that differs.

    `enough`: stop a course after so many broken promises: a mutant needs one.
    """
    for course in courses:
        names = operations(course, folder / f"{course.name}-count" / STORE)
        tried = Tried(course.name)
        for cut in thinned(range(len(names) + 1), every):
            if enough and len(tried.broken) >= enough:
                break
            step(f"{course.name}: power lost {_where(names, cut)}")
            _lose(folder / f"{course.name}-{cut}" / STORE, course, tried, cut, kind, forgets, _where(names, cut))
        yield tried


def _lose(
    home: Path, course: Course, tried: Tried, cut: int, kind: type[Store], forgets: str | None, where: str
) -> None:
    course.begin(home)
    ops = PowerLossOps(home, cut_at=cut, forgets=forgets)
    told, _ = course.go_on(home, ops, Told(), kind)
    for way, disk in list(ops.losses()):
        ops.restore(disk)
        tried.note(f"{where}, {way}", verdict(course, home, told, resumes=False))
    shutil.rmtree(home, ignore_errors=True)


def failures(folder: Path, *, every: int = 1, step: Step = lambda _: None) -> Iterator[Tried]:
    """The disk refuses one operation, or each from that one on, until it is well again. The process lives."""
    for number, code in KINDS.items():
        for lasting in (False, True):
            name = f"{errno.errorcode[number]}, {'from there on' if lasting else 'once'}"
            tried = Tried(name)
            for course in (UPDATE, REJECT):
                names = operations(course, folder / f"{name}-{course.name}-count" / STORE)
                loud = [at for at, each in enumerate(names) if not each.startswith(SILENT)]
                for at in thinned(loud, every):
                    step(f"{course.name}: {name} {_where(names, at)}")
                    home = folder / f"{name}-{course.name}-{at}" / STORE
                    tried.note(f"{course.name}, {_where(names, at)}", _fail(course, home, at, number, code, lasting))
                    shutil.rmtree(home)
            yield tried


def _fail(course: Course, home: Path, at: int, number: int, code: str, lasting: bool) -> str:
    course.begin(home)
    store = Store(home, UnsyncedOps())
    error = OSError(number, os.strerror(number))
    told = Told()
    ill = CountingOps(fails=lambda each: error if each == at or (lasting and each > at) else None)
    said = ""
    try:
        store = Store(home, ill)
        course.take(store, told)
    except StorageError as caught:
        said = caught.code
    if said != code:
        return f"CALLED {said.upper() or 'NOTHING'}"
    serves = {OLD_SHA: "old release", NEW_SHA: "new release"}.get(store.current(MODEL) or "", "")
    if not serves:
        return "SERVES NOTHING"
    store._ops = UnsyncedOps()  # the disk is well again
    again = told.copy()
    RECOVERY.take(store, again)
    if again.began_again:
        return "DOWNLOAD BEGAN AGAIN"
    found = verdict(course, home, again)
    return found if found.isupper() else serves


def _cuts(names: list[str], every: int) -> list[tuple[int, bool]]:
    before = [(at, False) for at in range(len(names) + 1)]
    within = [(at, True) for at, name in enumerate(names) if name.split()[0] in WRITES]
    points = sorted([*before, *within])
    return [points[at] for at in thinned(range(len(points)), every)]


def _where(names: list[str], at: int, torn: bool = False) -> str:
    if at == len(names):
        return "after the last"
    return f"{'in the middle of' if torn else 'before'} {at}: {names[at]}"
