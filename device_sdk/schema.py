"""What a release takes and gives, by its session's own account; checked against what was signed, and against calls."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from device_sdk.errors import ModelError
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.manifest import TensorSpec

DTYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "bool": "bool", "string": "object",
    **{name: name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}  # fmt: skip


@frozen
class Schema:
    """What a session takes and gives, by its own account."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def complaint(self, feeds: Mapping[str, Any]) -> str:
        """Say what is wrong with a call's inputs; empty: nothing that the schema forbids."""
        for name in feeds:
            if name not in self.inputs:
                return f"unknown input {name!r}; the model takes {', '.join(map(shown, self.inputs.values()))}"
        for name, spec in self.inputs.items():
            if name not in feeds:
                return f"input {name!r} is missing; expected {shown(spec)}"
            if problem := mismatch(spec, feeds[name]):
                return problem
        return ""


def specs_of(arguments: Sequence[Any]) -> dict[str, TensorSpec]:
    """What a session says of its tensors. Kinds other than tensors (sequences, maps) keep onnxruntime's word."""
    return {
        argument.name: TensorSpec(argument.name, dtype_of(argument.type), tuple(argument.shape or ()))
        for argument in arguments
    }


def dtype_of(name: str) -> str:
    """`tensor(float)`, `float` and `float32` are one thing: numpy's name."""
    bare = name.removeprefix("tensor(").removesuffix(")") if name.startswith("tensor(") else name
    return DTYPES.get(bare, bare)


def check_signed(found: Mapping[str, TensorSpec], signed: Sequence[TensorSpec], what: str) -> None:
    """The session must be what the manifest promised. A manifest that lists no tensors promises nothing."""
    if not signed:
        return
    if set(found) != {spec.name for spec in signed}:
        names = sorted(spec.name for spec in signed)
        raise ModelError(f"{what}s: the manifest says {names}; the model has {sorted(found)}", code="schema")
    for spec in signed:
        real = found[spec.name]
        ranks_differ = spec.shape and real.shape and len(spec.shape) != len(real.shape)
        if dtype_of(spec.dtype) != real.dtype or ranks_differ:
            raise ModelError(f"{what}: the manifest says {shown(spec)}; the model has {shown(real)}", code="schema")


def mismatch(spec: TensorSpec, value: Any, what: str = "input") -> str:
    if spec.dtype not in DTYPES.values():
        return ""
    if not isinstance(value, np.ndarray):
        return f"{what} {spec.name!r}: expected a numpy array, {shown(spec)}; got {type(value).__name__}"
    same = value.dtype.name == spec.dtype or (spec.dtype == "object" and value.dtype.kind in "OUST")
    fits = not spec.shape or (
        len(spec.shape) == value.ndim
        and all(not isinstance(d, int) or d == size for d, size in zip(spec.shape, value.shape, strict=True))
    )
    if same and fits:
        return ""
    return f"{what} {spec.name!r}: expected {shown(spec)}; got {value.dtype.name} {list(value.shape)}"


def shown(spec: TensorSpec) -> str:
    sizes = ", ".join("?" if size is None else str(size) for size in spec.shape)
    return f"{spec.name}: {dtype_of(spec.dtype)} [{sizes}]"
