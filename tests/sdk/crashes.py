"""File operations that stop half-way, for the store's crash tests."""

from device_sdk.store import FileOps

WRITES = frozenset({"write", "append"})
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
    """Counts the operations that change the disk; cuts before one of them, or fails it."""

    def __init__(self, *, cut_at=None, torn=False, fail_at=None, error=None):
        self.count = 0
        self._cut_at, self._torn, self._fail_at, self._error = cut_at, torn, fail_at, error

    def _before(self, name, arguments):
        at, self.count = self.count, self.count + 1
        if at == self._fail_at:
            raise self._error
        if self._cut_at is not None and at >= self._cut_at:
            if self._torn and at == self._cut_at and name in WRITES:
                path, data = arguments
                getattr(FileOps, name)(self, path, data[: len(data) // 2])
            raise PowerCut(f"at operation {at}: {name}")


def _counted(name):
    def operation(self, *arguments):
        self._before(name, arguments)
        return self._do(name, *arguments)

    return operation


def _do(self, name, *arguments):
    return getattr(UnsyncedOps, name)(self, *arguments)


CountingOps._do = _do
for _name in CHANGES:
    setattr(CountingOps, _name, _counted(_name))


class PowerLossOps(CountingOps):
    """Remembers what was not synced, so that `lose` can take it away, as a disk's cache would.

    `skip_sync_of`: the end of a file's name, or a folder, that this broken store forgets to sync.
    """

    def __init__(self, *, cut_at=None, skip_sync_of=None):
        super().__init__(cut_at=cut_at)
        self._skip = skip_sync_of
        self._dirty = set()
        self._renames = []

    def lose(self, way):
        """`data`: unsynced content; `names`: unsynced renames; `both`."""
        if way in {"data", "both"}:
            for path in self._dirty:
                if path.exists():
                    path.write_bytes(b"")
        if way in {"names", "both"}:
            for source, target, before in reversed(self._renames):
                if not target.exists():
                    continue
                source.write_bytes(target.read_bytes())
                target.unlink()
                if before is not None:
                    target.write_bytes(before)

    def _do(self, name, *arguments):
        path = arguments[0]
        if name in {"sync", "sync_directory"} and self._forgets(path, name):
            return
        before = arguments[1].read_bytes() if name == "rename" and arguments[1].exists() else None
        super()._do(name, *arguments)
        if name in WRITES:
            self._dirty.add(path)
        elif name == "sync":
            self._dirty.discard(path)
        elif name == "sync_directory":
            self._renames = [item for item in self._renames if item[1].parent != path]
        elif name == "rename":
            self._renames.append((path, arguments[1], before))
            if path in self._dirty:
                self._dirty = self._dirty - {path} | {arguments[1]}

    def _forgets(self, path, name):
        if self._skip is None:
            return False
        if name == "sync_directory":
            return path.name == self._skip or (self._skip == "store-root" and path.name.startswith("loss-"))
        state = path.name == ".state.json.tmp"
        return path.name.endswith(self._skip) and (state == (self._skip == ".state.json.tmp"))
