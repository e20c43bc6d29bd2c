"""Batches made to hurt: each is refused with a reason, before it costs memory, and nothing is ever unpickled."""

import io
import json
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_sdk.protocol.arrays import npy as arrays
from device_sdk.protocol.arrays.npy import DTYPES
from device_sdk.protocol.batches import INDEX
from device_sdk.protocol.errors import ProtocolError
from fleet.errors import Invalid
from fleet.feedback.parsing import Expected, parse
from tests.server.batch_world import image, npy, pack, sample

ID = "a" * 32
EXPECTED = Expected(id=ID, device="cam-1", model="digits", samples=1)


def packed(**options) -> bytes:
    return pack([sample(0)], batch_id=ID, **options)


def refused(data: bytes, expected: Expected = EXPECTED) -> str:
    with pytest.raises(Invalid) as caught:
        parse(data, expected)
    return caught.value.code


def with_index(change: Callable[[dict], None], **members: bytes) -> bytes:
    """A good batch whose index is changed in a way that `BatchIndex` would not write."""
    with zipfile.ZipFile(io.BytesIO(packed())) as archive:
        index = json.loads(archive.read(INDEX))
    change(index)
    return packed(members={INDEX: json.dumps(index).encode(), **members})


def header(text: str, payload: bytes = b"") -> bytes:
    line = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(line)) + line + payload


def test_a_good_batch_gives_its_samples():
    samples = parse(pack([sample(0), sample(1)], batch_id=ID), Expected(ID, "cam-1", "digits", 2))
    assert [str(item.entry.release) for item in samples] == ["digits/1.0.0/default"] * 2
    np.testing.assert_array_equal(samples[1].inputs["image"], image(1))
    assert samples[1].outputs["label"].tolist() == [1]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_plain_dtype_is_read_exactly(dtype):
    array = (np.arange(6).reshape(2, 3) % 2).astype(dtype)
    read = arrays.parse(npy(array))
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("array", [np.array([["é", "long one"], ["", "\U0001f600"]]), np.array("x"), np.array([], str)])
def test_text_is_read(array):
    np.testing.assert_array_equal(arrays.parse(npy(array)), array)


@pytest.mark.parametrize("code", [0x110000, 0xFFFFFFFF, 0xD800, 0xDFFF])
def test_text_of_what_are_no_characters_is_refused(code):
    data = header("{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}", struct.pack("<I", code))
    assert refused(packed(members={"t0.npy": data})) == "bad_tensor"


@pytest.mark.parametrize("array", [np.float32(1.5), np.zeros((0, 4)), np.asfortranarray(np.arange(6).reshape(2, 3))])
def test_scalars_empty_and_fortran_arrays_are_read(array):
    np.testing.assert_array_equal(arrays.parse(npy(np.asanyarray(array))), array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, ">f4"),
        np.zeros(2, "c8"),
        np.zeros(2, "S4"),
        np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, np.longdouble),
    ],
    ids=lambda array: str(array.dtype),
)
def test_other_dtypes_are_refused(array):
    assert refused(packed(members={"t0.npy": npy(array)})) == "bad_tensor"


class Evil:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def test_a_pickled_array_is_refused_and_not_unpickled():
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([None], object), allow_pickle=True)
    start = file.getvalue()[: -len(pickle.dumps(np.array([None], object), protocol=4))]
    for data in (file.getvalue(), start + pickle.dumps(Evil()), pickle.dumps(Evil())):
        assert refused(packed(members={"t0.npy": data})) == "bad_tensor"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff{}",
        npy(image(0))[:-1],
        npy(image(0)) + b"\0",
        npy(image(0)).replace(b"NUMPY\x01", b"NUMPY\x02"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (2.0,)}"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': 3}"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,) * 9}"),
        header("{'descr': '<f4', 'fortran_order': 1, 'shape': ()}", b"0000"),
        header("{'descr': '<f4'}"),
        header("{'descr': ('<f4', (1000000000,)), 'fortran_order': False, 'shape': ()}"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (0,)}"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 17 + ")}", b"0000"),
        header("{'descr': '<U0', 'fortran_order': False, 'shape': (9,)}"),
        header("{'descr': '>U1', 'fortran_order': False, 'shape': (0,)}"),
        header("__import__('os').abort()"),
        header("(" * 900),
    ],
    ids=lambda data: repr(data[10:60]),
)
def test_a_broken_array_is_refused(data):
    assert refused(packed(members={"t0.npy": data})) == "bad_tensor"


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(1000000, 1000000)", "(0, 9999999999999)"])
def test_a_shape_without_the_bytes_for_it_costs_no_memory(shape):
    data = packed(members={"t0.npy": header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}")})
    tracemalloc.start()
    assert refused(data) == "bad_tensor"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_member_is_refused(compression):
    assert refused(packed(compression=compression)) == "bad_zip"


def test_a_zip_bomb_is_refused_unopened():
    bomb = packed(members={"t0.npy": bytes(64 * 1024**2)}, compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    tracemalloc.start()
    assert refused(bomb) == "bad_zip"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_entries_that_share_bytes_are_refused():
    """The overlapping bomb: many directory entries for one large member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("t0.npy", bytes(100_000))
        for number in range(1, 200):
            twin = zipfile.ZipInfo(f"t{number}.npy")
            twin.file_size = twin.compress_size = 100_000
            twin.CRC = 0
            twin.header_offset = 0
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    assert refused(file.getvalue()) == "bad_zip"


def test_an_encrypted_member_is_refused():
    data = bytearray(packed())
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 8] |= 1
    assert refused(bytes(data)) == "bad_zip"


def test_a_member_twice_is_refused():
    file = io.BytesIO(packed())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("t0.npy", npy(image(7)))
    assert refused(file.getvalue()) == "bad_zip"


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "/etc/passwd", "sub/t2.npy", "t2.npy/", "T2.NPY", "x"])
def test_a_member_with_another_name_is_refused(name):
    assert refused(packed(members={name: b"x"})) == "bad_index"


@pytest.mark.parametrize("member", ["../t0.npy", "/t0.npy", "t0.npy\0", "batch.json", "t٣.npy", 7])
def test_an_index_that_names_such_a_member_is_refused(member):
    assert refused(with_index(lambda index: index["samples"][0]["inputs"].update(image=member))) == "bad_index"


def test_a_tensor_that_is_not_there_is_refused():
    assert refused(with_index(lambda index: index["samples"][0]["inputs"].update(more="t9.npy"))) == "bad_index"


def test_a_member_that_nobody_needs_is_refused():
    assert refused(packed(members={"t9.npy": npy(image(0))})) == "bad_index"


def test_one_member_cannot_stand_for_many_tensors():
    assert refused(with_index(lambda index: index["samples"][0]["inputs"].update(more="t0.npy"))) == "bad_index"


def test_a_sample_twice_in_one_batch_is_refused():
    twin = "b" * 32
    data = pack([sample(0, sample_id=twin), sample(1, sample_id=twin)], batch_id=ID)
    assert refused(data, Expected(ID, "cam-1", "digits", 2)) == "bad_index"


@pytest.mark.parametrize("name", ["", "a\nb", "nul\0", "\ud800"], ids=repr)
def test_a_tensor_name_that_makes_no_column_is_refused(name):
    def rename(index: dict) -> None:
        index["samples"][0]["inputs"] = {name: "t0.npy"}

    assert refused(with_index(rename)) == "bad_index"


def test_a_tensor_name_that_takes_the_place_of_anothers_shape_is_refused():
    data = with_index(lambda index: index["samples"][0]["inputs"].update({"image.shape": "t1.npy"}, image="t0.npy"))
    assert refused(data) == "bad_index"


@pytest.mark.parametrize(
    "expected",
    [
        Expected("b" * 32, "cam-1", "digits", 1),
        Expected(ID, "cam-2", "digits", 1),
        Expected(ID, "cam-1", "wine", 1),
        Expected(ID, "cam-1", "digits", 2),
    ],
    ids=["id", "device", "model", "samples"],
)
def test_an_index_that_differs_from_what_was_announced_is_refused(expected):
    assert refused(packed(), expected) == "wrong_batch"


@pytest.mark.parametrize("probability", [0, -1, 2, "1", None, True])
def test_a_probability_outside_zero_to_one_is_refused(probability):
    assert refused(with_index(lambda index: index["samples"][0].update(probability=probability))) == "bad_index"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000], ids=["0", "{", "[]", "ff", "deep"])
def test_a_broken_index_is_refused(data):
    assert refused(packed(members={INDEX: data})) == "bad_index"


def test_a_huge_index_is_refused_unread():
    assert refused(packed(members={INDEX: b" " * (2 * 1024**2 + 1)})) == "bad_index"


def test_a_batch_without_an_index_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("t0.npy", npy(image(0)))
    assert refused(file.getvalue()) == "bad_index"


@pytest.mark.parametrize("cut", [0, 1, 21, 22, 100, -1, -21, -22, -23])
def test_a_truncated_zip_is_refused(cut):
    assert refused(packed()[:cut]) == "bad_zip"


def test_a_directory_of_a_million_entries_is_refused_before_it_is_read():
    entry = b"PK\x01\x02" + bytes(42)
    directory = entry * 200_000
    size, count = len(directory), 200_000 & 0xFFFF
    data = directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size, 0, 0)
    tracemalloc.start()
    assert refused(data) == "bad_zip"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_zip64_is_refused():
    """Its record would overrule the one that was measured."""
    data = packed()
    body, end = data[:-22], data[-22:]
    count, size, offset = struct.unpack("<H2L", end[10:20])
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(body), 1)
    whole = body + record + locator + end
    assert zipfile.ZipFile(io.BytesIO(whole)).testzip() is None
    assert refused(whole) == "bad_zip"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_are_refused_or_harmless(data):
    """Whatever comes, the answer is samples or `Invalid`: no other exception, so one bad batch stops no compaction."""
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        samples = parse(bytes(content), EXPECTED)
    except Invalid:
        return
    assert len(samples) == 1


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="{}()[]'<|f48,: descrfortan_ohpeTuFalsL0123\\\"\n\t", max_size=90), st.binary(max_size=16))
def test_any_array_header_is_refused_or_harmless(text, payload):
    arrays._header.cache_clear()
    try:
        found = arrays.parse(header(text, payload))
    except ProtocolError:
        return
    assert not found.dtype.hasobject
    assert found.nbytes <= len(payload)


GOOD = packed()
