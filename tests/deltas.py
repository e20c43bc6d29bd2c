"""Models with tensors worth a patch, and patches made by hand. Small: some hundred kB."""

import hashlib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from device_sdk.protocol.patches.decoder import apply
from device_sdk.protocol.patches.frames import NOTHING, Frame, Head, Kind, Operation
from fleet.releases.deltas import layout
from fleet.releases.deltas.encoder import Side, encode


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def weights(seed: int = 0, *, layers: int = 3, width: int = 128) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    found = {f"w{number}": random.standard_normal((width, width), np.float32) / 11 for number in range(layers)}
    return {**found, "b": random.standard_normal(width, np.float32)}


def moved(base: Mapping[str, np.ndarray], by: float = 1e-5, seed: int = 1) -> dict[str, np.ndarray]:
    """Every weight a little off, as after a step of training."""
    random = np.random.default_rng(seed)
    return {
        name: value - (by * random.standard_normal(value.shape)).astype(value.dtype) for name, value in base.items()
    }


def model(tensors: Mapping[str, np.ndarray], factor: float = 2.0, **meta: str) -> bytes:
    """y = factor * x, and beside it weights that nothing uses: what is patched need not be run."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    constants = [onnx.numpy_helper.from_array(np.float32(factor), "k")]
    constants += [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph([helper.make_node("Mul", ["x", "k"], ["y"])], "g", [x], [y], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for key, value in meta.items():
        made.metadata_props.add(key=key, value=value)
    return bytes(made.SerializeToString())


def external(tensors: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """The same as two files."""
    made = onnx.load_model_from_string(model(tensors))
    data = b""
    for tensor in made.graph.initializer:
        if len(tensor.raw_data) > 4:
            raw = tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            place = (("location", "model.onnx.data"), ("offset", str(len(data))), ("length", str(len(raw))))
            for key, value in place:
                tensor.external_data.add(key=key, value=value)
            data += raw
    return {"model.onnx": made.SerializeToString(), "model.onnx.data": data}


def patched(
    folder: Path, base: Mapping[str, bytes] | None, target: Mapping[str, bytes], name: str = "model.onnx"
) -> bytes:
    """The patch between two releases' files of this name, made as the server makes it; checked to give the target."""
    sides: list[Any] = []
    for number, files in enumerate((base or {}, target)):
        place = folder / f"{len(list(folder.iterdir()))}-{number}"
        place.mkdir()
        for each, data in files.items():
            (place / each).write_bytes(data)
        found = layout.tensors(place)
        path = place / name if files else Path("/dev/null")
        here = [tensor for tensor in found if tensor.file == name]
        sides.append((Side(layout.Source(path), sha(files.get(name, b"")), here), layout.small_floats(place, found)))
    (old, _), (new, scales) = sides
    with closing(old.source), closing(new.source):
        patch = b"".join(encode(old, new, scales))
    assert applied(patch, (base or {}).get(name, b""), target[name]) == target[name]
    return patch


def applied(patch: bytes, base: bytes, target: bytes) -> bytes:
    """What a device makes of it."""
    return b"".join(pieces(patch, base, sha(target), len(target)))


def pieces(patch: bytes, base: bytes, target_sha: str, target_length: int, base_sha: str = "") -> Any:
    at = 0

    def read(size: int) -> bytes:
        nonlocal at
        data = patch[at : at + size]
        at += len(data)
        return data

    return apply(
        read,
        lambda offset, length: base[offset : offset + length],
        base_sha256=base_sha or sha(base),
        target_sha256=target_sha,
        target_length=target_length,
    )


def frame(operation: Operation, length: int, payload: bytes = b"", *, kind: Kind = Kind.U8, offset: int = 0) -> bytes:
    return Frame(operation, kind, len(payload), length, offset).to_bytes() + payload


def head(base: bytes, target_length: int, target_sha: str) -> bytes:
    return Head(sha(base) if base else NOTHING, len(base), target_sha, target_length).to_bytes()
