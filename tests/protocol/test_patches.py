"""The patch format: golden bytes, every operation by hand, and a decoder that hostile patches cannot move.

Bombs are judged by the peak of what Python and numpy allocate, which is what a device would need.
"""

import bz2
import lzma
import random
import struct
import tracemalloc
import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.patches import arithmetic, planes
from device_sdk.protocol.patches.frames import FIRST, FRAME_BYTES, HEAD_BYTES, MAX_FRAME, Head, Kind, Operation
from device_sdk.protocol.patches.offers import PatchOffer, offers_to_json, parse_offers
from device_sdk.protocol.patches.planes import Codec
from tests.deltas import frame, head, pieces, sha

OLD = np.arange(64, dtype=np.float32).tobytes()
MANY = settings(max_examples=400, deadline=None)


def golden() -> tuple[bytes, bytes]:
    """The patch as documented, byte by byte, and what it gives."""
    target = OLD[:8] + b"new" + struct.pack("<If", 0x3F7FFFFF, 2.0)  # the float32 right before 1.0, and 2.0
    text = (
        "464c45455450310a" + sha(OLD) + "0001000000000000" + sha(target) + "1300000000000000"
        "00000000" "00000000" "0800000000000000" "0000000000000000"  # COPY 8 of 0
        "01000000" "08000000" "0300000000000000" "0000000000000000" "0003000000" "6e6577"  # LITERAL "new"
        "02060000" "16000000" "0800000000000000" "0400000000000000"  # SUBTRACT F32, 8 bytes, from 4
        "0002000000" "0100" "0400000000" "0400000000" "0400000000"  # differences -1, 0: zig-zag 1, 0
    )  # fmt: skip
    return bytes.fromhex(text), target


def golden_quarters() -> tuple[bytes, bytes]:
    """The same for the codec QUARTERS: 21 bytes, of which two need more than two bits."""
    target = bytes([0, 1, 2, 0, 3, 2, 0, 255, 1]) + bytes(12)
    text = (
        "464c45455450310a" + sha(b"") + "0000000000000000" + sha(target) + "1500000000000000"
        "01000000" "17000000" "1500000000000000" "0000000000000000"  # LITERAL of 21 bytes
        "0512000000" "0006000000" "24cb01000000" "0002000000" "03ff"  # 0 1 2 0, 3 2 0 3, 1, zeros; then 3 and 255
    )  # fmt: skip
    return bytes.fromhex(text), target


def run(patch: bytes, base: bytes, target: bytes) -> bytes:
    return b"".join(pieces(patch, base, sha(target), len(target)))


def quarters(few: bytes, large: bytes, codec: Codec = Codec.STORED) -> bytes:
    return plane(plane(few, codec) + plane(large), Codec.QUARTERS)


def plane(data: bytes, codec: Codec = Codec.STORED) -> bytes:
    return planes.pack(codec, data)


def made(base: bytes, target: bytes, *frames: bytes) -> bytes:
    return head(base, len(target), sha(target)) + b"".join(frames)


def refused(patch: bytes, base: bytes = OLD, length: int = 8, target_sha: str = sha(b"?")) -> str:
    """The message; at most `length` bytes came out before it."""
    out = 0
    with pytest.raises(ProtocolError) as caught:  # noqa: PT012
        for piece in pieces(patch, base, target_sha, length):
            out += len(piece)
            assert len(piece) <= MAX_FRAME
    assert caught.value.code == "bad_patch"
    assert out <= length
    return caught.value.message


def test_the_golden_patch_gives_what_the_description_says() -> None:
    patch, target = golden()
    assert run(patch, OLD, target) == target
    assert len(patch) == HEAD_BYTES + 3 * FRAME_BYTES + 8 + 22


def test_the_golden_patch_in_quarters_gives_what_the_description_says() -> None:
    patch, target = golden_quarters()
    assert run(patch, b"", target) == target


# --- every operation ---


@pytest.mark.parametrize(
    ("codec", "pack"),
    [
        (Codec.STORED, bytes),
        (Codec.ZLIB, lambda data: zlib.compress(data, wbits=-15)),
        (Codec.BZ2, bz2.compress),
        (Codec.LZMA, lambda data: lzma.compress(data, lzma.FORMAT_RAW, filters=planes.lzma_filters())),
    ],
)
@pytest.mark.parametrize("size", [200, 1000, MAX_FRAME])
def test_literals_of_every_codec(codec: Codec, pack: Any, size: int) -> None:
    target = bytes(value & 3 for value in random.Random(size).randbytes(size))
    assert run(made(b"", target, frame(Operation.LITERAL, size, plane(pack(target), codec))), b"", target) == target


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=40) | st.lists(st.integers(0, 3), min_size=30, max_size=200).map(bytes))
def test_quarters_come_back_as_they_went(data: bytes) -> None:
    few, large = arithmetic.quarter(data)
    packed = quarters(few, large)
    if len(packed) <= planes.PLANE_BYTES + len(data):  # else no encoder would take them
        assert planes.unpack(memoryview(packed), count=1, size=len(data)) == [data]


@pytest.mark.parametrize("kind", list(Kind))
def test_differences_and_planes_of_every_kind(kind: Kind) -> None:
    source = random.Random(kind)
    old, new = source.randbytes(64 * kind.width), source.randbytes(64 * kind.width)
    items = arithmetic.values(new, kind)
    choices = {
        Operation.SUBTRACT: arithmetic.subtract(items, arithmetic.values(old, kind), kind),
        Operation.PLANES: arithmetic.turn(items, kind),
    }
    for operation, coded in choices.items():
        payload = b"".join(plane(each) for each in arithmetic.split(coded))
        assert run(made(old, new, frame(operation, len(new), payload, kind=kind)), old, new) == new


def test_neighbouring_floats_differ_by_one_also_across_zero() -> None:
    numbers = np.array([-1e-45, -0.0, 0.0, 1e-45], np.float32)
    items = arithmetic.values(numbers.tobytes(), Kind.F32)
    assert arithmetic.subtract(items[1:], items[:-1], Kind.F32).tolist() == [2, 2, 2]


def test_halves_are_computed() -> None:
    target = np.arange(64, dtype=np.float16)
    target[5] = np.float16(77)
    guess = arithmetic.half(OLD)
    differences = arithmetic.subtract(target.view("<u2"), guess, Kind.F16)
    payload = b"".join(plane(each) for each in arithmetic.split(differences))
    patch = made(OLD, target.tobytes(), frame(Operation.HALF, 128, payload, kind=Kind.F16))
    assert run(patch, OLD, target.tobytes()) == target.tobytes()


def test_bytes_are_quantised_by_channel() -> None:
    scales, zeros = np.array([1.0, 2.0], "<f4"), np.array([0.0, -3.0], "<f4")
    whole = np.frombuffer(OLD, "<f4")
    target = np.where(np.arange(64) // 4 % 2, np.rint(whole / 2) - 3, whole).astype(np.int8).tobytes()
    table = frame(Operation.TABLE, 16, plane(scales.tobytes() + zeros.tobytes()), offset=4)
    frames = [
        frame(Operation.QUANTISE, 32, FIRST.pack(at) + plane(b"", Codec.ZEROS), kind=Kind.I8, offset=4 * at)
        for at in (0, 32)
    ]
    target += zeros.tobytes()  # of the table, without being sent again
    frames.append(frame(Operation.SCALES, 8, offset=8))
    assert run(made(OLD, target, table, *frames), OLD, target) == target


def test_what_is_not_a_number_is_quantised_to_something() -> None:
    base = np.array([np.nan, np.inf, -np.inf, 1e38], np.float32).tobytes()
    for scale in (0.0, np.nan, np.inf, -1.0, 1e-45):
        table = frame(Operation.TABLE, 8, plane(np.array([scale, np.nan], "<f4").tobytes()), offset=1)
        quantised = frame(Operation.QUANTISE, 4, FIRST.pack(0) + plane(b"", Codec.ZEROS), kind=Kind.U8)
        out = b"".join(pieces(head(base, 4, sha(b"?")) + table + quantised, base, sha(b"?"), 4))
        assert len(out) == 4


# --- what is refused ---


def test_a_patch_of_other_files_is_refused_before_it_is_read() -> None:
    patch, target = golden()
    assert "expected one from" in refused(patch, b"another base", len(target), sha(target))
    assert "expected one from" in refused(patch, OLD, len(target), sha(b"another target"))
    assert "expected one to 20 bytes" in refused(patch, OLD, 20, sha(target))


def test_the_base_may_be_shorter_than_the_patch_says() -> None:
    """A base that is damaged on the device: its name is right, its bytes are not there."""
    patch = Head(sha(OLD), len(OLD), sha(b"?"), 8).to_bytes() + frame(Operation.COPY, 8, offset=100)
    with pytest.raises(ProtocolError, match="the base ends"):
        list(pieces(patch, OLD[:50], sha(b"?"), 8, base_sha=sha(OLD)))


GOOD = plane(b"8 bytes!")
BAD = {
    "nothing": (b"", "too early"),
    "another format": (b"PK\x03\x04" * 30, "expected b'FLEETP1"),
    "no frames": (b"", "expected the head of a frame"),
    "an unknown operation": (b"\x08" + bytes(23), "is not a valid Operation"),
    "an unknown kind": (b"\x00\x08" + bytes(22), "is not a valid Kind"),
    "reserved bits": (frame(Operation.COPY, 8)[:2] + b"\1" + frame(Operation.COPY, 8)[3:], "not defined"),
    "a kind that makes no sense": (frame(Operation.HALF, 8, kind=Kind.F64), "not defined"),
    "a frame of nothing": (frame(Operation.COPY, 0), "expected 1 to 8"),
    "half a value": (frame(Operation.PLANES, 6, kind=Kind.F32), "whole values"),
    "more than the target takes": (frame(Operation.COPY, 9), "expected 1 to 8"),
    "a copy that carries something": (frame(Operation.COPY, 8, b"x"), "carries nothing"),
    "a copy from outside": (frame(Operation.COPY, 8, offset=249), "reads to 257"),
    "a copy from far outside": (frame(Operation.COPY, 8, offset=2**64 - 1), "reads to"),
    "differences to the outside": (frame(Operation.SUBTRACT, 8, GOOD, offset=250), "reads to 258"),
    "halves from outside": (frame(Operation.HALF, 8, GOOD, kind=Kind.F16, offset=248), "reads to 264"),
    "bytes quantised from outside": (frame(Operation.QUANTISE, 8, GOOD, offset=248), "reads to 280"),
    "no table": (frame(Operation.QUANTISE, 8, FIRST.pack(0) + GOOD), "expected a TABLE"),
    "scales without a table": (frame(Operation.SCALES, 8), "of a table of 0"),
    "scales beyond their table": (
        frame(Operation.TABLE, 8, GOOD, offset=1) + frame(Operation.SCALES, 8, offset=1), "reads to 9 of a table of 8",
    ),
    "scales that carry something": (frame(Operation.SCALES, 8, b"x"), "carries nothing"),
    "half a table": (frame(Operation.TABLE, 12, plane(bytes(12)), offset=1), "expected pairs"),
    "a table without a stride": (frame(Operation.TABLE, 8, GOOD), "expected pairs and a stride"),
    "a payload that is not there": (frame(Operation.LITERAL, 8, GOOD)[:-1], "too early"),
    "no plane": (frame(Operation.LITERAL, 8), "a plane is missing"),
    "too few planes": (frame(Operation.PLANES, 8, plane(b"1234"), kind=Kind.F16), "a plane is missing"),
    "too many planes": (frame(Operation.LITERAL, 8, GOOD + b"\0"), "after the last plane"),
    "an unknown codec": (frame(Operation.LITERAL, 8, b"\x09" + GOOD[1:]), "is not a valid Codec"),
    "a plane beyond the payload": (frame(Operation.LITERAL, 8, b"\0\x08\0\0\0short"), "expected at most"),
    "a plane larger than what it gives": (frame(Operation.LITERAL, 8, plane(b"9 bytes!!")), "expected at most 8"),
    "a plane that is too short": (frame(Operation.LITERAL, 8, plane(b"7 bytes")), "expected 8 bytes; got 7"),
    "zeros that carry something": (frame(Operation.LITERAL, 8, plane(b"x", Codec.ZEROS)), "carries nothing"),
    "not zlib": (frame(Operation.LITERAL, 8, plane(b"\xff\xff", Codec.ZLIB)), "plane: "),
    "half of zlib": (frame(Operation.LITERAL, 8, plane(zlib.compress(bytes(8), wbits=-15)[:-2], Codec.ZLIB)), "plane"),
    "not bz2": (frame(Operation.LITERAL, 8, plane(b"BZh9", Codec.BZ2)), "plane: "),
    "not lzma": (frame(Operation.LITERAL, 8, plane(b"\x80", Codec.LZMA)), "plane: "),
    "more after the end": (frame(Operation.COPY, 8) + b"\0", "goes on after the target"),
    "an endless table": (frame(Operation.TABLE, 2 * MAX_FRAME, GOOD, offset=1), "expected at most"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_by_name(name: str) -> None:
    body, message = BAD[name]
    start = b"" if name in {"nothing", "another format"} else head(OLD, 8, sha(b"?"))
    assert message in refused(start + body)


BAD_QUARTERS = {
    "nothing": (plane(b"", Codec.QUARTERS), "a plane is missing"),
    "without the large values": (plane(plane(bytes(7)), Codec.QUARTERS), "a plane is missing"),
    "with something after them": (plane(plane(bytes(7)) + plane(b"") + b"\0", Codec.QUARTERS), "after the last plane"),
    "of quarters": (plane(plane(b"", Codec.QUARTERS) + plane(b""), Codec.QUARTERS), "quarters of quarters"),
    "whose large values are quarters": (
        plane(plane(bytes(7)) + plane(b"", Codec.QUARTERS), Codec.QUARTERS), "quarters of quarters",
    ),
    "of too few bytes": (quarters(bytes(6), b""), "expected 7 bytes; got 6"),
    "of too many bytes": (quarters(bytes(8), b""), "expected 7 bytes; got 8"),
    "of a value after the last": (quarters(bytes(6) + b"\x10", b""), "more than 26 values"),
    "with more large values than they say": (quarters(b"\3" + bytes(6), b"\7\7"), "expected 1 bytes; got 2"),
    "with fewer large values than they say": (quarters(b"\x0f" + bytes(6), b"\7"), "expected 2 bytes; got 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_QUARTERS)
def test_quarters_refused_by_name(name: str) -> None:
    payload, message = BAD_QUARTERS[name]
    assert message in refused(head(OLD, 26, sha(b"?")) + frame(Operation.LITERAL, 26, payload), length=26)


def test_lengths_beyond_any_artifact_are_refused() -> None:
    patch = Head(sha(OLD), 2**60, sha(b"?"), 2**60).to_bytes()
    assert f"at most {limits.ARTIFACT}" in refused(patch, length=2**60)


# --- bombs ---


@cache
def bomb(codec: Codec) -> bytes:
    """Some kB that unfold to much more than a frame may hold."""
    if codec is Codec.ZLIB:
        return zlib.compress(bytes(16 * MAX_FRAME), 9, wbits=-15)
    if codec is Codec.BZ2:
        return bz2.compress(bytes(16 * MAX_FRAME))
    if codec is Codec.QUARTERS:
        return plane(bomb(Codec.ZLIB), Codec.ZLIB) + plane(bomb(Codec.ZLIB), Codec.ZLIB)
    return lzma.compress(bytes(16 * MAX_FRAME), lzma.FORMAT_RAW, filters=planes.lzma_filters())


def peak_of(patch: bytes, length: int) -> tuple[str, int]:
    """What it was refused for, and the most memory that it took meanwhile."""
    tracemalloc.start()
    try:
        message = refused(patch, OLD, length)
        return message, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", [Codec.ZLIB, Codec.BZ2, Codec.LZMA, Codec.QUARTERS])
@pytest.mark.parametrize("length", [64, MAX_FRAME])
def test_row_29_a_plane_that_unfolds_to_16_mib_is_stopped_within_a_frame(codec: Codec, length: int) -> None:
    packed = bomb(codec)
    payload = plane(packed[:length] if length == 64 else packed, codec)
    patch = head(OLD, length, sha(b"?")) + frame(Operation.LITERAL, length, payload)
    message, peak = peak_of(patch, length)
    assert message.startswith("patch: plane: ")
    assert peak < 6 * MAX_FRAME


def test_row_29_frames_that_add_up_to_a_gib_are_stopped_at_the_signed_length() -> None:
    zeros = frame(Operation.LITERAL, MAX_FRAME, plane(b"", Codec.ZEROS))
    patch = head(OLD, 3 * MAX_FRAME, sha(b"?")) + zeros * 1024
    assert len(patch) < 33_000
    message, peak = peak_of(patch, 3 * MAX_FRAME)
    assert "goes on after the target" in message
    assert peak < 6 * MAX_FRAME
    short = head(OLD, 3 * MAX_FRAME - 1, sha(b"?")) + zeros * 1024
    assert "expected 1 to" in peak_of(short, 3 * MAX_FRAME - 1)[0]


def test_a_copy_of_all_there_is_comes_in_pieces() -> None:
    base = bytes(3 * MAX_FRAME)
    patch = head(base, len(base), sha(base)) + frame(Operation.COPY, len(base))
    assert [len(piece) for piece in pieces(patch, base, sha(base), len(base))] == [MAX_FRAME] * 3


# --- noise ---


def outcome(patch: bytes, base: bytes, target_sha: str, length: int) -> int:
    """How much came out. Anything but bytes within bounds or the named error fails the test."""
    out = 0
    try:
        for piece in pieces(patch, base, target_sha, length):
            out += len(piece)
            assert len(piece) <= MAX_FRAME
    except ProtocolError as error:
        assert error.code == "bad_patch"  # noqa: PT017  it may raise, and must not raise anything else
    assert out <= length
    return out


def rich() -> tuple[bytes, bytes]:
    """A patch with one frame of each kind and codec, and the sha256 that it promises."""
    zipped = zlib.compress(bytes(64), wbits=-15)
    packed = lzma.compress(bytes(64), lzma.FORMAT_RAW, filters=planes.lzma_filters())
    four = b"".join([plane(bytes(16)), plane(b"", Codec.ZEROS), plane(bytes(16)), plane(bytes(range(16)))])
    frames = [
        frame(Operation.LITERAL, 64, plane(zipped, Codec.ZLIB)),
        frame(Operation.LITERAL, 64, plane(bz2.compress(bytes(64)), Codec.BZ2)),
        frame(Operation.LITERAL, 64, plane(packed, Codec.LZMA)),
        frame(Operation.LITERAL, 64, quarters(bytes(range(0, 160, 10)), bytes(range(7)))),
        frame(Operation.SUBTRACT, 64, four, kind=Kind.F32, offset=3),
        frame(Operation.PLANES, 64, four, kind=Kind.I32),
        frame(Operation.HALF, 32, plane(bytes(16)) + plane(bytes(16)), kind=Kind.F16, offset=5),
        frame(Operation.TABLE, 16, plane(np.array([1, 2, 0, 1], "<f4").tobytes()), offset=3),
        frame(Operation.QUANTISE, 32, FIRST.pack(7) + plane(bytes(32)), kind=Kind.I8, offset=9),
        frame(Operation.COPY, 100, offset=1),
    ]
    length = 64 * 6 + 32 + 32 + 100
    return head(OLD, length, sha(b"?")) + b"".join(frames), length.to_bytes(4, "big")


RICH, _LENGTH = rich()
RICH_LENGTH = int.from_bytes(_LENGTH, "big")


def test_the_rich_patch_is_whole() -> None:
    assert outcome(RICH, OLD, sha(b"?"), RICH_LENGTH) == RICH_LENGTH


@MANY
@given(
    changes=st.lists(st.tuples(st.integers(0, len(RICH) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 40),
)
@example(changes=[(HEAD_BYTES, 255)], cut=0)
def test_a_patch_with_changed_bytes_is_refused_or_stays_within_bounds(changes: Any, cut: int) -> None:
    patch = bytearray(RICH)
    for place, value in changes:
        patch[place] = value
    assert outcome(bytes(patch[: len(patch) - cut]), OLD, sha(b"?"), RICH_LENGTH) <= RICH_LENGTH


@MANY
@given(body=st.binary(max_size=400), length=st.integers(0, 2_000))
def test_any_bytes_after_a_good_head_are_refused_or_stay_within_bounds(body: bytes, length: int) -> None:
    assert outcome(head(OLD, length, sha(b"?")) + body, OLD, sha(b"?"), length) <= length


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_frames_are_refused_or_stay_within_bounds(data: Any) -> None:
    """Well-formed frames of arbitrary numbers: past the first checks, where mutations of bytes rarely get."""
    small = st.integers(0, 300)
    body = b""
    for _ in range(data.draw(st.integers(1, 5))):
        operation, kind = data.draw(st.sampled_from(Operation)), data.draw(st.sampled_from(Kind))
        length = data.draw(small | st.integers(0, 2**64 - 1))
        codecs = data.draw(st.lists(st.tuples(st.sampled_from(Codec), st.binary(max_size=64)), max_size=8))
        first = FIRST.pack(data.draw(st.integers(0, 2**64 - 1))) if operation is Operation.QUANTISE else b""
        payload = first + b"".join(plane(content, codec) for codec, content in codecs)
        body += frame(operation, length, payload, kind=kind, offset=data.draw(small | st.integers(0, 2**64 - 1)))
    length = data.draw(small)
    assert outcome(head(OLD, length, sha(b"?")) + body, OLD, sha(b"?"), length) <= length


# --- offers ---


def test_offers_come_back_as_they_went() -> None:
    offers = (PatchOffer(sha(b"a"), sha(b"b"), 7), PatchOffer(sha(b""), sha(b"c"), 8))
    text = str(offers_to_json(offers)).replace("'", '"').encode()
    assert parse_offers(text) == offers


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"{}", b'{"patches": 1}', b'{"patches": [1]}',
        b'{"patches": [{"base": "..", "sha256": "", "length": 1}]}',
        b'{"patches": [' + b",".join([b"1"] * 100) + b"]}",
    ],
)  # fmt: skip
def test_offers_that_are_none_are_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_offers(text)
