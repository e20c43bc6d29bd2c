"""The acceptance bundle of a release: golden inputs, the outputs that CI recorded for them, and budgets.

A zip of stored members (see `archive`): `acceptance.json`, the index, and one `.npy` member for each tensor, as in a
batch. numpy opens it as an `.npz`. It is one of the files that the signed manifest names, so CI's signature covers it.

    {"format": 1, "rtol": 0.001, "atol": 0.0001, "tolerances": {output: {"rtol", "atol"}}, "latency_ms": 5.0,
     "memory": 268435456, "samples": [{"inputs": {name: "t0.npy"}, "outputs": {name: "t1.npy"}}, …]}

`latency_ms` and `memory` (bytes) are budgets; 0: none. Floats may be off by `atol + rtol * |expected|`, NaN is expected
where NaN was recorded, and text, truth values and whole numbers are the same or wrong, but for numbers of an output
under `tolerances`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

from device_sdk.protocol import fields, limits
from device_sdk.protocol.arrays import npy
from device_sdk.protocol.arrays.archive import Archive, opened, packed
from device_sdk.protocol.arrays.npy import Array
from device_sdk.protocol.batches import take_members
from device_sdk.protocol.errors import ProtocolError

INDEX = "acceptance.json"
FORMAT = 1
_CHUNK = 65_536  # elements compared at once: comparing takes little memory, whatever the size
MOST = 1e9  # of a tolerance, and of milliseconds
Arrays = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a number may be off: `atol + rtol * |expected|`."""

    rtol: float = 0.0
    atol: float = 0.0

    @classmethod
    def parse(cls, value: object) -> "Tolerance":
        item = fields.as_object(value, "tolerance")
        rtol, atol = (fields.take_number(item, name, low=0, high=MOST) for name in ("rtol", "atol"))
        return cls(rtol, atol)

    def to_json(self) -> dict[str, float]:
        return {"rtol": self.rtol, "atol": self.atol}


EXACT = Tolerance()


@dataclass(frozen=True, slots=True)
class Budgets:
    """`latency_ms`: the median of several calls; `memory`: bytes beyond an empty interpreter. 0: no budget."""

    latency_ms: float = 0.0
    memory: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One call, and what came of it where the release was made. Text is `<U`."""

    inputs: Arrays
    outputs: Arrays

    def feeds(self) -> dict[str, Array]:
        """The inputs as onnxruntime takes them: text as objects."""
        return {name: each.astype(object) if each.dtype.kind == "U" else each for name, each in self.inputs.items()}

    @property
    def size(self) -> int:
        """Bytes of the inputs."""
        return sum(each.nbytes for each in self.inputs.values())


@dataclass(frozen=True, slots=True, eq=False)
class Acceptance:
    """A bundle. `tolerance` is for floats whose output has none of its own."""

    samples: Sequence[Sample]
    tolerance: Tolerance
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    budgets: Budgets = field(default_factory=Budgets)

    def complaint(self, number: int, got: Mapping[str, Any]) -> str:
        """What is wrong with the answer to sample `number`; empty: nothing."""
        for name, expected in self.samples[number].outputs.items():
            if problem := _difference(got.get(name), expected, self._tolerance(name, expected)):
                return f"sample {number + 1} of {len(self.samples)}: output {name!r:.80} {problem}"
        return ""

    def question(self) -> str:
        """12 hex digits of all but the recorded outputs: what was asked, whatever a machine has answered."""
        asked = sha256(fields.canonical(self._terms()))
        for sample in self.samples:
            for name, each in sorted(sample.inputs.items()):
                asked.update(fields.canonical(name) + npy.to_bytes(each))
            asked.update(fields.canonical(sorted(sample.outputs)))
        return asked.hexdigest()[:12]

    def to_bytes(self) -> bytes:
        tensors: list[bytes] = []

        def kept(arrays: Arrays) -> dict[str, str]:
            names = {name: f"t{len(tensors) + at}.npy" for at, name in enumerate(sorted(arrays))}
            tensors.extend(npy.to_bytes(arrays[name]) for name in names)
            return names

        samples = [{"inputs": kept(each.inputs), "outputs": kept(each.outputs)} for each in self.samples]
        index = fields.canonical({"format": FORMAT, **self._terms(), "samples": samples})
        return packed({INDEX: index} | {f"t{number}.npy": data for number, data in enumerate(tensors)})

    @classmethod
    def parse(cls, data: bytes) -> "Acceptance":
        """Raises ProtocolError: `too_large`, `bad_zip`, `bad_tensor`, `bad_index`, `malformed`."""
        if len(data) > limits.ACCEPTANCE:
            message = f"acceptance bundle: expected at most {limits.ACCEPTANCE} bytes; got {len(data)}"
            raise ProtocolError("too_large", message)
        with opened(data) as archive:
            return _read(cls, archive)

    def _tolerance(self, name: str, expected: Array) -> Tolerance:
        usual = self.tolerance if expected.dtype.kind == "f" else EXACT
        return EXACT if expected.dtype.kind in "Ub" else self.tolerances.get(name, usual)

    def _terms(self) -> dict[str, Any]:
        own = {name: each.to_json() for name, each in self.tolerances.items()}
        budgets = {"latency_ms": self.budgets.latency_ms, "memory": self.budgets.memory}
        return {**self.tolerance.to_json(), "tolerances": own, **budgets}


def _read(cls: type[Acceptance], archive: Archive) -> Acceptance:
    if archive.sizes.get(INDEX, limits.ACCEPTANCE_INDEX + 1) > limits.ACCEPTANCE_INDEX:
        raise ProtocolError("bad_index", f"expected a member {INDEX} of at most {limits.ACCEPTANCE_INDEX} bytes")
    index = fields.parse_object(archive.read(INDEX), limit=limits.ACCEPTANCE_INDEX, what=INDEX)
    fields.take_int(index, "format", low=FORMAT, high=FORMAT)
    rows = [_row(item) for item in fields.take_list(index, "samples", limit=limits.ACCEPTANCE_SAMPLES)]
    _check_members(rows, archive.sizes.keys() - {INDEX})
    own = fields.take_object(index, "tolerances")
    latency = fields.take_number(index, "latency_ms", low=0, high=MOST)
    return cls(
        samples=tuple(Sample(_arrays(archive, inputs), _arrays(archive, outputs)) for inputs, outputs in rows),
        tolerance=Tolerance.parse(index),
        tolerances={name: Tolerance.parse(each) for name, each in own.items()},
        budgets=Budgets(latency, fields.take_int(index, "memory", high=2**50)),
    )


def _row(value: object) -> tuple[dict[str, str], dict[str, str]]:
    item = fields.as_object(value, "sample")
    return take_members(item, "inputs"), take_members(item, "outputs")


def _check_members(rows: Sequence[tuple[dict[str, str], dict[str, str]]], stored: set[str]) -> None:
    """Each is used once, so that a small file cannot stand for many samples, and none is left over."""
    used = [member for row in rows for tensors in row for member in tensors.values()]
    if not rows or not all(outputs for _, outputs in rows):
        raise ProtocolError("bad_index", "expected samples, each with an output")
    if len(set(used)) != len(used) or set(used) != stored:
        raise ProtocolError("bad_index", "expected each member to be used once, and none to be left over")


def _arrays(archive: Archive, tensors: Mapping[str, str]) -> dict[str, Array]:
    return {name: npy.parse(archive.read(member)) for name, member in tensors.items()}


def _difference(got: Any, expected: Array, tolerance: Tolerance) -> str:
    if not isinstance(got, np.ndarray):
        return f"is {type(got).__name__}; expected an array"
    if got.shape != expected.shape:
        return f"has the shape {list(got.shape)}; expected {list(expected.shape)}"
    if expected.dtype.kind != "U" and got.dtype != expected.dtype:
        return f"is {got.dtype}; expected {expected.dtype}"
    wrong, first = 0, -1
    for at, found in _wrong(got.reshape(-1), expected.reshape(-1), tolerance):
        first = at + int(found[0]) if first < 0 else first
        wrong += len(found)
    return _shown(got, expected, tolerance, wrong, first) if wrong else ""


def _wrong(got: Array, expected: Array, tolerance: Tolerance) -> Iterator[tuple[int, Array]]:
    for at in range(0, expected.size, _CHUNK):
        same = _same(got[at : at + _CHUNK], expected[at : at + _CHUNK], tolerance)
        if not same.all():
            yield at, np.flatnonzero(~same)


def _same(got: Array, expected: Array, tolerance: Tolerance) -> Array:
    if expected.dtype.kind == "U":
        return np.array([str(one) == other for one, other in zip(got.tolist(), expected.tolist(), strict=True)], bool)
    if expected.dtype.kind != "f" and tolerance == EXACT:
        return np.asarray(got == expected)  # not by way of floats: these know no 64 bits
    with np.errstate(all="ignore"):
        left, right = got.astype(np.float64), expected.astype(np.float64)
        return np.isclose(left, right, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True)


def _shown(got: Array, expected: Array, tolerance: Tolerance, wrong: int, first: int) -> str:
    place = [int(size) for size in np.unravel_index(first, expected.shape)]
    one, other = got.reshape(-1)[first : first + 1].tolist()[0], expected.reshape(-1)[first].item()
    spare = "" if tolerance == EXACT else f" ± {tolerance.atol + tolerance.rtol * abs(float(other)):.3g}"
    text = f"expected {_brief(other)}{spare}; got {_brief(one)}"
    return f"at {place}: {text} ({wrong} of {expected.size} values differ)"


def _brief(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else f"{value!r:.40}"
