"""A release with an acceptance bundle, from CI's samples to a real device, and to the page that says why it refused."""

import numpy as np
import pytest

from device_sdk import Fleet, publish
from tests.attacks.world import Shop
from tests.sdk.world import answer, scaling

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
SAMPLES = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(scope="module")
def shop(embedded, tmp_path_factory):
    shop = Shop(embedded, tmp_path_factory.mktemp("shop"))
    np.savez(shop.folder / "samples.npz", x=SAMPLES)
    return shop


def publish_and_roll_out(shop, version, factor, *options):
    code = shop.push(version, scaling(factor), "--accept", str(shop.folder / "samples.npz"), *options)
    assert code == publish.OK
    (release,) = shop.api("GET", f"releases/?model={shop.model}&version={version}")["results"]
    body = {"release": release["id"], "stages": [{"percent": 100, "min_reports": 1}]}
    made = shop.api("POST", "rollouts/", {**body, "probation": {"calls": 1, "seconds": 0}})
    shop.api("POST", f"rollouts/{made['id']}/start/", {})
    return release["id"], made["id"]


def test_a_device_takes_what_holds_and_refuses_what_does_not_and_the_operator_reads_why(shop):
    release, _ = publish_and_roll_out(shop, "1.0.0", 2.0, "--max-latency-ms", "1000", "--max-memory-mb", "300")
    home = shop.enrol("examined")
    with Fleet.open(home, rehearsal_nice=0) as fleet:
        fleet.update_once()
        assert answer(fleet, shop.model) == 2.0
        fleet.update_once()

        _, rollout = publish_and_roll_out(shop, "2.0.0", 3.0, "--max-latency-ms", "0.000001")
        status = fleet.update_once().models[shop.model]
        assert status.state == "failed"
        assert status.reason.startswith("acceptance_latency: a call takes ")
        assert answer(fleet, shop.model) == 2.0
        fleet.update_once()

    said = "expected at most 1e-06 ms"
    assert said in shop.page("examined")
    assert said in shop.admin(f"rollouts/rollout/{rollout}/change/")
    assert "3 of 3 asked here, and held" in shop.admin(f"releases/release/{release}/change/")
    events = shop.api("GET", f"events/?model={shop.model}&kind=activating")["results"]
    assert [event["detail"]["accepted"] for event in events] == [3]
    assert 0 < events[0]["detail"]["memory"] < 300 * 2**20
