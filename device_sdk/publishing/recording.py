"""Make an acceptance bundle: run the model on CI's machine on a few samples, and keep what it answers as expected.

Samples come as `.npz` files or as folders of `.npy` files, one array for each input, named as the input is. An array
of the input's own rank is cut along its first axis into calls: of as many rows as a fixed first size wants, else of
`batch` rows. One with an axis more in front is a list of calls. An input that has one call's worth is used for all.
Several files may hold calls of different shapes.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from device_sdk.errors import ModelError, SetupError
from device_sdk.protocol import limits
from device_sdk.protocol.arrays import npy
from device_sdk.protocol.arrays.acceptance import EXACT, MOST, Acceptance, Budgets, Sample, Tolerance
from device_sdk.protocol.arrays.npy import Array
from device_sdk.protocol.manifest import TensorSpec
from device_sdk.publishing.console import progress, say

RTOL, ATOL = 1e-3, 1e-4  # other processors and thread counts change the last bits of a float, not more


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for. `batch`: rows of a call, where the model leaves them open.

    `rtol` and `atol` by output; under no name for all floats.
    """

    samples: Sequence[Path]
    batch: int = 1
    rtol: Mapping[str, float] = field(default_factory=dict)
    atol: Mapping[str, float] = field(default_factory=dict)
    budgets: Budgets = field(default_factory=Budgets)


def wanted(options: argparse.Namespace) -> Wanted:
    """By `--accept` and the options that go with it."""
    return Wanted(
        samples=options.accept,
        batch=options.accept_batch,
        rtol=_amounts(options.accept_rtol, "--accept-rtol"),
        atol=_amounts(options.accept_atol, "--accept-atol"),
        budgets=Budgets(options.max_latency_ms, int(options.max_memory_mb * limits.MIB)),
    )


def _amounts(given: Sequence[str], option: str) -> dict[str, float]:
    """`AMOUNT` for all floats, `OUTPUT=AMOUNT` for one output."""
    amounts: dict[str, float] = {}
    for text in given:
        name, _, amount = text.rpartition("=")
        try:
            amounts[name] = float(amount)
        except ValueError:
            raise SetupError(f"{option}: expected a number, or OUTPUT=NUMBER; got {text!r}") from None
        if not 0 <= amounts[name] <= MOST:
            raise SetupError(f"{option}: expected 0 to {MOST:g}; got {text!r}")
    return amounts


def record(model: Path, wanted: Wanted) -> Acceptance:
    """Raises SetupError: what is wrong with the samples, or that the model does not answer twice alike."""
    try:
        from device_sdk import runtime
        from device_sdk.acceptance import Exam
        from device_sdk.schema import Schema, specs_of
    except ImportError as error:
        raise SetupError("--accept runs the model, which needs onnxruntime on this machine") from error
    session = runtime.make_session(model, runtime.RuntimeOptions())
    schema = Schema(specs_of(session.get_inputs()), specs_of(session.get_outputs()))
    feeds = [feed for path in wanted.samples for feed in _calls(path, schema.inputs, wanted.batch)]
    if not 1 <= len(feeds) <= limits.ACCEPTANCE_SAMPLES:
        raise SetupError(f"--accept: expected 1 to {limits.ACCEPTANCE_SAMPLES} samples; got {len(feeds)}")
    tolerance = Tolerance(wanted.rtol.get("", RTOL), wanted.atol.get("", ATOL))
    own = _tolerances(wanted, schema.outputs, tolerance)
    bundle = Acceptance(_answers(session, list(schema.outputs), feeds), tolerance, own, wanted.budgets)
    exam = Exam(_reread(bundle), timed=True, judged=False)
    try:
        exam(session, schema)  # the same: dice fall alike in a new one
    except ModelError as error:
        raise SetupError(f"--accept: the model does not answer twice alike: {error}") from error
    _tell(bundle, exam.latency_ms)
    return bundle


def _reread(bundle: Acceptance) -> Acceptance:
    data = bundle.to_bytes()
    if len(data) > limits.ACCEPTANCE:
        raise SetupError(f"--accept: expected at most {limits.ACCEPTANCE:,} bytes of bundle; got {len(data):,}")
    return Acceptance.parse(data)


def _calls(path: Path, inputs: Mapping[str, TensorSpec], batch: int) -> list[dict[str, Array]]:
    """What one file or folder of samples asks the model, call by call."""
    arrays = _read(path)
    if arrays.keys() != inputs.keys():
        raise SetupError(f"{path}: expected arrays {sorted(inputs)}; got {sorted(arrays)}")
    cut = {name: _cut(path, arrays[name], spec, batch) for name, spec in inputs.items()}
    count = max(map(len, cut.values()), default=0)
    for name, calls in cut.items():
        if len(calls) not in {1, count}:
            raise SetupError(f"{path}: {name} makes {len(calls)} calls; another input makes {count}")
    return [{name: calls[at if len(calls) > 1 else 0] for name, calls in cut.items()} for at in range(count)]


def _cut(path: Path, array: Array, spec: TensorSpec, batch: int) -> list[Array]:
    array = _cast(path, array, spec)
    if array.ndim == len(spec.shape) + 1:
        return list(array)
    if array.ndim != len(spec.shape) or not array.ndim:
        raise SetupError(f"{path}: {spec.name} has {array.ndim} axes; expected {len(spec.shape)}, or one more in front")
    rows = spec.shape[0] if isinstance(spec.shape[0], int) else batch
    if isinstance(spec.shape[0], int) and len(array) % max(rows, 1):
        raise SetupError(f"{path}: {spec.name} has {len(array)} rows; the model takes {rows} at a time")
    return [array[at : at + rows] for at in range(0, len(array), max(rows, 1))]


def _cast(path: Path, array: Array, spec: TensorSpec) -> Array:
    """To the model's kind of number, where that is a matter of width alone."""
    if spec.dtype == "object" and array.dtype.kind in "OU":
        return array.astype(np.str_)
    try:
        wanted = np.dtype(spec.dtype)
    except TypeError:
        raise SetupError(f"--accept: input {spec.name} is no plain tensor but {spec.dtype}") from None
    if spec.dtype == "object" or not np.can_cast(array.dtype, wanted, "same_kind"):
        raise SetupError(f"{path}: {spec.name} is {array.dtype}; expected {spec.dtype}")
    return array.astype(wanted)


def _read(path: Path) -> dict[str, Array]:
    """Arrays by input name."""
    try:
        if path.is_dir():
            return {file.stem: _plain(np.load(file, allow_pickle=False), file) for file in sorted(path.glob("*.npy"))}
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise SetupError(f"{path}: expected an .npz file, or a folder of .npy files")
        with loaded:
            return {name: _plain(loaded[name], path) for name in loaded.files}
    except (OSError, ValueError, EOFError) as error:
        raise SetupError(f"--accept: cannot read {path}: {error}") from error


def _plain(array: Array, path: Path) -> Array:
    if array.dtype.kind not in "biufU":
        raise SetupError(f"{path}: expected numbers or text; got {array.dtype}")
    return array


def _answers(session: Any, outputs: Sequence[str], feeds: Sequence[dict[str, Array]]) -> tuple[Sample, ...]:
    return tuple(_drop_foreign([Sample(feed, got) for feed, got in _asked(session, outputs, feeds)]))


def _asked(
    session: Any, outputs: Sequence[str], feeds: Sequence[dict[str, Array]]
) -> Iterator[tuple[dict[str, Array], dict[str, Any]]]:
    with progress("acceptance samples", len(feeds), is_bytes=False) as report:
        for number, feed in enumerate(feeds, 1):
            try:
                values = session.run(list(outputs), Sample(feed, {}).feeds())
            except Exception as error:  # onnxruntime has no base class
                raise SetupError(f"--accept: the model does not take sample {number}: {error}") from error
            yield feed, dict(zip(outputs, values, strict=True))
            report(number)


def _drop_foreign(samples: list[Sample]) -> Iterator[Sample]:
    """Outputs that are no plain tensors (sequences, maps, bfloat16) are not compared, and that is said."""
    for sample in samples:
        kept = {name: each for name, value in sample.outputs.items() if (each := _kept(value)) is not None}
        if not kept:
            raise SetupError("--accept: the model has no output that is a plain tensor, so nothing could be compared")
        if sample is samples[0] and (left := sorted(sample.outputs.keys() - kept.keys())):
            say(f"note: not compared, for they are no plain tensors: {', '.join(left)}")
        yield Sample(sample.inputs, kept)


def _kept(value: Any) -> Array | None:
    if not isinstance(value, np.ndarray):
        return None
    plain = value.astype(np.str_) if value.dtype.kind == "O" else value
    if plain.dtype.kind == "U" and not plain.dtype.itemsize:
        plain = plain.astype("<U1")
    return plain if npy.is_plain(plain.dtype) else None


def _tolerances(wanted: Wanted, outputs: Mapping[str, TensorSpec], floats: Tolerance) -> dict[str, Tolerance]:
    """Of outputs that have their own. Where only one half is said, the other is that of all floats, else 0."""
    named = (wanted.rtol.keys() | wanted.atol.keys()) - {""}
    if unknown := sorted(named - outputs.keys()):
        raise SetupError(f"--accept-rtol, --accept-atol: unknown output {unknown[0]!r}; it has {sorted(outputs)}")
    usual = {name: floats if outputs[name].dtype.startswith("float") else EXACT for name in named}
    return {
        name: Tolerance(wanted.rtol.get(name, usual[name].rtol), wanted.atol.get(name, usual[name].atol))
        for name in sorted(named)
    }


def _tell(bundle: Acceptance, latency: float) -> None:
    budget = bundle.budgets.latency_ms
    limit = f"; the budget is {budget:g} ms{', which devices like this one do not hold' * (latency > budget)}"
    say(f"acceptance: {len(bundle.samples)} samples recorded; a call takes {latency:.3g} ms here{limit * bool(budget)}")
