"""Make one patch, check it by applying it, and say as JSON what came of it. Run as a script, in a process of its own.

Everything here meets hostile bytes: it imports neither Django nor settings, sets its own limits before it reads
anything, and its caller takes a death by signal for an answer. `FOLDER` holds `base/` and `target/`, the files of two
releases (of the base none: a patch for devices that have nothing), and gets `patch`.
"""

import json
import os
import resource
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for: file names with their sha256 (`base` empty: from nothing), and how large it may be."""

    base: str
    base_sha256: str
    target: str
    target_sha256: str
    most: int


def main(folder: str, order: str, memory: str, seconds: str) -> int:
    wanted = Order(**json.loads(order))
    _limit(int(memory), int(seconds), wanted.most)
    sys.path.insert(0, str(ROOT))
    try:
        answer = make(Path(folder), wanted)
    except MemoryError:
        answer = {"error": f"it needs more than {int(memory) // 1024**2} MiB of memory"}
    except Exception as error:  # noqa: BLE001  # whatever the files make it raise is the answer
        answer = {"error": f"{type(error).__name__}: {error!s:.300}"}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)


def make(folder: Path, order: Order) -> dict[str, Any]:
    """{length, sha256, encode, decode} (seconds of processor time), or {useless: bytes after which it was given up}."""
    from fleet.releases.deltas.encoder import encode

    began = time.process_time()
    with closing(_side(folder, "base", order)) as base, closing(_side(folder, "target", order)) as target:
        digest, length = sha256(), 0
        with (folder / "patch").open("xb") as file:
            for piece in encode(base.side, target.side, target.scales):
                length += len(piece)
                if length > order.most:
                    return {"useless": length}
                digest.update(piece)
                file.write(piece)
        made = time.process_time()
        _check(folder / "patch", base, order, target.side.source.length)
    spent = {"encode": made - began, "decode": time.process_time() - made}
    return {"length": length, "sha256": digest.hexdigest(), **spent}


def _check(path: Path, base: "_Opened", order: Order, length: int) -> None:
    """A patch is offered when it gives the target, bit by bit."""
    from device_sdk.protocol.patches.decoder import apply

    digest = sha256()
    with path.open("rb") as file:
        pieces = apply(
            file.read, base.side.source.read, base_sha256=order.base_sha256, target_sha256=order.target_sha256,
            target_length=length,
        )  # fmt: skip
        for piece in pieces:
            digest.update(piece)
    if digest.hexdigest() != order.target_sha256:
        raise ValueError(f"the patch gives {digest.hexdigest()}")


class _Opened:
    """One side with its file open, and the small floats of all its files, among which scales are."""

    def __init__(self, folder: Path, file: str, sha: str) -> None:
        from fleet.releases.deltas import layout
        from fleet.releases.deltas.encoder import Side

        found = layout.tensors(folder) if file else []
        path = folder / file if file else Path(os.devnull)
        self.side = Side(layout.Source(path), sha, [tensor for tensor in found if tensor.file == file])
        self.scales = layout.small_floats(folder, found)

    def close(self) -> None:
        self.side.source.close()


def _side(folder: Path, name: str, order: Order) -> _Opened:
    file, sha = (order.base, order.base_sha256) if name == "base" else (order.target, order.target_sha256)
    return _Opened(folder / name, file, sha)


def _limit(memory: int, seconds: int, largest: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 4 * 1024**2,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5]))
