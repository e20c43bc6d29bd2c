"""From nothing to the first answer, without a network: `Fleet.open` beside onnxruntime loading the same files."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from deploy.bench import models
from deploy.bench.footprint import home_with
from deploy.bench.measure import Row, Scale, Section

LIMIT = 1.15
ROUNDS = 9
# What both need is imported before the clock starts; the files are in the disk's cache.
_BARE = """
import json, sys, time
import numpy, onnxruntime
path, width = sys.argv[1], int(sys.argv[2])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
began, spent = time.perf_counter(), time.process_time()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
session.run(None, {"x": numpy.ones((1, width), numpy.float32)})
print(json.dumps([time.perf_counter() - began, time.process_time() - spent]))
"""
_FLEET = """
import json, sys, time
import numpy, onnxruntime, device_sdk.client
path, width = sys.argv[1], int(sys.argv[2])
began, spent = time.perf_counter(), time.process_time()
fleet = device_sdk.client.Fleet.open(path, intra_op_threads=1)
fleet.model("bench").run({"x": numpy.ones((1, width), numpy.float32)})
print(json.dumps([time.perf_counter() - began, time.process_time() - spent]))
"""


def measure(folder: Path, scale: Scale) -> Section:
    files = models.medium(scale.layer, 0)
    plain = folder / "plain"
    plain.mkdir()
    for name, data in files.items():
        (plain / name).write_bytes(data)
    home = home_with(folder / "home", files)
    programs = {"bare": (_BARE, plain / "model.onnx"), "fleet": (_FLEET, home)}
    spent: dict[str, list[list[float]]] = {name: [] for name in programs}
    for _ in range(1 if scale.rounds == 1 else ROUNDS):
        for name, (code, path) in programs.items():
            spent[name].append(_run(code, path, scale.layer))
    size = sum(map(len, files.values())) / 2**20
    (wall, cpu), (wall0, cpu0) = (_medians(spent[name]) for name in ("fleet", "bare"))
    return Section(f"Start-up without a network, a model of {size:.0f} MB", [
        Row("to the first answer", wall, "ms", wall0, "onnxruntime, same files", f"<= {LIMIT:g} x",
            wall <= LIMIT * wall0),
        Row("processor time of it", cpu, "ms", cpu0, "onnxruntime, same files"),
    ], ["Imports not counted, files in the disk's cache, one thread; each run in a process of its own, taking turns.",
        "Ours hashes the files before it loads them, and reads provision, trust, state and outbox."])  # fmt: skip


def _run(code: str, path: Path, width: int) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code, str(path), str(width)], capture_output=True, check=True)
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def _medians(runs: list[list[float]]) -> tuple[float, float]:
    wall, cpu = zip(*runs, strict=True)
    return statistics.median(wall) * 1e3, statistics.median(cpu) * 1e3
