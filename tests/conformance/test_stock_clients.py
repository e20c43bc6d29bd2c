"""Two stock TUF clients read a device's view from the running server by plain addresses: python-tuf's and tuf-js."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from tuf.ngclient import Updater

from device_sdk.protocol.manifest import Manifest
from tests.live import ROOT, LiveServer
from tests.sdk.world import scaling

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
TUF_JS = Path(__file__).parent / "tuf_js"


@dataclass(frozen=True)
class Fetched:
    """What a client was told to run and the manifest that it brought."""

    path: str
    manifest: bytes


class View:
    """A device that is enrolled at the live server and assigned a release; and the addresses of its view."""

    def __init__(self, live: LiveServer, folder: Path) -> None:
        self.live, self.folder = live, folder
        self.model = f"scale-{secrets.token_hex(3)}"
        self.device = f"{self.model}-cam"
        self.key, self.provision = folder / "ci.key", folder / "provision.json"
        live.manage(
            "trust_add_model", self.model, *("--keystore", str(live.keystore)), *("--ci-key-out", str(self.key))
        )
        self.token = live.manage("api_token", self.model, "--scope", "publish", "--model", self.model).strip()
        live.manage("provision", "--name", self.model, "--model", self.model, "--out", str(self.provision))
        self.release("1.0.0", scaling(2.0))
        enrol = ("enrol", "--home", str(folder / "home"), "--provision", str(self.provision), "--name", self.device)
        run(sys.executable, "-m", "device_sdk", *enrol)

    def release(self, version: str, data: bytes) -> None:
        model = self.folder / "model.onnx"
        model.write_bytes(data)
        named = ("--model", self.model, "--version", version, "--server", self.live.url)
        secret = ("--key", str(self.key), "--token", self.token)
        run(sys.executable, "-m", "device_sdk.publish", "push", str(model), *named, *secret, "--wait")
        self.live.manage("rollout", "create", self.model, version, "--start")

    def base(self, device: str = "") -> str:
        """The address under which a stock client finds metadata/ and targets/. The key is the server's to give."""
        script = (
            "from fleet.devices.models import Device; from fleet.devices.credentials import view_key; "
            f"print('key', view_key(Device.objects.get(name={self.device!r})))"
        )
        key = self.live.manage("shell", "-v", "0", "-c", script).split()[-1]
        return f"{self.live.url}/tuf/{device or self.device}/{key}"

    def pinned_root(self) -> bytes:
        return json.loads(self.provision.read_bytes())["root"].encode()


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{command[:4]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


@pytest.fixture(scope="module")
def view(live: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> View:
    return View(live, tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="session")
def tuf_js(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tuf-js as its lock pins it, by hash, in a folder of its own."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")  # in CI a skip is a failure
    folder = tmp_path_factory.mktemp("tuf-js")
    for name in ("package.json", "package-lock.json", "fetch.js"):
        shutil.copy(TUF_JS / name, folder)
    quiet = ("--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error")
    done = subprocess.run(["npm", "ci", *quiet], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"npm ci: {done.stdout}{done.stderr}"
    return folder


def python_tuf(view: View, folder: Path, base: str) -> Fetched:
    (folder / "targets").mkdir(parents=True, exist_ok=True)
    root = view.pinned_root()
    updater = Updater(
        str(folder / "metadata"), f"{base}/metadata/", str(folder / "targets"), f"{base}/targets/", bootstrap=root
    )
    entry = updater.get_targetinfo(f"assign/{view.device}/{view.model}")
    assert entry is not None
    path = entry.custom["release"]
    release = updater.get_targetinfo(path)
    assert release is not None
    assert (release.length, release.hashes) == (entry.length, entry.hashes)
    assert updater.get_targetinfo(f"{view.model}/no-such-release/default") is None
    return Fetched(path, Path(updater.download_target(release)).read_bytes())


def ask_tuf_js(installed: Path, view: View, folder: Path, base: str) -> subprocess.CompletedProcess[str]:
    for name in ("metadata", "targets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not (folder / "metadata" / "root.json").exists():
        (folder / "metadata" / "root.json").write_bytes(view.pinned_root())
    command = ["node", "fetch.js", str(folder), f"{base}/metadata/", f"{base}/targets/", view.device, view.model]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(params=["python-tuf", "tuf-js"])
def client(request: pytest.FixtureRequest, view: View, tmp_path: Path) -> Callable[[], Fetched]:
    """Fetch by this client, each time with the same folder of metadata."""
    base = view.base()
    if request.param == "python-tuf":
        return lambda: python_tuf(view, tmp_path, base)
    installed = request.getfixturevalue("tuf_js")

    def fetch() -> Fetched:
        done = ask_tuf_js(installed, view, tmp_path, base)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["unknown"]
        data = Path(said["file"]).read_bytes()
        assert sha256(data).hexdigest() == said["sha256"]
        return Fetched(said["path"], data)

    return fetch


def test_a_stock_client_follows_a_device_from_release_to_release(client: Callable[[], Fetched], view: View) -> None:
    first = client()
    assert str(Manifest.parse(first.manifest).path) == first.path

    version = f"1.1.{secrets.randbelow(10**6)}"
    view.release(version, scaling(3.0))
    second = client()
    manifest = Manifest.parse(second.manifest)
    assert str(manifest.path) == second.path == f"{view.model}/{version}/default"
    assert [file.sha256 for file in manifest.files] == [sha256(scaling(3.0)).hexdigest()]


def test_tuf_js_with_the_key_of_another_device_gets_nothing(view: View, tuf_js: Path, tmp_path: Path) -> None:
    done = ask_tuf_js(tuf_js, view, tmp_path, view.base(device="cam-of-nobody"))
    assert done.returncode != 0
    assert list((tmp_path / "targets").iterdir()) == []


def test_the_lock_of_tuf_js_pins_every_package_and_names_no_registry() -> None:
    text = (TUF_JS / "package-lock.json").read_text()
    packages = {name: item for name, item in json.loads(text)["packages"].items() if name}
    assert packages
    assert all(item["integrity"].startswith("sha512-") for item in packages.values())
    assert not any("resolved" in item for item in packages.values())
    assert "registry" not in text
