"""What a device downloads when a model was trained further: our patches beside those of other tools."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.bench import finetune, patchers
from deploy.bench.finetune import Shape, adamw, quantised, sgd, to_onnx
from deploy.bench.measure import FULL, SMALL, Row, Scale, Section
from deploy.bench.patchers import PATCH_FROM, TOOLS, Made
from device_sdk.protocol.patches.frames import NOTHING
from fleet.releases.deltas import maker

NAME = "model.onnx"
MIB = 1024 * 1024
MEMORY = 48 * MIB
COARSER = 3.5  # zstd then leaves as much of int8 as of the model by which the bars were set: 67 %
# The rest of the memory limit is what python and numpy have taken: numpy reserves much address space that it never
# touches, so the limit is on what is added to it.
_DECODE = """
import hashlib, json, os, resource, sys, time
from device_sdk.protocol.patches import arithmetic, decoder
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
order, limit = json.loads(sys.argv[1]), int(sys.argv[2])
before = status("VmRSS")
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + limit - before,) * 2)
patch, base = open(order["patch"], "rb"), os.open(order["base"], os.O_RDONLY)
began, digest = time.process_time(), hashlib.sha256()
for piece in decoder.apply(patch.read, lambda at, size: os.pread(base, size, at), base_sha256=order["base_sha256"],
                           target_sha256=order["target_sha256"], target_length=order["length"]):
    digest.update(piece)
assert digest.hexdigest() == order["target_sha256"]
print(json.dumps({"seconds": time.process_time() - began, "peak": status("VmHWM"), "before": before}))
"""


@dataclass(frozen=True, slots=True)
class Change:
    """A pair of files, and what its patch may cost, in percent of the new file (`absolute`: in bytes)."""

    what: str
    old: bytes
    new: bytes
    bar: float | None = None
    absolute: bool = False


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes on the wire; seconds of processor time; bytes of memory at the peak of decoding."""

    wire: int
    encode: float
    decode: float
    peak: int


def measure(folder: Path, scale: Scale) -> Section:
    full, beside_all = scale is FULL, scale in {FULL, SMALL}
    shape, steps = {FULL: (finetune.FULL, 150), SMALL: (finetune.SMALL, 150)}.get(scale, (finetune.TINY, 3))
    told: list[str] = []
    rows, costs, beside = [], [], [HEAD]
    for number, change in enumerate(changes(shape, steps, told)):
        place = folder / str(number)
        cost = patch(place, change.old, change.new)
        others = (
            patchers.all_make(place / "base" / NAME, place / "target" / NAME, place) if beside_all or not number else {}
        )
        rows.append(_row(change, cost, others, judged=full))
        costs.append((change, cost))
        told.append(_whole(change, cost))
        if others:
            beside.append((change.what, _cell(cost, change), *(_cell(each, change) for each in others.values())))
        shutil.rmtree(place)
    rows += _processor(costs, judged=full)
    rows.append(_limited(folder / "limited", shape, judged=full))
    told.append(BESIDE)
    return Section("Delta: percent of the new file on the wire", rows, told, beside)


def changes(shape: Shape, steps: int, told: list[str]) -> Iterator[Change]:
    """The same model, changed as fine-tuning changes it. Really: forward, backward, step."""
    start = finetune.initial(shape)
    base, before = adamw(start, shape, steps=steps // 5 + 1, seed=1, rate=1e-3)
    tuned, _ = adamw(base, shape, steps=steps, seed=2)
    told.append(
        f"{sum(value.nbytes for value in base.values()) / 1e6:.0f} MB of float32 in the shape of MiniLM, trained in "
        f"numpy: {steps // 5 + 1} steps of AdamW at 1e-3 make the base (loss {before[0]:.2f} to {before[-1]:.2f}); the "
        f"changes are one step of SGD at 0.01, or {steps} of AdamW at 2e-5 falling to 0, batches of {shape.batch} "
        f"texts of {shape.tokens} words. Words that no batch held are rows that stay as they were. The task is made up."
    )
    old = to_onnx(base, shape)
    yield Change("metadata only", old, to_onnx(base, shape, note={"commit": "4be1c0", "data": "set 8"}), 10_000, True)
    head = adamw(base, shape, steps=min(steps, 20), seed=3, only=("head",))[0]
    yield Change("new head", old, to_onnx(head, shape))
    last = adamw(base, shape, steps=min(steps, 20), seed=4, only=("head", "norm", f"layer{shape.layers - 1}."))[0]
    yield Change("head and last layer", old, to_onnx(last, shape), 5.5)
    yield Change("one SGD step, all weights", old, to_onnx(sgd(base, shape, seed=5, rate=0.01), shape), 15)
    yield Change(f"{steps} AdamW steps", old, to_onnx(tuned, shape), 36)
    decayed = adamw(base, shape, steps=steps, seed=2, decay=0.01)[0]
    yield Change(f"{steps} AdamW steps with weight decay", old, to_onnx(decayed, shape))
    halves = [to_onnx(weights, shape, half=True) for weights in (base, tuned)]
    yield Change(f"float16, {steps} AdamW steps", *halves, 25)
    eights = [to_onnx(quantised(weights), shape) for weights in (base, tuned)]
    yield Change(f"int8, {steps} AdamW steps", *eights, 4)
    told.append(
        f"int8: a patch that were told, for nothing, by how much every float changed would still be "
        f"{100 * finetune.rounding(base, tuned) / len(eights[1]):.2f} % of the new file: which way each value is "
        "rounded. These weights fill all levels of int8. The bars were set by a model of which zstd left 67 % in int8, "
        f"so that its steps were coarser; with steps {COARSER} times as coarse zstd leaves as much here: the next row."
    )
    coarse = [to_onnx(quantised(weights, coarser=COARSER), shape) for weights in (base, tuned)]
    yield Change(f"int8 in coarser steps, {steps} AdamW steps", *coarse, 4)
    yield Change("float32 to int8 of the same weights", old, eights[0], 0.5)
    yield Change("float32 to float16 of the same weights", old, halves[0])
    again = adamw(start, shape, steps=steps // 5 + 1, seed=6, rate=1e-3)[0]
    yield Change("trained again from the same beginning", old, to_onnx(again, shape))
    yield Change("full float32, from nothing", b"", old, 86)


def patch(place: Path, old: bytes, new: bytes) -> Cost:
    """Made and applied as in production: each in a process of its own."""
    for side, data in (("base", old), ("target", new)):
        (place / side).mkdir(parents=True)
        (place / side / NAME).write_bytes(data)
    sha = hashlib.sha256(new).hexdigest()
    base_sha = hashlib.sha256(old).hexdigest() if old else NOTHING
    order = maker.Order(NAME if old else "", base_sha, NAME, sha, len(new))
    command = [sys.executable, maker.__file__, str(place), json.dumps(asdict(order)), str(8 * 1024**3), "600"]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if "length" not in answer:
        raise RuntimeError(f"no patch: {answer}")
    applied = decode(place, base_sha, sha, len(new))
    return Cost(answer["length"], answer["encode"], applied["seconds"], applied["peak"])


def decode(place: Path, base_sha: str, sha: str, length: int, *, limit: int = 0) -> dict[str, Any]:
    order = {
        "patch": str(place / "patch"), "base": str(place / "base" / NAME), "base_sha256": base_sha,
        "target_sha256": sha, "length": length,
    }  # fmt: skip
    command = [sys.executable, "-c", _DECODE, json.dumps(order), str(limit)]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def _row(change: Change, cost: Cost, others: Mapping[str, Made | str], *, judged: bool) -> Row:
    """Beside `zstd --patch-from`, where there is that command; else beside the whole file by zlib."""
    other = others.get(PATCH_FROM)
    baseline, against = (
        (other.wire, PATCH_FROM) if isinstance(other, Made) else (_zlib(change), "zlib of the whole file")
    )
    value, unit = float(cost.wire), "bytes"
    if not change.absolute:
        value, baseline, unit = 100 * value / len(change.new), 100 * baseline / len(change.new), "%"
    bar = f"<= {change.bar:,g} {unit}" if change.bar and judged else ""
    return Row(change.what, value, unit, baseline, against, bar, value <= change.bar if bar and change.bar else None)


def _whole(change: Change, cost: Cost) -> str:
    return (
        f"{change.what}: {cost.wire:,} of {len(change.new):,} bytes; the whole file by zlib: "
        f"{100 * _zlib(change) / len(change.new):.1f} %"
    )


def _zlib(change: Change) -> float:
    return len(zlib.compress(change.new))


def _cell(made: Cost | Made | str, change: Change) -> str:
    """Size; encoding and decoding; memory of the latter."""
    if isinstance(made, str):
        return made
    size = f"{made.wire:,} B" if change.absolute else f"{100 * made.wire / len(change.new):.2f} %"
    return f"{size}; {made.encode:.1f} + {made.decode:.2f} s; {made.peak / MIB:.0f} MiB"


HEAD = ("Change", "ours", *TOOLS)
BESIDE = (
    "The second table: bytes on the wire; processor seconds of encoding + decoding; resident at the peak of decoding "
    "(ours with python and numpy, 30 MiB). Every patch was applied and the result compared. zstd --long=27, xdelta3 -9 "
    "with the whole old file as its window."
)


def _processor(costs: list[tuple[Change, Cost]], *, judged: bool) -> list[Row]:
    """The worst of all changes, for 100 MB of the new file; the small ones say nothing about speed."""
    large = max(len(change.new) for change, _ in costs)
    there = [(change, cost) for change, cost in costs if len(change.new) > 0.9 * large]
    hundred = 100e6 / large
    sample = there[0][0].new
    packed, encoded = _timed(lambda: zlib.compress(sample))
    _, decoded = _timed(lambda: zlib.decompress(packed))
    encode, decode_ = max(cost.encode for _, cost in there), max(cost.decode for _, cost in there)
    peak = max(cost.peak for _, cost in costs) / MIB
    return [
        Row("encode 100 MB, the worst of these", encode * hundred, "s", encoded * hundred, "zlib of the whole file",
            "<= 6 s" if judged else "", encode * hundred <= 6 if judged else None),
        Row("decode 100 MB, the worst of these", decode_ * hundred, "s", decoded * hundred, "zlib of the whole file",
            "<= 1 s" if judged else "", decode_ * hundred <= 1 if judged else None),
        Row("resident at the peak of decoding", peak, "MiB", large / MIB, "the file itself"),
    ]  # fmt: skip


def _limited(place: Path, shape: Shape, *, judged: bool) -> Row:
    """Twice the model in one file, rebuilt under a memory limit that the process cannot pass."""
    start = finetune.initial(shape)
    step = sgd(start, shape, seed=7, rate=0.01)
    old, new = (to_onnx({**w, **{f"copy.{name}": value for name, value in w.items()}}, shape) for w in (start, step))
    cost = patch(place, old, new)
    shas = [hashlib.sha256(data).hexdigest() for data in (old, new)]
    found = decode(place, *shas, len(new), limit=MEMORY)
    peak = found["peak"] / MIB
    sizes = f"{len(new) / 1e6:.0f} MB of {cost.wire / 1e6:.0f} MB of patch"
    what = f"resident, {sizes} under a limit of {MEMORY // MIB} MiB"
    bar = f"<= {MEMORY // MIB} MiB" if judged else ""
    return Row(what, peak, "MiB", found["before"] / MIB, "python and numpy", bar, peak <= 48 if judged else None)


def _timed(action: Any) -> tuple[Any, float]:
    began = time.process_time()
    result = action()
    return result, time.process_time() - began
