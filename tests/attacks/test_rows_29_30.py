"""Rows 29 and 30 of the attack table: patches that unfold to too much, and patches to another file than the one here.

The real server makes the patches; the attacker changes what is offered and what comes. He also withholds the whole
file, so that what a refused patch leaves behind can be seen before the honest download begins.
"""

import json
import re
import resource
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import requests

from device_sdk.protocol.patches.frames import Operation
from device_sdk.protocol.patches.offers import PatchOffer, offers_to_json, parse_offers, patches_path
from device_sdk.protocol.patches.planes import Codec, pack
from device_sdk.protocol.polls import BLOBS
from tests.attacks.world import assert_unharmed, eventually
from tests.deltas import frame, head, model, moved, sha, weights
from tests.sdk.loopback import Asked, Reply

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
TAKEN = ("trust/view.json", "trust/floor.json", "store/manifests/")
BASE = weights(29)
MIB = 2**20
_seeds = count(1)
_running = {}  # by what it answers: the large release that the device runs, which the next test starts from


def large(factor):
    """A release large enough for patches, and every one a small step from the last."""
    return model(moved(BASE, 1e-7, seed=next(_seeds)), factor)


class Attack:
    """A device that runs a large release; another one, with the patch from it, waits on the server."""

    def __init__(self, device):
        self.device, self.shop, self.factor = device, device.shop, 0.0
        device.proxy.patches = True
        if device.facts().answer not in _running:
            _running.clear()
            data = self._publish()
            _running[self.factor] = data
            device.recovers(self.factor)
        self.old = _running[device.facts().answer]
        self.new = self._publish()
        self.honest = self._offers()

    def _publish(self):
        self.factor = self.shop.new_factor()
        version = f"{int(self.factor)}.0.0"
        data = large(self.factor)
        assert self.shop.push(version, data) == 0
        self.shop.releases |= {
            each["version"]: each["id"]
            for each in self.shop.api("GET", f"releases/?model={self.shop.model}")["results"]
        }
        return data

    def _offers(self):
        """What the server has made; the one from the old release is what a device takes."""
        path = patches_path(BLOBS + sha(self.new))
        device = self.device
        headers = {"Authorization": f"Bearer {json.loads((device.home / 'identity.json').read_text())['credential']}"}

        def made():
            answer = requests.get(self.shop.server.url + path, headers=headers, timeout=30)
            return {each.base: each for each in parse_offers(answer.content)} if answer.ok else {}

        # One at a time, after those for every release that the rows before have pushed.
        eventually(lambda: sha(self.old) in made(), "the server to make the patch", patience=120)
        return made()[sha(self.old)]

    def begin(self, bad):
        """Offer `bad` in place of the honest patch; a roll-out makes the device take it."""
        fake = PatchOffer(sha(self.old), sha(bad), min(len(bad), len(self.new) - 1))

        def hook(asked, honest):
            if asked.path.endswith("/patches"):
                body = json.dumps(offers_to_json([fake])).encode()
                return Reply(200, body, {"Content-Type": "application/json"})
            if asked.path == BLOBS + fake.sha256:
                return Reply(200, bad, {"Content-Type": "application/octet-stream"})
            return Reply(503, b"") if asked.path == BLOBS + sha(self.new) else honest()

        self.device.proxy.attack(BLOBS, hook)
        self.device.hears_last_of(self.factor)

    def ends_well(self):
        self.device.runs(self.factor)
        _running[self.factor] = self.new

    def ends_in_a_full_download(self):
        self.device.proxy.relent()
        self.device.retry()
        self.ends_well()
        assert self.device.proxy.count(BLOBS + sha(self.new)) > 0
        blob = self.device.home / "store" / "blobs" / sha(self.new)
        assert blob.read_bytes() == self.new
        page = self.device.page
        self.device.comes_to(lambda: "refuses what it is sent" not in page(), "its page shows that it is over")


@pytest.fixture
def attack(device):
    return Attack(device)


def peak(device):
    """The most memory that the device's process has had, in bytes."""
    status = Path(f"/proc/{device.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def test_an_honest_patch_is_taken_and_the_file_itself_is_not(attack):
    device = attack.device
    attack.shop.roll_out(attack.factor)
    attack.ends_well()
    assert device.proxy.count(BLOBS + attack.honest.sha256) == 1
    assert device.proxy.count(BLOBS + sha(attack.new)) == 0
    assert attack.honest.length < 0.5 * len(attack.new)


def zeros(length):
    return frame(Operation.LITERAL, length, pack(Codec.ZEROS, b""))


BOMBS = {
    "a GiB in frames of 1 MiB, 33 kB": lambda old, new: head(old, len(new), sha(new)) + zeros(MIB) * 1024,
    "a head that promises a GiB": lambda old, new: head(old, 1024 * MIB, sha(new)) + zeros(MIB) * 1024,
    "a GiB that is copied": lambda old, new: head(old, len(new), sha(new)) + frame(Operation.COPY, len(old)) * 1_000,
}  # fmt: skip


@contextmanager
def no_larger_file(device, size):
    """The kernel refuses the device a longer file: what unfolds to more is seen, though it be deleted at the end."""
    limit = resource.prlimit(device.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(device.pid, resource.RLIMIT_FSIZE, (size, limit[1]))
    yield
    resource.prlimit(device.pid, resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("bomb", BOMBS)
def test_row_29_a_delta_bomb_is_capped_at_the_signed_length(attack, bomb):
    device = attack.device
    bad = BOMBS[bomb](attack.old, attack.new)
    assert len(bad) < 34_000 + 100
    before = peak(device)
    with assert_unharmed(device, volatile=TAKEN), no_larger_file(device, len(attack.new) + 4 * MIB):
        attack.begin(bad)
        device.refuses("bad_patch", polled="")
        assert list((device.home / "store" / "incoming").iterdir()) == []
    assert peak(device) - before < 32 * MIB
    attack.ends_in_a_full_download()


def foreign(attack, content):
    """Of another file, by its own head: refused unread."""
    other = large(1.0)
    return head(other, len(attack.new), sha(attack.new)) + content[len(head(other, 0, sha(attack.new))) :]


def lying(attack, _):
    """Of another file, and its head says that it is of the one here. Applied in good faith it gives other bytes."""
    beginning = frame(Operation.LITERAL, 8, pack(Codec.STORED, b"not that"))
    return head(attack.old, len(attack.new), sha(attack.new)) + beginning + frame(Operation.COPY, len(attack.new) - 8)


WRONG = {"by its own head": (foreign, "bad_patch"), "by its bytes": (lying, "hash_mismatch")}


@pytest.mark.parametrize("wrong", WRONG)
def test_row_30_a_delta_to_the_wrong_base_means_a_full_download(attack, wrong):
    device, (forge, code) = attack.device, WRONG[wrong]
    bad = forge(attack, read(attack, device.proxy.honest))
    with assert_unharmed(device, volatile=TAKEN):
        attack.begin(bad)
        device.refuses(code, polled="")
        assert list((device.home / "store" / "incoming").iterdir()) == []
    attack.ends_in_a_full_download()


def read(attack, honest):
    """The honest patch, as it goes over the line."""
    credential = json.loads((attack.device.home / "identity.json").read_text())["credential"]
    asked = Asked("GET", BLOBS + attack.honest.sha256, {"Authorization": f"Bearer {credential}"}, b"")
    return replace(honest(asked)).body
