"""A device's life by commands, from the wheel alone, against the real server on both backends."""

import json
import re
import secrets

import numpy as np
import pytest

from tests.sdk.world import scaling

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def shop(live, bare_venv, tmp_path_factory):
    """A model of its own on the shared server, with CI's key and token, and a provisioning file."""
    return Shop(live, bare_venv, tmp_path_factory.mktemp("shop"))


class Shop:
    def __init__(self, live, venv, folder):
        self.live, self.venv, self.folder = live, venv, folder
        self.model = f"scale-{secrets.token_hex(3)}"
        self.key, self.provision = folder / "ci.key", folder / "provision.json"
        keys = ["--keystore", str(live.keystore), "--ci-key-out", str(self.key)]
        live.manage("trust_add_model", self.model, *keys)
        self.token = live.manage("api_token", self.model, "--scope", "publish", "--model", self.model).strip()
        limits = ["--uses", "5", "--days", "1"]
        live.manage("provision", "--name", self.model, "--model", self.model, *limits, "--out", str(self.provision))
        np.save(folder / "x.npy", np.ones((1, 4), np.float32))

    def push(self, version, data, check=True):
        model = self.folder / "model.onnx"
        model.write_bytes(data)
        named = ["--model", self.model, "--version", version, "--server", self.live.url]
        secret = ["--key", str(self.key), "--token", self.token]
        return self.venv.run("-m", "device_sdk.publish", "push", str(model), *named, *secret, "--wait", check=check)

    def roll_out(self, version):
        self.live.manage("rollout", "create", self.model, version, "--start")

    def device(self, command, home, *arguments, check=True):
        return self.venv.run("-m", "device_sdk", command, "--home", str(home), *arguments, check=check)

    def enrol(self, name):
        home = self.folder / name
        self.device("enrol", home, "--provision", str(self.provision), "--name", f"{self.model}-{name}")
        return home

    def answer(self, home):
        said = self.device("run", home, self.model, str(self.folder / "x.npy")).stdout
        return float(re.search(r"-?\d+\.\d*", said.split("y", 1)[1])[0])


def test_enrol_poll_update_infer_from_the_wheel_alone(shop):
    shop.push("1.0.0", scaling(2.0))
    shop.roll_out("1.0.0")
    home = shop.enrol("first")

    shop.device("update", home)
    assert shop.answer(home) == 2.0

    shop.push("1.1.0", scaling(3.0))
    shop.roll_out("1.1.0")
    shop.device("update", home)
    assert shop.answer(home) == 3.0
    status = json.loads(shop.device("status", home, "--json").stdout)
    assert status["models"][shop.model]["release"] == "1.1.0/default"


def test_a_device_serves_its_last_good_release_when_the_server_is_gone(shop):
    shop.push("1.2.0", scaling(4.0))
    shop.roll_out("1.2.0")
    home = shop.enrol("lonely")
    shop.device("update", home)
    file = home / "provision.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "server": "http://127.0.0.1:9"}))

    assert shop.answer(home) == 4.0
    assert shop.device("update", home, check=False).returncode == 4


def test_a_release_that_does_not_load_is_named_invalid_and_cannot_go_out(shop):
    refused = shop.push("6.6.6", b"not a model at all", check=False)

    assert refused.returncode == 5
    assert "invalid" in refused.stdout + refused.stderr
    with pytest.raises(RuntimeError, match=r"(?i)not valid|invalid"):
        shop.roll_out("6.6.6")


def test_a_taken_device_name_is_refused_with_the_servers_reason(shop):
    shop.enrol("taken")
    other = shop.folder / "other"
    named = ["--provision", str(shop.provision), "--name", f"{shop.model}-taken"]
    refused = shop.device("enrol", other, *named, check=False)

    assert refused.returncode == 3
    assert "device_exists" in refused.stderr
