"""The workflow files of deploy/ci: YAML that a runner takes, and every script in them run against a live server."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from securesystemslib.signer import CryptoSigner

from fleet.releases.models import Release
from fleet.trust import keystore, selectors
from fleet.trust.models import PendingRole
from tests.registry import MODEL, onnx_model, own_folder, publish_token, set_up_trust  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)
ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "deploy" / "ci").glob("*.yml"))
GIVEN = {"secrets.FLEET_API_TOKEN", "secrets.FLEET_CI_KEY", "vars.FLEET_SERVER"}


def workflow(name: str) -> dict[Any, Any]:
    return dict(yaml.safe_load((ROOT / "deploy" / "ci" / name).read_text()))


def steps(name: str) -> list[dict[str, Any]]:
    """Those that run fleet-publish."""
    (job,) = workflow(name)["jobs"].values()
    return [step for step in job["steps"] if "fleet-publish" in step.get("run", "")]


class Runner:
    """Runs a step as a CI runner does: `bash -e`, with what stands under `env` and nothing else of ours."""

    def __init__(self, folder: Path, server: str) -> None:
        signer = set_up_trust()
        self.folder = folder / "checkout"
        self.folder.mkdir()
        (self.folder / "model.onnx").write_bytes(onnx_model())
        self.signer = signer
        self.given = {
            "secrets.FLEET_API_TOKEN": publish_token(MODEL),
            "secrets.FLEET_CI_KEY": signer.private_bytes.decode(),
            "vars.FLEET_SERVER": server,
            "github.ref_name": f"{MODEL}/1.4.0",
            "github.sha": "9f1c2ab",
            "matrix.model": MODEL,
        }
        shim = folder / "bin" / "fleet-publish"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m device_sdk.publish "$@"\n')
        shim.chmod(0o755)
        self.path = f"{shim.parent}:{os.environ['PATH']}"

    def run(self, step: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        env = {
            name: re.sub(r"\$\{\{ *([\w.]+) *\}\}", lambda found: self.given[found[1]], value)
            for name, value in step["env"].items()
        }
        return subprocess.run(
            ["bash", "-e", "-c", step["run"]],
            cwd=self.folder,
            env={**env, "PATH": self.path, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.folder.parent)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture
def runner(live_server: Any, own_folder: Path) -> Runner:  # noqa: F811
    return Runner(own_folder, live_server.url)


def co_sign_needed(runner: Runner) -> CryptoSigner:
    second = CryptoSigner.generate_ed25519()
    public = [runner.signer.public_key, second.public_key]
    keystore.add_model(keystore.at(None), model=MODEL, public_keys=public, threshold=2)
    return second


def test_there_is_a_workflow_to_push_and_one_to_sign_anew() -> None:
    assert [path.name for path in FILES] == ["push.yml", "resign.yml"]
    assert workflow("push.yml")[True] == {"push": {"tags": ["*/*"]}}  # YAML 1.1 reads `on` as true
    ((cron,),) = ([entry["cron"] for entry in workflow("resign.yml")[True]["schedule"]],)
    assert re.fullmatch(r"\d+ \d+ \d+ \* \*", cron), "once a month"


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_secrets_come_by_the_environment_and_no_address_is_built_in(name: str) -> None:
    text = (ROOT / "deploy" / "ci" / name).read_text()
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert set(re.findall(r"(?:secrets|vars)\.\w+", code)) == GIVEN
    assert "http" not in code
    for step in steps(name):
        assert "${{" not in step["run"]  # text from outside, pasted into a script, would be run
        assert "set -x" not in step["run"]


def test_a_tag_is_pushed_as_a_release(runner: Runner) -> None:
    (step,) = steps("push.yml")
    done = runner.run(step)
    assert done.returncode == 0, done.stderr
    assert Release.objects.get().version == "1.4.0"
    assert "published digits 1.4.0" in done.stderr
    assert not list(runner.folder.parent.glob("tmp.*")), "the key is left in a file"
    assert "PRIVATE KEY" not in done.stdout + done.stderr


def test_a_push_that_waits_for_the_second_person_is_no_failure_of_ci(runner: Runner) -> None:
    co_sign_needed(runner)
    step = steps("push.yml")[0]
    done = runner.run(step | {"run": step["run"].replace("--wait-seconds 120", "--wait-seconds 0")})
    assert done.returncode == 0, done.stderr
    assert "::notice::" in done.stdout
    assert "pending: 1 of 2 signatures" in done.stderr
    assert PendingRole.objects.count() == 1


def test_a_push_that_is_refused_fails(runner: Runner) -> None:
    runner.given["secrets.FLEET_API_TOKEN"] = "flt_wrong"
    assert runner.run(steps("push.yml")[0]).returncode == 3


def test_the_monthly_job_signs_anew_and_says_how_it_stands(runner: Runner) -> None:
    assert runner.run(steps("push.yml")[0]).returncode == 0
    renew, status = steps("resign.yml")
    done = runner.run(renew)
    assert done.returncode == 0, done.stderr
    held = selectors.newest(MODEL)
    assert held is not None
    assert held.version == 2
    told = runner.run(status)
    assert told.returncode == 0, told.stderr
    assert "digits: role version 2, 1 variant, expires" in told.stderr


def test_the_monthly_job_fails_where_somebody_must_sign(runner: Runner) -> None:
    assert runner.run(steps("push.yml")[0]).returncode == 0
    co_sign_needed(runner)
    renew = steps("resign.yml")[0]
    # The role in force carries one of the two signatures: CI's own key still vouches for it.
    assert runner.run(renew).returncode == 6
