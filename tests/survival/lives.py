"""A device's process is killed at every step of an update: a real one, by SIGKILL, before each of its doings.

`python -m tests.survival.lives HOME MODEL [STEP] [--rehearse]`. HOME is a device that runs one release and is assigned
another. It is put back as it was before each round; a child updates it and is killed before its n-th doing; a second
child starts on what the first left, and says on a line of JSON what it found, and what it runs after an update of its
own.

A doing is a change to the disk, something that is sent, or the start of a rehearsal. They are seen by an audit hook,
so that none is left out: of the store, the journal, the outbox, trust, the spool. The children are forked before
onnxruntime has made a session.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from device_sdk import Fleet
from device_sdk.transport import Transport

CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR
SENT, STARTED = "http.client.send", "subprocess.Popen"
INTO_REHEARSAL = 0.3  # seconds after its start
ONES = {"x": np.ones((1, 4), np.float32)}
NOTHING_LEFT = 77


def main() -> None:
    options = _options()
    home = options.home
    os.fsync = lambda _: None  # a killed process loses nothing of what it wrote; the store's matrix models that
    saved, cut = home.with_name(f"{home.name}.saved"), home.with_name(f"{home.name}.cut")
    shutil.copytree(home, saved)
    point = 0
    while True:
        shutil.rmtree(home)
        shutil.copytree(saved, home)
        cut.write_text("{}")
        status = in_child(partial(update, options, cut, point))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == NOTHING_LEFT, status
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        status = in_child(partial(look, options, {"point": point, **json.loads(cut.read_text())}))
        assert status == 0, f"after the cut at {point}: {status}"
        point += options.step
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


def update(options: argparse.Namespace, cut: Path, cut_at: int) -> int:
    """What came before the cut goes to a file outside of the device's directory: what it did next, and acknowledged."""
    told = {"committed": False}
    with opened(options) as fleet:
        fleet.model(options.model)
        kill_before(options.home, cut_at, lambda doing: cut.write_text(json.dumps({**told, "doing": doing})))
        settle(fleet, options.model, told)
        return NOTHING_LEFT


def opened(options: argparse.Namespace) -> Fleet:
    return Fleet.open(options.home, intra_op_threads=1, rehearse=options.rehearse)


def settle(fleet: Fleet, model: str, told: dict[str, Any]) -> None:
    """Poll, install, and infer until the probation is over."""
    for _ in range(3):
        told["committed"] |= fleet.update_once().models[model].state == "committed"
        for _ in range(8):
            fleet.model(model).run(ONES)


def kill_before(home: Path, number: int, tell: Callable[[str], object]) -> None:
    left, is_ending = [number], [False]

    def end(doing: str) -> None:
        is_ending[0] = True  # what `tell` writes is no doing of the device's
        tell(doing)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        doing = _doing(home, event, arguments)
        if not doing or is_ending[0]:
            return
        for each in doing:
            if left[0] == 0 and each == IN_REHEARSAL:
                threading.Timer(INTO_REHEARSAL, end, [each]).start()
            elif left[0] == 0:
                end(each)
            left[0] -= 1

    sys.addaudithook(hook)


IN_REHEARSAL = "in the rehearsal"


def _doing(home: Path, event: str, arguments: tuple[Any, ...]) -> tuple[str, ...]:
    """What is about to be done, in words; a rehearsal counts twice: before it and during it."""
    if event == SENT:
        head = bytes(arguments[1][:80]).split()
        return (f"send {head[0].decode()} {_plain(head[1].decode())}",) if head[:1] in ([b"GET"], [b"POST"]) else ()
    if event == STARTED:
        return ("rehearse", IN_REHEARSAL)
    if event not in CHANGES and not (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
        return ()
    path = arguments[1] if event in {"os.rename", "os.link"} else arguments[0]
    if isinstance(path, str | Path) and str(path).startswith(str(home)) and "/scratch/" not in str(path):
        return (f"{'write' if event == 'open' else event.removeprefix('os.')} {_plain(str(path)[len(str(home)) :])}",)
    return ()


def _plain(path: str) -> str:
    """Without what differs each time."""
    *folders, name = path.partition("?")[0].strip("/").split("/")
    return "/".join([*folders[:2], "…" if len(name) >= 64 or folders[1:2] == ["loading"] else name])


def look(options: argparse.Namespace, found: dict[str, Any]) -> int:
    home, model = options.home, options.model
    found["whole"], found["here"] = whole(home), here(home)
    with opened(options) as fleet:
        found["answer"] = float(fleet.model(model).run(ONES)["y"][0, 0])
        found["active"] = active(home, model)
        found["asked"] = asked = []
        listen(asked)
        settle(fleet, model, {"committed": False})
        found["after"] = float(fleet.model(model).run(ONES)["y"][0, 0])
        found["state"] = fleet.status().models[model].state
    found["whole"] &= whole(home)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def listen(asked: list[str]) -> None:
    """Note from where each file is asked for."""
    stream = Transport.stream

    def heard(self: Transport, url: str, **how: Any) -> Any:
        asked.append(dict(how.get("headers") or {}).get("Range", "all"))
        return stream(self, url, **how)

    Transport.stream = heard  # type: ignore[method-assign]


def here(home: Path) -> int:
    """Bytes of a download that were written before the cut."""
    return sum(path.stat().st_size for path in (home / "store" / "incoming").glob("*.part"))


def whole(home: Path) -> bool:
    """Whether every blob is what its name says."""
    return all(sha256(path.read_bytes()).hexdigest() == path.name for path in (home / "store" / "blobs").iterdir())


def active(home: Path, model: str) -> str:
    state = json.loads((home / "store" / "state.json").read_bytes())["state"]
    return str(state["models"][model]["active"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("model")
    parser.add_argument("step", type=int, nargs="?", default=1)
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
