"""What an application says when it opens a device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any

from device_sdk.install import Clock
from device_sdk.probes import Probe
from device_sdk.protocol import limits
from device_sdk.protocol.frozen import frozen

if TYPE_CHECKING:
    from device_sdk.spool import Redact


@frozen
class Options:
    """How a device behaves, apart from what the server decides. Sizes in bytes, times in seconds.

    `redact` gets each sample's inputs and returns what may be written; it runs on the spool's thread, before the first
    write, and a sample for which it raises is lost. `session_options` makes an onnxruntime.SessionOptions per session.
    `stall_seconds`: a download that brings less than 1 KiB a second over so long is broken off, and resumed later.
    `rehearse`: a new release is loaded first in a process of its own, which takes about 50 MB more for a moment, under
    `rehearsal_bytes` (0: by its manifest) and `rehearsal_seconds`. `rehearsal_nice`: by how much it gives way to calls.
    `hash_first`: at a start, hash files before they serve, also those that are as they were when they were last hashed.
    `probes`: what the host is like, by name (`unmetered`, `charging`, `idle`: true or false; `free_disk`,
    `free_memory`: bytes), for rollouts that wait for it; the defaults are Linux's, and `unmetered` has none.
    `max_bytes_per_second`, `max_bytes_per_day`: of downloads, 0: no limit but the server's; the smaller counts.
    `max_upload_bytes_per_second`, `max_upload_bytes_per_day`: of samples, 0: no limit. Batches are made to fit the day;
    a sample that is larger than the day's bytes goes as the first of a day.
    `mirror`: address of a cache that is asked for files first (None: the provisioned one, "": none).
    `swap`: "beside", "unload-first" or "auto" (by what memory is free): how a release takes another's place. Where it
    is unloaded first, up to `held_calls` calls wait for it, each for up to `held_seconds`; others get HeldError.
    `on_update(model, release)` is called when another release serves, `on_rollback(model, release, reason)` after
    `release` was left because it is bad. On a thread of the SDK's, or the one that calls `update_once`, outside of
    locks; what they raise is logged.
    `read_only`: serve what is installed, change nothing, whoever holds the lock; never take over.
    `follow_seconds`: how often a process that does not update looks what the one that does serves.
    """

    intra_op_threads: int | None = None
    providers: Sequence[Any] = ("CPUExecutionProvider",)
    session_options: Callable[[], Any] | None = None
    redact: "Redact | None" = None
    spool_bytes: int = 256 * limits.MIB
    spool_samples: int = 100_000
    poll_seconds: float = 60.0
    health_seconds: float = 60.0
    upload_seconds: float = 60.0
    download_seconds: float = 6 * 3_600.0
    stall_seconds: float = 60.0
    rehearse: bool = True
    rehearsal_bytes: int = 0
    rehearsal_seconds: float = 300.0
    rehearsal_nice: int = 10
    hash_first: bool = False
    probes: Mapping[str, Probe] = field(default_factory=dict)
    max_bytes_per_second: int = 0
    max_bytes_per_day: int = 0
    max_upload_bytes_per_second: int = 0
    max_upload_bytes_per_day: int = 0
    mirror: str | None = None
    swap: str = "beside"
    held_calls: int = 64
    held_seconds: float = 30.0
    on_update: Callable[[str, str], object] | None = None
    on_rollback: Callable[[str, str, str], object] | None = None
    read_only: bool = False
    follow_seconds: float = 0.5
    clock: Clock = field(default_factory=Clock)
    transport: Any = None  # a stand-in for tests and simulators; else HTTP to the provisioned server
