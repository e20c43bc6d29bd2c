"""Every command of the README is run, in its order, as a reader would: in an empty folder, by bash."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import requests

from deploy.demo import training
from deploy.demo.world import free_port

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(sh|sh background|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "README.md").read_text())


@pytest.fixture
def folder(tmp_path):
    """An empty folder with what the reader has: the checkout's commands, a model and an image."""
    (tmp_path / "manage.py").symlink_to(ROOT / "manage.py")
    digits = training.Digits.load()
    training.save(training.train_digits(digits.lab_images[:40], digits.lab_labels[:40]), tmp_path)
    np.save(tmp_path / "image.npy", digits.test_images[:1])
    return tmp_path


@pytest.fixture
def environment(folder):
    port = free_port(0)
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DJANGO_SETTINGS_MODULE": "fleet.settings",
        "FLEET_VAR": str(folder / "var"),
        "FLEET_PUBLIC_URL": f"http://127.0.0.1:{port}",
        "FLEET_TICK_SECONDS": "1",
        "FLEET_SWEEP_SECONDS": "2",
        "SERVER": f"http://127.0.0.1:{port}",
        "PORT": str(port),
        "ADMIN_PASSWORD": "correct-horse-battery",
    }


def test_the_make_targets_of_the_readme_exist():
    named = set(re.findall(r"\bmake ([a-z]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named
    for target in named:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_readme_can_be_followed_to_the_letter(folder, environment):
    server = None
    try:
        for kind, text in blocks():
            if text.startswith("make "):
                continue
            if kind == "sh background":
                server = start(text, folder, environment)
            elif kind == "python":
                run(["python", "-c", f"{PRELUDE}{text}{EPILOGUE}"], folder, environment)
            else:
                keep = re.findall(r"^export (\w+)=\$\(cat (\S+)\)$", text, re.MULTILINE)
                run(["bash", "-euo", "pipefail", "-c", text], folder, environment)
                environment.update({name: (folder / file).read_text().strip() for name, file in keep})
    finally:
        if server:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=20)


PRELUDE = "import numpy\nimage = numpy.load('image.npy')\n"
EPILOGUE = "\nfleet.stop()\nassert outputs['probabilities'].shape == (1, 10), outputs\n"


def run(command, folder, environment):
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]}\n--- out\n{done.stdout}\n--- err\n{done.stderr}"


def start(text, folder, environment):
    command = ["bash", "-euo", "pipefail", "-c", f"exec {text}"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if requests.get(f"{environment['SERVER']}/healthz", timeout=2).ok:
                return server
        except requests.RequestException:
            time.sleep(0.3)
    os.killpg(server.pid, signal.SIGKILL)
    raise AssertionError((folder / "server.log").read_text())
