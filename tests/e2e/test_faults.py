"""The fault table: what the network does to a device, what the device says and runs meanwhile, and what it costs.

A real device against the real server, behind a proxy that misbehaves. Every row begins at the same place: the device
runs 2.0.0, and the next release is assigned. While the fault lasts 2.0.0 must answer; when it is over the next one
must come, from where the download stood. `pytest tests/e2e/test_faults.py -s` prints the table.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from device_sdk import Fleet
from device_sdk.errors import DeviceError
from device_sdk.install import Clock
from device_sdk.protocol.polls import BLOBS, POLL
from tests.attacks.world import Hook, Proxy, Shop, proxy_to
from tests.live import LiveServer
from tests.sdk.loopback import Asked, Reply
from tests.sdk.world import graph

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ONES = {"x": np.ones((1, 4), np.float32)}
BEFORE, AFTER = 2.0, 3.0
SIZE = 1_000_000
DAY = 86_400.0
HOTEL = Reply(200, b"<html><body>Welcome! Please log in.</body></html>", {"Content-Type": "text/html; charset=utf-8"})
NOTHING = Reply(raw=[])  # the connection ends before an answer
MOST_TRIES = 40


def large(factor: float) -> bytes:
    pad = np.random.default_rng(7).integers(0, 256, SIZE, np.uint8)
    return graph([helper.make_node("Mul", ["x", "k"], ["y"])], {"k": np.float32(factor), "pad": pad})


@dataclass
class Line:
    """The proxy of a row, and the body bytes of files that it let through."""

    proxy: Proxy
    passed: int = 0

    def on_files(self, say: Callable[[Reply], Reply]) -> None:
        """`say` makes of the server's answer what the device gets. Patches are none of the table's business."""

        def hook(asked: Asked, honest: Callable[..., Reply]) -> Reply:
            if asked.path.endswith("/patches"):
                return Reply(404)
            reply = say(honest())
            if isinstance(reply.body, bytes) and "text/html" not in reply.headers.get("Content-Type", ""):
                self.passed += len(reply.body)
            return reply

        self.proxy.attack(BLOBS, hook)

    def heal(self) -> None:
        self.proxy.relent()
        self.on_files(lambda reply: reply)


def cut_at(*parts: float) -> Callable[[Line], None]:
    """The line breaks at each of these parts of the file, and each time the device goes on behind it."""

    def breaks(line: Line) -> None:
        left = [int(part * len(large(AFTER))) for part in parts]

        def say(reply: Reply) -> Reply:
            at = int(reply.headers.get("Content-Range", "bytes 0-").removeprefix("bytes ").partition("-")[0])
            body = reply.body
            assert isinstance(body, bytes)
            if not left:
                return reply
            short = body[: left.pop(0) - at]
            return Reply(reply.status, short, {**reply.headers, "Content-Length": str(len(body))})

        line.on_files(say)

    return breaks


def files_say(reply: Reply) -> Callable[[Line], None]:
    return lambda line: line.on_files(lambda _: reply)


def all_say(*paths: str, reply: Hook | Reply) -> Callable[[Line], None]:
    def breaks(line: Line) -> None:
        for path in paths:
            line.proxy.attack(path, reply)

    return breaks


def drip(line: Line) -> None:
    """Right bytes, and too few of them."""

    def say(reply: Reply) -> Reply:
        body = reply.body
        assert isinstance(body, bytes)
        return Reply(reply.status, pieces(body), reply.headers)

    def pieces(body: bytes) -> Iterator[bytes]:
        for at in range(0, 2000, 50):
            time.sleep(0.1)
            line.passed += 50
            yield body[at : at + 50]

    line.on_files(say)


def wrong(reply: Reply) -> Reply:
    body = reply.body
    assert isinstance(body, bytes)
    return Reply(reply.status, body[:-1] + bytes([body[-1] ^ 1]), reply.headers)


@dataclass(frozen=True)
class Fault:
    """`says`: what the device reports while it lasts."""

    name: str
    breaks: Callable[[Line], None]
    says: str
    heals_itself: bool = False  # it is over after so many cuts
    virtual_days: int = 0
    address: str = ""  # where the device looks for its server meanwhile


FAULTS = [
    *(
        Fault(f"cut at {tenth} %", cut_at(tenth / 100), "waiting: network: truncated", heals_itself=True)
        for tenth in range(10, 100, 10)
    ),
    Fault(
        "cut at every 10 %", cut_at(*(tenth / 10 for tenth in range(1, 10))), "waiting: network: truncated",
        heals_itself=True,
    ),
    Fault("connection closed before an answer", files_say(NOTHING), "waiting: network"),
    Fault("files: a web page with 200", files_say(HOTEL), "waiting: network: captive_portal"),
    Fault("polls: a web page with 200", all_say(POLL, reply=HOTEL), "poll: captive_portal"),
    Fault("everything: a web page with 200", all_say("/", BLOBS, reply=HOTEL), "poll: captive_portal"),
    Fault("files: 503", files_say(Reply(503)), "waiting: network"),
    Fault("files: less than 1 KiB a second", drip, "waiting: network: too_slow"),
    Fault("DNS fails", files_say(NOTHING), "poll: transfer", address="http://fleet.invalid"),
    Fault("server gone for a month", all_say("/", BLOBS, reply=NOTHING), "poll: transfer", virtual_days=30),
]  # fmt: skip


@dataclass
class Device:
    """A copy of the device that stands before the update, in this process, with a clock that can be put forward."""

    home: Path
    line: Line
    model: str
    skipped: float = 0.0
    fleet: Fleet = field(init=False)

    def __post_init__(self) -> None:
        self.open()

    def open(self, address: str = "") -> None:
        provision = json.loads((self.home / "provision.json").read_text())
        provision["server"] = address or self.line.proxy.url
        (self.home / "provision.json").write_text(json.dumps(provision))
        clock = Clock(now=lambda: time.time() + self.skipped, monotonic=lambda: time.monotonic() + self.skipped)
        self.fleet = Fleet.open(self.home, rehearse=False, clock=clock, intra_op_threads=1, stall_seconds=0.5)

    def try_once(self) -> str:
        """Look once, with all that was put off; what it says of itself."""
        try:
            status = self.fleet.update_once().models[self.model]
        except DeviceError as error:
            return f"poll: {error.code}"
        return f"{status.state}: {status.reason}" if status.reason else status.state

    def answer(self) -> float:
        return float(self.fleet.model(self.model).run(ONES)["y"][0, 0])

    def kept(self) -> int:
        """Bytes on its disk."""
        return sum(path.stat().st_size for path in self.home.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def shop(embedded: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(embedded, tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def standing(shop: Shop) -> Path:
    """The directory of a device that runs 2.0.0; 3.0.0 is assigned, and none of it is here."""
    shop.roll_out(BEFORE)
    home = shop.enrol("standing")
    with Fleet.open(home, rehearse=False) as fleet:
        fleet.update_once()
        for _ in range(10):
            fleet.model(shop.model).run(ONES)
        assert fleet.update_once().models[shop.model].state == "committed"
    shop.roll_out(AFTER, large(AFTER))
    return home


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    print("\n\n| fault | the device says | meanwhile answers | after it answers | bytes, in files |")  # noqa: T201
    print("|---|---|---|---|---|", *rows, sep="\n")  # noqa: T201


@pytest.fixture
def device(shop: Shop, standing: Path, tmp_path: Path) -> Iterator[Device]:
    home = tmp_path / "home"
    shutil.copytree(standing, home, symlinks=True)
    with proxy_to(shop.server.url) as proxy:
        made = Device(home, Line(proxy), shop.model)
        try:
            yield made
        finally:
            made.fleet.stop()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_old_release_answers_while_the_fault_lasts_and_the_new_one_comes_after(device, fault, table):
    fault.breaks(device.line)
    if fault.address:
        device.fleet.stop()
        device.open(fault.address)
    assert set(during(device, fault)) == {(fault.says, BEFORE)}
    if not fault.heals_itself:
        device.line.heal()
    if fault.address or fault.virtual_days:
        device.fleet.stop()
        device.skipped = 0.0
        device.open()
    tries = arrives(device)
    after = device.answer()
    share = device.line.passed / len(large(AFTER))
    table.append(f"| {fault.name} | {fault.says} | {BEFORE} | {after}, at try {tries} | {share:.3f} |")
    assert after == AFTER
    assert 1 <= share < 1.01  # no part of it comes twice


def during(device: Device, fault: Fault) -> list[tuple[str, float]]:
    """What it says, and what it answers, at each look, until it is over or has been looked at enough."""
    said: list[tuple[str, float]] = []
    for each in count():
        outcome = device.try_once()
        device.skipped += DAY if fault.virtual_days else 4_000.0
        if outcome == "probation":
            device.skipped = 0.0
            return said
        said.append((outcome, device.answer()))
        assert each < MOST_TRIES
        if not fault.heals_itself and each + 1 >= max(fault.virtual_days, 2):
            return said
    raise AssertionError


def arrives(device: Device) -> int:
    """How many looks it takes until the new release serves."""
    for tries in range(1, MOST_TRIES):
        if device.try_once() in {"probation", "committed"}:
            return tries
        device.skipped += 4_000.0
    raise AssertionError(device.try_once())


def test_a_month_without_a_server_fills_no_disk_and_survives_restarts(device):
    device.line.proxy.attack("/", NOTHING)
    device.line.proxy.attack(BLOBS, NOTHING)
    before = device.kept()
    for day in range(30):
        for _ in range(8):
            device.try_once()
            device.skipped += DAY / 8
        if day % 7 == 3:
            device.fleet.stop()
            device.open()
        assert device.answer() == BEFORE
    told = device.fleet.status().events_waiting
    assert 200 < told <= 8 * 30 + 10  # a view that has expired is told once an hour at most
    assert device.kept() - before < 400 * told


def test_one_wrong_byte_is_refused_by_name_and_the_old_release_stays(embedded, tmp_path, table):
    """The server takes a release back from a device that failed: the rollout of this row is its own."""
    shop = Shop(embedded, tmp_path)
    shop.roll_out(BEFORE)
    with proxy_to(shop.server.url) as proxy:
        device = Device(shop.enrol("cam", proxy.url), Line(proxy), shop.model)
        device.try_once()
        for _ in range(10):
            device.answer()
        assert device.try_once() == "committed"
        shop.roll_out(AFTER, large(AFTER))
        device.line.on_files(wrong)
        said, kept = device.try_once(), device.answer()
        device.line.heal()
        device.skipped += 4_000.0
        after = (device.try_once(), device.answer())
        device.fleet.stop()
    table.append(f"| files: one byte is wrong | {said} | {kept} | {after[1]}, and the server takes 3.0.0 back | - |")
    assert (said, kept) == ("failed: hash_mismatch", BEFORE)
    assert after == ("committed", BEFORE)
