"""Rows 24 to 28 of the attack table: downloads that stop short, lie, never end, drip or unpack."""

import re
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from onnx.helper import make_node as node

from device_sdk.protocol import limits
from device_sdk.protocol.manifest import digest
from device_sdk.protocol.polls import BLOBS, POLL
from tests.attacks.world import assert_unharmed, device_of, eventually
from tests.sdk.loopback import Reply
from tests.sdk.world import graph

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
# An honest view of a release whose artifact is attacked: the view is taken, the manifest and the first bytes are here.
TAKEN = ("trust/view.json", "trust/floor.json", "store/manifests/", "store/incoming/")
ANEW = "it is fetched from its beginning"
OCTETS = {"Content-Type": "application/octet-stream"}
SOCKETS = 24 * limits.MIB  # what the buffers of two sockets may hold besides what the device took
MIB = limits.MIB


def heavy(factor: float) -> bytes:
    """A release that answers `factor` and weighs 1 MiB, of which no two have a piece in common."""
    ballast = np.random.default_rng(int(factor)).random(MIB // 4, np.float32)
    return graph([node("Mul", ["x", "k"], ["y"])], {"k": np.float32(factor), "ballast": ballast})


@pytest.fixture
def coming(device):
    """A heavy release that is published, and about to be rolled out: its factor and its bytes."""
    factor = device.shop.new_factor()
    data = heavy(factor)
    device.shop.release(factor, data)
    return factor, data


def short(data: bytes, length: int, start: int = 0) -> Reply:
    """An answer that says it is whole, or the rest, and ends after `length` bytes."""
    headers = {**OCTETS, "Content-Length": str(len(data) - start)}
    if not start:
        return Reply(200, data[:length], headers)
    return Reply(206, data[start : start + length], {**headers, **span(data, start)})


def span(data: bytes, start: int) -> dict[str, str]:
    return {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}


def partial(device, data: bytes) -> int:
    path = device.home / "store" / "incoming" / f"{digest(data)}.part"
    return path.stat().st_size if path.exists() else 0


def shows(device, words: str) -> None:
    """In the log, and on the server's page of the device."""
    device.refuses("", polled="", log=words, page=words)


def ranges(device, data: bytes) -> list[str | None]:
    return [asked.headers.get("Range") for asked in device.proxy.asked if asked.path == BLOBS + digest(data)]


@pytest.mark.parametrize("beginning", ["honest", "a lie"])
def test_row_24_a_truncated_blob_is_resumed_or_refused_and_never_activated(device, coming, beginning):
    if beginning == "honest":
        check_that_it_is_resumed(device, *coming)
    else:
        check_that_the_whole_is_fetched_anew(device, *coming)


def check_that_it_is_resumed(device, factor, data):
    where = BLOBS + digest(data)
    with assert_unharmed(device, volatile=TAKEN):
        device.proxy.attack(where, short(data, 300_000))
        device.shop.roll_out(factor)
        assert device.poll() == ""
        device.logs("truncated")
        shows(device, "network: truncated")
        assert partial(device, data) == 300_000
        device.proxy.attack(where, short(data, 200_000, start=300_000))
        device.retry()
        assert partial(device, data) == 500_000
        assert ranges(device, data)[-1] == "bytes=300000-"
    device.proxy.relent()
    device.retry()
    assert ranges(device, data)[-1] == "bytes=500000-"
    device.runs(factor)


def check_that_the_whole_is_fetched_anew(device, factor, data):
    where = BLOBS + digest(data)
    with assert_unharmed(device, volatile=TAKEN):
        device.proxy.attack(where, short(bytes(len(data)), 300_000))
        device.hears_last_of(factor)
        assert device.poll() == ""
        shows(device, "network: truncated")
    device.proxy.relent(where)
    device.retry()  # honest bytes, after those of the attacker
    device.logs(ANEW)
    device.runs(factor)
    assert ranges(device, data)[-2:] == ["bytes=300000-", None]
    device.recovers()


def asked_again(device, data: bytes) -> str | None:
    """The range that it asks for when it tries again. Not at its first poll, where that meets a server that is busy."""
    asked = len(ranges(device, data))
    device.retry()
    device.comes_to(lambda: len(ranges(device, data)) > asked, "it asks for the file again")
    return ranges(device, data)[asked]


def test_row_25_a_range_resume_that_returns_other_bytes_is_refused(device, coming):
    factor, data = coming
    where, half = BLOBS + digest(data), len(data) // 2
    other = bytes(len(data) - half)
    lies = {
        "other bytes": (Reply(206, other, {**OCTETS, **span(data, half)}), ANEW),
        "another beginning": (Reply(206, data[half:], {**OCTETS, **span(data, half - 1)}), "bad_range"),
        "another end": (
            Reply(206, data[half:], {**OCTETS, "Content-Range": f"bytes {half}-{2 * len(data)}/{3 * len(data)}"}),
            "bad_range",
        ),
        "another total": (
            Reply(206, data[half:], {**OCTETS, "Content-Range": f"bytes {half}-{len(data) - 1}/{len(data) + 7}"}),
            "bad_range",
        ),
        "no range": (Reply(206, data[half:], OCTETS), "bad_range"),
        "several ranges": (
            Reply(206, data[half:], {"Content-Type": "multipart/byteranges; boundary=x"}),
            "bad_range",
        ),
        "more than the rest": (Reply(206, data[half:] + b"more", {**OCTETS, **span(data, half)}), "too_large"),
        "another whole": (Reply(200, bytes(len(data)), OCTETS), "hash_mismatch"),
        "another entity": (Reply(206, other, {**OCTETS, **span(data, half), "ETag": '"other"'}), ANEW),
    }
    with assert_unharmed(device, volatile=TAKEN):
        device.proxy.attack(where, short(data, half))
        device.hears_last_of(factor)
        assert device.poll() == ""
        for name, (lie, code) in lies.items():
            assert partial(device, data) == half, name
            device.proxy.attack(where, lie)
            device.retry()
            device.logs(code)
            assert partial(device, data) == 0, name
            if name in {"another whole", "another beginning", "more than the rest"}:
                shows(device, code)
            device.proxy.attack(where, short(data, half))
            assert asked_again(device, data) is None, name
            device.begin()
        device.proxy.attack(where, Reply(416, b"", OCTETS))
        device.retry()
        assert partial(device, data) == 0
    device.proxy.relent(where)
    device.retry()
    device.runs(factor)
    device.recovers()


class Tap:
    """Bytes without end, and how many of them were taken."""

    def __init__(self, piece: bytes = bytes(64 * 1024)) -> None:
        self.taken = 0
        self._piece = piece

    def __iter__(self):
        while True:
            yield self._piece
            self.taken += len(self._piece)


def test_row_26_an_endless_blob_or_bundle_is_stopped_within_one_chunk_of_its_cap(device, coming):
    factor, data = coming
    where = BLOBS + digest(data)
    peak = peak_memory(device)
    with assert_unharmed(device, volatile=TAKEN):
        bundles: list[Tap] = []

        def bundle(*_):
            bundles.append(Tap())
            return Reply(200, bundles[-1], {"Content-Type": "application/json"})

        device.proxy.attack(POLL, bundle)
        device.refuses("too_large")
        assert max(each.taken for each in bundles) <= limits.BUNDLE + SOCKETS
        device.proxy.relent()
        sizes = []

        def blob():
            for piece in Tap(data[:65_536]):
                sizes.append(partial(device, data))
                yield piece

        device.proxy.attack(where, lambda *_: Reply(200, blob(), OCTETS))
        device.hears_last_of(factor)
        shows(device, "too_large")
        assert max(sizes) <= len(data)
        assert len(sizes) * 65_536 <= len(data) + SOCKETS
        assert partial(device, data) == 0
    assert peak_memory(device) - peak < 80 * MIB
    device.recovers()


def drip(first: bytes = b"", piece: bytes = b"0"):
    yield first
    while True:
        time.sleep(0.05)
        yield piece


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
DRIPS = {
    "body": lambda data: Reply(200, drip(data[:1000]), OCTETS),
    "sizes of chunks": lambda _: Reply(raw=drip(CHUNKED + b"5\r\nhello\r\n")),
    "trailer": lambda _: Reply(raw=drip(CHUNKED + b"0\r\n", b"A: b\r\n")),
    "headers": lambda _: Reply(raw=drip(HEAD + b"A: ")),
}


def dripping(make, data):
    """A hook: each who asks gets a drip of his own."""
    return lambda *_: make(data)


def test_row_27_a_slow_drip_ends_by_an_overall_deadline_and_by_its_pace(shop):
    with device_of(shop, stall_seconds=0.4, exchange_seconds=1.2) as device:
        factor = shop.new_factor()
        data = heavy(factor)
        where = BLOBS + digest(data)
        shop.release(factor, data)
        with assert_unharmed(device, volatile=TAKEN):
            for name, make in DRIPS.items():
                device.begin()
                device.proxy.attack(POLL, dripping(make, b"{"))
                assert device.poll(within=8) == "deadline", name
                if name == "body":  # only the polls in the background are logged; they are put off by those that fail
                    eventually(lambda: "deadline has passed" in device.said(), "the log to say it")
                device.proxy.relent()
                device.retry()
            device.proxy.attack(where, dripping(DRIPS["body"], data))
            shop.roll_out(factor)
            device.poll(within=8)
            device.logs("less than 1024 bytes a second")
            shows(device, "network: too_slow")
            for make in DRIPS.values():
                device.begin()
                device.proxy.attack(where, dripping(make, data))
                device.retry(within=8)
                device.logs("again in")
        device.proxy.relent()
        device.retry()
        device.retry()  # the first may find that the attacker's bytes are not a beginning
        device.runs(factor)


def squeezed(size: int) -> bytes:
    """Zeros, a thousandth of their length, as gzip; made without holding them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * (size // MIB - 1)


def test_row_28_a_gzip_bomb_takes_no_memory(device, coming):
    factor, data = coming
    where, bomb = BLOBS + digest(data), squeezed(2 * limits.GIB)
    assert len(bomb) < 4 * MIB
    peak = peak_memory(device)
    with assert_unharmed(device, volatile=TAKEN):
        for encoding in ("gzip", "deflate", "gzip, gzip", "GZIP"):
            headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
            device.proxy.attack(POLL, Reply(200, bomb, headers))
            assert device.poll() == "encoding"
            if encoding == "gzip":  # only the polls in the background are logged; they are put off by those that fail
                eventually(lambda: "asked for plain bytes; got gzip" in device.said(), "the log to say it")
        # Where the length of the blob, or a bundle's shape, is all that is wrong with it.
        packed = [HEAD, b"Transfer-Encoding: gzip, chunked\r\n\r\n", bomb]
        device.proxy.attack(POLL, lambda *_: Reply(raw=packed))
        assert device.poll() != ""
        device.proxy.relent()
        device.proxy.attack(where, Reply(200, bomb, {**OCTETS, "Content-Encoding": "gzip"}))
        device.shop.roll_out(factor)
        assert device.poll() == ""
        device.logs("encoding")
        shows(device, "network: encoding")
        device.proxy.attack(where, lambda *_: Reply(raw=packed))
        device.retry()
    assert peak_memory(device) - peak < 64 * MIB
    device.recovers()


def peak_memory(device) -> int:
    """The most that the device's process has held, in bytes."""
    status = Path(f"/proc/{device.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
