"""Load a release and warm it up. The only import of onnxruntime."""

import contextlib
import ctypes
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from device_sdk.errors import ModelError, first_line
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.manifest import Manifest
from device_sdk.protocol.versions import older
from device_sdk.schema import DTYPES, Schema, check_signed, mismatch, specs_of
from device_sdk.slot import Array, Loaded

log = logging.getLogger("device_sdk")

RUNTIME = str(onnxruntime.__version__)
GIL_FREE_LOAD = "1.31"  # the first onnxruntime whose session constructor releases the GIL
_CPU = "CPUExecutionProvider"
_PROBE_SIZES = (1, 32, 224)  # tried for dimensions that the signed shape leaves open
_PROBE_ELEMENTS = 4_000_000
MEMORY_LIMIT = "memory_limit"  # the code of a release that asked for more memory than it may have
_STARVED = ("bad_alloc", "Failed to allocate memory", "AllocateRawInternal", "Cannot allocate memory", "MemoryError")


@frozen
class RuntimeOptions:
    """How sessions are made. `session_options` is called for each session, so that none is shared."""

    intra_op_threads: int | None = None
    providers: Sequence[Any] = ("CPUExecutionProvider",)
    session_options: Callable[[], Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The providers that are asked for, without their options."""
        return tuple(str(each if isinstance(each, str) else each[0]) for each in self.providers)

    def available(self) -> list[Any]:
        """Those that this onnxruntime has; what is missing is reported by `load`, not warned of by onnxruntime."""
        has = set(onnxruntime.get_available_providers())
        return [each for each, name in zip(self.providers, self.names, strict=True) if name in has] or [_CPU]

    def make(self) -> Any:
        options = self.session_options() if self.session_options else onnxruntime.SessionOptions()
        if self.intra_op_threads is not None:
            options.intra_op_num_threads = self.intra_op_threads
        return options


def end_plainly() -> None:
    """In a forked child: end the process right after Python has ended, with the same status.

    onnxruntime's own clean-up at the end of a process waits for the parent's threads, for ever. glibc only: its
    `on_exit` calls with the status first, which is what `_exit` takes.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.on_exit(libc._exit, None)  # noqa: SLF001  the C function's name


def load(
    manifest: Manifest,
    *,
    sha256: str,
    entry: bytes | Path,
    options: RuntimeOptions,
    exam: Callable[[Any, Schema], None] | None = None,
    proven: bool = False,
) -> Loaded:
    """Make a session of a verified release and prove that it answers as its manifest says. Raises ModelError.

    `entry`: the verified bytes of the model file, or its path where external data lies beside it. `exam` asks the
    session what the release's makers would have it asked, and warms it up by that; without one it is asked zeros,
    unless it is `proven`: it has answered here before, and nobody is kept waiting by a slow first call.
    """
    _warn_of_old_runtime()
    session = make_session(entry, options)
    schema = Schema(specs_of(session.get_inputs()), specs_of(session.get_outputs()))
    check_signed(schema.inputs, manifest.inputs, "input")
    check_signed(schema.outputs, manifest.outputs, "output")
    if manifest.scores and manifest.scores.output not in schema.outputs:
        raise ModelError(f"scores: the model has no output {manifest.scores.output!r}", code="schema")
    if exam is not None:
        exam(session, schema)
    elif not proven:
        _warm_up(session, schema, manifest)
    loaded = Loaded(
        sha256=sha256, path=manifest.path, session=session, schema=schema, scores=manifest.scores, asked=options.names
    )
    if missing := loaded.missing:
        log.warning("%s: asked for %s; it runs on %s", loaded.path, ", ".join(missing), ", ".join(loaded.providers))
    return loaded


def make_session(entry: bytes | Path, options: RuntimeOptions) -> Any:
    """Raises ModelError `load_failed`, `memory_limit`."""
    source: bytes | str = entry if isinstance(entry, bytes) else str(entry)
    try:
        return onnxruntime.InferenceSession(source, options.make(), providers=options.available())
    except Exception as error:
        code = MEMORY_LIMIT if is_starved(str(error) or repr(error)) else "load_failed"
        raise ModelError(f"does not load: {first_line(error)}", code=code) from error


def _warm_up(session: Any, schema: Schema, manifest: Manifest) -> None:
    """Run on zeros: the first call costs double, and a model that cannot answer is found out here.

    Where a shape leaves sizes open (beyond the batch axis) we invent them, and a failure proves nothing.
    """
    signed = {spec.name: spec.shape for spec in manifest.inputs}
    shapes = {name: signed.get(name) or spec.shape for name, spec in schema.inputs.items()}
    invented = any(not isinstance(size, int) for shape in shapes.values() for size in shape[1:])
    problem = ""
    for size in _PROBE_SIZES if invented else _PROBE_SIZES[:1]:
        feeds = _zeros(schema, shapes, size)
        if feeds is None:
            break
        try:
            _check_outputs(schema, session.run(None, feeds))
            return
        except ModelError:
            raise
        except Exception as error:
            problem = first_line(error)
            if is_starved(str(error) or repr(error)):  # whatever the sizes: what it asks for is not to be had
                raise ModelError(f"does not answer: {problem}", code=MEMORY_LIMIT) from error
    if problem and not invented:
        raise ModelError(f"does not answer: {problem}", code="test_failed")
    log.warning("%s could not be warmed up with invented sizes: %s", manifest.path, problem or "no plain tensors")


def _zeros(schema: Schema, shapes: Mapping[str, Sequence[Any]], size: int) -> dict[str, Array] | None:
    feeds = {}
    for name, spec in schema.inputs.items():
        shape = [dim if isinstance(dim, int) and dim >= 0 else size for dim in shapes[name]]
        if spec.dtype not in DTYPES.values() or math.prod(shape) > _PROBE_ELEMENTS:
            return None
        feeds[name] = np.full(shape, "", dtype=object) if spec.dtype == "object" else np.zeros(shape, spec.dtype)
    return feeds


def _check_outputs(schema: Schema, values: Sequence[Any]) -> None:
    for spec, value in zip(schema.outputs.values(), values, strict=True):
        if isinstance(value, np.ndarray) and spec.dtype in DTYPES.values() and spec.dtype != "object":
            problem = mismatch(spec, value, what="output")
            if problem:
                raise ModelError(problem, code="test_failed")


def is_starved(text: str) -> bool:
    """Whether an error of onnxruntime's says that it got no memory. It has no class for that."""
    return any(mark in text for mark in _STARVED)


def _warn_of_old_runtime() -> None:
    if older(RUNTIME, GIL_FREE_LOAD):
        log.warning(
            "onnxruntime %s holds the GIL while it loads a model: calls stall during an update. Install %s or newer.",
            RUNTIME, GIL_FREE_LOAD,
        )  # fmt: skip
