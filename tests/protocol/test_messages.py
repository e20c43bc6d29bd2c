"""Names, manifests, assignments and batches: round trips, golden bytes, and what must never get in."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_sdk.protocol.assignment import Assignment, Probation, Sampling, Window
from device_sdk.protocol.batches import BatchHead, BatchIndex, SampleEntry
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import FileEntry, Manifest, Requirements, TensorSpec, digest
from device_sdk.protocol.mirrors import check_mirror
from device_sdk.protocol.names import ReleasePath, assign_path, check_file_name, check_model, check_name, check_sha256
from device_sdk.protocol.scores import Scores

HOSTILE_NAMES = [
    "", ".", "..", "../x", "a/b", "a\\b", "/a", "a..b", "-a", ".a", "_a", "A", "é", "a b", "a\0", "a\n", "a" * 65,
    "%2e", None, ["a"], b"a",
]  # fmt: skip
GOLDEN_MANIFEST = Manifest(
    path=ReleasePath("digits", "1.0.0", "default"),
    files=(FileEntry("model.onnx", 3, "ab" * 32), FileEntry("model.onnx.data", 5, "cd" * 32)),
    entry="model.onnx",
    inputs=(TensorSpec("image", "float32", ("batch", 64)),),
    outputs=(TensorSpec("label", "int64", (None,)),),
    requires=Requirements(sdk="0.1.0", opset=17),
    metadata={"commit": "abc"},
)
GOLDEN_MANIFEST_SHA256 = "afb5e08f3a0659feca3fbb2d06b77a43c69b69f46e1acf14809058889fc4deb9"
minutes = st.integers(0, 1439)
windows = st.builds(Window, minutes, minutes)
samplings = st.builds(
    Sampling, st.text("abc", max_size=9), st.floats(0, 1), st.integers(0, 10**7), st.integers(0, 2**40), windows,
    st.integers(0, 86_400),
)  # fmt: skip
assignments = st.builds(
    Assignment,
    model=st.just("digits"),
    release=st.none() | st.just(ReleasePath("digits", "1.1.0", "onnx-int8")),
    length=st.integers(0, 2**20),
    sha256=st.just("ef" * 32),
    rollout=st.sampled_from(["", "17"]),
    urgent=st.booleans(),
    window=windows,
    probation=st.builds(Probation, st.integers(0, 10**9), st.floats(0, 10**6), st.floats(0, 1), st.floats(0, 1)),
    sampling=st.none() | samplings,
    mirror=st.sampled_from(["", "http://mirror.oslo.example:8080"]),
)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_name_is_refused_everywhere(name: Any) -> None:
    for check in (check_name, check_model, check_sha256):
        with pytest.raises(ProtocolError):
            check(name)
    with pytest.raises(ProtocolError):
        ReleasePath.parse(f"digits/{name}/default")
    with pytest.raises(ProtocolError):
        assign_path(name, "digits")


@pytest.mark.parametrize("name", ["..", "a/b", "/etc/passwd", "a\\b", "a\0", "", ".hidden", "a" * 129, None])
def test_a_file_name_is_never_a_path(name: Any) -> None:
    with pytest.raises(ProtocolError):
        check_file_name(name)


@pytest.mark.parametrize("name", ["root", "targets", "snapshot", "timestamp", "director", "assign"])
def test_a_model_cannot_take_the_name_of_a_role(name: str) -> None:
    with pytest.raises(ProtocolError, match="reserved"):
        check_model(name)


def test_a_manifests_bytes_are_those_of_the_golden_vector() -> None:
    """They are hashed and signed: another order or space would be another release."""
    assert digest(GOLDEN_MANIFEST.to_bytes()) == GOLDEN_MANIFEST_SHA256
    assert Manifest.parse(GOLDEN_MANIFEST.to_bytes()) == GOLDEN_MANIFEST


@pytest.mark.parametrize(
    "edit",
    [
        {"format": 2}, {"entry": "other.onnx"}, {"entry": "../model.onnx"}, {"files": []}, {"files": None},
        {"files": [{"name": "a", "length": -1, "sha256": "ab" * 32}], "entry": "a"},
        {"files": [{"name": "a", "length": 1.5, "sha256": "ab" * 32}], "entry": "a"},
        {"files": [{"name": "a", "length": 1, "sha256": "AB" * 32}], "entry": "a"},
        {"files": [{"name": "a", "length": 1, "sha256": "ab" * 32}] * 2, "entry": "a"},
        {"model": "root"}, {"variant": "../x"}, {"inputs": [5]}, {"variant": 0}, {"version": 1}, {"model": None},
        {"inputs": [{"name": "x", "dtype": "f", "shape": [True]}]},
        {"inputs": [{"name": "x", "dtype": "f", "shape": [[]]}]},
        {"requires": []}, {"requires": {"opset": "17"}}, {"metadata": {"a": 1}},
    ],
)  # fmt: skip
def test_a_hostile_manifest_is_refused(edit: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        Manifest.parse(json.dumps(json.loads(GOLDEN_MANIFEST.to_bytes()) | edit).encode())


def test_scores_stand_in_a_manifest_only_where_they_are_named() -> None:
    assert b"scores" not in GOLDEN_MANIFEST.to_bytes()
    named = replace(GOLDEN_MANIFEST, scores=Scores("probs", "logits"))
    assert Manifest.parse(named.to_bytes()) == named
    for wrong in (5, {"output": "p"}, {"output": "p", "kind": "odds"}):
        with pytest.raises(ProtocolError):
            Manifest.parse(json.dumps(json.loads(GOLDEN_MANIFEST.to_bytes()) | {"scores": wrong}).encode())


@pytest.mark.parametrize("name", ["max_slowdown", "max_confidence_drop", "max_class_shift"])
def test_comparisons_stand_in_an_assignment_only_where_they_are_asked_for(name: str) -> None:
    assert name not in Probation().to_json()
    asked = replace(Probation(), **{name: 1.0})
    assert Probation.parse(json.loads(json.dumps(asked.to_json()))) == asked
    for wrong in (-1, "many", 1_001):
        with pytest.raises(ProtocolError):
            Probation.parse(Probation().to_json() | {name: wrong})


@given(assignment=assignments)
def test_an_assignment_survives_the_round_trip(assignment: Assignment) -> None:
    custom = json.loads(json.dumps(assignment.to_custom()))
    assert Assignment.parse("digits", assignment.length, assignment.sha256, custom) == assignment


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("https://Mirror.Oslo.example:8080/", "https://mirror.oslo.example:8080"),
        ("http://[FE80::1]:80", "http://[fe80::1]:80"),
        ("http://10.0.0.1", "http://10.0.0.1"),
        ("http://near_by", "http://near_by"),
        *(
            (said, "")
            for said in (
                "near",
                "ftp://near",
                "http://",
                "http:///x",
                "http://near/x",
                "http://near?x",
                "http://near#x",
            )
        ),
        *(
            (said, "")
            for said in ("http://u:p@near", "http://near:0", "http://near:65536", "http://near:", "http://[::g]")
        ),
        *(
            (said, "")
            for said in (
                "http://near by",
                "http://near\n",
                "http://-x",
                "http://\u212aelvin",
                "x" * 10**6,
                None,
                7,
                [],
                {},
            )
        ),
    ],
)
def test_a_mirror_is_an_address_or_none_and_never_a_reason_to_refuse_an_assignment(said: Any, meant: str) -> None:
    custom = Assignment("digits", ReleasePath("digits", "1.0.0", "default")).to_custom() | {"mirror": said}
    assignment = Assignment.parse("digits", 1, "ab" * 32, custom)
    assert (assignment.mirror, assignment.release is not None) == (meant, True)
    if meant:
        assert check_mirror(said) == check_mirror(meant) == meant
    else:
        with pytest.raises(ProtocolError):
            check_mirror(said)


def test_an_assignment_that_names_another_models_release_is_refused() -> None:
    custom = Assignment("wine", ReleasePath("wine", "1.0.0", "default")).to_custom()
    with pytest.raises(ProtocolError) as caught:
        Assignment.parse("digits", 1, "ab" * 32, custom)
    assert caught.value.code == "wrong_model"


@given(window=windows, minute=minutes)
def test_a_window_holds_as_many_minutes_as_it_says(window: Window, minute: int) -> None:
    inside = [m for m in range(1440) if window.contains(m)]
    assert len(inside) == ((window.end - window.start) % 1440 or 1440)
    assert window.contains(minute) == (minute in inside)
    assert window.contains(window.start)


HEAD = BatchHead("0" * 32, "digits", "ab" * 32, 100, 5, 2, "night")
SAMPLE = SampleEntry(
    "1" * 32, 1.5, ReleasePath("digits", "1.0.0", "default"), 0.5, {"image": "t0.npy"}, {"label": "t1.npy"}
)
INDEX = BatchIndex("0" * 32, "cam-1", "digits", (SAMPLE,))


def test_a_batch_survives_the_round_trip() -> None:
    assert BatchHead.parse(json.loads(json.dumps(HEAD.to_json()))) == HEAD
    assert BatchIndex.parse(INDEX.to_bytes()) == INDEX


@pytest.mark.parametrize(
    "edit",
    [
        {"id": "x"}, {"model": "root"}, {"sha256": "AB" * 32}, {"length": 0}, {"length": 2**40}, {"samples": 0},
        {"samples": 10**9}, {"dropped": -1}, {"campaign": 5},
    ],
)  # fmt: skip
def test_a_hostile_batch_head_is_refused(edit: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        BatchHead.parse(HEAD.to_json() | edit)


@pytest.mark.parametrize("member", ["../t0.npy", "t0.npy/..", "/t0.npy", "t.npy", "t0.exe", None])
def test_a_batch_that_names_a_hostile_member_is_refused(member: Any) -> None:
    with pytest.raises(ProtocolError):
        BatchIndex.parse(replace(INDEX, samples=(replace(SAMPLE, inputs={"image": member}),)).to_bytes())


def test_a_batch_with_a_sample_of_another_model_is_refused() -> None:
    stranger = replace(SAMPLE, release=ReleasePath("wine", "1.0.0", "default"))
    with pytest.raises(ProtocolError) as caught:
        BatchIndex.parse(replace(INDEX, samples=(stranger,)).to_bytes())
    assert caught.value.code == "wrong_model"
