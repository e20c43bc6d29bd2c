"""Resident memory of a device's process, each figure from a process of its own."""

import os
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
_OWN = "print(next(int(l.split()[1]) for l in open('/proc/self/smaps_rollup') if l.startswith('Anonymous')) / 1024)"
_NOTHING = ""
_NUMPY = "import numpy"
_TUF = "import tuf.ngclient"
_URLLIB3 = "import urllib3"
_REQUESTS = "import urllib3, requests"
_OTHERS = "import numpy, requests, tuf.ngclient"
# Everything that a device runs day in, day out, but onnxruntime itself: what devices pay for us.
_SDK = """
import sys, types
sys.modules["onnxruntime"] = types.ModuleType("onnxruntime")
sys.modules["onnxruntime"].__version__ = "0"
import device_sdk.client, device_sdk.trust, device_sdk.transport, device_sdk.worker, device_sdk.download
import device_sdk.spool, device_sdk.uploader
"""
_TRUST = "import device_sdk.trust, device_sdk.transport, device_sdk.store, device_sdk.download"  # without numpy
NOTES = (
    "Before onnxruntime, which imports numpy too. tuf, urllib3 and cryptography alone, the bar's own parts, are the",
    "baseline of the row on trust; requests comes on top of urllib3 because the device's HTTP is to be requests.",
    "As on a device: without boto3, which tuf's signers import where it is installed, at 9 MB.",
)
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
        "nothing": _NOTHING, "numpy": _NUMPY, "tuf": _TUF, "urllib3": _URLLIB3, "requests": _REQUESTS,
        "others": _OTHERS, "sdk": _SDK, "trust": _TRUST,
        "bare": _BARE.format(model=str(model)), "fleet": _FLEET.format(home=str(home)),
    }  # fmt: skip
    found = {name: _measured(code, folder) for name, code in programs.items()}
    ours, others = _measured(_SDK, folder, _OWN), _measured(_OTHERS, folder, _OWN)
    return Section("Memory of a device's process (resident)", [
        Row("SDK and tuf imported, without onnxruntime", found["sdk"], "MB", found["nothing"], "python alone",
            f"<= about {LIMIT:g} MB", found["sdk"] <= LIMIT * 1.05),
        Row("the same, against what is not ours", found["sdk"], "MB", found["others"],
            "numpy, requests and tuf alone", difference=True),
        Row("the same, pages that no file backs", ours, "MB", others, "numpy, requests and tuf alone", difference=True),
        Row("numpy imported (part of the above)", found["numpy"], "MB", found["nothing"], "python alone"),
        Row("trust, transport, store and download, without numpy", found["trust"], "MB", found["tuf"],
            "tuf alone, with urllib3 and cryptography", difference=True),
        Row("requests (part of the above)", found["requests"], "MB", found["urllib3"], "urllib3 alone",
            difference=True),
        Row("Fleet.open, a small model loaded and called", found["fleet"], "MB", found["bare"],
            "bare onnxruntime, same file", difference=True),
    ], NOTES)  # fmt: skip


def _measured(code: str, folder: Path, how: str = _PRINT) -> float:
    """Without boto3, which the server stores by, and tuf's signers import wherever they find it."""
    program = f'import sys; sys.modules["boto3"] = None\n{code}\n{how}'
    started(program, folder)  # compiling takes memory, too
    return float(started(program, folder))


def started(program: str, folder: Path) -> str:
    """What a process prints, with what it imports compiled beforehand, as pip leaves it, from the second time on."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "compiled"), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


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
