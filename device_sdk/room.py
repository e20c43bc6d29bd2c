"""Memory: how much a release may take in its test, and how much there is."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from device_sdk.protocol import limits
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.manifest import Manifest

SLACK = 256 * limits.MIB  # arenas grow in powers of two
UNSAID = 768 * limits.MIB  # what a release may take whose manifest says nothing, and eight times its files
_MARGIN = 64 * limits.MIB  # that `auto` leaves to the rest of the device


@frozen
class Rules:
    """`memory` in bytes beyond an empty interpreter, 0: by the manifest. `seconds`: for loading and for all calls.
    `nice`: by how much its process gives way to this one, as `nice` counts.
    """

    memory: int = 0
    seconds: float = 300.0
    nice: int = 10

    def allowance(self, manifest: Manifest, budget: int = 0) -> int:
        """`budget`: what its acceptance bundle grants, in bytes; it is measured, and this leaves room to measure."""
        most = self.memory or SLACK + (manifest.requires.memory or UNSAID + 8 * manifest.length)
        return min(most, SLACK + budget) if budget else most


@frozen
class Swap:
    """How a release takes another's place. `how`: `beside` it, `unload-first`, or `auto`: by the memory that is free.

    Unloaded first, calls wait: `calls` of them, each for `seconds`.
    """

    how: str = "beside"
    calls: int = 64
    seconds: float = 30.0

    def is_tight(self, manifest: Manifest) -> bool:
        """Whether there is no room for a second release. A session takes up to 3.5 times its files while it is made."""
        if self.how != "auto":
            return self.how == "unload-first"
        free = free_memory()
        return free is not None and free < manifest.length * 4 + _MARGIN


def free_memory() -> int | None:
    """Bytes that this process may still take, by the system and by its control group. None: not known here."""
    known = [value for value in (_system_free(), *_group_free()) if value is not None]
    return min(known, default=None)


def _system_free() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _group_free() -> Iterator[int]:
    """Of control groups (version 2) from our own upwards: containers and systemd's MemoryMax set these."""
    root = Path("/sys/fs/cgroup")
    own = root
    with contextlib.suppress(OSError, IndexError):
        own = root / Path("/proc/self/cgroup").read_text().split("0::", 1)[1].splitlines()[0].lstrip("/")
    for folder in (own, *own.parents):
        if folder == root.parent:
            return
        with contextlib.suppress(OSError, ValueError):
            limit = int((folder / "memory.max").read_text())  # "max", no number: no limit
            yield max(limit - int((folder / "memory.current").read_text()), 0)
