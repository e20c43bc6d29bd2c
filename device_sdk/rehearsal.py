"""Load a release for the first time in a process of its own, under a memory and a time limit.

A model of 200 bytes can ask for 40 GB, spin for ever or crash native code. Here that ends a process that nobody needs;
the one that serves loads a release only after it has been loaded, warmed up and seen to answer here: as its acceptance
bundle says, where it has one, and within that bundle's memory budget.

The child is a fresh interpreter (`python -m device_sdk.rehearsal JOB`): a fork of a process with onnxruntime's threads
is not safe. It hashes what it reads, says one short line of JSON, and is believed only about its own end.

The limit is RLIMIT_DATA (private writable memory, touched or not), on top of what the interpreter and onnxruntime take
before they see the model. Not RLIMIT_AS: thread pools, arenas and mapped weights reserve addresses that cost nothing.
Enforced by Linux only; elsewhere the time limit alone holds. Memory of a GPU is not limited.
"""

import contextlib
import json
import logging
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from device_sdk.acceptance import LARGE, Exam, read
from device_sdk.errors import ModelError, RehearsalError, ShortageError, UntrustedError
from device_sdk.protocol import limits
from device_sdk.protocol.arrays.acceptance import Acceptance
from device_sdk.protocol.manifest import Manifest, digest
from device_sdk.room import SLACK, Rules, free_memory
from device_sdk.runtime import MEMORY_LIMIT, RuntimeOptions, is_starved, load
from device_sdk.store import LoadedFiles

log = logging.getLogger("device_sdk")

TEST_TIMED_OUT = "test_timed_out"
CRASHED_IN_TEST = "crashed_in_test"
START_SECONDS = 120.0  # until the child has imported onnxruntime, on the slowest of devices
CHANGED = "hash_mismatch"
_LOOK_SECONDS = 0.2
_READY = b"ready\n"
_ANSWER = 4_096


def rehearse(
    files: LoadedFiles,
    *,
    options: RuntimeOptions,
    rules: Rules,
    go_on: Callable[[], None],
    bundle: Acceptance | None = None,
) -> int | None:
    """Try a release. `go_on` is called while it is under way, and ends it by raising.

    Returns the bytes that it took at most, beyond an empty interpreter (0: not known here), or None: it could not be
    tried, as the log says.

    Raises ModelError (`memory_limit`, `test_timed_out`, `crashed_in_test`, or what loading it and its acceptance bundle
    raised), ShortageError where the device, not the release, had too little memory, RehearsalError where no process
    could be started, and UntrustedError where the files are no longer those that were verified.
    """
    if reason := _cannot(options):
        log.warning("%s is not tried in a process of its own: %s", files.manifest.path, reason)
        return None
    budget = bundle.budgets.memory if bundle else 0
    allowance, free = rules.allowance(files.manifest, budget), free_memory()
    memory = allowance if free is None else min(allowance, free * 9 // 10)
    started = time.monotonic()
    with _child(_job(files, options, memory, rules.seconds), files.directory, rules.nice) as child:
        said = _listen(child, rules.seconds, go_on)
        status = child.wait()
    try:
        took = _judge(said, status, memory)
    except ModelError as error:
        if error.code == MEMORY_LIMIT and memory < allowance:
            raise ShortageError(f"{error}; a release may take {allowance >> 20} MiB where they are free") from error
        raise
    if took > budget > 0:
        raise ModelError(
            f"it takes {took / limits.MIB:.0f} MiB of memory; expected at most {budget / limits.MIB:.0f}", code=LARGE
        )
    log.info("%s passed its test in %.1f s", files.manifest.path, time.monotonic() - started)
    return took


def _cannot(options: RuntimeOptions) -> str:
    """Why this program cannot start the test; empty: it can."""
    if not sys.executable or getattr(sys, "frozen", False):
        return "this program has no Python interpreter that could be started"
    made = options.session_options
    if made is not None and _importable(made) is None:
        return "`session_options` is not a function of a module that can be imported"
    try:
        json.dumps(list(options.providers))
    except TypeError:
        return "`providers` holds what is not plain data"
    if sys.platform != "linux":
        log.warning("%s enforces no memory limit: a new release is tried under a time limit only", sys.platform)
    return ""


def _importable(made: Callable[[], Any]) -> str | None:
    module, name = getattr(made, "__module__", ""), getattr(made, "__qualname__", "<")
    found = getattr(sys.modules.get(module), name, None) if module != "__main__" else None
    return f"{module}:{name}" if found is made else None


def _job(files: LoadedFiles, options: RuntimeOptions, memory: int, seconds: float) -> str:
    bundle = files.manifest.acceptance
    job = {  # absolute: the child stands in another directory
        "manifest": str(files.manifest_path.absolute()),
        "sha256": files.sha256,
        "entry": str(files.entry_path.absolute()),
        "in_memory": files.entry_bytes is not None,
        "acceptance": bundle and [str(files.store.blob(bundle.sha256).absolute()), bundle.sha256],
        "memory": memory,
        "seconds": math.ceil(seconds + START_SECONDS),
        "threads": options.intra_op_threads or 1,  # a pool's stacks count as memory, on a machine of many cores
        "providers": list(options.providers),
        "session_options": options.session_options and _importable(options.session_options),
    }
    return json.dumps(job)


@contextlib.contextmanager
def _child(job: str, directory: Path, nice: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start it, and see to its end whatever happens. It finds the modules that this process finds.

    Nobody waits for it. At `nice` 10 it gets a tenth of a core where calls want them all, and these feel little of it.
    """
    command = [sys.executable, "-P", "-m", "device_sdk.rehearsal", job]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path)}
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=directory,
            env=environment,
        )  # fmt: skip
    except OSError as error:
        raise RehearsalError(f"the test's process does not start: {error.strerror}") from error
    with contextlib.suppress(OSError):  # it may be gone already
        os.setpriority(os.PRIO_PROCESS, child.pid, os.getpriority(os.PRIO_PROCESS, 0) + nice)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()


def _listen(child: subprocess.Popen[bytes], seconds: float, go_on: Callable[[], None]) -> bytes:
    """What the child says until it closes its mouth, bounded. Its time runs from when it has seen the job."""
    assert child.stdout is not None  # noqa: S101  it was asked for
    said, ends = b"", time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while len(said) < _ANSWER:
            go_on()
            if time.monotonic() > ends:
                _raise_late(said, seconds)
            if not selector.select(_LOOK_SECONDS):
                continue
            chunk = os.read(child.stdout.fileno(), _ANSWER)
            if not chunk:
                break
            if not said:
                ends = time.monotonic() + seconds
            said += chunk
    try:
        child.wait(max(ends - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired:
        _raise_late(said, seconds)
    return said


def _raise_late(said: bytes, seconds: float) -> None:
    if not said:
        raise RehearsalError(f"the test's process has not begun within {START_SECONDS:.0f} s")
    raise ModelError(f"it did not load and answer within {seconds:g} s", code=TEST_TIMED_OUT)


def _judge(said: bytes, status: int, memory: int) -> int:
    """The bytes that it took, if it passed."""
    text = said.removeprefix(_READY)
    if not said.startswith(_READY):
        raise RehearsalError(f"the test's process ended with {status} before it began; `rehearse=False` does without")
    if status == -signal.SIGKILL:  # not by us: we have not raised
        raise ShortageError("the system killed the test, most likely because memory ran out")
    if status == -signal.SIGALRM:
        raise ModelError("it did not load and answer in time", code=TEST_TIMED_OUT)
    try:
        answer = json.loads(text)
        code, message, took = str(answer["code"])[:64], str(answer["message"])[:300], int(answer["took"])
    except (ValueError, TypeError, KeyError, RecursionError):
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        raise ModelError(f"its test ended by {how}", code=CRASHED_IN_TEST) from None
    if code == MEMORY_LIMIT:
        raise ModelError(f"it takes more than the {memory >> 20} MiB of its test: {message}", code=MEMORY_LIMIT)
    if code == CHANGED:
        raise UntrustedError(message, code=code)
    if code or status:
        raise ModelError(message, code=code or CRASHED_IN_TEST)
    return took


# The child


def main(text: str) -> int:
    """Do one job: a JSON object, see `_job`."""
    job = json.loads(text)
    out = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # onnxruntime and what it loads print as they like
        os.dup2(nowhere, descriptor)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(job["seconds"])  # should the parent be gone
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # of all processes, this one may go
    data = _verified(Path(job["manifest"]), job["sha256"])
    manifest = Manifest.parse(data)
    exam = Exam(read(_verified(Path(job["acceptance"][0]), job["acceptance"][1]))) if job["acceptance"] else None
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is of what follows
    before = _status("VmRSS")
    _limit(job["memory"])
    os.write(out, _READY)
    answer = {**_try(job, manifest, job["sha256"], exam), "took": max(_status("VmHWM") - before, 0)}
    os.write(out, json.dumps(answer).encode()[: _ANSWER - len(_READY)])
    os._exit(0)  # no destructors: a model that was read is done with


def _limit(memory: int) -> None:
    if sys.platform == "linux":
        import resource

        most = (_status("VmData") or SLACK) + memory
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _status(name: str) -> int:
    """A figure about this process, in bytes: `VmData` is what RLIMIT_DATA counts. 0: not known here."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _try(job: dict[str, Any], manifest: Manifest, sha: str, exam: Exam | None) -> dict[str, str]:
    try:
        entry: bytes | Path = Path(job["entry"])
        if job["in_memory"]:
            hashes = {file.name: file.sha256 for file in manifest.files}
            entry = _verified(Path(job["entry"]), hashes[manifest.entry])
        providers = [tuple(each) if isinstance(each, list) else each for each in job["providers"]]
        options = RuntimeOptions(job["threads"], providers, _named(job["session_options"]))
        load(manifest, sha256=sha, entry=entry, options=options, exam=exam)
    except ModelError as error:
        return {"code": error.code, "message": str(error)[:300]}
    except MemoryError:
        return {"code": MEMORY_LIMIT, "message": "out of memory"}
    except Exception as error:  # noqa: BLE001  whatever it raises is the answer
        text = f"{type(error).__name__}: {error}"[:300]
        return {"code": MEMORY_LIMIT if is_starved(text) else CRASHED_IN_TEST, "message": text}
    return {"code": "", "message": ""}


def _named(name: str | None) -> Callable[[], Any] | None:
    if not name:
        return None
    import importlib

    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def _verified(path: Path, sha: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read()
    if digest(data) != sha:
        raise ModelError(f"{path.name}: changed on disk since it was verified", code=CHANGED)
    return data


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
