"""Load an ONNX model and say as JSON what it takes and gives. Run as a script, in a process of its own.

Everything here meets hostile bytes: it imports neither Django nor settings, sets its own limits before it reads
anything, and its caller takes a death by signal for an answer. `onnx_probe.py FILE MEMORY SECONDS [BUNDLE]`: with an
acceptance bundle the model is asked what stands there, and must answer so on this machine's processor too. Budgets are
the devices': latency is measured here, and shown, and no more.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MAX_OUTPUT = 4 * 1024 * 1024  # bytes; also what the process may write to any file


class RefusedError(Exception):
    """The model is not acceptable; the text says why."""


def main(path: str, memory: str, seconds: str, bundle: str = "") -> int:
    limit(int(memory), int(seconds))
    sys.path.insert(0, str(ROOT))
    try:
        answer = probe(Path(path), Path(bundle) if bundle else None, int(seconds))
    except RefusedError as error:
        answer = {"error": str(error)[:800]}
    except MemoryError:
        answer = {"error": f"it needs more than the {int(memory) // 1024**2} MiB of memory that validation allows"}
    except Exception as error:  # noqa: BLE001  # whatever onnx and onnxruntime raise is the answer
        answer = {"error": _plain(error, int(memory))}
    sys.stdout.write(json.dumps(answer)[:MAX_OUTPUT])
    sys.stdout.flush()
    os._exit(0)  # no destructors of a half-loaded model


def limit(memory: int, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_OUTPUT, MAX_OUTPUT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def probe(path: Path, bundle: Path | None = None, seconds: int = 60) -> dict[str, Any]:
    opset = check(path)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # threads cost address space
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return {
        "inputs": [_spec(item) for item in session.get_inputs()],
        "outputs": [_spec(item) for item in session.get_outputs()],
        "opset": opset,
        "acceptance": accept(session, bundle, seconds / 2) if bundle else {},
    }


def accept(session: Any, path: Path, seconds: float) -> dict[str, Any]:
    """Ask the session, for so long. `problem`: why the release does not hold what its makers promise."""
    from device_sdk.protocol.arrays.acceptance import Acceptance
    from device_sdk.protocol.errors import ProtocolError

    try:
        bundle = Acceptance.parse(path.read_bytes())
    except ProtocolError as error:
        raise RefusedError(f"its acceptance bundle is no good: {error.message}") from error
    took, problem = _ask(session, bundle, time.monotonic() + seconds)
    return {
        "samples": len(bundle.samples),
        "asked": len(took),
        "problem": problem and f"it does not answer as its acceptance bundle says: {problem}",
        "here_ms": round(median(took), 3),
        "latency_ms": bundle.budgets.latency_ms,
        "memory": bundle.budgets.memory,
        "rtol": bundle.tolerance.rtol,
        "atol": bundle.tolerance.atol,
        "tolerances": {name: each.to_json() for name, each in bundle.tolerances.items()},
    }


def _ask(session: Any, bundle: Any, ends: float) -> tuple[list[float], str]:
    """Milliseconds of each call, and what was wrong with the last one."""
    took: list[float] = []
    for number, sample in enumerate(bundle.samples):
        if number and time.monotonic() > ends:
            break
        began = time.perf_counter()
        try:
            values = session.run(list(sample.outputs), sample.feeds())
        except Exception as error:
            raise RefusedError(f"its acceptance bundle: sample {number + 1}: {' '.join(str(error).split())}") from error
        took.append((time.perf_counter() - began) * 1e3)
        if problem := bundle.complaint(number, dict(zip(sample.outputs, values, strict=True))):
            return took, problem
    return took, ""


def check(path: Path) -> int:
    """Parse, refuse external data outside the release's own files, run onnx's checker. Returns the default opset."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    if not model.graph.node and not model.graph.output:
        raise RefusedError("it is not an ONNX model: it has neither nodes nor outputs")
    for location in external_locations(model):
        _check_location(path.parent, location)
    onnx.checker.check_model(str(path))
    return max((item.version for item in model.opset_import if item.domain in {"", "ai.onnx"}), default=0)


def external_locations(message: Any) -> Iterator[str]:
    """Every `location` of external data anywhere in the model: initializers, attributes, subgraphs, functions."""
    pending = [message]
    while pending:
        item = pending.pop()
        if item.DESCRIPTOR.name == "TensorProto":
            yield from (entry.value for entry in item.external_data if entry.key == "location")
            continue
        for field, value in item.ListFields():
            if field.message_type is not None:
                pending.extend([value] if hasattr(value, "DESCRIPTOR") else value)


def _check_location(folder: Path, location: str | bytes) -> None:
    """Protobuf gives bytes where the text is no UTF-8."""
    if (
        isinstance(location, bytes)
        or location in {"", ".", ".."}
        or "/" in location
        or "\\" in location
        or "\0" in location
    ):
        raise RefusedError(
            f"external data: expected the plain name of one of the release's files; got {location!r:.120}"
        )
    if not (folder / location).is_file():
        raise RefusedError(f"external data: {location!r:.120} is not among the release's files")


def _spec(item: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, (int, str)) else None for size in item.shape]
    return {"name": item.name, "dtype": item.type, "shape": shape}


def _plain(error: Exception, memory: int) -> str:
    """The library's words, without our temporary folder in them, and bounded."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.replace(str(Path(sys.argv[1]).parent) + "/", "")
    if "bad_alloc" in text or "Failed to allocate memory" in text:
        return f"it needs more than the {memory // 1024**2} MiB of memory that validation allows ({text[:200]})"
    return text[:800]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5]))
