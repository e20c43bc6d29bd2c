"""File operations that stop half-way, fail, or turn out not to have reached the disk."""

import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from device_sdk.store import FileOps

WRITES = frozenset({"write", "append"})
SILENT = "remove_tree"  # tells of no error: what it leaves is swept later
CHANGES = frozenset({"mkdir", "sync", "sync_directory", "rename", "link", "unlink", "remove_tree"}) | WRITES


class UnsyncedOps(FileOps):
    """Real files, but no waiting for the disk: these tests model what a sync does instead of paying for it."""

    def sync(self, path):
        with self.open(path):
            pass

    def sync_directory(self, path):
        assert path.is_dir()


class PowerCut(BaseException):
    """Not an Exception: nothing may catch it and tidy up, as nothing would."""


class CountingOps(UnsyncedOps):
    """Counts the operations that change the disk; cuts before one of them, or fails it.

    `torn`: the cut comes in the middle of the write. `fails`: an operation's number to the error it raises, or None.
    `log`: what was done, such as `rename blobs`.
    """

    def __init__(self, *, cut_at=None, torn=False, fails=lambda _: None):
        self.log = []
        self._cut_at, self._torn, self._fails = cut_at, torn, fails

    @property
    def count(self):
        return len(self.log)

    def _before(self, name, arguments):
        at = self.count
        self.log.append(f"{name} {_kind(arguments[-1] if name in {'rename', 'link'} else arguments[0])}")
        if name != SILENT and (error := self._fails(at)):
            raise error
        if self._cut_at is not None and at >= self._cut_at:
            if self._torn and at == self._cut_at and name in WRITES:
                path, data = arguments
                self._do(name, path, data[: len(data) // 2])
            raise PowerCut(f"at operation {at}: {name}")

    def _do(self, name, *arguments):
        return getattr(UnsyncedOps, name)(self, *arguments)


def _counted(name):
    def operation(self, *arguments):
        self._before(name, arguments)
        return self._do(name, *arguments)

    return operation


for _name in CHANGES:
    setattr(CountingOps, _name, _counted(_name))


def _kind(path):
    """Which of the store's files or folders it is, without its hash."""
    if path.name in {"blobs", "incoming", "manifests", "loading", "store"}:
        return f"{path.name}/"
    if path.parent.name in {"blobs", "incoming", "loading"}:
        return path.parent.name
    for end in (".state.json.tmp", "state.json", ".json.tmp", ".json", ".bad.tmp", ".bad"):
        if path.name.endswith(end):
            return end if "state" in end or end.startswith(".bad") else f"manifest{end.removeprefix('.json')}"
    return "loading" if "loading" in path.parts else "the folder above"


@dataclass(eq=False)
class Inode:
    """`synced`: what the disk has for sure; None: a folder. `seen`: what programs see, filled in at the loss."""

    synced: bytes | None
    seen: bytes = b""
    changed: int = 0  # nanoseconds


Entries = dict[Path, Inode]
Disk = dict[Path, tuple[bytes | None, Inode]]  # what a path is found to hold (None: a folder)


@dataclass(frozen=True)
class Change:
    """Entries of one directory that come and go together, and are not synced yet."""

    directory: Path
    entries: dict[Path, Inode | None] = field(default_factory=dict)


# Which of the unsynced changes of directories had reached the disk, and what of unsynced bytes.
NAMES = {
    "all": lambda at, count: True,
    "none": lambda at, count: False,
    "the first": lambda at, count: at == 0,
    "the last": lambda at, count: at == count - 1,
    "every other": lambda at, count: at % 2 == 0,
    "all but the first": lambda at, count: at > 0,
}
BYTES = {
    "whole": lambda inode: inode.seen,
    "lost": lambda inode: inode.synced,
    "zeroed": lambda inode: bytes(len(inode.seen)),
    "torn": lambda inode: inode.seen[: len(inode.seen) // 2],
}


class PowerLossOps(CountingOps):
    """Knows what of `home` is on the disk and what only in its cache, as POSIX promises it and no better.

    `forgets`: the end of a file's name, or a folder's name, that this broken store forgets to sync.
    """

    def __init__(self, home, *, cut_at=None, forgets=None):
        super().__init__(cut_at=cut_at)
        self._home, self._forgets = home, forgets
        there = [home, *home.rglob("*")] if home.exists() else []
        self._seen: Entries = {path: Inode(None if path.is_dir() else path.read_bytes()) for path in there}
        self._disk: Entries = dict(self._seen)
        self._pending: list[Change] = []

    def losses(self) -> Iterator[tuple[str, Disk]]:
        """Each different disk that a power loss may leave now, and what it is called."""
        for path, inode in self._seen.items():
            if inode.synced is not None:
                inode.seen, inode.changed = path.read_bytes(), path.stat().st_mtime_ns
        known = []
        for (names, reached), (data, left) in itertools.product(NAMES.items(), BYTES.items()):
            found = self._after(reached, left)
            bare = {path: content for path, (content, _) in found.items()}
            if bare not in known:
                known.append(bare)
                yield f"{names} of the names, bytes {data}", found

    def restore(self, disk) -> None:
        """Make `home` what the disk is found to be."""
        shutil.rmtree(self._home, ignore_errors=True)
        self._home.parent.mkdir(parents=True, exist_ok=True)
        placed: dict[Inode, Path] = {}
        for path in sorted(disk):
            content, inode = disk[path]
            if content is None:
                path.mkdir(mode=0o700)
            elif inode in placed:
                path.hardlink_to(placed[inode])
            else:
                path.write_bytes(content)
                os.utime(path, ns=(inode.changed, inode.changed))
                placed[inode] = path

    def _after(self, reached, left):
        entries, count = dict(self._disk), len(self._pending)
        for at, change in enumerate(self._pending):
            if reached(at, count):
                _apply(entries, change)
        found = {}
        for path in sorted(entries):
            inode = entries[path]
            if path == self._home or path.parent in found:
                whole = inode.synced is None or inode.synced == inode.seen
                found[path] = (inode.synced if whole else left(inode), inode)
        return found

    def _do(self, name, *arguments):
        if not (name in {"sync", "sync_directory"} and self._is_forgotten(name, arguments[0])):
            super()._do(name, *arguments)
            getattr(self, f"_note_{name}")(*arguments)

    def _note_mkdir(self, path):
        if path not in self._seen:
            self._enter(path, Inode(None))

    def _note_write(self, path, _):
        if path not in self._seen:
            self._enter(path, Inode(b""))

    _note_append = _note_write

    def _note_sync(self, path):
        self._seen[path].synced = path.read_bytes()

    def _note_sync_directory(self, path):
        for change in [each for each in self._pending if each.directory == path]:
            _apply(self._disk, change)
            self._pending.remove(change)

    def _note_rename(self, source, target):
        inode = self._seen.pop(source)
        self._seen[target] = inode
        if source.parent == target.parent:
            self._pending.append(Change(target.parent, {source: None, target: inode}))
        else:
            self._pending += [Change(target.parent, {target: inode}), Change(source.parent, {source: None})]

    def _note_link(self, source, target):
        self._enter(target, self._seen[source])

    def _note_unlink(self, path):
        if self._seen.pop(path, None):
            self._pending.append(Change(path.parent, {path: None}))

    def _note_remove_tree(self, path):
        gone = [each for each in self._seen if each == path or path in each.parents]
        for each in gone:
            del self._seen[each]
        self._pending.append(Change(path.parent, dict.fromkeys(gone)))

    def _enter(self, path, inode):
        self._seen[path] = inode
        self._pending.append(Change(path.parent, {path: inode}))

    def _is_forgotten(self, name, path):
        if self._forgets is None:
            return False
        if name == "sync_directory":
            return f"{path.name}/" == self._forgets
        is_state = path.name == ".state.json.tmp"
        return path.name.endswith(self._forgets) and is_state == (self._forgets == ".state.json.tmp")


def _apply(entries, change):
    for path, inode in change.entries.items():
        if inode is None:
            entries.pop(path, None)
        else:
            entries[path] = inode
