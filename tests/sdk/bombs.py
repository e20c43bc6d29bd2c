"""Models of a few hundred bytes that do harm: they ask for memory without end, spin, or reach for other files."""

import signal
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from tests.sdk.world import graph

BOMB_BYTES = 3 * 10**9  # enough to be over every limit here, and survivable where the limit is broken
node = helper.make_node


def _summed(nodes: list[onnx.NodeProto], size: int = BOMB_BYTES, **constants: object) -> bytes:
    """`y = x * max(big)`, where `nodes` make `big`."""
    ends = [node("ReduceMax", ["big"], ["most"], keepdims=0), node("Mul", ["x", "most"], ["y"])]
    return graph([*nodes, *ends], {"size": np.array([size // 4], np.int64), **constants})


def folded() -> bytes:
    """Bursts while the session is made: constants are folded."""
    value = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    return _summed([node("ConstantOfShape", ["size"], ["big"], value=value)])


def expanding() -> bytes:
    """Bursts at the first call; the session is made without a sign."""
    return _summed([node("ReduceSum", ["x"], ["one"], keepdims=0), node("Expand", ["one", "size"], ["big"])])


def tiling() -> bytes:
    return _summed([node("Tile", ["x", "times"], ["big"])], times=np.array([BOMB_BYTES // 16, 1], np.int64))


def ranging() -> bytes:
    nodes = [
        node("ReduceSum", ["x"], ["zero"], keepdims=0),
        node("Add", ["zero", "end"], ["last"]),
        node("Range", ["zero", "last", "step"], ["big"]),
    ]
    return _summed(nodes, end=np.float32(16e6), step=np.float32(16e6 / BOMB_BYTES * 4))


def doubling() -> bytes:
    """A loop whose state doubles at each turn."""
    return _summed([_loop("Concat", 28, axis=0)], turns=np.int64(28), go=np.bool_(True))


def spinning() -> bytes:
    """A loop that goes on for some centuries."""
    return graph([_loop("Add", 2**62, output="y")], {"turns": np.int64(2**62), "go": np.bool_(True)})


def _loop(operator: str, turns: int, *, output: str = "big", **attributes: object) -> onnx.NodeProto:
    value, state = helper.make_tensor_value_info, TensorProto.BOOL
    body = helper.make_graph(
        [node(operator, ["v", "v"], ["w"], **attributes), node("Identity", ["c"], ["d"])],
        "turn",
        [value("i", TensorProto.INT64, []), value("c", state, []), value("v", TensorProto.FLOAT, None)],
        [value("d", state, []), value("w", TensorProto.FLOAT, None)],
    )
    return node("Loop", ["turns", "go", "x"], [output], body=body)


def reaching(location: str, *, offset: int = 0, length: int = 16, constant: bool = False) -> bytes:
    """`y = x * weights`, which lie in another file: external data."""
    model = onnx.load_model_from_string(
        graph([node("Mul", ["x", "weights"], ["y"])], {"weights": np.ones((1, 4), np.float32)})
    )
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    if constant:
        model.graph.node.insert(0, node("Constant", [], ["weights"], value=tensor))
        del model.graph.initializer[:]
    return bytes(model.SerializeToString())


# Session options by name, as a product makes them: what they do happens in the test's process and in no other.


def dying_options() -> onnxruntime.SessionOptions:
    """Stands for native code that crashes."""
    signal.raise_signal(signal.SIGSEGV)
    raise AssertionError


BOMBS: dict[str, Callable[[], bytes]] = {
    "folded": folded, "expanding": expanding, "tiling": tiling, "ranging": ranging, "doubling": doubling,
}  # fmt: skip
