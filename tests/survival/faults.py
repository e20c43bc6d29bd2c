"""The fault table: what befalls a device, what the device says and runs meanwhile, and what it costs.

A real device against the real server, behind a proxy that misbehaves. Every row begins at the same place: the device
runs 2.0.0, had 1.0.0 before, and the next release is assigned. While the fault lasts a whole release must answer; when
it is over the next one must come, from where the download stood. `make drill` prints the table.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from secrets import token_hex

import numpy as np
from onnx import helper

from device_sdk import Fleet
from device_sdk.errors import DeviceError, NoModelError
from device_sdk.install import Clock
from device_sdk.protocol.manifest import digest
from device_sdk.protocol.polls import BLOBS, POLL
from tests.attacks.world import Hook, Proxy, Shop, proxy_to
from tests.live import KNOWN
from tests.sdk.loopback import Asked, Reply
from tests.sdk.world import graph, scaling

ONES = {"x": np.ones((1, 4), np.float32)}
FIRST, BEFORE, AFTER = 1.0, 2.0, 3.0
SIZE = 1_000_000
DAY = 86_400.0
HOTEL = Reply(200, b"<html><body>Welcome! Please log in.</body></html>", {"Content-Type": "text/html; charset=utf-8"})
NOTHING = Reply(raw=[])  # the connection ends before an answer
GONE = "poll: transfer"
MOST_TRIES = 40
SMALL = ("store/state.json", "progress.json", "outbox/events.jsonl", "trust/view.json", "trust/floor.json")


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


def honest(line: Line) -> None:
    """Nothing is wrong with the network."""
    line.on_files(lambda reply: reply)


def gone(line: Line) -> None:
    for path in ("/", BLOBS):
        line.proxy.attack(path, NOTHING)


def emptied(*names: str) -> Callable[[Path], None]:
    return lambda home: [(home / name).write_bytes(b"") for name in names]  # type: ignore[return-value]


def spoilt(*names: str) -> Callable[[Path], None]:
    return lambda home: [spoil(home / name) for name in names]  # type: ignore[return-value]


def spoil(path: Path) -> None:
    """Other bytes, as many."""
    path.write_bytes(bytes(byte ^ 0x55 for byte in path.read_bytes()))


def spoilt_files(*factors: float) -> Callable[[Path], None]:
    return lambda home: [spoil(home / "store" / "blobs" / digest(scaling(each))) for each in factors]  # type: ignore[return-value]


def spoilt_download(home: Path) -> None:
    data = large(AFTER)
    (home / "store" / "incoming" / f"{digest(data)}.part").write_bytes(bytes(len(data) // 2))


@dataclass(frozen=True)
class Fault:
    """`says`: what the device reports while it lasts, "": it updates all the same; `answers`: by which release, None:
    it has no model left.
    """

    name: str
    breaks: Callable[[Line], None]
    says: str
    answers: float | None = BEFORE
    heals_itself: bool = False  # it is over after so many cuts
    virtual_days: int = 0
    address: str = ""  # where the device looks for its server meanwhile
    clock: float = 0.0  # seconds by which its wall clock is wrong meanwhile
    harms: Callable[[Path], None] | None = None  # what happens to its directory before it starts again
    share: float = 1.01  # of the new release's bytes may come at most


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
    Fault("server gone for a month", gone, GONE, virtual_days=30),
    Fault("clock at 1970", honest, "", clock=-time.time()),
    Fault("clock in 2126", honest, "poll: expired", clock=100 * 365.25 * DAY),
    Fault("half a download is rubbish", gone, GONE, harms=spoilt_download, share=1.51),
    Fault("the state file is empty", gone, GONE, harms=emptied("store/state.json")),
    Fault("the state file is rubbish", gone, GONE, harms=spoilt("store/state.json")),
    Fault("every small file is empty", gone, GONE, harms=emptied(*SMALL)),
    Fault("a file of the release that runs is rubbish", gone, GONE, answers=FIRST, harms=spoilt_files(BEFORE)),
    Fault("files of both releases are rubbish", gone, GONE, answers=None, harms=spoilt_files(FIRST, BEFORE)),
]  # fmt: skip


@dataclass
class Device:
    """A copy of the device that stands before the update, in this process, with a clock that can be put forward."""

    home: Path
    line: Line
    model: str
    skipped: float = 0.0
    wrong: float = 0.0  # of the wall clock alone
    fleet: Fleet = field(init=False)

    def __post_init__(self) -> None:
        self.open()

    def open(self, address: str = "") -> None:
        provision = json.loads((self.home / "provision.json").read_text())
        provision["server"] = address or self.line.proxy.url
        (self.home / "provision.json").write_text(json.dumps(provision))
        clock = Clock(
            now=lambda: time.time() + self.skipped + self.wrong, monotonic=lambda: time.monotonic() + self.skipped
        )
        self.fleet = Fleet.open(self.home, rehearse=False, clock=clock, intra_op_threads=1, stall_seconds=0.5)

    def try_once(self) -> str:
        """Look once, with all that was put off; what it says of itself."""
        try:
            status = self.fleet.update_once().models[self.model]
        except DeviceError as error:
            return f"poll: {error.code}"
        return f"{status.state}: {status.reason}" if status.reason else status.state

    def answer(self) -> float | None:
        try:
            return float(self.fleet.model(self.model).run(ONES)["y"][0, 0])
        except NoModelError:
            return None

    def kept(self) -> int:
        """Bytes on its disk."""
        return sum(path.stat().st_size for path in self.home.rglob("*") if path.is_file())


def prepare(shop: Shop) -> Path:
    """The directory of a device that runs 2.0.0 and had 1.0.0; 3.0.0 is assigned, and none of it is here."""
    home = shop.enrol(f"standing-{token_hex(3)}")
    for factor in (FIRST, BEFORE):
        shop.roll_out(factor)
        with Fleet.open(home, rehearse=False) as fleet:
            fleet.update_once()
            for _ in range(10):
                fleet.model(shop.model).run(ONES)
            assert fleet.update_once().models[shop.model].state == "committed"
    shop.roll_out(AFTER, large(AFTER))
    return home


@contextmanager
def device_like(standing: Path, home: Path, shop: Shop) -> Iterator[Device]:
    """A copy of the device that stands before the update, behind a proxy of its own."""
    shutil.copytree(standing, home, symlinks=True)
    with proxy_to(shop.server.url) as proxy:
        made = Device(home, Line(proxy), shop.model)
        try:
            yield made
        finally:
            made.fleet.stop()


@dataclass(frozen=True)
class Found:
    """What came of a fault. `meanwhile`: what the device said and answered, each once; `share`: of the file's bytes."""

    meanwhile: frozenset[tuple[str, float | None]]
    after: float | None
    tries: int
    share: float

    def breaks(self, fault: Fault) -> list[str]:
        """What is not as the table promises."""
        wrong = []
        if self.meanwhile != ({(fault.says, fault.answers)} if fault.says else set()):
            wrong.append(f"meanwhile {sorted(self.meanwhile, key=str)}")
        if self.after != AFTER:
            wrong.append(f"afterwards it answers {self.after}")
        if not 1 <= self.share < fault.share:
            wrong.append(f"{self.share:.3f} of the file came")
        return wrong


def befall(device: Device, fault: Fault) -> Found:
    """Let it happen, look, let it be over, and look again."""
    fault.breaks(device.line)
    is_new_start = bool(fault.address or fault.clock or fault.harms or fault.virtual_days)
    if fault.address or fault.clock or fault.harms:
        device.fleet.stop()
        device.wrong = fault.clock
        if fault.harms:
            fault.harms(device.home)
        device.open(fault.address)
    meanwhile = frozenset(_during(device, fault))
    if not fault.heals_itself:
        device.line.heal()
    if is_new_start and not fault.harms:
        device.fleet.stop()
        device.skipped = device.wrong = 0.0
        device.open()
    tries = _arrives(device)
    return Found(meanwhile, device.answer(), tries, device.line.passed / len(large(AFTER)))


def _during(device: Device, fault: Fault) -> list[tuple[str, float | None]]:
    """What it says, and what it answers, at each look, until it is over or has been looked at enough."""
    said: list[tuple[str, float | None]] = []
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


def _arrives(device: Device) -> int:
    """How many looks it takes until the new release serves."""
    for tries in range(1, MOST_TRIES):
        if device.try_once() in {"probation", "committed"}:
            return tries
        device.skipped += 4_000.0
    raise AssertionError(device.try_once())


@dataclass(frozen=True)
class WrongByte:
    """What the device said and answered while one byte of the file was wrong, and after."""

    said: str
    kept: float | None
    after: tuple[str, float | None]


def wrong_byte(shop: Shop) -> WrongByte:
    """The server takes a release back from a device that failed: this row has a device and a rollout of its own."""
    shop.roll_out(BEFORE)
    with proxy_to(shop.server.url) as proxy:
        device = Device(shop.enrol(f"cam-{token_hex(3)}", proxy.url), Line(proxy), shop.model)
        try:
            device.try_once()
            for _ in range(10):
                device.answer()
            assert device.try_once() == "committed"
            shop.roll_out(AFTER, large(AFTER))
            device.line.on_files(wrong)
            said, kept = device.try_once(), device.answer()
            device.line.heal()
            time.sleep(KNOWN)
            device.skipped += 4_000.0
            return WrongByte(said, kept, (device.try_once(), device.answer()))
        finally:
            device.fleet.stop()


WRONG_BYTE = WrongByte("failed: hash_mismatch", BEFORE, ("committed", BEFORE))
