"""Several processes on one directory: the updater tells what it serves, the others follow, and tell what they see.

    peers/serving.json   by the updater: what each model runs, and why nothing where that was decided
    peers/<id>.alive     by each follower: empty, and locked as long as its process lives
    peers/<id>.json      by each follower: what its calls of each model came to
    peers/<id>.drops     by each follower: samples asked for and not kept; the updater takes it away and counts them

Nothing here is trusted beyond the store: it names releases that the store verified, and counts. Files of processes that
have ended are ignored and removed. Owns no thread.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path

from device_sdk.config import read_plainly
from device_sdk.counts import Counts, added
from device_sdk.naming import token_hex
from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.names import check_sha256

log = logging.getLogger("device_sdk")

MOST = 256  # followers that are listened to
_LIMIT = 256 * limits.KIB
_TEXT = 500


@frozen
class Served:
    """What the updater runs of one model. `stopped`: why it decided on nothing; `rate`: of samples, that it keeps."""

    sha256: str = ""
    trial: bool = False
    stopped: str = ""
    rate: float = 0.0

    @classmethod
    def parse(cls, value: object) -> "Served":
        item = fields.as_object(value, "served")
        sha = fields.take_text(item, "sha256", limit=64, default="")
        return cls(
            sha256=check_sha256(sha) if sha else "",
            trial=fields.take_bool(item, "trial"),
            stopped=fields.take_text(item, "stopped", limit=_TEXT, default=""),
            rate=fields.take_number(item, "rate", low=0, high=1),
        )


@frozen
class Seen:
    """What one follower saw of one release. `failure`: the code by which it did not load there."""

    sha256: str
    counts: Counts = field(default_factory=Counts)
    failure: str = ""

    @classmethod
    def parse(cls, value: object) -> "Seen":
        item = fields.as_object(value, "seen")
        return cls(
            sha256=check_sha256(item.get("sha256")),
            counts=Counts.parse(item.get("counts")),
            failure=fields.take_text(item, "failure", limit=64, default=""),
        )


class Board:
    """One process's place at the folder. Raises OSError only where it is said; what does not parse is not there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / "serving.json"
        self._told: dict[str, Served] | None = None
        self._seen_file: tuple[int, ...] | None = None
        self._id = ""
        self._alive = -1
        self._reported: dict[str, Seen] | None = None

    # The updater

    def tell(self, served: Mapping[str, Served]) -> None:
        """Let the others follow. Raises OSError; say it again then."""
        if served == self._told:
            return
        self._directory.mkdir(mode=0o700, exist_ok=True)
        _replace(self._file, json.dumps({name: asdict(each) for name, each in served.items()}).encode())
        self._told = dict(served)

    def sweep(self) -> None:
        """Remove what processes left that were killed. One that lives and is hit by it writes again."""
        self._listen()
        names = {path.stem for path in self._files(".alive")}
        for path in [*self._files(".tmp"), *self._files(".json")]:
            if path != self._file and path.stem not in names:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def seen(self, model: str, sha: str) -> list[Seen]:
        """What living followers see of a release."""
        return [told[model] for told in self._listen() if model in told and told[model].sha256 == sha]

    def take_drops(self) -> dict[str, int]:
        """Samples that followers did not keep since they were last asked; each is counted once."""
        total: dict[str, int] = {}
        for path in self._files(".drops"):
            with contextlib.suppress(OSError, ProtocolError):
                item = fields.parse_object(read_plainly(path, limit=_LIMIT), limit=_LIMIT, what="drops")
                counts = {model: fields.take_int(item, model, high=2**62) for model in item}
                path.unlink()
                for model, count in counts.items():
                    total[model] = total.get(model, 0) + count
        return total

    def _listen(self) -> list[dict[str, Seen]]:
        alive = []
        for path in self._files(".alive"):
            report = path.with_suffix(".json")
            if _is_held(path):
                with contextlib.suppress(OSError, ProtocolError, ValueError):
                    item = fields.parse_object(read_plainly(report, limit=_LIMIT), limit=_LIMIT, what="report")
                    alive.append({model: Seen.parse(value) for model, value in item.items()})
                continue
            for left in (report, path):
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)
        return alive

    def _files(self, suffix: str) -> list[Path]:
        try:
            return sorted(path for path in self._directory.iterdir() if path.suffix == suffix)[:MOST]
        except OSError:
            return []

    # A follower

    def news(self) -> dict[str, Served] | None:
        """What the updater serves, if it said so since the last time. One look at one file."""
        try:
            status = self._file.lstat()
            now = (status.st_ino, status.st_mtime_ns, status.st_size)
            if now == self._seen_file:
                return None
            data = read_plainly(self._file, limit=_LIMIT)
            item = fields.parse_object(data, limit=_LIMIT, what="serving")
            served = {model: Served.parse(value) for model, value in item.items()}
        except (OSError, ProtocolError, ValueError):
            return None
        self._seen_file = now
        return served

    def look_again(self) -> None:
        """What was said last could not be followed: it is news once more."""
        self._seen_file = None

    def report(self, seen: Mapping[str, Seen]) -> None:
        """Say what this process sees. Raises OSError."""
        if seen == self._reported or not (seen or self._reported):
            return
        self._join()
        body = {
            model: {"sha256": each.sha256, "failure": each.failure, "counts": each.counts.to_json()}
            for model, each in seen.items()
        }
        _replace(self._directory / f"{self._id}.json", json.dumps(body).encode())
        self._reported = dict(seen)

    def hand_over_drops(self, drops: Mapping[str, int]) -> bool:
        """Leave a count for the updater. False: it has not taken the last one yet. Raises OSError."""
        self._join()
        path = self._directory / f"{self._id}.drops"
        if os.path.lexists(path):
            return False
        _replace(path, json.dumps(drops).encode())
        return True

    def leave(self) -> None:
        """This process follows no more. Counts of drops stay until they are taken."""
        if not self._id:
            return
        for suffix in (".json", ".alive"):
            with contextlib.suppress(OSError):
                (self._directory / f"{self._id}{suffix}").unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Let go of the place without giving it up: in a forked child it is still the parent's."""
        if self._alive >= 0:
            os.close(self._alive)
        self._id, self._alive, self._reported = "", -1, None
        self._seen_file, self._told = None, None

    def _join(self) -> None:
        if self._id:
            return
        self._directory.mkdir(mode=0o700, exist_ok=True)
        name = token_hex(8)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fresh = self._directory / f".{name}.tmp"
        descriptor = os.open(fresh, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # before it has its name: an unlocked one is taken for a dead one's
            fresh.rename(self._directory / f"{name}.alive")
        except OSError:
            os.close(descriptor)
            raise
        self._id, self._alive = name, descriptor


class Uncollected:
    """Stands where samples are taken in, in a process that keeps none: counts those that it was offered."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._offered: deque[None] = deque()  # appending is atomic, adding is not

    def offer(self, *_: object) -> None:
        self._offered.append(None)

    def take(self) -> int:
        taken = len(self._offered)
        for _ in range(taken):
            self._offered.popleft()
        return taken


def total(own: Counts, seen: list[Seen]) -> Counts:
    """What all processes of a device did. One that cannot load the release has failed: that is a call and an error."""
    failed = sum(1 for each in seen if each.failure)
    return added([own, *(each.counts for each in seen), Counts(calls=failed, errors=failed)])


def _is_held(path: Path) -> bool:
    """Whether the process that made `path` lives. Not by its number, which another container counts differently."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _replace(path: Path, data: bytes) -> None:
    """Whole or not at all, for whoever reads meanwhile. Not synced: it means nothing after a power cut."""
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
