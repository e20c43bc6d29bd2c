"""From nothing to the first answer, without a network: a device's process beside one that only loads the file."""

import os
from pathlib import Path
from statistics import median

from deploy.bench import footprint, models
from deploy.bench.measure import Row, Scale, Section
from device_sdk.config import Home
from device_sdk.standing import remember

LIMIT = 1.15
_BARE = """
import time
import numpy, onnxruntime
began = time.perf_counter()
session = onnxruntime.InferenceSession({model!r}, providers=["CPUExecutionProvider"])
width = session.get_inputs()[0].shape[1]
session.run(None, {{"x": numpy.zeros((1, width), numpy.float32)}})
answered = time.perf_counter()
"""
_FLEET = """
import time
import numpy, onnxruntime
import device_sdk.client
began = time.perf_counter()
fleet = device_sdk.client.Fleet.open({home!r})
model = fleet.model("bench")
width = model.inputs["x"].shape[1]
model.run({{"x": numpy.zeros((1, width), numpy.float32)}})
answered = time.perf_counter()
"""
_PRINT = """
with open("/proc/self/stat") as file:
    since_boot = int(file.read().rsplit(")", 1)[1].split()[19]) / {ticks}
print(answered - began, time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot, time.process_time())
"""
NOTES = (
    "Medians of forty starts each, in turns, unless it says shortest. Both end with their first answer.",
    "A committed release that has answered on this device, and nobody has written to its files since they were hashed:",
    "ours goes by that, and hashes them again once `start()` runs, which is not in these figures.",
    "Everything imported: the clock starts when numpy, onnxruntime and the SDK are. The bar is held against that,",
    "and against the time from the process's start, in which Python and all imports count, the SDK's too.",
    "The last view is remembered: tuf and requests are loaded by `start()`, not by `Fleet.open`.",
)


def measure(folder: Path, scale: Scale) -> Section:
    rows = [
        row
        for width in (scale.layer, int(scale.layer * models.LARGER))
        for row in _of(folder / str(width), width, scale)
    ]
    return Section("Start-up without a network, weights as external data", rows, NOTES)


def _of(folder: Path, width: int, scale: Scale) -> list[Row]:
    folder.mkdir()
    files = models.medium(width, 1)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    home = _home(folder / "home", files)
    programs = {"bare": _BARE.format(model=str(folder / "model.onnx")), "fleet": _FLEET.format(home=str(home))}
    turns = [{name: _run(code, folder) for name, code in programs.items()} for _ in range(scale.rounds)]
    usual = {name: [median(turn[name][part] for turn in turns) for part in range(3)] for name in programs}
    least = {name: [min(turn[name][part] for turn in turns) for part in range(3)] for name in programs}
    size = f"{sum(map(len, files.values())) / 1e6:.0f} MB"
    return [
        _row(f"{size}: to the first answer, everything imported", usual, 0, judged=True),
        _row(f"{size}: the same, the shortest", least, 0, judged=False),
        _row(f"{size}: from the process's start to its first answer", usual, 1, judged=True),
        _row(f"{size}: the same, the shortest", least, 1, judged=False),
        _row(f"{size}: CPU of the process", usual, 2, judged=False),
    ]


def _row(what: str, took: dict[str, list[float]], part: int, *, judged: bool) -> Row:
    ours, bare = took["fleet"][part] * 1e3, took["bare"][part] * 1e3
    bar = f"<= x {LIMIT:g}" if judged else ""
    return Row(what, ours, "ms", bare, "bare onnxruntime, same file", bar, ours <= bare * LIMIT if judged else None)


def _home(folder: Path, files: dict[str, bytes]) -> Path:
    home = Home(footprint.home_with(folder, files))
    home.view_file.write_bytes(b"{}")
    remember(home.standing_file, home.view_file, {})
    return folder


def _run(code: str, folder: Path) -> list[float]:
    program = code + _PRINT.format(ticks=os.sysconf("SC_CLK_TCK"))
    return [float(part) for part in footprint.started(program, folder).split()]
