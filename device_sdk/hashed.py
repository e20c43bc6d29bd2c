"""Which files are as they were when they were last hashed, so that a start need not hash them before it serves.

    hashed.json   {blob's sha256: [device, inode, bytes, mtime, ctime]}, times in nanoseconds

The kernel sets ctime at each change of a file, and no program can set it back. What a medium lets rot, or what was
changed in another computer, shows in no identity: so the release that serves is hashed all the same, soon after.
Losing this costs the time of a hash, so it is not synced. One process writes it.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from device_sdk.config import read_plainly
from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import check_sha256

Identity = tuple[int, ...]
_PARTS = 5
_LIMIT = limits.MIB


class Ops(Protocol):
    """Of `store.FileOps`, by which a test cuts after each."""

    def unlink(self, path: Path) -> None: ...
    def write(self, path: Path, data: bytes) -> None: ...
    def rename(self, source: Path, target: Path) -> None: ...


class Hashed:
    def __init__(self, path: Path, ops: Ops) -> None:
        self._path = path
        self._ops = ops
        self._known: dict[str, Identity] | None = None

    def holds(self, sha: str, identity: Identity) -> bool:
        """Whether the blob was this very file, in this very state, when it was last hashed."""
        return self._all().get(sha) == identity

    def keep(self, found: Mapping[str, Identity], *, present: frozenset[str]) -> None:
        """Remember what was hashed, and forget what is not `present` any more. A full disk costs the next start."""
        known = {sha: identity for sha, identity in {**self._all(), **found}.items() if sha in present}
        if known == self._known:
            return
        self._known = known
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with contextlib.suppress(OSError):
            self._ops.unlink(temporary)  # a planted link must not be what gets written through
            self._ops.write(temporary, json.dumps(known).encode())
            self._ops.unlink(self._path)  # what replaces a file is written out by ext4 at once; this may be lost
            self._ops.rename(temporary, self._path)

    def _all(self) -> dict[str, Identity]:
        if self._known is None:
            try:
                self._known = parse(read_plainly(self._path, limit=_LIMIT))
            except (OSError, ProtocolError):
                self._known = {}
        return self._known


def parse(data: bytes) -> dict[str, Identity]:
    """Raises ProtocolError."""
    items = fields.parse_object(data, limit=_LIMIT, what="hashed")
    return {check_sha256(sha): _identity(value) for sha, value in items.items()}


def _identity(value: Any) -> Identity:
    if not isinstance(value, list) or len(value) != _PARTS or any(type(part) is not int for part in value):
        raise ProtocolError("malformed", f"expected {_PARTS} whole numbers; got {value!r:.80}")
    return tuple(value)
