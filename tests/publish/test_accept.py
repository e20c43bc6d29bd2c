"""`fleet-publish push --accept`: what a model answers on CI's machine becomes what every device must see."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from device_sdk import publish
from device_sdk.errors import SetupError
from device_sdk.protocol import limits
from device_sdk.protocol.arrays.acceptance import Acceptance, Budgets, Tolerance
from device_sdk.protocol.manifest import Manifest
from device_sdk.publishing import recording
from device_sdk.publishing.recording import Wanted, record
from fleet.releases import storage
from fleet.releases.models import Release, Variant
from tests.publish.test_publish import Runner, ci, states  # noqa: F401
from tests.sdk.world import graph

pytestmark = pytest.mark.django_db(transaction=True)
X = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def samples(ci: Runner) -> str:  # noqa: F811
    path = ci.folder / "samples.npz"
    np.savez(path, x=X)
    return str(path)


def stored() -> Acceptance:
    """The bundle that the server has of the only release."""
    entry = Manifest.parse(Variant.objects.get().manifest.encode()).acceptance
    assert entry is not None
    with storage.open_object(storage.blob_name(entry.sha256)) as file:
        return Acceptance.parse(file.read())


def test_a_bundle_is_recorded_signed_uploaded_and_holds_on_the_server(ci: Runner, samples: str, capsys: Any) -> None:  # noqa: F811
    options = ["--max-latency-ms", "1000", "--max-memory-mb", "64", "--accept-atol", "0.5", "--accept-rtol", "y=0.25"]
    assert ci.push("1.0.0", "--accept", samples, *options, "--wait") == publish.OK
    found = stored()
    assert [sample.inputs["x"].tolist() for sample in found.samples] == [[row] for row in X.tolist()]
    assert np.array_equal(found.samples[1].outputs["y"], X[1:2] * 2)
    assert (found.tolerance, found.tolerances) == (Tolerance(1e-3, 0.5), {"y": Tolerance(0.25, 0.5)})
    assert found.budgets == Budgets(1000.0, 64 * 2**20)
    assert Variant.objects.get().acceptance["asked"] == 3
    said = capsys.readouterr().err
    assert "acceptance: 3 samples recorded; a call takes " in said
    assert "ms here; the budget is 1000 ms\n" in said


def test_pushing_again_is_harmless_and_asking_otherwise_is_not(ci: Runner, samples: str) -> None:  # noqa: F811
    assert ci.push("1.0.0", "--accept", samples) == publish.OK
    assert ci.push("1.0.0", "--accept", samples) == publish.OK
    assert ci.push("1.0.0", "--accept", samples, "--accept-rtol", "0.5") == publish.REFUSED
    assert ci.push("1.0.0") == publish.REFUSED
    assert Release.objects.count() == 1


def test_other_last_bits_of_another_machine_are_harmless(ci: Runner, samples: str, monkeypatch: Any) -> None:  # noqa: F811
    assert ci.push("1.0.0", "--accept", samples) == publish.OK
    real = recording._kept
    monkeypatch.setattr(recording, "_kept", lambda value: real(value) * np.float32(1 + 1e-6))
    assert ci.push("1.0.0", "--accept", samples) == publish.OK


@pytest.mark.parametrize(
    "options",
    [
        ["--max-latency-ms", "5"],
        ["--accept-rtol", "0.1"],
        ["--accept", "nowhere.npz"],
        ["--accept", "{samples}", "--accept-rtol", "z=0.1"],
        ["--accept", "{samples}", "--accept-atol", "some"],
        ["--accept", "{samples}", "--accept-atol", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_use_is_said_before_anything_is_sent(ci: Runner, samples: str, options: list[str]) -> None:  # noqa: F811
    assert ci.push("1.0.0", *[option.format(samples=samples) for option in options]) == publish.USAGE
    assert states() == {}


def test_the_second_person_finds_the_bundle_among_the_files(ci: Runner, samples: str) -> None:  # noqa: F811
    assert ci.push("1.0.0", "--accept", samples, "--accept-out", str(ci.folder)) == publish.OK
    (path,) = (ci.folder / "default").glob("acceptance-*.npz")
    assert path.read_bytes() == stored().to_bytes()


# --- samples, without a server ---


@pytest.fixture
def model(tmp_path: Any) -> Any:
    def make(nodes: list[Any], constants: Any = None, **options: Any) -> Any:
        path = tmp_path / "model.onnx"
        path.write_bytes(graph(nodes, constants, **options))
        return path

    return make


DOUBLE = [helper.make_node("Add", ["x", "x"], ["y"])]


def shapes(path: Any, tmp_path: Any, batch: int = 1, **arrays: Any) -> list[tuple[int, ...]]:
    np.savez(tmp_path / "s.npz", **arrays)
    bundle = record(path, Wanted([tmp_path / "s.npz"], batch))
    return [sample.inputs["x"].shape for sample in bundle.samples]


def test_an_array_is_cut_into_calls(model: Any, tmp_path: Any) -> None:
    path = model(DOUBLE)
    assert shapes(path, tmp_path, x=X) == [(1, 4)] * 3
    assert shapes(path, tmp_path, batch=2, x=X) == [(2, 4), (1, 4)]
    assert shapes(path, tmp_path, x=np.stack([X, X])) == [(3, 4)] * 2
    assert shapes(path, tmp_path, x=X.astype(np.float64)) == [(1, 4)] * 3


def test_a_folder_and_files_of_other_shapes_make_one_bundle(model: Any, tmp_path: Any) -> None:
    folder, other = tmp_path / "samples", tmp_path / "other.npz"
    folder.mkdir()
    np.save(folder / "x.npy", X)
    np.savez(other, x=X[None])
    bundle = record(model(DOUBLE), Wanted([folder, other]))
    assert [sample.inputs["x"].shape for sample in bundle.samples] == [(1, 4)] * 3 + [(3, 4)]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"z": X}, "expected arrays"),
        ({"x": X[0]}, "has 1 axes; expected 2"),
        ({"x": X.astype(str)}, "expected float32"),
        ({"x": X.astype(np.complex64)}, "expected numbers or text"),
        ({"x": X[:, :3]}, "does not take sample 1"),
        ({"x": X[:0]}, "expected 1 to 256 samples; got 0"),
        ({"x": np.zeros((10_000, 4), np.float32)}, "expected 1 to 256 samples; got 10000"),
        ({"x": np.zeros((1, limits.ACCEPTANCE // 16, 4), np.float32)}, "bytes of bundle"),
    ],
    ids=["name", "rank", "kind", "complex", "size", "none", "10,000", "too large"],
)
def test_samples_that_will_not_do_are_said(model: Any, tmp_path: Any, arrays: Any, said: str) -> None:
    with pytest.raises(SetupError, match=said):
        shapes(model(DOUBLE), tmp_path, **arrays)


def test_objects_are_not_unpickled(model: Any, tmp_path: Any) -> None:
    with pytest.raises(SetupError, match="allow_pickle"):
        shapes(model(DOUBLE), tmp_path, x=np.array([None], object))


def test_a_model_that_rolls_dice_gets_no_bundle(model: Any, tmp_path: Any) -> None:
    noisy = [helper.make_node("RandomNormalLike", ["x"], ["y"])]
    with pytest.raises(SetupError, match="does not answer twice alike: sample 1 of 3"):
        shapes(model(noisy), tmp_path, x=X)


def test_labels_of_text_are_recorded(model: Any, tmp_path: Any) -> None:
    node = helper.make_node(
        "LabelEncoder",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        keys_floats=[0.0],
        values_strings=["zero"],
        default_string="ö",
    )
    np.savez(tmp_path / "s.npz", x=X[:1])
    bundle = record(model([node], output=TensorProto.STRING), Wanted([tmp_path / "s.npz"]))
    assert bundle.samples[0].outputs["y"].tolist() == [["zero", "ö", "ö", "ö"]]
