"""A small transformer in numpy that is really trained, and its ONNX: what updates of a fine-tuned model look like.

The shape of MiniLM: an embedding that is half of the weights, six layers, a head. Gradients are by hand and exact (a
test compares them with differences); the task, telling from which of a few vocabularies a text was drawn, is made up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Weights = dict[str, NDArray[Any]]
EPSILON = np.float32(1e-5)
QUANTISED = "_quantized"


@dataclass(frozen=True)
class Shape:
    vocabulary: int = 30_522
    width: int = 384
    layers: int = 6
    heads: int = 12
    tokens: int = 16
    batch: int = 4
    classes: int = 8


FULL = Shape()
SMALL = Shape(vocabulary=4_000, width=96, layers=4, heads=4, tokens=8)
TINY = Shape(vocabulary=900, width=32, layers=2, heads=2, tokens=8)


def initial(shape: Shape, seed: int = 0) -> Weights:
    random = np.random.default_rng(seed)
    width = shape.width

    def normal(*size: int) -> NDArray[Any]:
        return (0.02 * random.standard_normal(size)).astype(np.float32)

    found: Weights = {"embedding": normal(shape.vocabulary, width), "position": normal(shape.tokens, width)}
    for number in range(shape.layers):
        at = f"layer{number}."
        for name in ("q", "k", "v", "o"):
            found |= {f"{at}{name}": normal(width, width), f"{at}{name}.bias": np.zeros(width, np.float32)}
        found |= {f"{at}up": normal(width, 4 * width), f"{at}up.bias": np.zeros(4 * width, np.float32)}
        found |= {f"{at}down": normal(4 * width, width), f"{at}down.bias": np.zeros(width, np.float32)}
        for name in ("norm1", "norm2"):
            found |= {f"{at}{name}": np.ones(width, np.float32), f"{at}{name}.bias": np.zeros(width, np.float32)}
    found |= {"norm": np.ones(width, np.float32), "norm.bias": np.zeros(width, np.float32)}
    return found | {"head": normal(width, shape.classes), "head.bias": np.zeros(shape.classes, np.float32)}


def batches(shape: Shape, seed: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Texts and their classes. Words are drawn as in a language, few often and many hardly ever."""
    random = np.random.default_rng(seed)
    order = np.random.default_rng(99).permuted(np.tile(np.arange(shape.vocabulary), (shape.classes, 1)), axis=1)
    chances = 1.0 / np.arange(1, shape.vocabulary + 1)
    chances /= chances.sum()
    while True:
        labels = random.integers(0, shape.classes, shape.batch)
        ranks = random.choice(shape.vocabulary, (shape.batch, shape.tokens), p=chances)
        yield order[labels[:, None], ranks], labels


def loss_and_gradients(w: Weights, shape: Shape, texts: NDArray[Any], labels: NDArray[Any]) -> tuple[float, Weights]:
    """Cross entropy, and its derivative by every weight. The embedding's: of the rows in `texts` alone, as `rows`."""
    x = w["embedding"][texts] + w["position"]
    kept = []
    for number in range(shape.layers):
        x, memory = _layer(w, f"layer{number}.", x, shape.heads)
        kept.append(memory)
    pooled, pool = _norm(x.mean(axis=1), w["norm"], w["norm.bias"])
    logits = pooled @ w["head"] + w["head.bias"]
    shares = _softmax(logits)
    loss = float(-np.log(shares[np.arange(len(labels)), labels] + 1e-12).mean())
    back = shares.copy()
    back[np.arange(len(labels)), labels] -= 1
    back /= np.float32(len(labels))
    g: Weights = {"head": pooled.T @ back, "head.bias": back.sum(axis=0)}
    d = _norm_back(back @ w["head"].T, pool, w["norm"], g, "norm")
    dx = np.repeat(d[:, None] / np.float32(x.shape[1]), x.shape[1], axis=1)
    for number in reversed(range(shape.layers)):
        dx = _layer_back(w, f"layer{number}.", dx, kept[number], g, shape.heads)
    g["position"] = dx.sum(axis=0)
    g["rows"], inverse = np.unique(texts, return_inverse=True)
    g["embedding"] = np.zeros((len(g["rows"]), shape.width), np.float32)
    np.add.at(g["embedding"], inverse.reshape(-1), dx.reshape(-1, shape.width))
    return loss, g


def sgd(w: Weights, shape: Shape, *, seed: int, rate: float) -> Weights:
    """One step on all weights."""
    new = {name: value.copy() for name, value in w.items()}
    _, g = loss_and_gradients(new, shape, *next(batches(shape, seed)))
    rows = g.pop("rows")
    new["embedding"][rows] -= np.float32(rate) * g.pop("embedding")
    for name, gradient in g.items():
        new[name] -= np.float32(rate) * gradient
    return new


def adamw(
    w: Weights,
    shape: Shape,
    *,
    steps: int,
    seed: int,
    rate: float = 2e-5,
    decay: float = 0.0,
    only: tuple[str, ...] = (),
) -> tuple[Weights, list[float]]:
    """`steps` of AdamW, the rate falling to nothing, and their losses. `only`: how the names that are trained begin."""
    new = {name: value.copy() for name, value in w.items()}
    first = {name: np.zeros_like(value) for name, value in w.items()}
    second = {name: np.zeros_like(value) for name, value in w.items()}
    source, losses = batches(shape, seed), []
    seen = np.zeros(0, np.int64)
    for step in range(1, steps + 1):
        loss, g = loss_and_gradients(new, shape, *next(source))
        losses.append(loss)
        seen = np.union1d(seen, g["rows"])  # the other rows' moments are zero, so that only decay moves them
        gradient = np.zeros((len(seen), shape.width), np.float32)
        gradient[np.searchsorted(seen, g.pop("rows"))] = g["embedding"]
        g["embedding"] = gradient
        now = rate * (1 - (step - 1) / steps)
        for name, each in g.items():
            if only and not name.startswith(only):
                continue
            if decay:
                new[name] *= np.float32(1 - now * decay)
            if name != "embedding":
                _move(new[name], first[name], second[name], each, now, step)
                continue
            part = [weights[name][seen] for weights in (new, first, second)]
            _move(*part, each, now, step)
            for weights, value in zip((new, first, second), part, strict=True):
                weights[name][seen] = value
    return new, losses


def _move(w: NDArray[Any], m: NDArray[Any], v: NDArray[Any], g: NDArray[Any], rate: float, step: int) -> None:
    """Adam's rule, in place; `g` is used up."""
    m *= np.float32(0.9)
    m += np.float32(0.1) * g
    v *= np.float32(0.999)
    g *= g
    g *= np.float32(0.001)
    v += g
    fair = np.sqrt(v, out=g)
    fair *= np.float32((1 - 0.999**step) ** -0.5)
    fair += np.float32(1e-8)
    np.divide(m, fair, out=fair)
    fair *= np.float32(rate / (1 - 0.9**step))
    w -= fair


def _layer(w: Weights, at: str, x: NDArray[Any], heads: int) -> tuple[NDArray[Any], dict[str, Any]]:
    h, norm1 = _norm(x, w[f"{at}norm1"], w[f"{at}norm1.bias"])
    q, k, v = (_split(h @ w[f"{at}{name}"] + w[f"{at}{name}.bias"], heads) for name in "qkv")
    scale = np.float32(q.shape[-1] ** -0.5)
    shares = _softmax(q @ k.swapaxes(-1, -2) * scale)
    mixed = _unsplit(shares @ v)
    middle = x + mixed @ w[f"{at}o"] + w[f"{at}o.bias"]
    h2, norm2 = _norm(middle, w[f"{at}norm2"], w[f"{at}norm2.bias"])
    up = np.maximum(h2 @ w[f"{at}up"] + w[f"{at}up.bias"], 0)
    out = middle + up @ w[f"{at}down"] + w[f"{at}down.bias"]
    return out, {"h": h, "norm1": norm1, "q": q, "k": k, "v": v, "shares": shares, "mixed": mixed, "h2": h2,
                 "norm2": norm2, "up": up, "scale": scale}  # fmt: skip


def _layer_back(w: Weights, at: str, d: NDArray[Any], m: dict[str, Any], g: Weights, heads: int) -> NDArray[Any]:
    dup = _linear_back(d, m["up"], w, f"{at}down", g) * (m["up"] > 0)
    dh2 = _linear_back(dup, m["h2"], w, f"{at}up", g)
    dmiddle = d + _norm_back(dh2, m["norm2"], w[f"{at}norm2"], g, f"{at}norm2")
    dmixed = _split(_linear_back(dmiddle, m["mixed"], w, f"{at}o", g), heads)
    dshares = dmixed @ m["v"].swapaxes(-1, -2)
    dscores = m["shares"] * (dshares - (dshares * m["shares"]).sum(axis=-1, keepdims=True)) * m["scale"]
    parts = {
        "q": dscores @ m["k"],
        "k": dscores.swapaxes(-1, -2) @ m["q"],
        "v": m["shares"].swapaxes(-1, -2) @ dmixed,
    }
    dh = sum(_linear_back(_unsplit(part), m["h"], w, f"{at}{name}", g) for name, part in parts.items())
    return dmiddle + _norm_back(dh, m["norm1"], w[f"{at}norm1"], g, f"{at}norm1")


def _linear_back(d: NDArray[Any], x: NDArray[Any], w: Weights, name: str, g: Weights) -> NDArray[Any]:
    flat, given = d.reshape(-1, d.shape[-1]), x.reshape(-1, x.shape[-1])
    g[name], g[f"{name}.bias"] = given.T @ flat, flat.sum(axis=0)
    result: NDArray[Any] = d @ w[name].T
    return result


def _norm(x: NDArray[Any], gain: NDArray[Any], bias: NDArray[Any]) -> tuple[NDArray[Any], tuple[Any, Any]]:
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + EPSILON)
    unit = centred * inverse
    return unit * gain + bias, (unit, inverse)


def _norm_back(d: NDArray[Any], kept: tuple[Any, Any], gain: NDArray[Any], g: Weights, name: str) -> NDArray[Any]:
    unit, inverse = kept
    axes = tuple(range(d.ndim - 1))
    g[name], g[f"{name}.bias"] = (d * unit).sum(axis=axes), d.sum(axis=axes)
    du = d * gain
    result: NDArray[Any] = inverse * (
        du - du.mean(axis=-1, keepdims=True) - unit * (du * unit).mean(axis=-1, keepdims=True)
    )
    return result


def _softmax(x: NDArray[Any]) -> NDArray[Any]:
    raised = np.exp(x - x.max(axis=-1, keepdims=True))
    result: NDArray[Any] = raised / raised.sum(axis=-1, keepdims=True)
    return result


def _split(x: NDArray[Any], heads: int) -> NDArray[Any]:
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _unsplit(x: NDArray[Any]) -> NDArray[Any]:
    swapped = x.swapaxes(1, 2)
    return swapped.reshape(*swapped.shape[:2], -1)


# --- ONNX ---


def to_onnx(w: Weights, shape: Shape, *, half: bool = False, note: Mapping[str, str] | None = None) -> bytes:
    """The model as an exporter writes it, weights inside. `half`: all of it in float16."""
    graph = _Graph(shape)
    graph.build()
    kind, dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    constants = {**w, "scale": np.asarray((shape.width // shape.heads) ** -0.5, np.float32)}
    initializers = [
        numpy_helper.from_array(value if value.dtype == np.int8 else np.asarray(value, dtype), name)
        for name, value in constants.items()
    ]
    eights = [name for name, value in w.items() if value.dtype == np.int8]
    unpacked = [_dequantised(name.removesuffix(QUANTISED)) for name in eights]
    initializers += [numpy_helper.from_array(np.asarray(value, np.int64), name) for name, value in graph.shapes.items()]
    made = helper.make_model(
        helper.make_graph(
            [*unpacked, *graph.nodes],
            "classifier",
            [helper.make_tensor_value_info("texts", TensorProto.INT64, ["n", shape.tokens])],
            [helper.make_tensor_value_info("logits", kind, ["n", shape.classes])],
            initializers,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    for key, value in (note or {}).items():
        made.metadata_props.add(key=key, value=value)
    return bytes(made.SerializeToString())


def quantised(w: Weights, *, coarser: float = 1.0) -> Weights:
    """Symmetric int8 by column, named as onnxruntime's quantiser does. What is one-dimensional stays as it is.

    `coarser`: how much larger the largest weight would be if there were outliers.
    """
    found: Weights = {}
    for name, value in w.items():
        if value.ndim < 2:
            found[name] = value
            continue
        scale = np.abs(value).max(axis=0) * np.float32(coarser / 127)
        scale[scale == 0] = 1
        found[f"{name}{QUANTISED}"] = np.clip(np.rint(value / scale), -127, 127).astype(np.int8)
        found[f"{name}_scale"] = scale
    return found


def rounding(old: Weights, new: Weights) -> float:
    """Bytes that int8 of `new` costs whoever has int8 of `old`, and is told by how much each float changed.

    What is left then is which way each value is rounded: its float lies anywhere between two halves, each place as
    likely. No patch can do better in the mean, whatever its method, for it has to tell those changes too.
    """
    eights = [quantised(w) for w in (old, new)]
    bits = 0.0
    for name in old:
        if f"{name}{QUANTISED}" not in eights[0]:
            continue
        (given, width), (_, step) = [(each[f"{name}{QUANTISED}"], each[f"{name}_scale"]) for each in eights]
        low = ((given - np.float32(0.5)) * width + (new[name] - old[name])) / step
        width = width / step
        edge = np.rint(low)
        for _ in range(3):
            inside = np.minimum(low + width, edge + np.float32(0.5)) - np.maximum(low, edge - np.float32(0.5))
            share = np.clip(inside / width, 1e-9, 1)
            share[np.abs(given) == 127] = 1  # it is the column's largest, and known
            bits -= float((share * np.log2(share)).sum(dtype=np.float64))
            edge += 1
    return bits / 8


def _dequantised(name: str) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [f"{name}{QUANTISED}", f"{name}_scale"], [name], axis=1)


class _Graph:
    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.shapes = {
            "split": [0, shape.tokens, shape.heads, shape.width // shape.heads],
            "unsplit": [0, shape.tokens, shape.width],
        }

    def build(self) -> None:
        x = self._add("Add", self._add("Gather", "embedding", "texts"), "position")
        for number in range(self._shape.layers):
            x = self._layer(f"layer{number}.", x)
        pooled = self._norm(self._add("ReduceMean", x, axes=[1], keepdims=0), "norm")
        product = self._add("MatMul", pooled, "head")
        self.nodes.append(helper.make_node("Add", [product, "head.bias"], ["logits"]))

    def _layer(self, at: str, x: str) -> str:
        h = self._norm(x, f"{at}norm1")
        q, k, v = (self._heads(self._linear(h, f"{at}{name}"), swap=name == "k") for name in "qkv")
        scores = self._add("Mul", self._add("MatMul", q, k), "scale")
        mixed = self._add("MatMul", self._add("Softmax", scores, axis=-1), v)
        flat = self._add("Reshape", self._add("Transpose", mixed, perm=[0, 2, 1, 3]), "unsplit")
        x = self._add("Add", x, self._linear(flat, f"{at}o"))
        up = self._add("Relu", self._linear(self._norm(x, f"{at}norm2"), f"{at}up"))
        return self._add("Add", x, self._linear(up, f"{at}down"))

    def _heads(self, x: str, *, swap: bool) -> str:
        order = [0, 2, 3, 1] if swap else [0, 2, 1, 3]
        return self._add("Transpose", self._add("Reshape", x, "split"), perm=order)

    def _linear(self, x: str, name: str) -> str:
        return self._add("Add", self._add("MatMul", x, name), f"{name}.bias")

    def _norm(self, x: str, name: str) -> str:
        return self._add("LayerNormalization", x, name, f"{name}.bias", epsilon=float(EPSILON))

    def _add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output
