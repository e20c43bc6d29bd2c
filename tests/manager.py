"""`manage.py` commands against a live server, one after another in one process: each start of Django costs a second.

What a command finds is what it would find in a process of its own: the same environment, arguments, standard input and
directory, and no open connection to the database. `python -m tests.manager` is that process; one line of JSON each way.
"""

import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class CommandFailed(RuntimeError):
    pass


class Manager:
    """Runs commands in the environment `env`. Started by the first of them, and anew when a test changed `env`."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self._started_in: dict[str, str] = {}
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, *arguments: str, stdin: str | None = None) -> str:
        if self._started_in != self.env:
            self.close()
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"arguments": arguments, "stdin": stdin or ""}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise CommandFailed(f"manage.py {' '.join(arguments)} took its process down")
        answer = json.loads(line)
        if answer["code"]:
            said = answer["out"] + answer["err"]
            raise CommandFailed(f"manage.py {' '.join(arguments)} ended with {answer['code']}:\n{said}")
        return str(answer["out"])

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.communicate(timeout=30)

    def _start(self) -> subprocess.Popen[str]:
        self._started_in = dict(self.env)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.manager"], cwd=ROOT, env=self.env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self._process


def serve() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "fleet.settings")
    from django.core.management import execute_from_command_line

    answers, sys.stdout = sys.stdout, sys.stderr
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        answers.write(json.dumps(answer(execute_from_command_line, asked["arguments"], asked["stdin"])) + "\n")
        answers.flush()


def answer(execute: Callable[[list[str]], None], arguments: list[str], stdin: str) -> dict[str, Any]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    kept, sys.argv, sys.stdin = (sys.argv, sys.stdin), ["manage.py", *arguments], io.StringIO(stdin)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            execute(sys.argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except Exception:  # noqa: BLE001  a process of its own would show it and end with 1
        code = 1
        err.write(traceback.format_exc())
    finally:
        sys.argv, sys.stdin = kept
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    serve()
