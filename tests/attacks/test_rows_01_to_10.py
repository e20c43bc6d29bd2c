"""Rows 1 to 10 of the attack table: views that are old, another device's, empty, or signed by the wrong key."""

from dataclasses import replace

import pytest

from device_sdk.protocol.polls import BINDING, POLL
from tests.attacks.forgery import Forger, keep, part, stranger, text_of, unsigned, with_files
from tests.attacks.world import UNCHANGED, assert_unharmed, device_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
HOUR = 3_600.0


@pytest.fixture(scope="module")
def forger(shop):
    return Forger(shop)


@pytest.fixture(scope="module")
def other(shop):
    """Another device of the same model: enrolled, and heard of."""
    return shop.enrol(f"{shop.model}-neighbour")


def test_row_01_an_older_full_view_replayed_is_refused(device):
    recorded = device.shop.ask(device.home)
    device.recovers()  # a newer view, so that the recorded one is old
    with assert_unharmed(device):
        device.says(recorded)
        device.refuses("replayed")
    device.recovers()


def test_row_02_an_expired_timestamp_is_refused_and_the_model_keeps_serving(device):
    device.proxy.attack(POLL, UNCHANGED)
    device.shop.roll_out(device.shop.new_factor())
    recorded = device.shop.ask(device.home)  # newer than what the device holds, and kept back until it is too old
    with assert_unharmed(device):
        device.set_clock(25 * HOUR)
        device.says(recorded)
        device.refuses("expired")
    device.set_clock(0)
    device.recovers()


def test_row_03_endless_304_past_the_expiry_is_reported_stale(device):
    with assert_unharmed(device):
        device.proxy.attack(POLL, UNCHANGED)
        device.set_clock(25 * HOUR)
        device.refuses("stale", polled="")
    device.set_clock(0)
    device.recovers()


def test_row_04_another_devices_view_is_refused_by_a_fresh_device(shop, other):
    shop.roll_out(2.0)
    with device_of(shop, start=False) as fresh:
        fresh.says(shop.ask(other))
        fresh.start()
        fresh.refuses("wrong_device")
        assert fresh.on_disk() == {}
        assert fresh.facts().answer is None
        fresh.recovers(2.0)


def test_row_05_another_devices_newer_view_is_refused_and_the_honest_one_accepted(device, other, forger):
    with assert_unharmed(device):
        device.says(
            forger.view(device.shop.ask(other), version=part(device.honest(), "timestamp").signed.version + 1000)
        )
        device.refuses("wrong_device")
    device.recovers()


def test_row_06_an_old_director_with_a_new_snapshot_is_refused(device, forger):
    old = device.honest()
    device.recovers()
    new = forger.view(device.honest())
    with assert_unharmed(device):
        device.says(with_files(new, director=text_of(old, "director")))
        device.refuses("hash_mismatch")
        both = {**old.manifests, **device.honest().manifests}
        device.says(replace(forger.view(device.honest(), roles={"director": text_of(old, "director")}), manifests=both))
        assert device.poll() == "replayed"
    device.recovers()


def test_row_07_another_devices_snapshot_is_refused(device, other, forger):
    theirs = device.shop.ask(other)
    mine = device.honest()
    version = max(part(mine, "timestamp").signed.version, part(theirs, "timestamp").signed.version) + 1
    mine, theirs = forger.view(mine, version=version), forger.view(theirs, version=version)
    stolen = {role: text_of(theirs, role) for role in ("snapshot", "director")}
    with assert_unharmed(device):
        device.says(with_files(mine, **stolen))
        device.refuses("hash_mismatch")
        device.says(forger.view(theirs, timestamp=lambda it: it.unrecognized_fields.update({BINDING: device.name})))
        assert device.poll() == "missing_model"
    device.recovers()


def test_row_08_an_empty_director_is_refused_and_the_models_kept(device, forger):
    with assert_unharmed(device):
        device.says(forger.view(device.honest(), director=lambda it: it.targets.clear()))
        device.refuses("empty_director")
    device.recovers()


def test_row_09_the_same_version_with_new_content_is_ignored(device, forger):
    """The new content is the release before: listed by CI, and would be installed."""
    before = device.honest()
    device.recovers()
    honest = device.honest()
    same = part(honest, "timestamp").signed.version
    entries = part(before, "director").signed.targets
    other = forger.view(honest, version=same, director=lambda it: it.targets.update(entries))
    with assert_unharmed(device):
        device.says(replace(other, manifests={**honest.manifests, **before.manifests}))
        asked = device.proxy.count(POLL)
        assert [device.poll(), device.poll()] == ["", ""]
        assert device.proxy.count(POLL) >= asked + 2
    device.recovers()


def test_row_10_unsigned_or_wrong_key_metadata_is_refused(device, forger):
    honest, evil = device.honest(), stranger()
    model = device.shop.model
    bundles = [
        forger.view(honest, keys={role: key}) for role in ("timestamp", "snapshot", "director") for key in (None, evil)
    ]
    roles = [(model, forger.role(honest, keep, evil)), (model, unsigned(forger.role(honest, keep)))]
    roles += [("targets", forger.new_targets(honest, keep, evil)), ("targets", unsigned(text_of(honest, "targets")))]
    bundles += [forger.view(honest, roles={role: text}) for role, text in roles]
    with assert_unharmed(device):
        device.says(bundles[0])
        device.refuses("bad_signature")
        for bundle in bundles[1:]:
            device.says(bundle)
            assert device.poll() == "bad_signature"
    device.recovers()
