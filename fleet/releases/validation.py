"""Ask a subprocess whether a variant's files load. What is wrong with the files is an answer, not an exception.

Raises only for what is our own fault (the object store is away, no disk): the sweep tries that again.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from django.conf import settings

from device_sdk.protocol import fields
from device_sdk.protocol.manifest import FileEntry, Manifest, TensorSpec
from fleet.releases import storage

PROBE = Path(__file__).with_name("onnx_probe.py")
CHUNK = 1024 * 1024
LEFT_SECONDS = 3_600  # beyond what a validation may take; its folder is touched with each file
_PREFIX = "validate-"  # of the folders
PATCH_PREFIX = "patch-"  # of those in which patches are made, which are as large
NUMPY_NAMES = {"float": "float32", "double": "float64", "string": "object"}  # the rest are called alike


class StorageAwayError(Exception):
    """The object store did not give what it should hold. Not the release's fault."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What validation found. `reason` empty: it loads, and answers as its acceptance bundle says, if it has one."""

    reason: str = ""
    inputs: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    opset: int | None = None
    acceptance: dict[str, Any] = field(default_factory=dict)


def examine(manifest: Manifest) -> Finding:
    """Lay the files out beside each other in a private folder, load the entry in a subprocess, compare."""
    settings.INCOMING.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=settings.INCOMING) as folder:
        for file in manifest.fetched:
            lay_out(file, Path(folder))
        answer = _run(Path(folder) / manifest.entry, manifest.acceptance)
    if isinstance(answer, str):
        return Finding(reason=answer)
    finding = Finding(
        inputs=[_numpy(item) for item in answer["inputs"]],
        outputs=[_numpy(item) for item in answer["outputs"]],
        opset=answer["opset"],
        acceptance=answer.get("acceptance", {}),
    )
    reason = (
        _differs("inputs", manifest.inputs, finding.inputs)
        or _differs("outputs", manifest.outputs, finding.outputs)
        or _lacks_scores(manifest, finding.outputs)
    )
    return replace(finding, reason=reason or finding.acceptance.get("problem", ""))


def remove_leftovers(*, older_than: float = LEFT_SECONDS) -> int:
    """Delete the copies of validations that were killed, for models are large. Returns how many."""
    count, limit = 0, older_than + max(settings.VALIDATION_SECONDS, settings.PATCH_SECONDS)
    for folder in (path for prefix in (_PREFIX, PATCH_PREFIX) for path in settings.INCOMING.glob(f"{prefix}*")):
        with suppress(FileNotFoundError):  # done with in the meantime
            if time.time() - folder.stat().st_mtime > limit:
                shutil.rmtree(folder)
                count += 1
    return count


def dtype(onnx_type: str) -> str:
    """`tensor(float)`, `float` and `float32` are one thing: numpy's name. What is no tensor stays as it is."""
    bare = onnx_type.removeprefix("tensor(").removesuffix(")") if onnx_type.startswith("tensor(") else onnx_type
    return NUMPY_NAMES.get(bare, bare)[:32]


def lay_out(file: FileEntry, folder: Path) -> None:
    """Copy, hashing on the way: what runs on it must get the very bytes that are signed."""
    digest = hashlib.sha256()
    try:
        with storage.open_object(storage.blob_name(file.sha256)) as source, (folder / file.name).open("xb") as target:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                target.write(chunk)
    except Exception as error:  # the local store raises OSError, boto3 its own family
        raise StorageAwayError(f"cannot read {file.name}: {error}") from error
    if digest.hexdigest() != file.sha256:
        raise StorageAwayError(f"the object store returns other bytes for {file.name} ({file.sha256})")


def _run(entry: Path, bundle: FileEntry | None) -> dict[str, Any] | str:
    """The probe's answer, or the reason why the model does not load."""
    command = [str(PROBE), str(entry), str(settings.VALIDATION_MEMORY), str(settings.VALIDATION_SECONDS)]
    command += [str(entry.with_name(bundle.name))] if bundle else []
    done = run_script(command, folder=entry.parent, seconds=settings.VALIDATION_SECONDS)
    if done is None:
        return f"it did not load within {settings.VALIDATION_SECONDS} s"
    return _read(*done)


def run_script(command: Sequence[str], *, folder: Path, seconds: float) -> tuple[int, bytes] | None:
    """Run a script of ours in a process of its own. Its exit code and output; None: it was killed after `seconds`."""
    with tempfile.TemporaryFile(dir=folder) as output:
        process = subprocess.Popen(
            [sys.executable, "-I", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(),
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
        output.seek(0)
        return code, output.read()


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    """None of our secrets, and few arenas and threads: they cost address space."""
    return {"PATH": os.defpath, "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _read(code: int, output: bytes) -> dict[str, Any] | str:
    if code < 0:
        return _signalled(-code)
    try:
        answer: dict[str, Any] = json.loads(output)
    except ValueError:
        return f"the loader ended with code {code} and said nothing"
    answer = _keepable(answer)
    return str(answer["error"]) if "error" in answer else answer


def _keepable(value: Any) -> Any:
    """Names inside a model are hostile text: turned into what every database can keep."""
    if isinstance(value, str):
        return fields.plain(value)
    if isinstance(value, list):
        return [_keepable(item) for item in value]
    if isinstance(value, dict):
        return {name: _keepable(item) for name, item in value.items()}
    return value


def _signalled(number: int) -> str:
    if number == signal.SIGXCPU:
        return f"it did not load within {settings.VALIDATION_SECONDS} s of processor time"
    if number == signal.SIGKILL:
        return "the loader was killed, most likely because it needs more memory than there is"
    name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
    return f"the loader crashed ({name})"


def _numpy(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": item["name"], "dtype": dtype(item["dtype"]), "shape": item["shape"]}


def _differs(what: str, stated: tuple[TensorSpec, ...], found: list[dict[str, Any]]) -> str:
    """Names, kinds, ranks and fixed sizes must agree. A manifest that states nothing agrees with everything."""
    real = {item["name"]: item for item in found}
    if stated and {spec.name for spec in stated} != real.keys():
        return f"{what}: the manifest states {sorted(spec.name for spec in stated)}; the model has {sorted(real)}"
    for spec in stated:
        if not _agrees(spec, real[spec.name]):
            return f"{what}: the manifest states {spec.to_json()!r:.200}; the model has {real[spec.name]!r:.200}"
    return ""


def _lacks_scores(manifest: Manifest, found: list[dict[str, Any]]) -> str:
    names = [item["name"] for item in found]
    if manifest.scores is None or manifest.scores.output in names:
        return ""
    return f"scores: the manifest names the output {manifest.scores.output!r:.100}; the model has {names!r:.200}"


def _agrees(spec: TensorSpec, real: Mapping[str, Any]) -> bool:
    if dtype(spec.dtype) != real["dtype"] or len(spec.shape) != len(real["shape"]):
        return False
    pairs = zip(spec.shape, real["shape"], strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
