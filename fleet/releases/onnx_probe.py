"""Load an ONNX model and say as JSON what it takes and gives. Run as a script, in a process of its own.

Everything here meets hostile bytes: it imports neither Django nor settings, sets its own limits before it reads
anything, and its caller takes a death by signal for an answer. `onnx_probe.py FILE MEMORY SECONDS`.
"""

import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_OUTPUT = 4 * 1024 * 1024  # bytes; also what the process may write to any file


class RefusedError(Exception):
    """The model is not acceptable; the text says why."""


def main(path: str, memory: str, seconds: str) -> int:
    limit(int(memory), int(seconds))
    try:
        answer = probe(Path(path))
    except RefusedError as error:
        answer = {"error": str(error)}
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


def probe(path: Path) -> dict[str, Any]:
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
    }


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
    sys.exit(main(*sys.argv[1:4]))
