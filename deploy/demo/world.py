"""What the demonstration starts and talks to: the server, the devices, the operator's and CI's hands.

All of it is what a user would do: commands, the REST API, the CI publisher. No database is touched from here.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parents[2]
OPERATOR = "operator"


class DemoError(Exception):
    """The demonstration did not go as it should; the message says what to look at."""


@dataclass
class World:
    """One run. `var` is emptied at the start and holds everything that the run writes."""

    var: Path
    port: int
    backend: Mapping[str, str] = field(default_factory=dict)  # extra environment: another database, queue, store
    password: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        settings = {
            "DJANGO_SETTINGS_MODULE": "fleet.settings",
            "FLEET_VAR": str(self.var),
            "FLEET_PUBLIC_URL": self.url,
            "FLEET_SECRET_KEY": secrets.token_hex(32),
            "DJANGO_SUPERUSER_PASSWORD": self.password,
            "FLEET_POLL_INTERVAL": "1",
            "FLEET_TICK_SECONDS": "1",
            "FLEET_SWEEP_SECONDS": "2",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        return {**os.environ, **settings, **self.backend}

    # --- processes -------------------------------------------------------------------------------------------------
    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `python <arguments>` with its output in a log file; `close` ends it and all its children."""
        log = (self.var / "logs" / f"{name}.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=self._environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        self.processes.append(process)
        return process

    def manage(self, *arguments: str) -> str:
        return self._run("manage.py", *arguments)[0]

    def manage_with_notes(self, *arguments: str) -> str:
        """The same, with what the command says to people on standard error."""
        return "".join(reversed(self._run("manage.py", *arguments)))

    def publish(self, *arguments: str) -> str:
        return self._run("-m", "device_sdk.publish", *arguments)[0]

    def _run(self, *arguments: str) -> tuple[str, str]:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DemoError(f"{' '.join(arguments)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout, done.stderr

    def close(self) -> None:
        """End every process that was started, politely first. Safe to call twice."""
        for process in reversed(self.processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.processes.clear()

    # --- life ------------------------------------------------------------------------------------------------------
    def open(self) -> None:
        """Empty the folder, set the server up and start it."""
        shutil.rmtree(self.var, ignore_errors=True)
        (self.var / "logs").mkdir(parents=True)
        self._environment = self.environment
        self.manage("migrate", "--verbosity", "0")
        self.manage("collectstatic", "--noinput", "--verbosity", "0")

    def serve(self) -> None:
        server = self.start("server", "manage.py", "serve", "--port", str(self.port))
        self.wait("the server to answer", lambda: self._answers(server), seconds=60)

    def _answers(self, server: subprocess.Popen[bytes]) -> bool:
        if server.poll() is not None:
            raise DemoError(f"the server ended; see {self.var / 'logs' / 'server.log'}")
        try:
            return requests.get(f"{self.url}/healthz", timeout=2).ok
        except requests.RequestException:
            return False

    def wait(self, what: str, ready: Callable[[], Any], *, seconds: float = 120, every: float = 0.5) -> Any:
        """Wait until `ready` returns something true, and return it."""
        deadline = time.monotonic() + seconds
        while not (result := ready()):
            if time.monotonic() > deadline:
                raise DemoError(f"waited {seconds:g} s in vain for {what}; the logs are in {self.var / 'logs'}")
            time.sleep(every)
        return result


@dataclass
class Api:
    """The REST API in an operator's hand."""

    url: str
    token: str
    session: requests.Session = field(default_factory=requests.Session)

    def get(self, path: str, **parameters: Any) -> Any:
        return self._call("GET", path, params=parameters)

    def all(self, path: str, **parameters: Any) -> list[dict[str, Any]]:
        return list(self.get(path, limit=1000, **parameters)["results"])

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._call("POST", path, json=body or {})

    def patch(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._call("PATCH", path, json=body)

    def _call(self, method: str, path: str, **keywords: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = self.session.request(method, f"{self.url}/api/v1/{path}", headers=headers, timeout=30, **keywords)
        if not answer.ok:
            raise DemoError(f"{method} {path}: {answer.status_code} {answer.text[:500]}")
        return answer.json() if answer.content else None


def free_port(preferred: int) -> int:
    """`preferred` if nobody listens there, else any free one."""
    for port in (preferred, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise DemoError("no free port on 127.0.0.1")


def read_counts(files: list[Path]) -> list[dict[str, Any]]:
    """The counts of every feed of every process; a process that has not written yet counts nothing."""
    return [row for file in files if file.exists() for row in json.loads(file.read_bytes())]
