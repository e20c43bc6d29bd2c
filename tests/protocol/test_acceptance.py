"""Acceptance bundles: one byte string for one bundle, what counts as the same answer, and hostile files."""

import io
import json
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest

from device_sdk.protocol import limits
from device_sdk.protocol.arrays import npy
from device_sdk.protocol.arrays.acceptance import INDEX, Acceptance, Budgets, Sample, Tolerance
from device_sdk.protocol.arrays.archive import packed
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import FileEntry, Manifest, digest
from device_sdk.protocol.names import ReleasePath

TOLERANCE = Tolerance(rtol=1e-3, atol=1e-4)
X = np.arange(8, dtype=np.float32).reshape(2, 4)
GOLDEN = Acceptance(
    (Sample({"x": X}, {"y": X * 2, "label": np.array(["a", "öl"])}), Sample({"x": X[:1]}, {"y": X[:1] * 2})),
    TOLERANCE,
    {"y": Tolerance(0.0, 0.5)},
    Budgets(5.0, 2**28),
)
GOLDEN_SHA256 = "25acbf87fea34f9ec5f34f83470706b16f84fd0880f5854fffdd93afc8bd29f9"


def asking(expected: Any, **tolerances: Tolerance) -> Acceptance:
    return Acceptance((Sample({}, {"y": np.asarray(expected)}),), TOLERANCE, tolerances)


def complaint(expected: Any, got: Any, **tolerances: Tolerance) -> str:
    return asking(expected, **tolerances).complaint(0, {"y": got})


def test_a_bundle_is_one_byte_string_and_reads_back() -> None:
    data = GOLDEN.to_bytes()
    assert digest(data) == GOLDEN_SHA256
    read = Acceptance.parse(data)
    assert (read.tolerance, read.tolerances, read.budgets) == (GOLDEN.tolerance, GOLDEN.tolerances, GOLDEN.budgets)
    for one, other in zip(read.samples, GOLDEN.samples, strict=True):
        for mine, theirs in ((one.inputs, other.inputs), (one.outputs, other.outputs)):
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    assert read.to_bytes() == data


def test_numpy_opens_a_bundle_without_pickle() -> None:
    with np.load(io.BytesIO(GOLDEN.to_bytes()), allow_pickle=False) as file:
        assert np.array_equal(file["t0"], X)


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        (np.float32([1, 1000, 0]), np.float32([1.0005, 1000.9, 0.00009])),
        (np.float32([np.nan, np.inf, -np.inf]), np.float32([np.nan, np.inf, -np.inf])),
        (np.float16([60000, 1]), np.float16([60000, 1.001])),
        (np.float64([]), np.float64([])),
        (np.int64([2**53 + 1]), np.int64([2**53 + 1])),
        (np.array([True, False]), np.array([True, False])),
        (np.array(["cat", ""]), np.array(["cat", ""], object)),
        (np.asfortranarray(X), np.ascontiguousarray(X)),
        (np.float32(1.5), np.array(1.5, np.float32)),
        (np.arange(200_000, dtype=np.float32), np.arange(200_000, dtype=np.float32)),
    ],
    ids=repr,
)
def test_what_counts_as_the_same(expected: Any, got: Any) -> None:
    assert complaint(expected, got) == ""


@pytest.mark.parametrize(
    ("expected", "got", "said"),
    [
        (np.float32([1, 2]), np.float32([1, 2.01]), "at [1]: expected 2 ± 0.0021; got 2.01 (1 of 2 values differ)"),
        (np.float32([1]), np.float32([np.nan]), "at [0]: expected 1 ± 0.0011; got nan"),
        (np.float32([np.nan]), np.float32([1]), "expected nan ± nan; got 1"),
        (np.float32([np.inf]), np.float32([-np.inf]), "got -inf"),
        (np.float32([np.inf]), np.float32([3e38]), "got 3e+38"),
        (np.int64([2**53 + 1]), np.int64([2**53]), "expected 9007199254740993; got 9007199254740992"),
        (np.int64([7]), np.int64([8]), "at [0]: expected 7; got 8 (1 of 1 values differ)"),
        (np.array([True]), np.array([False]), "expected True; got False"),
        (np.array(["cat", "dog"]), np.array(["cat", "cow"], object), "at [1]: expected 'dog'; got 'cow'"),
        (X, X[:1], "has the shape [1, 4]; expected [2, 4]"),
        (np.float32([1]), np.float64([1]), "is float64; expected float32"),
        (X, [1, 2], "is list; expected an array"),
        (X, None, "is NoneType; expected an array"),
        (np.zeros(200_000), np.append(np.zeros(199_999), 1.0), "at [199999]: expected 0 ± 0.0001; got 1"),
    ],
    ids=repr,
)
def test_what_does_not_is_said_with_what_was_expected_and_what_came(expected: Any, got: Any, said: str) -> None:
    assert complaint(expected, got).startswith("sample 1 of 1: output 'y' ")
    assert said in complaint(expected, got)


def test_an_outputs_own_tolerance_goes_before_the_others() -> None:
    assert complaint(np.int64([7]), np.int64([8]), y=Tolerance(0, 1)) == ""
    assert complaint(np.int64([7]), np.int64([9]), y=Tolerance(0, 1))
    assert complaint(np.float32([1]), np.float32([1.0005]), y=Tolerance())
    assert complaint(np.array(["a"]), np.array(["b"], object), y=Tolerance(1e9, 1e9))


def test_the_question_is_the_same_whatever_a_machine_answered() -> None:
    def ask(factor: float, x: Any = X, tolerance: Tolerance = TOLERANCE) -> str:
        return Acceptance((Sample({"x": x}, {"y": X * factor}),), tolerance).question()

    assert ask(2.0) == ask(2.0001)
    assert len({ask(2.0), ask(2.0, X + 1), ask(2.0, X.astype(np.float64)), ask(2.0, tolerance=Tolerance())}) == 4


# --- hostile files ---


def index(**changes: Any) -> dict[str, bytes]:
    """The members of a good bundle, whose index is changed."""
    with zipfile.ZipFile(io.BytesIO(GOLDEN.to_bytes())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return {**members, INDEX: json.dumps(json.loads(members[INDEX]) | changes).encode()}


def row(**changes: str) -> dict[str, dict[str, str]]:
    return {"inputs": {"x": "t0.npy"}, "outputs": {"y": "t1.npy"}} | changes


def refused(data: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        Acceptance.parse(data)
    return caught.value.code


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"samples": []},
        {"samples": [row()] * 10_000},
        {"samples": [row(outputs={})]},
        {"samples": [row(), row()]},  # the same members for two samples
        {"samples": [row()]},  # members are left over
        {"samples": [row(inputs={"x": "../t0.npy"})]},
        {"samples": [row(inputs={"x": "t99.npy"})]},
        {"samples": "t0.npy"},
        {"rtol": -1},
        {"rtol": "1e-3"},
        {"atol": 1e300},
        {"tolerances": {"y": 1}},
        {"tolerances": None},
        {"latency_ms": -1},
        {"latency_ms": None},
        {"memory": 1.5},
        {"memory": 2**60},
    ],
    ids=repr,
)
def test_a_hostile_index_is_refused(changes: dict[str, Any]) -> None:
    assert refused(packed(index(**changes))) in {"malformed", "bad_index"}


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"rtol": NaN}', b" " * (limits.ACCEPTANCE_INDEX + 1), b"[" * 100_000])
def test_an_index_that_is_none_is_refused(data: bytes) -> None:
    assert refused(packed({**index(), INDEX: data})) in {"malformed", "bad_index"}


def test_what_is_no_zip_of_plain_arrays_is_refused() -> None:
    members = index()
    objects, bomb = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array(objects, np.array([None], object), allow_pickle=True)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(INDEX, members[INDEX])
        archive.writestr("t0.npy", bytes(10**7))
    huge = npy.to_bytes(np.zeros(4, np.uint8)).replace(b"(4,), }", b"(10**9,)")
    assert refused(packed({**members, "t0.npy": objects.getvalue()})) == "bad_tensor"
    assert refused(packed({**members, "t0.npy": huge})) == "bad_tensor"
    assert refused(bomb.getvalue()) == "bad_zip"
    assert refused(b"") == refused(GOLDEN.to_bytes()[:-1]) == "bad_zip"
    assert refused(bytes(limits.ACCEPTANCE + 1)) == "too_large"
    del members[INDEX]
    assert refused(packed(members)) == "bad_index"


def test_a_shape_without_the_bytes_for_it_costs_no_memory() -> None:
    data = npy.to_bytes(np.zeros((9, 9), np.float64)).replace(b"(9, 9), }        ", b"(999999, 999999),}")
    tracemalloc.start()
    assert refused(packed({**index(), "t0.npy": data})) == "bad_tensor"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


# --- the manifest ---

FILE = FileEntry("model.onnx", 1, "0" * 64)


def manifest(acceptance: FileEntry | None) -> Manifest:
    return Manifest(ReleasePath("m", "1", "default"), (FILE,), FILE.name, acceptance=acceptance)


def test_a_manifest_names_its_bundle_and_without_one_has_the_bytes_that_it_always_had() -> None:
    bundle = FileEntry("acceptance-0.npz", 9, "1" * 64)
    stated = manifest(bundle)
    assert Manifest.parse(stated.to_bytes()) == stated
    assert stated.fetched == (FILE, bundle)
    assert stated.length == 1
    assert b"acceptance" not in manifest(None).to_bytes()
    assert manifest(None).fetched == (FILE,)


@pytest.mark.parametrize(
    "entry",
    [
        FileEntry("model.onnx", 9, "1" * 64),
        FileEntry("a.npz", limits.ACCEPTANCE + 1, "1" * 64),
        FileEntry("../a.npz", 9, "1" * 64),
        FileEntry("a.npz", 9, "1"),
    ],
    ids=["the model's own name", "too large", "a path", "no hash"],
)
def test_a_hostile_entry_is_refused(entry: FileEntry) -> None:
    with pytest.raises(ProtocolError):
        Manifest.parse(manifest(entry).to_bytes())
