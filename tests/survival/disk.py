"""A small real disk that fills up, or becomes read-only: a tmpfs in a mount namespace of our own, where one may be had.

The crash matrix injects errors at every operation; here the kernel gives them. Run as `python -m tests.survival.disk
FOLDER` by `unshare`, which makes us root of nothing but our own mounts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from device_sdk.errors import DeviceError, StorageError
from device_sdk.store import Store
from tests.survival.matrix import MODEL, RIGHT, STORE, UPDATE, Told, contents, verdict
from tests.survival.outcome import Tried

SIZE = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")  # what a tmpfs counts in
MOST = 24  # pages left over: an update takes fewer
FULL, READ_ONLY = "disk full", "disk read-only"


def tried(folder: Path) -> tuple[list[Tried], str]:
    """What came of it; or nothing, and why this machine gives no such disk."""
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-m", "tests.survival.disk", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return [], "there is no unshare"
    if done.returncode:
        return [], (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    found = []
    for what, outcomes in json.loads(done.stdout).items():
        found.append(Tried(what))
        for where, outcome in outcomes:
            found[-1].note(where, outcome)
    return found, ""


def main(folder: str) -> int:
    home = Path(folder)
    _run("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder)
    sys.stdout.write(json.dumps({FULL: list(_filled(home)), READ_ONLY: list(_read_only(home))}))
    return 0


def _filled(home: Path) -> Iterator[tuple[str, str]]:
    for left in range(MOST):
        place = home / f"full-{left}" / STORE
        UPDATE.begin(place)
        filler = home / "filler"
        _fill(filler, home, left * PAGE)
        told, outcome = _update(place, "disk_full")
        filler.unlink()
        yield f"{left} pages left", _afterwards(place, told, outcome)
        _run("rm", "-r", str(place.parent))


def _read_only(home: Path) -> Iterator[tuple[str, str]]:
    place = home / "read-only" / STORE
    UPDATE.begin(place)
    _run("mount", "-o", "remount,ro", str(home))
    told, outcome = _update(place, "storage")
    _run("mount", "-o", "remount,rw", str(home))
    yield "from the beginning", _afterwards(place, told, outcome)


def _afterwards(place: Path, told: Told, outcome: str) -> str:
    """There is room again: the device finishes what it began. A broken promise is said alone, in capitals."""
    found = verdict(UPDATE, place, told)
    return next((each for each in (outcome, found) if each.isupper()), f"{outcome}, then {found}")


def _update(place: Path, code: str) -> tuple[Told, str]:
    """How an update goes, and whether the old release goes on where it does not."""
    told = Told()
    try:
        UPDATE.take(Store(place), told)
    except StorageError as error:
        if error.code != code:
            return told, f"SAID {error.code}".upper()
        return told, _served(place)
    return told, "updated"


def _served(place: Path) -> str:
    """A session is in memory by then: what a new process can read is more than is promised."""
    try:
        store = Store(place)
        sha = store.current(MODEL)
        return "refused, served" if sha and contents(store, sha) == RIGHT[sha] else "NO WHOLE RELEASE"
    except DeviceError:
        return "refused"


def _fill(filler: Path, home: Path, left: int) -> None:
    status = os.statvfs(home)
    filler.write_bytes(bytes(status.f_bavail * status.f_frsize - left))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
