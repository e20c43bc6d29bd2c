"""Train the demonstration's models on real data that scikit-learn ships, and export them to ONNX.

`digits`: the UCI handwritten digits (1,797 images of 8x8, values 0 to 16). `wine`: the UCI wine recognition data
(178 wines, 13 measurements, 3 growers). The splits are fixed, so that a run can be repeated.

The field differs from the lab in one way that real cameras know: some frames are blank (a covered lens).
Release 1.2.0 stretches each image to full contrast. That helps in the lab, where no frame is blank;
in the field a blank frame is 0/0, and the model answers NaN. Its acceptance bundle, made of the lab's images, holds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_digits, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

OPSET = 17
FEW, MORE, LAB = 40, 120, 260  # training images of 1.0.0, 1.1.0 and 1.2.0
GOLDEN = 26  # one in so many of the lab's samples is asked of a release on each device, before it serves
BLANK_FRAMES = 0.05  # of what a device's camera sees


@dataclass(frozen=True, slots=True)
class Digits:
    """Images as float32 [n, 64], labels as int64 [n]. No image stands in two of the splits."""

    lab_images: np.ndarray
    lab_labels: np.ndarray
    field_images: np.ndarray
    field_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @classmethod
    def load(cls) -> "Digits":
        images, labels = load_digits(return_X_y=True)
        images = images.astype(np.float32)
        rest, test, rest_labels, test_labels = train_test_split(
            images, labels, test_size=500, random_state=7, stratify=labels
        )
        lab, field, lab_labels, field_labels = train_test_split(
            rest, rest_labels, train_size=LAB, random_state=7, stratify=rest_labels
        )
        return cls(lab, lab_labels, field, field_labels, test, test_labels)


def train_digits(images: np.ndarray, labels: np.ndarray, *, stretch: bool = False) -> onnx.ModelProto:
    """A small neural network, `image` [n, 64] to `label` [n] and `probabilities` [n, 10], preprocessing included."""
    prepared = _stretched(images) if stretch else images / 16
    network = MLPClassifier(hidden_layer_sizes=(64,), alpha=1e-2, max_iter=600, random_state=7)
    network.fit(prepared, labels)
    options = {id(network): {"zipmap": False}}
    core = to_onnx(
        network, initial_types=[("scaled", FloatTensorType([None, 64]))], target_opset=OPSET, options=options
    )
    merged = compose.merge_models(_preprocessing(core, stretch=stretch), core, io_map=[("prepared", "scaled")])
    onnx.checker.check_model(merged, full_check=True)
    return merged


def train_wine() -> onnx.ModelProto:
    """A logistic regression, `measurements` [n, 13] to `label` [n] and `probabilities` [n, 3]."""
    measurements, growers = load_wine(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(measurements, growers)
    return to_onnx(
        pipeline,
        initial_types=[("measurements", FloatTensorType([None, 13]))],
        target_opset=OPSET,
        options={id(pipeline): {"zipmap": False}},
    )


def wine_measurements() -> np.ndarray:
    """What a cellar's sensor reads: float32 [178, 13]."""
    measurements, _ = load_wine(return_X_y=True)
    return np.asarray(measurements, dtype=np.float32)


def save(model: onnx.ModelProto, folder: Path) -> list[Path]:
    """Write `model.onnx` and, beside it, its weights as external data: less memory and a quicker load."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    for tensor in model.graph.initializer:  # only raw bytes can lie outside
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    onnx.save_model(
        model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=256, convert_attribute=False
    )
    return [path, *folder.glob("model.onnx.data")]


def field_frames(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What one camera sees: the images in its own order, some of them blank."""
    frames = images[rng.permutation(len(images))].copy()
    frames[rng.random(len(frames)) < BLANK_FRAMES] = 0
    return frames


def _stretched(images: np.ndarray) -> np.ndarray:
    low, high = images.min(axis=1, keepdims=True), images.max(axis=1, keepdims=True)
    return (images - low) / (high - low)


def _preprocessing(core: onnx.ModelProto, *, stretch: bool) -> onnx.ModelProto:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [None, 64])
    prepared = helper.make_tensor_value_info("prepared", TensorProto.FLOAT, [None, 64])
    if stretch:
        nodes = [
            helper.make_node("ReduceMin", ["image"], ["low"], axes=[1], keepdims=1),
            helper.make_node("ReduceMax", ["image"], ["high"], axes=[1], keepdims=1),
            helper.make_node("Sub", ["image", "low"], ["above"]),
            helper.make_node("Sub", ["high", "low"], ["range"]),
            helper.make_node("Div", ["above", "range"], ["prepared"]),
        ]
        constants = []
    else:
        nodes = [helper.make_node("Div", ["image", "full"], ["prepared"])]
        constants = [helper.make_tensor("full", TensorProto.FLOAT, [1], [16.0])]
    graph = helper.make_graph(nodes, "preprocessing", [image], [prepared], constants)
    return helper.make_model(graph, opset_imports=core.opset_import, ir_version=core.ir_version)
