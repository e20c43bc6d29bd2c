"""The power goes, at every step of an update: a real process ends by SIGKILL before each of its changes to the disk.

`python -m tests.attacks.cuts HOME MODEL STEP`. HOME is a device that runs one release and is assigned another. It
is put back as it was before each round; a child updates it and is killed before its n-th change; a second child starts
on what the first left, and says on a line of JSON what it found, and what it runs after an update of its own.

Changes are seen by an audit hook, so that none is left out: of the store, the journal, the outbox, trust, the spool.
The children are forked before onnxruntime has made a session.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from device_sdk import Fleet

CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR
ONES = {"x": np.ones((1, 4), np.float32)}
NOTHING_LEFT = 77


def main(home: Path, model: str, step: int) -> None:
    os.fsync = lambda _: None  # a killed process loses nothing of what it wrote; tests/sdk/crashes.py models that
    saved = home.with_name(f"{home.name}.saved")
    shutil.copytree(home, saved)
    point = 0
    while True:
        shutil.rmtree(home)
        shutil.copytree(saved, home)
        status = in_child(partial(update, home, model, point))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == NOTHING_LEFT, status
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        status = in_child(partial(look, home, model, point))
        assert status == 0, f"after the cut at {point}: {status}"
        point += step
    sys.stdout.write(json.dumps({"over": point}) + "\n")


def in_child(do: Callable[[], int]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        code = do()
        sys.stdout.flush()
    finally:
        os._exit(code)


def update(home: Path, model: str, cut_at: int) -> int:
    with opened(home) as fleet:
        fleet.model(model)
        cut_before_change(home, cut_at)
        settle(fleet, model)
        return NOTHING_LEFT


def opened(home: Path) -> Fleet:
    return Fleet.open(home, intra_op_threads=1, rehearse=False)


def settle(fleet: Fleet, model: str) -> None:
    """Poll, install, and infer until the probation is over."""
    for _ in range(3):
        fleet.update_once()
        for _ in range(8):
            fleet.model(model).run(ONES)


def cut_before_change(home: Path, number: int) -> None:
    left = [number]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            path = arguments[0]
            if isinstance(path, (str, Path)) and str(path).startswith(str(home)) and "/scratch/" not in str(path):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

    sys.addaudithook(hook)


def look(home: Path, model: str, point: int) -> int:
    found: dict[str, Any] = {"point": point, "whole": whole(home)}
    with opened(home) as fleet:
        found["answer"] = float(fleet.model(model).run(ONES)["y"][0, 0])
        found["active"] = active(home, model)
        settle(fleet, model)
        found["after"] = float(fleet.model(model).run(ONES)["y"][0, 0])
        found["state"] = fleet.status().models[model].state
    found["whole"] &= whole(home)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def whole(home: Path) -> bool:
    """Whether every blob is what its name says."""
    return all(sha256(path.read_bytes()).hexdigest() == path.name for path in (home / "store" / "blobs").iterdir())


def active(home: Path, model: str) -> str:
    state = json.loads((home / "store" / "state.json").read_bytes())["state"]
    return str(state["models"][model]["active"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
