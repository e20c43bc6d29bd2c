"""What came of killing a device's process at each of its doings: see `lives`, which does it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.survival.outcome import Tried

PATIENCE = 1_200.0  # seconds
PARTS = {
    "incoming": "download", "blobs": "download", "send GET": "asking", "send POST": "telling", "rehears": "rehearsal",
    "loading": "verification", "state.json": "switch", "manifests": "manifest", "trust": "view", "outbox": "outbox",
    "progress": "journal", "peers": "peers", "traffic": "traffic",
}  # fmt: skip


def rounds(home: Path, model: str, *, step: int = 1, rehearse: bool = False) -> Iterator[dict[str, Any]]:
    """Each round, as it ends. Raises where the device did not come back at all."""
    command = [sys.executable, "-m", "tests.survival.lives", str(home), model, str(step)]
    log = home.with_name(f"{home.name}.log")
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [*command, *(["--rehearse"] if rehearse else [])], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise RuntimeError(log.read_text(errors="replace")[-2_000:])


def judge(found: dict[str, Any], *, old: float, new: float) -> str:
    """The outcome of a round; in capitals where it breaks a promise."""
    if not found["whole"]:
        return "WRONG BYTES"
    if found["answer"] not in {old, new}:
        return "NO WHOLE RELEASE"
    if found["committed"] and found["answer"] != new:
        return "ACKNOWLEDGED INSTALL WAS FORGOTTEN"
    if found["here"] and found["asked"] not in ([], [f"bytes={found['here']}-"]):
        return "DOWNLOAD BEGAN AGAIN"
    if (found["after"], found["state"]) != (new, "committed"):
        return "UPDATE CANNOT BE FINISHED"
    return "old release" if found["answer"] == old else "new release"


def part(doing: str) -> str:
    """Of an update, in which it was killed."""
    return next((name for key, name in PARTS.items() if key in doing), "other")


def by_part(found: Iterator[dict[str, Any]], *, old: float, new: float) -> dict[str, Tried]:
    parts: dict[str, Tried] = {}
    for each in found:
        if "point" in each:
            tried = parts.setdefault(part(each["doing"]), Tried(part(each["doing"])))
            tried.note(f"{each['point']}: {each['doing']}", judge(each, old=old, new=new))
    return parts
