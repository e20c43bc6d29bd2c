"""Rows 11 to 17 of the attack table: who may say what runs. The attacker has the online key, and at times CI's."""

import json
from dataclasses import replace

import pytest

from tests.attacks.forgery import (
    Forger,
    assigning,
    carrying,
    listing,
    of_threshold,
    part,
    stranger,
    text_of,
)
from tests.attacks.world import assert_unharmed
from tests.sdk.world import manifest_of, scaling

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def forger(shop):
    return Forger(shop)


@pytest.fixture
def evil(shop):
    """A release that CI never made."""
    return manifest_of(f"{shop.model}/6.6.6/default", scaling(666.0))


def test_row_11_one_key_signing_twice_at_threshold_2_is_refused(device, forger, evil):
    """The targets key has put the model at threshold 2; the thief has one of CI's two keys."""
    honest, model, second = device.honest(), device.shop.model, stranger()
    targets = forger.new_targets(honest, of_threshold(model, 2, forger.ci, second))
    role = forger.role(honest, listing(evil))
    repeated, renamed = json.loads(role), json.loads(role)
    repeated["signatures"] *= 2
    renamed["signatures"].append({**renamed["signatures"][0], "keyid": second.public_key.keyid})
    foreign = json.loads(forger.role(honest, listing(evil), forger.ci, forger.other_ci))
    attacks = [(json.loads(role), "bad_signature"), (repeated, "malformed")]
    attacks += [(renamed, "bad_signature"), (foreign, "bad_signature")]
    with assert_unharmed(device):
        for text, code in attacks:
            roles = {"targets": targets, model: json.dumps(text)}
            view = forger.view(honest, director=assigning(device.name, evil), roles=roles)
            device.says(carrying(view, evil))
            if code == "malformed":
                device.refuses(code)
            assert device.poll() == code
    device.recovers()


def test_row_12_the_wrong_models_ci_key_is_refused(device, forger, evil):
    honest, model, other = device.honest(), device.shop.model, device.shop.other
    assigned = assigning(device.name, evil)
    with assert_unharmed(device):
        role = forger.role(honest, listing(evil), forger.other_ci)
        device.says(carrying(forger.view(honest, director=assigned, roles={model: role}), evil))
        device.refuses("bad_signature")
        # In its own role the other CI may write what it likes: nobody looks there for this model.
        role = forger.role(honest, listing(evil), forger.other_ci)
        device.says(carrying(forger.view(honest, director=assigned, roles={other: role}), evil))
        device.refuses("unlisted_release")
    device.recovers()


def test_row_13_a_director_that_names_an_unreleased_hash_is_refused(device, forger, evil):
    honest = device.honest()
    disguised = replace(evil, path=listed_path(device, honest))
    with assert_unharmed(device):
        device.says(carrying(forger.view(honest, director=assigning(device.name, evil)), evil))
        device.refuses("unlisted_release")
        device.says(carrying(forger.view(honest, director=assigning(device.name, disguised)), disguised))
        device.refuses("disagreement")
    device.recovers()


def test_row_14_a_director_that_differs_from_the_release_in_length_or_hash_is_refused(device, forger, evil):
    honest = device.honest()
    path = f"assign/{device.name}/{device.shop.model}"

    def longer(director):
        director.targets[path].length += 1

    def other_hash(director):
        director.targets[path].hashes = {"sha256": "0" * 64}

    with assert_unharmed(device):
        device.says(forger.view(honest, director=longer))
        device.refuses("disagreement")
        device.says(forger.view(honest, director=other_hash))
        assert device.poll() == "disagreement"
    device.recovers()


def test_row_15_model_as_assignment_that_names_model_b_is_refused(device, forger):
    honest, other = device.honest(), device.shop.other
    foreign = manifest_of(f"{other}/1.0.0/default", scaling(666.0))
    role = forger.role(honest, listing(foreign), forger.other_ci)
    with assert_unharmed(device):
        assigned = assigning(device.name, foreign, model=device.shop.model)
        device.says(carrying(forger.view(honest, director=assigned, roles={other: role}), foreign))
        device.refuses("wrong_model")
    device.recovers()


def test_row_16_a_release_that_ci_removed_is_refused_when_assigned(device, forger):
    honest = device.honest()
    removed = str(listed_path(device, honest))
    role = forger.role(honest, lambda it: it.targets.pop(removed))
    with assert_unharmed(device):
        device.says(forger.view(honest, roles={device.shop.model: role}))
        device.refuses("unlisted_release")
    device.recovers()


def test_row_17_a_role_rolled_back_in_the_snapshot_is_refused(device, forger):
    """CI's role as it was before its last release, and the release that was assigned then."""
    before = device.honest()
    device.shop.release(factor := device.shop.new_factor())
    device.recovers(factor)
    honest, model = device.honest(), device.shop.model
    assert part(honest, model).signed.version > part(before, model).signed.version
    entries = part(before, "director").signed.targets
    roles = {model: text_of(before, model)}
    old = forger.view(honest, director=lambda it: it.targets.update(entries), roles=roles)
    with assert_unharmed(device):
        device.says(replace(old, manifests={**honest.manifests, **before.manifests}))
        device.refuses("replayed")
        device.says(forger.view(honest, snapshot=lambda it: it.meta.pop("targets.json")))
        assert device.poll() == "inconsistent"
    device.recovers()


def listed_path(device, honest):
    """What the device is assigned, as the manifest in the bundle names it."""
    from device_sdk.protocol.names import ReleasePath

    director = json.loads(text_of(honest, "director"))["signed"]["targets"]
    return ReleasePath.parse(director[f"assign/{device.name}/{device.shop.model}"]["custom"]["release"])
