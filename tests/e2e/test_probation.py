"""A device in a process of its own sees that a new model answers otherwise than the one before, and leaves it."""

import numpy as np
import pytest
from onnx import helper

from device_sdk import publish
from tests.attacks.world import Shop, device_of
from tests.sdk.world import graph

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
WATCHED = {"calls": 300, "seconds": 0, "max_confidence_drop": 0.1, "max_class_shift": 0.2}


@pytest.fixture(scope="module")
def shop(embedded, tmp_path_factory):
    return Shop(embedded, tmp_path_factory.mktemp("shop"))


def classifier(sharpness, favoured=0.0):
    """Four classes; `favoured` is what the last of them has before it has seen anything."""
    nodes = [
        helper.make_node("Mul", ["x", "sharpness"], ["sharp"]),
        helper.make_node("Add", ["sharp", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["y"], axis=-1),
    ]
    return graph(nodes, {"sharpness": np.float32(sharpness), "bias": np.array([0, 0, 0, favoured], np.float32)})


def roll_out(shop, version, data):
    """To the fleet's devices, which compare its answers with those of the one before. The rollout's number."""
    assert shop.push(version, data, "--scores", "y:probabilities") == publish.OK
    (release,) = shop.api("GET", f"releases/?model={shop.model}&version={version}")["results"]
    stages = [{"percent": 100, "min_reports": 1}]
    made = shop.api(
        "POST",
        "rollouts/",
        {"release": release["id"], "stages": stages, "probation": WATCHED, "on_failure": "roll_back"},
    )
    shop.api("POST", f"rollouts/{made['id']}/start/", {})
    return made["id"]


def test_a_shift_of_confidence_or_of_the_class_mix_is_left_by_the_device_itself_and_its_page_says_why(shop):
    roll_out(shop, "1.0.0", classifier(4.0))
    with device_of(shop, name="watchful", start=False, frames=500, rehearse=False) as device:
        device.start()
        device.comes_to(lambda: runs(device, "1.0.0", "committed"), "the first release is committed", calls=2_000)
        roll_out(shop, "1.1.0", classifier(4.2))
        device.comes_to(
            lambda: runs(device, "1.1.0", "committed"), "one that is as the first is committed", calls=2_000
        )

        for version, bad, reason in (
            ("2.0.0", classifier(0.5), "confidence_drop: "),
            ("3.0.0", classifier(4.0, favoured=20.0), "class_shift: "),
        ):
            rollout = roll_out(shop, version, bad)
            device.comes_to(lambda version=version: told(shop, version), f"{version} is left", calls=2_000)
            (event,) = told(shop, version)
            assert event["reason"].startswith(reason)
            assert device.facts().release == "1.1.0/default"
            assert event["reason"] in device.page()
            device.comes_to(lambda pk=rollout: is_taken_back(shop, pk), "the rollout is taken back")
            assert event["reason"] in shop.admin(f"rollouts/rollout/{rollout}/change/")
        assert device.facts().failures == ()


def runs(device, version, state):
    model = device.tell("status")["status"]["models"][device.shop.model]
    return (model["release"], model["state"]) == (f"{version}/default", state)


def told(shop, version):
    found = shop.api("GET", f"events/?device=watchful&model={shop.model}&kind=rolled_back")["results"]
    return [event for event in found if event["release"] == f"{shop.model}/{version}/default"]


def is_taken_back(shop, rollout):
    return shop.api("GET", f"rollouts/{rollout}/")["state"] == "halted"
