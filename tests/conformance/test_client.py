"""The command that tuf-conformance drives, by the suite's own protocol, over HTTP. The suite: `make conformance`."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata

from tests.conformance import client
from tests.sdk.loopback import Loopback, Reply, loopback
from tests.simulator import DAY, Simulator, resigned, unsigned

PATH = "detector/1.0.0/default"


class Suite:
    """What the suite does: a repository over HTTP, and the command with its folders."""

    def __init__(self, web: Loopback, folder: Path) -> None:
        self.web, self.folder = web, folder
        self.sim = Simulator(now=int(datetime.now(UTC).timestamp()))
        self.manifest = self.sim.publish(PATH)
        (folder / "metadata").mkdir()
        (folder / "targets").mkdir()

    def serve(self, files: dict[str, str] | None = None) -> dict[str, str]:
        """The next view, or these files; older ones stay where they are."""
        self.sim.now += 1
        files = files if files is not None else self.sim.view()
        for root in self.sim.roots[1:]:
            files[f"{root.signed.version}.root.json"] = root.to_bytes().decode()
        for name, text in files.items():
            self.web.on(f"/repo/metadata/{name}", Reply(body=text.encode()))
        data = self.manifest.to_bytes()
        self.web.on(f"/repo/targets/detector/1.0.0/{sha256(data).hexdigest()}.default", Reply(body=data))
        return files

    def arguments(self, *command: str) -> list[str]:
        url = f"{self.web.url}/repo"
        return [
            *("--metadata-dir", str(self.folder / "metadata"), "--metadata-url", f"{url}/metadata/"),
            *("--target-dir", str(self.folder / "targets"), "--target-base-url", f"{url}/targets/"),
            *command,
        ]

    def run(self, *command: str) -> int:
        return client.main(self.arguments(*command))

    def download(self, *names: str) -> int:
        return self.run(*(part for name in names for part in ("--target-name", name)), "download")

    def init(self) -> int:
        root = self.folder / "initial_root.json"
        root.write_bytes(self.sim.pinned_root())
        return client.main(["--metadata-dir", str(self.folder / "metadata"), "init", str(root)])

    def trusted(self) -> dict[str, int]:
        """The suite's look at the folder: each role by its unversioned name."""
        found: dict[str, int] = {}
        for path in (self.folder / "metadata").glob("*.json"):
            metadata: Metadata[Any] = Metadata.from_file(str(path))
            found[path.stem] = metadata.signed.version
        return found

    def downloaded(self) -> list[bytes]:
        return [path.read_bytes() for path in (self.folder / "targets").iterdir()]


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[Suite]:
    with loopback() as web:
        suite = Suite(web, tmp_path)
        assert suite.init() == 0
        yield suite


def test_init_asks_the_repository_nothing(suite: Suite) -> None:
    assert suite.trusted() == {"root": 1}
    assert suite.web.asked == []


def test_the_command_refreshes_and_downloads_as_the_suite_calls_it(suite: Suite) -> None:
    suite.serve()
    command = [sys.executable, "-m", "tests.conformance"]
    for arguments in (["refresh"], ["--target-name", PATH, "download"]):
        done = subprocess.run([*command, *suite.arguments(*arguments)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert suite.downloaded() == [suite.manifest.to_bytes()]
    assert set(suite.trusted()) >= {"root", "timestamp", "snapshot", "targets", "detector"}


def test_a_refusal_is_exit_code_1_and_is_named(suite: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    suite.serve()
    suite.web.on("/repo/metadata/timestamp.json", Reply(body=b"{}"))
    assert suite.run("refresh") == 1
    assert capfd.readouterr().err.startswith("malformed: ")


def test_an_older_view_is_refused(suite: Suite) -> None:
    old = suite.serve()
    new = suite.serve()
    assert suite.run("refresh") == 0
    before = suite.trusted()
    suite.serve(old)
    assert suite.run("refresh") == 1
    assert suite.trusted() == before
    suite.serve(new)
    assert suite.run("refresh") == 0


def test_an_older_view_is_refused_even_when_ngclient_has_lost_its_files(suite: Suite) -> None:
    """This is the SDK's floor and not ngclient's doing: a plain client would start afresh."""
    old = suite.serve()
    suite.serve()
    assert suite.run("refresh") == 0
    for name in ("timestamp", "snapshot", "targets"):
        (suite.folder / "metadata" / f"{name}.json").unlink()
    suite.serve(old)
    assert suite.run("refresh") == 1


def test_the_root_that_was_pinned_is_what_counts(suite: Suite) -> None:
    """A root.json that was planted in the folder of ngclient's files is not believed: the SDK pins its own."""
    suite.serve()
    thief = Simulator(now=suite.sim.now, root_keys=("thief-1", "thief-2"), online="thief")
    (suite.folder / "metadata" / "root.json").write_bytes(thief.pinned_root())
    suite.serve(thief.view())
    assert suite.run("refresh") == 1
    assert "timestamp" not in suite.trusted()


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_an_unsigned_role_is_refused(suite: Suite, role: str) -> None:
    suite.serve(suite.sim.view(edit=lambda name, text: unsigned(text) if name == role else text))
    assert suite.run("refresh") == 1
    assert role not in suite.trusted()


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_an_expired_role_is_refused(suite: Suite, role: str) -> None:
    past = datetime.fromtimestamp(suite.sim.now - DAY, UTC)
    key = "targets" if role == "targets" else suite.sim.online
    suite.serve(suite.sim.view(edit=lambda name, text: resigned(text, key, expires=past) if name == role else text))
    assert suite.run("refresh") == 1


def test_roots_are_followed_one_by_one(suite: Suite) -> None:
    for _ in range(3):
        suite.sim.rotate_root()
    suite.sim.rotate_root(online="online-2")
    suite.serve()
    assert suite.run("refresh") == 0
    assert suite.trusted()["root"] == 5


def test_a_root_that_the_old_keys_did_not_sign_is_refused(suite: Suite) -> None:
    suite.sim.rotate_root(keys=("thief-1", "thief-2"), signed_by=("thief-1", "thief-2"))
    suite.serve()
    assert suite.run("refresh") == 1
    assert suite.trusted() == {"root": 1}


def test_metadata_beyond_our_cap_is_refused(suite: Suite) -> None:
    suite.serve()
    suite.web.on("/repo/metadata/timestamp.json", Reply(body=iter([b" " * 2**20] * 8)))
    assert suite.run("refresh") == 1


def test_a_redirect_to_another_host_is_refused(suite: Suite) -> None:
    suite.serve()
    elsewhere = Reply(302, headers={"Location": "http://127.0.0.2:9/timestamp.json"})
    suite.web.on("/repo/metadata/timestamp.json", elsewhere)
    assert suite.run("refresh") == 1


def test_other_bytes_than_were_signed_are_not_stored(suite: Suite) -> None:
    suite.serve()
    data = suite.manifest.to_bytes()
    place = f"/repo/targets/detector/1.0.0/{sha256(data).hexdigest()}.default"
    for other in (data[:-1] + b"!", data + b"!", data[:-1]):
        suite.web.on(place, Reply(body=other))
        assert suite.download(PATH) == 1
        assert suite.downloaded() == []


def test_a_target_that_nobody_lists_is_exit_code_1(suite: Suite) -> None:
    suite.serve()
    assert suite.download("detector/9/default") == 1
    assert suite.download(PATH, "detector/9/default") == 1
    assert suite.downloaded() == [suite.manifest.to_bytes()]


def test_a_target_that_is_here_is_not_fetched_again(suite: Suite) -> None:
    suite.serve()
    assert suite.download(PATH) == 0
    assert suite.download(PATH) == 0
    assert len([asked for asked in suite.web.asked if "/targets/detector/" in asked.path]) == 1
