"""What an operator asks of devices, obeyed by a real one and seen by the operator: from the rollout to the page."""

from datetime import date

import numpy as np
import pytest
from onnx import helper

from device_sdk import Fleet
from device_sdk.protocol.polls import BLOBS
from device_sdk.traffic import Clock
from tests.attacks.world import Shop, proxy_to
from tests.sdk.world import graph

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def shop(embedded, tmp_path_factory):
    return Shop(embedded, tmp_path_factory.mktemp("shop"))


def large(factor):
    pad = np.random.default_rng(3).integers(0, 256, 500_000, np.uint8)
    return graph([helper.make_node("Mul", ["x", "k"], ["y"])], {"k": np.float32(factor), "pad": pad})


def roll_out(shop, **terms):
    """A new release of half a megabyte, under these terms; its length."""
    factor = shop.new_factor()
    release = shop.releases[shop.release(factor, large(factor))]
    body = {"release": release, "stages": [{"percent": 100, "min_reports": 1}], **terms}
    made = shop.api("POST", "rollouts/", body)
    shop.api("POST", f"rollouts/{made['id']}/start/", {})
    return len(large(factor))


def test_the_operator_reads_what_a_device_waits_for_and_may_say_that_it_is_urgent(shop):
    roll_out(shop, conditions={"charging": True})
    home = shop.enrol("on-battery")
    with Fleet.open(home, rehearse=False, probes={"charging": lambda: False}) as fleet:
        status = fleet.update_once().models[shop.model]
        assert (status.state, status.reason) == ("waiting", "charging")
        (lagging,) = shop.api("GET", f"laggards/?model={shop.model}")["results"]
        assert (lagging["why"], lagging["detail"]) == ("waiting", "charging")
        assert "charging" in shop.page("on-battery")
        roll_out(shop, conditions={"charging": True}, urgent=True)
        assert fleet.update_once().models[shop.model].state == "probation"


def test_a_daily_budget_of_the_rollout_is_kept_to_the_byte_and_the_next_day_goes_on(shop):
    length = roll_out(shop, conditions={"daily": 200_000})
    said, came = [], []
    with proxy_to(shop.server.url) as proxy:
        home = shop.enrol("on-a-budget", proxy.url)
        passed = {"bytes": 0}

        def count(asked, honest):
            reply = honest()
            passed["bytes"] += 0 if asked.path.endswith("/patches") else len(reply.body)
            return reply

        proxy.attack(BLOBS, count)
        for day in (date(2026, 11, 21), date(2026, 11, 22), date(2026, 11, 23)):
            with Fleet.open(home, rehearse=False) as fleet:  # each day another process
                # The budget's days alone: by a clock that is a day ahead what the server signs has expired.
                fleet._installers[shop.model]._parts.traffic._clock = Clock(today=lambda day=day: day)
                said.append([fleet.update_once().models[shop.model] for _ in range(2)])
            came.append(passed["bytes"])
    assert came == [200_000, 400_000, length]
    assert [(status.state, status.reason) for day in said[:2] for status in day] == [("waiting", "budget")] * 4
    assert said[2][0].state == "probation"
