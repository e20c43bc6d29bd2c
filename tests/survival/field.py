"""The drill's tables of a device before the real server: what the network and its disk do to it, and its death."""

import io
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import onnxruntime

from tests.attacks.world import Shop
from tests.live import LiveServer, serving
from tests.survival import faults, killed
from tests.survival.faults import AFTER, BEFORE, FAULTS, WRONG_BYTE, Fault, Found
from tests.survival.outcome import Line, Step, Table, Tried
from tests.survival.store import table

NOTE = "Each device runs 2.0.0 and had 1.0.0; 3.0.0, of a megabyte, is assigned when the fault begins."


def tables(folder: Path, step: Step) -> Iterator[Table]:
    """With an embedded server of their own."""
    onnxruntime.set_default_logger_severity(3)
    with serving("embedded", {}) as server:
        with quiet():
            shop = Shop(server, folder)
            standing = faults.prepare(shop)
        yield _faults(shop, standing, folder, step)
        yield _killed(shop, standing, folder, step)


def _faults(shop: Shop, standing: Path, folder: Path, step: Step) -> Table:
    lines = []
    for number, fault in enumerate(FAULTS):
        step(fault.name)
        with quiet(), faults.device_like(standing, folder / f"home-{number}", shop) as device:
            lines.append(_line(fault, faults.befall(device, fault)))
    step("one byte is wrong")
    lines.append(_wrong_byte(shop.server, folder / "wrong"))
    columns = ("fault", "the device says", "meanwhile answers", "afterwards answers", "bytes, in files")
    return Table("Faults between a device and the real server", columns, lines, [NOTE])


def _line(fault: Fault, found: Found) -> Line:
    broken = found.breaks(fault)
    answers = "none, and says so" if fault.answers is None else f"{fault.answers}"
    says = (fault.says, answers) if fault.says else ("nothing: it updates at once", "")
    return Line(
        (fault.name, *says, f"{found.after}, at try {found.tries}", f"{found.share:.3f}"), not broken, tuple(broken)
    )


def _wrong_byte(server: LiveServer, folder: Path) -> Line:
    folder.mkdir()
    with quiet():
        found = faults.wrong_byte(Shop(server, folder))
    after = f"{found.after[1]}: the server takes 3.0.0 back"
    return Line(("files: one byte is wrong", found.said, f"{found.kept}", after, ""), found == WRONG_BYTE)


def _killed(shop: Shop, standing: Path, folder: Path, step: Step) -> Table:
    """A whole update, rehearsal and all."""
    home = folder / "killed"
    shutil.copytree(standing, home)
    told = _told(killed.rounds(home, shop.model, rehearse=True), step)
    parts = killed.by_part(told, old=BEFORE, new=AFTER)
    found: list[Tried] = sorted(parts.values(), key=lambda each: each.what)
    note = "SIGKILL before each change to the disk, each request, before and in the rehearsal; then a new process."
    return table("A device's process, killed at every step of a whole update", found, note)


def _told(found: Iterator[dict[str, object]], step: Step) -> Iterator[dict[str, object]]:
    for each in found:
        step(f"killed at {each.get('point', 'the end')}: {each.get('doing', '')}")
        yield each


@contextmanager
def quiet() -> Iterator[None]:
    """What CI's command and the SDK say is not the drill's business."""
    log = logging.getLogger("device_sdk")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)
