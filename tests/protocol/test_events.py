import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.events import DETAIL_KEYS, KINDS, Event
from device_sdk.protocol.names import ReleasePath
from device_sdk.protocol.posts import EventPost

ids = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
names = st.from_regex(r"m[a-z0-9]{0,10}", fullmatch=True)
any_text = st.text(max_size=600)
any_number = st.floats(allow_nan=True, allow_infinity=True) | st.integers()
releases = st.builds(ReleasePath, names, names, names)
events = st.builds(
    Event,
    id=ids,
    at=st.floats(0, 2**33),
    kind=st.sampled_from(sorted(KINDS)),
    model=names,
    release=st.none() | releases,
    rollout=st.from_regex(r"[0-9]{0,6}", fullmatch=True),
    reason=any_text,
    detail=st.dictionaries(names, any_number | any_text, max_size=4),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(posted=st.lists(events, max_size=5), dropped=st.integers(0, 2**40))
def test_whatever_a_device_sends_arrives(posted: list[Event], dropped: int) -> None:
    """Reasons with bytes that are no text and NaN readings are what reports of failures hold."""
    post = EventPost(tuple(posted), {"digits": "1.0.0/default"}, "0.1.0", dropped)
    arrived = EventPost.parse(json.dumps(post.to_json()).encode())
    assert [event.id for event in arrived.events] == [event.id for event in posted]
    assert [event.release for event in arrived.events] == [event.release for event in posted]
    assert (arrived.runs, arrived.sdk, arrived.dropped) == (post.runs, post.sdk, post.dropped)
    again = EventPost.parse(json.dumps(arrived.to_json()).encode())
    assert again == arrived


def event_of(**changes: Any) -> dict[str, Any]:
    return {"id": "0" * 32, "at": 1.0, "kind": "failed", "model": "digits", "release": None} | changes


def post_of(*posted: Any, **changes: Any) -> bytes:
    return json.dumps({"events": posted, "runs": {}, "sdk": "0.1.0", "dropped": 0} | changes).encode()


def test_an_ordinary_post_is_taken() -> None:
    """So that the refusals below are for what each says."""
    assert EventPost.parse(post_of(event_of())).events[0].kind == "failed"


@pytest.mark.parametrize(
    "event",
    [
        None, [], "x", {}, event_of(id="x"), event_of(id="0" * 31), event_of(id=["0"]), event_of(kind="boom"),
        event_of(kind=None), event_of(at=-1), event_of(at="now"), event_of(at=True), event_of(at=2**41),
        event_of(release="digits"), event_of(release="a/b/c/d"), event_of(release="../../x"), event_of(release=5),
        event_of(reason="x" * 501), event_of(reason="a\0b"), event_of(reason="\ud800"), event_of(rollout="9" * 65),
        event_of(detail=[]), event_of(detail={"a": None}), event_of(detail={"a": [1]}),
        event_of(detail={"a": "x" * 201}), event_of(detail={"a" * 65: 1}),
        event_of(detail={str(n): n for n in range(DETAIL_KEYS + 1)}),
        event_of(detail={"a": 10**400}), event_of(detail={"a\0": 1}),
    ],
)  # fmt: skip
def test_a_hostile_event_is_refused(event: Any) -> None:
    with pytest.raises(ProtocolError):
        EventPost.parse(post_of(event))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"x" * (limits.EVENT_BODY + 1),
        b'{"events": [], "runs": []}',
        post_of(*[event_of(id=f"{n:032x}") for n in range(limits.EVENTS_PER_POST + 1)]), post_of(dropped=-1),
        b'{"events": [{"id": "' + b"0" * 32 + b'", "at": NaN, "kind": "failed"}], "runs": {}}',
        b'{"events": [{"id": "' + b"0" * 32 + b'", "at": 1, "kind": "failed", "detail": {"a": 1e999}}], "runs": {}}',
    ],
    ids=range(12),
)  # fmt: skip
def test_a_hostile_body_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        EventPost.parse(body)


@given(value=json_values)
def test_any_json_is_a_post_or_a_protocol_error(value: object) -> None:
    with pytest.raises(ProtocolError):
        EventPost.parse(json.dumps({"events": [value], "runs": {}}).encode())


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_post_or_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        EventPost.parse(data)
