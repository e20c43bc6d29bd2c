"""The demonstration is the end-to-end test: real server, real SDK, real data, on both backends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live import production_environment
from tests.services import free_port, temporary_folder

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 8

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(params=["embedded", "production"])
def backend(request):
    if request.param == "embedded":
        return {}
    services = [request.getfixturevalue(name) for name in ("postgres", "redis_server", "s3")]
    real = ("FLEET_DATABASE_URL", "FLEET_REDIS_URL", "FLEET_S3")  # the demo's own keystore is not for production
    return {name: value for name, value in production_environment(*services).items() if name.startswith(real)}


def test_the_whole_loop_runs_and_no_inference_is_dropped(backend, monkeypatch):
    for name, value in backend.items():
        monkeypatch.setenv(name, value)
    with temporary_folder("demo") as folder:
        summary = run_demo(folder)
    assert summary["failed"] == 0
    assert summary["unanswered"] == 0
    assert summary["answered"] > 1000
    assert "failure budget spent" in summary["1.2.0 halted"]
    assert summary["back on 1.1.0"].startswith(f"{DEVICES} of {DEVICES}")
    assert summary["1.3.0 to all"].endswith(f"{DEVICES} of {DEVICES} run it")


def run_demo(folder):
    options = ["--devices", str(DEVICES), "--processes", "2", "--port", str(free_port()), "--var", str(folder / "var")]
    command = [sys.executable, "-m", "deploy.demo", "--exit", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    logs = "".join(log.read_text()[-3000:] for log in folder.glob("var/logs/*.log")) if done.returncode else ""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    return json.loads((folder / "var" / "summary.json").read_text())
