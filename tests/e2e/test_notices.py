"""Told for real: a rollout on the real server with a real device, and a receiver that takes what is signed, once."""

import base64
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from device_sdk import Fleet
from device_sdk.protocol.polls import BLOBS
from tests.attacks.world import QUICK, Shop, eventually, proxy_to
from tests.sdk.loopback import Reply
from tests.sdk.world import X

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def shop(embedded, tmp_path_factory):
    return Shop(embedded, tmp_path_factory.mktemp("shop"))


class Receiver(BaseHTTPRequestHandler):
    """By the text of the standard, not by our code. Its first answer is that it is busy."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key, stamp = self.headers["webhook-id"], self.headers["webhook-timestamp"]
        shared = base64.b64decode(self.server.secret.removeprefix("whsec_"))
        mac = hmac.new(shared, f"{key}.{stamp}.".encode() + body, "sha256").digest()
        is_signed = self.headers["webhook-signature"] == "v1," + base64.b64encode(mac).decode()
        is_fresh = abs(time.time() - int(stamp)) < 300
        busy = not self.server.asked
        self.server.asked.append(key)
        if is_signed and is_fresh and not busy:
            self.server.taken[key] = json.loads(body)
        self.send_response(503 if busy else 204 if is_signed and is_fresh else 400)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver(shop):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.asked, server.taken = [], {}
    name = f"hook-{shop.model}"
    address = f"http://127.0.0.1:{server.server_port}/fleet"
    server.secret = shop.server.manage("notices", "add", name, address).strip()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    shop.server.manage("notices", "remove", name)


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
    eventually(lambda: wanted <= told(receiver), f"all of {wanted}; got {told(receiver)}")
    assert receiver.asked.count(receiver.asked[0]) == 2, "the one that was refused comes again, with the same id"
    assert all(receiver.asked.count(key) == 1 for key in receiver.asked if key != receiver.asked[0])
    assert receiver.asked[0] in receiver.taken


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


def told(receiver):
    return {(body["data"].get("rollout"), body["type"]) for body in list(receiver.taken.values())}


def work_until_complete(fleet, shop, rollout):
    """Poll and infer, until the server says so."""

    def is_complete():
        time.sleep(0.2)
        if fleet.update_once().models[shop.model].state == "probation":
            for _ in range(10):
                fleet.model(shop.model).run(X)
        return state(shop, rollout) == "completed"

    eventually(is_complete, "the rollout to complete")
