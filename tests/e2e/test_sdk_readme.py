"""What device_sdk/README.md says is run, from the bare wheel, on a directory that the real server knows."""

import os
import re
import subprocess
from dataclasses import fields

import pytest

from device_sdk.client import Options
from tests.attacks.world import Shop
from tests.walkthrough import ROOT, blocks

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
README = ROOT / "device_sdk" / "README.md"
FOR_TESTS = {"clock", "transport"}
# What a reader's own program has.
PRELUDE = """
import types
import numpy as np
import onnxruntime
from device_sdk import Fleet
x = np.ones((1, 4), np.float32)
frame_on_gpu = onnxruntime.OrtValue.ortvalue_from_numpy(x)
drive, on_wifi, battery = (lambda: None), (lambda: True), types.SimpleNamespace(plugged=True)
"""
OPENED = """
fleet = Fleet.open("/var/lib/fleet")
detector = fleet.model("detector")
"""
EPILOGUE = """
assert float(fleet.model({model!r}).run({{"x": x}})["y"][0, 0]) == 2.0
assert fleet.health()["ok"], fleet.health()
fleet.stop()
"""


class Reader:
    """A shell in an empty folder, with the provisioning file and the wheel's commands. Runs what the README says, but
    for the names of the directory, the device, the model, its tensors, and a GPU.
    """

    def __init__(self, shop, venv, folder):
        (folder / "provision.json").write_bytes(shop.provision.read_bytes())
        self.folder, self.model, self._python = folder, shop.model, venv.python
        home = str(folder / "fleet")
        self._names = {
            "/var/lib/fleet": home, "cam-17": f"{shop.model}-cam", '"detector"': f'"{shop.model}"', '"image"': '"x"',
            '"scores"': '"y"', '"cuda"': '"cpu"',
        }  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self._environment = inherited | {"PATH": f"{venv.folder / 'bin'}:{os.environ['PATH']}"}

    def shell(self, text):
        return self._run(["bash", "-euo", "pipefail", "-c"], text)

    def python(self, text):
        return self._run([self._python, "-I", "-c"], text)

    def _run(self, command, text):
        for said, meant in self._names.items():
            text = text.replace(said, meant)
        done = subprocess.run(
            [*command, text],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n--- out\n{done.stdout}\n--- err\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def reader(embedded, bare_venv, tmp_path_factory):
    shop = Shop(embedded, tmp_path_factory.mktemp("shop"))
    shop.roll_out(2.0)
    return Reader(shop, bare_venv, tmp_path_factory.mktemp("reader"))


def test_every_block_of_the_readme_runs(reader):
    shells, programs = ([text for _, text in blocks(README, kind)] for kind in ("sh", "python"))
    assert len(shells) >= 1
    assert len(programs) >= 3
    for text in shells:
        reader.shell(text)
    for text in programs:
        epilogue = EPILOGUE.format(model=reader.model)
        if "fleet.stop()" in text:
            epilogue = epilogue.replace("fleet.stop()", "")
        reader.python(f"{PRELUDE}{'' if 'Fleet.open' in text else OPENED}{text}{epilogue}")
    assert "2.0.0/default" in reader.shell("fleet-device status --home /var/lib/fleet")


def test_no_block_is_left_out():
    """A block of another kind would not be run. What is mere text leaves something out on purpose."""
    fences = re.findall(r"^```(\w*)$", README.read_text(), re.MULTILINE)
    assert set(fences[::2]) == {"python", "sh", "text"}
    assert all("…" in text for _, text in blocks(README, "text"))
    assert set(fences[1::2]) == {""}


def test_the_commands_of_the_readme_are_those_that_there_are(reader):
    named = set(re.findall(r"^\| `([a-z]+)[ `]", section("## Set up"), re.MULTILINE))
    assert named == set(re.findall(r"^    ([a-z]+) ", reader.shell("fleet-device --help"), re.MULTILINE))


def test_the_options_of_the_readme_are_those_that_there_are():
    rows = re.findall(r"^\| (`[^|]*`) \|", section("## Options"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {field.name for field in fields(Options)} - FOR_TESTS


def section(heading):
    return README.read_text().split(f"{heading}\n")[1].split("\n## ")[0]
