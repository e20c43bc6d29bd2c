"""A program that is not ours embeds the SDK as device_sdk/README.md says: from the bare wheel, before a real server."""

import json
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.attacks.world import Shop, proxy_to
from tests.sdk.loopback import Reply
from tests.sdk.world import nan_emitting
from tests.services import end_with_me

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
CAMERA = Path(__file__).with_name("camera.py")
NO_ANSWER = Reply(raw=[])
PATIENCE = 60.0  # seconds, on a machine that does much else


class Camera:
    """The process, and its page."""

    def __init__(self, venv, home, model, log):
        command = [venv.python, "-I", str(CAMERA), str(home), model]
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.guard = end_with_me(self.process.pid)
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://"), log.read_text()

    def seen(self):
        return requests.get(self.url, timeout=10).json()

    def health(self):
        return requests.get(f"{self.url}/healthz", timeout=10).json()

    def comes_to(self, condition, what):
        deadline = time.monotonic() + PATIENCE
        while not condition(self.seen(), self.health()):
            assert time.monotonic() < deadline, (what, self.seen(), self.health(), self.log.read_text()[-2_000:])
            time.sleep(0.1)

    def ends(self):
        """On SIGTERM: what it said since its start."""
        self.process.terminate()
        said, _ = self.process.communicate(timeout=30)
        self._leave()
        assert self.process.returncode == 0, self.log.read_text()[-2_000:]
        return said

    def kill(self):
        self.process.kill()
        self.process.communicate()
        self._leave()

    def _leave(self):
        self.guard.stdin.close()
        self.guard.wait()


@contextmanager
def running(*arguments):
    camera = Camera(*arguments)
    try:
        yield camera
    finally:
        if camera.process.poll() is None:
            camera.kill()


@pytest.fixture
def shop(embedded, tmp_path):
    return Shop(embedded, tmp_path)


def test_a_camera_loop_embeds_the_sdk_and_never_misses_a_frame(shop, bare_venv, tmp_path):
    shop.roll_out(2.0)
    with proxy_to(shop.server.url) as proxy:
        home = shop.enrol(f"{shop.model}-camera", proxy.url)
        where = (bare_venv, home, shop.model, tmp_path / "camera.log")
        bare_venv.run("-m", "device_sdk", "update", "--home", str(home))

        proxy.attack("/", NO_ANSWER)  # it starts without a network, and serves
        with running(*where) as camera:
            camera.comes_to(lambda seen, _: seen["frames"] > 20, "frames are looked at")
            assert (camera.seen()["last"], camera.seen()["failed"]) == (2.0, 0)
            assert camera.health()["ok"]
            proxy.relent()  # the network is back, and the first release passes its probation
            camera.comes_to(committed(shop, "2.0.0"), "2.0.0 is committed")

            shop.roll_out(3.0)
            camera.comes_to(committed(shop, "3.0.0"), "3.0.0 is committed")
            assert camera.seen()["last"] == 3.0

            shop.release(4.0, nan_emitting())
            shop.roll_out(4.0)
            camera.comes_to(lambda _, health: is_left(health, shop), "4.0.0 is left")
            camera.comes_to(lambda seen, _: seen["last"] == 3.0, "3.0.0 answers again")
            said = camera.ends()

        seen = json.loads(said.splitlines()[-1].removeprefix("bye "))
        assert (seen["failed"], seen["error"], seen["release"]) == (0, "", "3.0.0")
        assert f"{shop.model} is now 3.0.0/default" in said
        assert f"{shop.model} left 4.0.0/default because of invalid_rate" in said

        with running(*where) as camera:  # an end by SIGTERM is no crash
            camera.comes_to(lambda seen, _: seen["last"] == 3.0, "3.0.0 answers after a restart")
            assert "crash_loop" not in where[-1].read_text()
            assert camera.ends().splitlines()[-1].startswith("bye")


def committed(shop, version):
    def condition(seen, health):
        model = health["models"][shop.model]
        return (seen["release"], model["state"], model["release"]) == (version, "committed", f"{version}/default")

    return condition


def is_left(health, shop):
    model = health["models"][shop.model]
    return (model["state"], model["release"]) == ("rolled_back", "3.0.0/default")
