import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.polls import Bundle, EnrolRequest, Tag, check_runs, running_digest

GOLDEN_RUNS = [
    ({}, "01e7b720ff566d53"),
    ({"digits": "1.0.0/default"}, "938984112422af77"),
    ({"wine": "2.0/onnx-int8", "digits": "1.0.0/default"}, "04de8901f213be42"),
]
digests = st.from_regex(r"[0-9a-f]{16}", fullmatch=True)
sha256s = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200)


@pytest.mark.parametrize(("runs", "expected"), GOLDEN_RUNS)
def test_running_digests_are_those_of_the_golden_vectors(runs: dict[str, str], expected: str) -> None:
    assert running_digest(runs) == expected


def test_the_order_of_models_does_not_change_the_digest() -> None:
    assert running_digest({"a": "1/x", "b": "2/y"}) == running_digest({"b": "2/y", "a": "1/x"})


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        (Tag(0, "0" * 16), '"0-0000000000000000"'),
        (Tag(1_790_000_000, "89abcdef01234567"), '"1790000000-89abcdef01234567"'),
    ],
)
def test_tags_are_those_of_the_golden_vectors(tag: Tag, text: str) -> None:
    assert str(tag) == text
    assert Tag.parse(text) == tag
    assert Tag.parse(f"W/{text}") == tag  # proxies that compress weaken tags


@given(view=st.integers(0, 10**19 - 1), runs=digests)
def test_a_tag_survives_the_round_trip(view: int, runs: str) -> None:
    assert Tag.parse(str(Tag(view, runs))) == Tag(view, runs)


@pytest.mark.parametrize(
    "text",
    [
        "", "*", '"', '""', '"-"', '"1"', '"1-"', '"-0000000000000000"', '"1-000000000000000"', '"1-00000000000000000"',
        '"1-000000000000000G"', '"1-000000000000000A"', "1-0000000000000000", '"-1-0000000000000000"',
        '"1-0000000000000000", "2-0000000000000000"', f'"{"9" * 20}-0000000000000000"', '"\u0661-0000000000000000"',
        '"1-0000000000000000"\n"', "x" * 100_000,
    ],
)  # fmt: skip
def test_a_malformed_tag_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        Tag.parse(text)
    assert caught.value.code == "malformed_tag"
    assert len(caught.value.message) < 300


@given(text=st.text(max_size=60))
def test_any_text_is_a_tag_or_a_protocol_error(text: str) -> None:
    with suppress(ProtocolError):
        assert Tag.parse(text).view >= 0


@given(manifests=st.dictionaries(sha256s, texts, max_size=3), version=st.integers(1, 10**18), content=texts)
def test_a_bundle_survives_the_round_trip(manifests: dict[str, str], version: int, content: str) -> None:
    bundle = Bundle(metadata={"timestamp.json": content, f"{version}.snapshot.json": content}, manifests=manifests)
    assert Bundle.parse(bundle.to_bytes()) == bundle


@pytest.mark.parametrize("name", ["../root.json", "/root.json", "a/b.json", "root.json\0", "root", "..json", "1..json"])
def test_a_bundle_with_a_hostile_file_name_is_refused(name: str) -> None:
    with pytest.raises(ProtocolError):
        Bundle.parse(json.dumps({"format": 1, "metadata": {name: "{}"}, "manifests": {}}).encode())


def test_a_bundle_of_another_format_is_refused() -> None:
    with pytest.raises(ProtocolError, match="format"):
        Bundle.parse(b'{"format": 2, "metadata": {}, "manifests": {}}')


@pytest.mark.parametrize(
    "runs",
    [
        None, [], "x", {"digits": "1.0.0"}, {"digits": "1/2/3"}, {"digits": None}, {"digits": "../x"}, {"root": "1/a"},
        {"assign": "1/a"}, {"Digits": "1/a"}, {"digits": "1 /a"},
        {f"m{n}": "1/a" for n in range(limits.MODELS_PER_DEVICE + 1)},
    ],
)  # fmt: skip
def test_a_malformed_running_set_is_refused(runs: object) -> None:
    with pytest.raises(ProtocolError):
        check_runs(runs)


def request_of(**changes: object) -> dict[str, object]:
    return {"device": "cam-1", "nonce": "ab" * 16, "labels": {"site": "berlin"}, "sdk": "0.1.0"} | changes


def test_an_enrolment_request_survives_the_round_trip() -> None:
    request = EnrolRequest.parse(request_of())
    assert EnrolRequest.parse(request.to_json()) == request


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "../etc"}, {"device": ""}, {"device": "a" * 65}, {"device": "CAM"}, {"device": None},
        {"device": "a..b"},
        {"nonce": ""}, {"nonce": "ab"}, {"nonce": "zz" * 16}, {"nonce": 5}, {"labels": []}, {"labels": {"a b": "c"}},
        {"labels": {"a": 1}}, {"labels": {"a": "x" * 65}}, {"labels": {f"l{n}": "x" for n in range(33)}},
        {"sdk": "x" * 33},
    ],
)  # fmt: skip
def test_a_hostile_enrolment_request_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        EnrolRequest.parse(request_of(**changes))
