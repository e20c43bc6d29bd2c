"""Rotation and recovery as `deploy/keys.md` tells it, with devices that are offline through it.

One server lives through all of it, drill after drill, as a fleet does over the years; `hermit`, a device that is
pinned to the first root, is offline from the first drill to the last.
"""

import pytest
from django.core.management import call_command

from device_sdk import publish, signing
from device_sdk.errors import ModelStoppedError, TransferError, UntrustedError
from device_sdk.protocol.polls import POLL
from tests.attacks.forgery import Forger
from tests.attacks.world import proxy_to
from tests.drills.world import Custody, FarDevice, FarShop, public_of
from tests.live import serving
from tests.sdk.loopback import Reply

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
FAST_FORWARD = 2**31


@pytest.fixture(scope="module")
def next_key(tmp_path_factory):
    """The server's next online key, beside the one in force."""
    folder = tmp_path_factory.mktemp("next")
    call_command("ceremony", "make-key", "online-next", "--private", str(folder), "--no-passphrase")
    return folder / "online-next.pem"


@pytest.fixture(scope="module")
def server(next_key):
    following = {
        "FLEET_NEXT_ONLINE_KEY_URI": f"file:{next_key}",
        "FLEET_NEXT_ONLINE_KEY_PUBLIC": str(next_key.with_suffix(".pub.json")),
        "FLEET_FAST_POLL": "0",  # the next poll shows what was done; with it, any within a second
    }
    with serving("drills", following) as live:
        yield live


@pytest.fixture(scope="module")
def custody(server, tmp_path_factory):
    return Custody(server, tmp_path_factory.mktemp("custody"))


@pytest.fixture(scope="module")
def shop(server, tmp_path_factory):
    made = FarShop(server, tmp_path_factory.mktemp("shop"))
    made.roll_out(1.0)
    return made


@pytest.fixture(scope="module", autouse=True)
def ended(server, tmp_path_factory):
    """Another model, delegated by the first targets key."""
    made = FarShop(server, tmp_path_factory.mktemp("ended"))
    made.roll_out(1.0)
    return made


@pytest.fixture(scope="module", autouse=True)
def both(shop, ended):
    """A device that runs the two models."""
    far = FarDevice(shop, "both", others=[ended.model])
    assert far.visit() == 1.0
    assert far.offline(ended.model) == 1.0
    return far


@pytest.fixture(scope="module")
def device(shop):
    far = FarDevice(shop, "far")
    assert far.visit() == 1.0
    return far


@pytest.fixture(scope="module", autouse=True)
def hermit(shop):
    alone = FarDevice(shop, "hermit")
    assert alone.visit() == 1.0
    return alone


def takes_the_next_release(device):
    factor = device.shop.next_release()
    return device.visit() == factor


def test_the_online_key_is_rotated_by_bringing_a_root_and_nothing_else(custody, shop, device, next_key):
    public = next_key.with_suffix(".pub.json")
    custody.fetch().edit("set-online", str(public))
    custody.sign(*custody.roots[:2], custody.targets)
    custody.bring()

    assert takes_the_next_release(device)
    assert custody.signers_of(shop.ask(device.home)) == {signing.read_public(public).keyid}


def test_a_lost_online_key_stops_updates_and_nothing_else_until_there_is_a_new_one(custody, shop, device, next_key):
    custody.lose_online_keys(next_key)
    factor, before = shop.next_release(), device.offline()
    with pytest.raises(TransferError, match="online key"):
        device.visit()
    assert device.offline() == before

    custody.fetch()
    custody.edit("set-online", str(custody.make_online(custody.online)))
    custody.sign(*custody.roots[:2], custody.targets)
    custody.bring()
    assert device.visit() == factor


def test_a_ci_key_is_rotated_without_a_moment_in_which_neither_is_good(custody, shop, device):
    old, new = shop.ci, custody.key(custody.fetch().make("ci"))
    custody.edit("set-model", shop.model, "--key", str(public_of(old)), "--key", str(public_of(new)))
    custody.sign(custody.targets)
    custody.bring()
    assert device.visit() == shop.last  # by the old key's signature still
    assert shop.renew(new, "--role-key", str(public_of(old))) == publish.OK
    custody.fetch().edit("set-model", shop.model, "--key", str(public_of(new)))
    custody.sign(custody.targets)
    custody.bring()

    assert shop.push_by(old, 999.0, ["--role-key", str(public_of(new))]) == publish.REFUSED
    shop.ci = new
    assert takes_the_next_release(device)


def test_a_stolen_ci_key_is_replaced_at_once_and_devices_wait_for_the_new_ones_signature(custody, shop, device):
    stolen, new = shop.ci, custody.key(custody.fetch().make("ci"))
    custody.edit("set-model", shop.model, "--key", str(public_of(new)))
    custody.sign(custody.targets)
    said = custody.bring()
    assert shop.model in said  # who has to act now
    assert "renew" in said

    before = device.offline()
    with pytest.raises(UntrustedError) as caught:
        device.visit()  # what the thief could have signed is good no more
    assert caught.value.code == "bad_signature"
    assert device.offline() == before
    assert shop.renew(new, "--role-key", str(public_of(stolen))) == publish.OK
    shop.ci = new
    assert takes_the_next_release(device)


def test_the_targets_key_is_rotated(custody, shop, device):
    name = custody.fetch().make("targets")
    custody.edit("set-targets", "--remove", custody.targets, "--add", name)
    custody.sign(*custody.roots[:2], name)
    custody.bring()
    custody.targets = name

    assert takes_the_next_release(device)


def test_one_lost_root_key_is_replaced(custody, shop, device):
    kept, lost = custody.roots[:2], custody.roots[2]
    name = custody.fetch().make("root")
    custody.edit("rotate-root", "--remove", lost, "--add", name)
    custody.sign(*kept)
    custody.bring()
    custody.roots = [*kept, name]

    assert takes_the_next_release(device)
    assert device.root() == custody.newest_root()


def test_two_root_keys_at_once_are_replaced_while_they_can_still_sign(custody, shop, device):
    first, second, third = custody.roots
    names = [custody.fetch().make("root"), custody.make("root")]
    custody.edit("rotate-root", "--remove", first, "--remove", second, "--add", names[0], "--add", names[1])
    custody.sign(first, second)
    with pytest.raises(RuntimeError, match="still needs"):
        custody.bring()  # enough of the old holders have agreed, and none of the new
    custody.sign(*names)
    custody.bring()
    custody.roots = [third, *names]

    assert takes_the_next_release(device)
    assert device.root() == custody.newest_root()


def test_a_device_ten_roots_behind_climbs_all_of_them(custody, shop, device):
    device.visit()
    began = device.root()
    custody.fetch()
    for _ in range(10):
        custody.edit("renew", "root")
        custody.sign(*custody.roots[:2])
    custody.bring()

    assert takes_the_next_release(device)
    assert device.root() == began + 10


def test_a_repository_that_a_thief_fast_forwarded_is_recovered_by_another_online_key(custody, shop, next_key):
    with proxy_to(shop.server.url) as proxy:
        poisoned = FarDevice(shop, "poisoned", proxy.url)
        assert poisoned.visit() == shop.last
        thief = Forger(shop)
        thief.online = custody.signer(shop.ask(poisoned.home))
        forged = thief.view(shop.ask(poisoned.home), version=FAST_FORWARD)
        proxy.attack(POLL, Reply(200, forged.to_bytes(), {"Content-Type": "application/json"}))
        assert poisoned.visit() == shop.last  # rightly signed, so it is believed
        proxy.relent()
        factor, before = shop.next_release(), poisoned.offline()
        with pytest.raises(UntrustedError) as caught:
            poisoned.visit()
        assert caught.value.code == "replayed"
        assert poisoned.offline() == before

        custody.lose_online_keys(next_key)
        custody.fetch().edit("set-online", str(custody.make_online(custody.online)))
        custody.sign(*custody.roots[:2], custody.targets)
        custody.bring()
        assert poisoned.visit() == factor


def test_a_model_that_a_ceremony_takes_out_ends_and_the_devices_others_go_on(custody, shop, ended, both):
    custody.fetch().edit("remove-model", ended.model)
    custody.sign(custody.targets)
    assert f"{ended.model} 1.0.0 is revoked" in custody.bring()

    factor = shop.next_release()
    assert both.visit() == factor
    assert both.offline(ended.model) == 1.0  # the default: what runs goes on
    shop.server.manage("model_policy", ended.model, "stop")
    assert both.visit() == factor
    with pytest.raises(ModelStoppedError):
        both.offline(ended.model)


def test_the_hermit_who_knows_the_first_root_alone_finds_its_way(custody, shop, hermit):
    custody.fetch().edit("renew", "root")
    custody.sign(*custody.roots[:2])
    custody.bring()

    assert hermit.root() == 1
    assert hermit.offline() == 1.0
    assert hermit.visit() == shop.last
    assert hermit.root() == custody.newest_root() > 1
