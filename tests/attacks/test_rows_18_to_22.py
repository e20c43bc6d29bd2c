"""Rows 18 to 22 of the attack table: stolen online keys and roots.

A rotation would spoil the server for the rows that share it. So here the honest answers after a rotation are built by
the test from the real server's keystore, root keys and all, and said through the proxy; events and artifacts go by the
real server. Each row has a device of its own.
"""

import json

import pytest

from device_sdk.protocol.polls import POLL
from tests.attacks.forgery import Forger, part, stranger, with_roots
from tests.attacks.world import assert_unharmed, device_of
from tests.sdk.loopback import Reply

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
CHANGES = ("trust/view.json", "trust/floor.json")


class People:
    """The honest people with the root keys: what they sign after a theft."""

    def __init__(self, device, forger):
        self.device, self.forger = device, forger
        self.roots = [forger.pinned_root(device.home)]

    def rotate(self, **changes):
        """A new root, and a new online key, which from now on signs what is honest."""
        online = stranger()
        self.roots.append(self.forger.next_root(self.roots[-1], online=online, **changes))
        self.forger.online = online
        return self.roots[-1]

    def bundle(self, **changes):
        """The honest answer: what the server assigns now, under the newest root."""
        honest = self.device.honest()
        targets = self.forger.redirected(honest, self.forger.online)
        return with_roots(self.forger.view(honest, roles={"targets": targets}, **changes), *self.roots[1:])

    def recover(self, factor):
        self.device.shop.roll_out(factor)
        self.device.says(self.bundle())
        self.device.runs(factor)


@pytest.fixture
def device(shop):
    with device_of(shop) as device:
        yield device


@pytest.fixture
def forger(shop):
    return Forger(shop)


@pytest.fixture
def people(device, forger):
    return People(device, forger)


def test_row_18_after_a_fast_forward_a_root_rotation_brings_recovery(device, forger, people):
    with assert_unharmed(device, volatile=CHANGES):  # a validly signed view, and nothing new in it
        device.says(forger.view(device.honest(), version=2**31))
        assert device.poll() == ""
    with assert_unharmed(device):
        device.proxy.relent()
        device.refuses("replayed")
    people.rotate()
    people.recover(3.0)


def test_row_19_a_root_signed_below_the_old_or_the_new_threshold_is_refused(device, forger, people):
    first, mallory, new = people.roots[0], stranger(), [stranger(), stranger(), stranger()]
    attempts = [
        forger.next_root(first, online=mallory, signed_by=forger.roots[:1]),
        forger.next_root(first, online=mallory, signed_by=[stranger(), stranger()]),
        forger.next_root(first, online=mallory, holders=new, signed_by=[*new, forger.roots[0]]),
        forger.next_root(first, online=mallory, holders=new, signed_by=[*forger.roots, new[0]]),
    ]
    honest = device.honest()
    thief = Forger(device.shop)
    thief.online = mallory
    view = thief.view(honest, roles={"targets": thief.redirected(honest, mallory)})
    with assert_unharmed(device):
        for number, root in enumerate(attempts):
            device.says(with_roots(view, root))
            if number == 0:
                device.refuses("bad_signature")
            assert device.poll() == "bad_signature"
    device.recovers()


def test_row_20_a_gap_in_the_root_versions_is_refused(device, forger, people):
    people.rotate()
    people.rotate()
    whole = people.bundle()
    without = {name: text for name, text in whole.metadata.items() if name != "2.root.json"}
    renamed = {**without, "2.root.json": whole.metadata["3.root.json"]}
    with assert_unharmed(device):
        device.says(type(whole)(without, whole.manifests))
        device.refuses("bad_signature")
        device.says(type(whole)(renamed, whole.manifests))
        assert device.poll() == "replayed"
    people.recover(3.0)


def test_row_21_ten_root_rotations_while_offline_are_caught_up_with(device, forger, people):
    with assert_unharmed(device):
        device.proxy.attack(POLL, Reply(raw=[]))  # no network
        for _ in range(10):
            holders = [stranger(), stranger(), stranger()]
            people.rotate(holders=holders, signed_by=[*forger.roots, *holders])
            forger.roots = holders
        assert device.poll() != ""
    people.recover(3.0)
    assert len(kept_roots(device)) == 10


def test_row_22_a_stolen_old_online_key_is_worth_nothing_after_its_rotation(device, forger, people):
    thief = Forger(device.shop)
    people.rotate()
    people.recover(3.0)
    recorded = device.honest()
    version = part(people.bundle(), "timestamp").signed.version + 1000
    with assert_unharmed(device):
        device.says(thief.view(recorded, version=version))
        device.refuses("bad_signature")
    device.stop()
    (device.home / "trust" / "roots.json").unlink()  # and it has lost the root that took the key away
    device.begin()
    device.start()
    with assert_unharmed(device, begins=False):  # a refusal is told once, and may have been already
        device.refuses("replayed")
    people.recover(2.0)


def kept_roots(device):
    path = device.home / "trust" / "roots.json"
    assert path.exists()
    body = json.loads(path.read_bytes())["body"]
    return json.loads(body)["roots"]
