"""Twenty devices on the real server, by the doors that devices and operators use: a bad release, and a good one."""

import json
import random
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import requests

from device_sdk.protocol import events
from device_sdk.protocol.events import Event
from device_sdk.protocol.names import ReleasePath
from device_sdk.protocol.polls import EVENTS
from device_sdk.protocol.posts import EventPost
from tests.attacks.world import Shop, eventually
from tests.e2e.webhooks import receiving
from tests.live import KNOWN

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
DEVICES = 20
GUARDS = {"failures": {}, "errors": {}, "devices": 5, "calls": 100}
# The first stage soaks until all have told: one that passed before would be compared anew, with fewer beside it.
STAGES = [{"percent": 50, "min_reports": 9, "soak_seconds": 15}, {"percent": 100, "min_reports": 16}]


@dataclass
class Camera:
    """A device that runs what it is given and counts as the SDK does, without a model."""

    shop: Shop
    home: object
    seed: int
    version: str = ""
    load: str = ""
    counts: dict = field(default_factory=dict)

    @property
    def name(self):
        return self.home.name

    def polls(self):
        return self.shop.assigned(self.shop.ask(self.home), self.name)

    def takes(self, version, rollout):
        """Install it, and commit after a probation of ten calls."""
        self.version, self.load, self.counts = version, secrets.token_hex(4), {"calls": 0, "errors": 0}
        self.works(10, 0.0)
        self.says(self.event(events.PROBATION, rollout), self.event(events.COMMITTED, rollout, self.detail()))

    def works(self, calls, error_rate):
        rng = random.Random(self.seed * 1_000 + self.counts["calls"])
        self.counts["calls"] += calls
        self.counts["errors"] += sum(rng.random() < error_rate for _ in range(calls))

    def detail(self):
        slow = 2_000 + 300 * self.seed  # microseconds: no two boards are the same
        return {**self.counts, "load": self.load, "checked": self.counts["calls"], "invalid": 0, "p95_us": slow}

    def tells(self, rollout):
        self.says(self.event(events.HEALTH, rollout, self.detail()))

    def event(self, kind, rollout, detail=None):
        path = ReleasePath(self.shop.model, self.version, "default")
        return Event(secrets.token_hex(16), 1.8e9, kind, self.shop.model, path, str(rollout), detail=detail or {})

    def says(self, *told):
        credential = json.loads((self.home / "identity.json").read_text())["credential"]
        runs = {self.shop.model: f"{self.version}/default"}
        answer = requests.post(
            f"{self.shop.server.url}{EVENTS}",
            json=EventPost(told, runs, "0.2.0").to_json(),
            headers={"Authorization": f"Bearer {credential}"},
            timeout=30,
        )
        assert answer.status_code == 200, answer.text


@dataclass
class Fleet:
    shop: Shop
    cameras: list

    def each(self, act):
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(act, self.cameras))

    def starts(self, factor, **terms):
        version = self.shop.release(factor)
        body = {"release": self.shop.releases[version], "stages": STAGES, "on_failure": "roll_back", **terms}
        made = self.shop.api("POST", "rollouts/", body)
        self.shop.api("POST", f"rollouts/{made['id']}/start/", {})
        return version, made["id"]

    def goes_back(self):
        def act(camera):
            if camera.version != "1.0.0":
                camera.takes("1.0.0", 0)
                camera.works(500, 0.005)
                camera.tells("")

        self.each(act)

    def rollout(self, pk):
        return self.shop.api("GET", f"rollouts/{pk}/")

    def becomes(self, pk, **wanted):
        """The rollout, once it is so for whoever polls; looked at no more often than the engine ticks."""
        deadline = time.monotonic() + 60
        while any((found := self.rollout(pk))[name] != value for name, value in wanted.items()):
            assert time.monotonic() < deadline, (wanted, found["state"], found["stage_index"], found["reason"])
            time.sleep(0.5)
        time.sleep(KNOWN)  # and so do the polls
        return found

    def live(self, version, pk, error_rate):
        """Each polls, takes what it is given, works, and tells twice."""

        def act(camera):
            if camera.polls() == version and camera.version != version:
                camera.takes(version, pk)
            for _ in range(2):
                new = camera.version == version
                camera.works(150, error_rate if new else 0.005)
                camera.tells(pk if new else "")

        time.sleep(KNOWN)
        self.each(act)


@pytest.fixture(scope="module")
def fleet(embedded, tmp_path_factory):
    """Devices that have run a release for a while."""
    shop = Shop(embedded, tmp_path_factory.mktemp("shop"))
    shop.roll_out(1.0)
    made = Fleet(shop, [Camera(shop, shop.enrol(f"{shop.model}-{at}"), at) for at in range(DEVICES)])

    def settle(camera):
        camera.takes("1.0.0", 0)
        camera.works(2_000, 0.005)
        camera.tells("")

    made.each(settle)
    return made


def test_the_guard_halts_a_fifth_of_failed_calls_and_lets_the_resumed_rollout_of_a_healthy_model_through(fleet):
    """The same release twice: first a service that the model calls is away, then it is back, and a person resumes."""
    version, pk = fleet.starts(2.0, guards=GUARDS)
    with receiving(fleet.shop, "rollout.halted") as receiver:
        fleet.live(version, pk, 0.2)
        halted = fleet.becomes(pk, state="halted")
        eventually(receiver.told, "the halt to be told")

    (told,) = receiver.taken.values()
    assert (told["type"], told["data"]["rollout"], told["data"]["actor"]) == ("rollout.halted", pk, "guard")
    assert told["data"]["comment"] == halted["reason"]
    assert halted["reason"].startswith("inference errors: ")
    assert receiver.refused == []
    assert {each["guard"] for each in halted["readings"]} == {"failures", "errors"}
    assert {camera.polls() for camera in fleet.cameras} == {"1.0.0"}
    fleet.goes_back()
    fleet.shop.api("POST", f"rollouts/{pk}/resume/", {"comment": "the lens service is back"})
    fleet.live(version, pk, 0.005)
    fleet.becomes(pk, stage_index=1)
    fleet.live(version, pk, 0.005)
    done = fleet.becomes(pk, state="completed")
    compared = {each["guard"]: each["compared"] for each in done["readings"]}
    assert compared["errors"] >= 5
    assert compared["failures"] >= 16, "of those who began after the resume"
