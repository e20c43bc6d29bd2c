"""Run the commands of a page as a reader would: its blocks in their order, by bash, in one folder.

What a block exports holds for the blocks after it. A background block is a server; the next one takes its place.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import requests

from deploy.demo.world import free_port

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: Path, *kinds: str) -> list[tuple[str, str]]:
    """The kind and the text of each fenced block of these kinds."""
    fence = re.compile(rf"^```({'|'.join(kinds)})\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return fence.findall(page.read_text())


class Walk:
    def __init__(self, folder: Path, extra: Mapping[str, str]) -> None:
        port = free_port(0)
        (folder / "manage.py").symlink_to(ROOT / "manage.py")
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FLEET_")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DJANGO_SETTINGS_MODULE": "fleet.settings",
            "FLEET_VAR": str(folder / "var"),
            "FLEET_PUBLIC_URL": f"http://127.0.0.1:{port}",
            "FLEET_TICK_SECONDS": "1",
            "FLEET_SWEEP_SECONDS": "2",
            "SERVER": f"http://127.0.0.1:{port}",
            "PORT": str(port),
            **extra,
        }
        self._server: subprocess.Popen[bytes] | None = None

    def shell(self, text: str) -> str:
        """Run a block, and keep what it exported. Every question is answered by yes."""
        kept = self.folder / ".environment"
        out = self.run(["bash", "-euo", "pipefail", "-c", f'{text}\nenv -0 > "{kept}"'])
        pairs = [entry.partition("=") for entry in kept.read_text().split("\0") if entry]
        self.environment = {name: value for name, _, value in pairs if name not in {"_", "SHLVL"}}
        return out

    def run(self, command: list[str]) -> str:
        with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as yes:
            done = subprocess.run(
                command, cwd=self.folder, env=self.environment, stdin=yes.stdout, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            yes.kill()
        assert done.returncode == 0, f"{command[-1]}\n--- out\n{done.stdout}\n--- err\n{done.stderr}"
        return done.stdout

    def start(self, text: str) -> None:
        self.stop()
        command = ["bash", "-euo", "pipefail", "-c", f"exec {text}"]
        with (self.folder / "server.log").open("ab") as log:
            self._server = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if requests.get(f"{self.environment['SERVER']}/healthz", timeout=2).ok:
                    return
            except requests.RequestException:
                time.sleep(0.3)
        raise AssertionError((self.folder / "server.log").read_text())

    def stop(self) -> None:
        if self._server is None:
            return
        os.killpg(self._server.pid, signal.SIGTERM)
        try:
            self._server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait(timeout=20)
        self._server = None
