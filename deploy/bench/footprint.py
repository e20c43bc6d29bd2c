"""Resident memory of a device's process, each figure from a process of its own."""

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from deploy.bench import models
from deploy.bench.measure import Row, Scale, Section
from device_sdk import runtime
from device_sdk.config import Home, Identity, Provision
from device_sdk.counts import Counts
from device_sdk.ledger import Done, Ledger
from device_sdk.store import Store

LIMIT = 34.0  # MB
_PRINT = "print(next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmRSS')) / 1024)"
_NOTHING = ""
_NUMPY = "import numpy"
# Everything of the SDK, but onnxruntime itself: what devices pay for us.
_SDK = """
import sys, types
sys.modules["onnxruntime"] = types.ModuleType("onnxruntime")
sys.modules["onnxruntime"].__version__ = "0"
import device_sdk.client, tuf.ngclient
"""
_BARE = """
import numpy, onnxruntime
session = onnxruntime.InferenceSession({model!r})
session.run(None, {{"x": numpy.zeros((1, 4), numpy.float32)}})
"""
_FLEET = """
import numpy
from device_sdk import Fleet
fleet = Fleet.open({home!r})
fleet.model("bench").run({{"x": numpy.zeros((1, 4), numpy.float32)}})
"""


def measure(folder: Path, _scale: Scale) -> Section:
    model = folder / "model.onnx"
    model.write_bytes(models.small())
    home = home_with(folder / "home", {"model.onnx": models.small()})
    programs = {
        "nothing": _NOTHING, "numpy": _NUMPY, "sdk": _SDK,
        "bare": _BARE.format(model=str(model)), "fleet": _FLEET.format(home=str(home)),
    }  # fmt: skip
    found = {name: _resident(code) for name, code in programs.items()}
    return Section("Memory of a device's process (resident)", [
        Row("SDK and tuf imported, without onnxruntime", found["sdk"], "MB", found["nothing"], "python alone",
            f"<= about {LIMIT:g} MB", found["sdk"] <= LIMIT * 1.05),
        Row("numpy imported (part of the above)", found["numpy"], "MB", found["nothing"], "python alone"),
        Row("Fleet.open, a small model loaded and called", found["fleet"], "MB", found["bare"],
            "bare onnxruntime, same file", difference=True),
    ])  # fmt: skip


def _resident(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", f"{code}\n{_PRINT}"], capture_output=True, text=True, check=True)
    return float(done.stdout)


def home_with(folder: Path, files: Mapping[str, bytes]) -> Path:
    """An enrolled device with a release, as it stands on disk between two polls."""
    home = make_home(folder)
    store = Store(home.store)
    sha, _ = models.put(store, "1.0.0", files)
    store.begin_trial(models.MODEL, sha)
    store.commit(models.MODEL)
    done = Done(Counts(calls=100), 60.0, runtime.RUNTIME)  # of its probation
    Ledger(home.ledger_file).keep(models.MODEL, sha, done, kept={sha})
    return folder


def make_home(folder: Path) -> Home:
    """An enrolled device."""
    home = Home(folder)
    home.make()
    root = Root(1, consistent_snapshot=True)
    key = CryptoSigner.generate_ed25519()
    for role in root.roles:
        root.add_key(key.public_key, role)
    signed = Metadata(root)
    signed.sign(key)
    provision = Provision(
        "http://127.0.0.1:1", signed.to_bytes().decode(), "token", (models.MODEL,), (), int(time.time())
    )
    home.provision_file.write_bytes(provision.to_bytes())
    home.identity_file.write_bytes(Identity("bench", "0" * 32, "credential").to_bytes())
    return home
