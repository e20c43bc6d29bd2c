"""Models to measure with: one that costs microseconds, and a medium one with its weights as external data."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from device_sdk.protocol.manifest import FileEntry, Manifest, digest
from device_sdk.protocol.names import ReleasePath
from device_sdk.store import Store

MODEL = "bench"
SMALL_INPUT = {"x": np.arange(4, dtype=np.float32).reshape(1, 4)}
DATA = "model.onnx.data"
LARGER = (
    13 / 8
)  # wider layers than the usual ones: 2.6 times the bytes, some 90 MB; whole multiples of 16, as layers are


def small(factor: float = 2.0) -> bytes:
    """`y = x * factor` on four floats: what is left is the cost of calling."""
    return _model([helper.make_node("Mul", ["x", "k"], ["y"])], {"k": np.float32(factor)}, width=4).SerializeToString()


def medium(width: int, seed: int) -> dict[str, bytes]:
    """A perceptron of two square layers, 8 * width^2 bytes, as torch exports it: a model file and its data."""
    random = np.random.default_rng(seed)
    weights = {name: random.standard_normal((width, width), np.float32) / width**0.5 for name in ("w1", "w2")}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    model = _model(nodes, weights, width=width)
    data = b""
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        _move_out(tensor, len(data), len(raw))
        data += raw
    return {"model.onnx": model.SerializeToString(), DATA: data}


def manifest(version: str, files: Mapping[str, bytes]) -> Manifest:
    entries = tuple(FileEntry(name, len(data), digest(data)) for name, data in files.items())
    return Manifest(ReleasePath(MODEL, version, "default"), entries, entries[0].name)


def put(store: Store, version: str, files: Mapping[str, bytes]) -> tuple[str, Manifest]:
    """Bring a release into a store as a finished download does."""
    signed = manifest(version, files)
    for data in files.values():
        store.append(digest(data), data)
        store.admit(digest(data), len(data))
    return store.add_manifest(signed.to_bytes()), signed


def _model(nodes: list[Any], constants: Mapping[str, Any], *, width: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _move_out(tensor: onnx.TensorProto, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", DATA), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
