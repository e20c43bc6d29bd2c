"""Told for real: a rollout on the real server with a real device, and a receiver that takes what is signed, once."""

import time

import pytest

from device_sdk import Fleet
from device_sdk.protocol.polls import BLOBS
from tests.attacks.world import QUICK, Shop, eventually, proxy_to
from tests.e2e.webhooks import receiving
from tests.sdk.loopback import Reply
from tests.sdk.world import X

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def shop(embedded, tmp_path_factory):
    return Shop(embedded, tmp_path_factory.mktemp("shop"))


@pytest.fixture
def receiver(shop):
    with receiving(shop, busy=1) as receiver:
        yield receiver


def test_start_stage_halt_and_completion_arrive_signed_though_the_receiver_was_busy_once(shop, receiver):
    home = shop.enrol("told")
    stages = [{"percent": 99.99, "min_reports": 0, "success_threshold": 0}, {"percent": 100, "min_reports": 1}]
    good = roll_out(shop, stages)
    with Fleet.open(home, rehearse=False) as fleet:
        work_until_complete(fleet, shop, good)
    bad = roll_out(shop, stages)
    shop.api("POST", f"rollouts/{bad}/roll_back/", {"comment": "looks odd"})
    wanted = {
        (good, "rollout.started"), (good, "rollout.stage_passed"), (good, "rollout.completed"),
        (bad, "rollout.started"), (bad, "rollout.rolled_back"),
    }  # fmt: skip
    eventually(lambda: wanted <= receiver.told(), f"all of {wanted}; got {receiver.told()}")
    assert receiver.asked.count(receiver.asked[0]) == 2, "the one that was refused comes again, with the same id"
    assert all(receiver.asked.count(key) == 1 for key in receiver.asked if key != receiver.asked[0])
    assert receiver.asked[0] in receiver.taken
    assert receiver.refused == []


def test_a_device_that_could_not_fetch_a_release_gets_it_again_and_commits(shop):
    with proxy_to(shop.server.url) as proxy:
        home = shop.enrol("cut-off", proxy.url)
        proxy.attack(BLOBS, Reply(404, b"{}"))
        terms = {"selector": "@name=cut-off", "retry_seconds": 1}
        made = roll_out(shop, [{"percent": 100, "min_reports": 1}], **terms)
        with Fleet.open(home, rehearse=False) as fleet:
            assert fleet.update_once().models[shop.model].state == "failed"
        eventually(lambda: has_failed(shop), "the server to hear of it")
        proxy.relent()
        with Fleet.open(home, rehearse=False) as fleet:
            work_until_complete(fleet, shop, made)


def roll_out(shop, stages, **terms):
    release = shop.releases[shop.release(shop.new_factor())]
    made = shop.api("POST", "rollouts/", {"release": release, "stages": stages, "probation": QUICK, **terms})
    shop.api("POST", f"rollouts/{made['id']}/start/", {})
    return made["id"]


def has_failed(shop):
    found = shop.api("GET", f"events/?device=cut-off&model={shop.model}")["results"]
    return [each for each in found if each["kind"] == "failed"]


def state(shop, rollout):
    return shop.api("GET", f"rollouts/{rollout}/")["state"]


def work_until_complete(fleet, shop, rollout):
    """Poll and infer, until the server says so."""

    def is_complete():
        time.sleep(0.2)
        if fleet.update_once().models[shop.model].state == "probation":
            for _ in range(10):
                fleet.model(shop.model).run(X)
        return state(shop, rollout) == "completed"

    eventually(is_complete, "the rollout to complete")
