"""Children are kept alive while the supervisor lives, and none outlives it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 20
PROGRAM = """
import os, sys
from fleet.operations.supervisor import Child, Supervisor
script, prefixed = sys.argv[1], sys.argv[2] == "prefixed"
children = [Child("first", ["/bin/sh", "-c", script]), Child("second", ["/bin/sh", "-c", "exec sleep 600"])]
Supervisor(children, environment=dict(os.environ), prefixed=prefixed).run()
print("the end", flush=True)
"""
# Starts a grandchild, which is what granian and Celery do, then waits for it.
PARENT = "echo run $$; sleep 601 & echo grandchild $!; wait"


@pytest.fixture
def supervise(tmp_path):
    started = []

    def start(script: str, *, prefixed: bool = True) -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAM, script, "prefixed" if prefixed else "plain"]
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        process.output = tmp_path / "output"
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait()


def until(read: Callable[[], object]):
    deadline = time.monotonic() + SECONDS
    while not (value := read()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def numbers(process, word: str) -> list[int]:
    """The process ids that the child printed after `word`."""
    lines = process.output.read_text().splitlines()
    return [int(line.split()[-1]) for line in lines if f" {word} " in f" {line} " and line.split()[-1].isdigit()]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_child_that_falls_starts_again_and_its_own_children_are_gone(supervise):
    process = supervise(PARENT)
    (grandchild,) = until(lambda: numbers(process, "grandchild"))
    (child,) = numbers(process, "run")
    os.kill(child, signal.SIGKILL)

    until(lambda: len(numbers(process, "run")) == 2)
    assert not alive(grandchild)
    assert "first ended with -9; starts again in 1 s" in process.output.read_text()


def test_a_child_that_always_falls_is_restarted_ever_more_slowly(supervise):
    process = supervise("echo run $$; exit 3")
    until(lambda: "starts again in 4 s" in process.output.read_text())

    waits = [line.split()[-2] for line in process.output.read_text().splitlines() if "starts again" in line]
    assert waits == ["1", "2", "4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_in_good_order(supervise, number):
    process = supervise(f"trap 'echo goodbye; exit 0' TERM; {PARENT}")
    (grandchild,) = until(lambda: numbers(process, "grandchild"))
    process.send_signal(number)

    assert process.wait(SECONDS) == 0
    told = process.output.read_text()
    assert "first  | goodbye" in told
    assert told.endswith("the end\n")
    assert not alive(grandchild)


def test_killing_the_supervisor_leaves_no_orphan(supervise):
    process = supervise(f"trap 'kill $!; exit 0' TERM; {PARENT}")
    (grandchild,) = until(lambda: numbers(process, "grandchild"))
    (child,) = numbers(process, "run")
    process.kill()
    process.wait()

    until(lambda: not alive(child))
    until(lambda: not alive(grandchild))
    assert not alive(child)


def test_lines_bear_the_name_of_the_child_and_the_last_one_needs_no_line_feed(supervise):
    process = supervise("printf 'one\\ntwo\\nthree'; exit 0")
    until(lambda: "starts again" in process.output.read_text())

    assert process.output.read_text().splitlines()[:4] == [
        "first  | one",
        "first  | two",
        "first  | three",
        "serve  | first ended with 0; starts again in 1 s",
    ]


def test_a_child_that_prints_much_is_not_held_up(supervise):
    process = supervise("head -c 3000000 /dev/zero | tr '\\0' 'x' | fold -w 99; echo; echo done $$; exec sleep 602")
    until(lambda: numbers(process, "done"))

    assert process.output.read_text().count("x") == 3_000_000


def test_without_prefix_a_line_of_json_stays_a_line_of_json(supervise):
    process = supervise("echo '{}'; exec sleep 603", prefixed=False)
    until(process.output.read_text)

    assert process.output.read_text() == "{}\n"
