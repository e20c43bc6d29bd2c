"""The fast poll in real web processes: what one of them is told, all of them obey."""

import http.client
import json
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from device_sdk.protocol import polls
from device_sdk.protocol.polls import Tag, running_digest
from tests.live import LiveServer

pytestmark = pytest.mark.e2e
PREPARE = """
from datetime import timedelta
from django.contrib.auth.models import User
from fleet.accounts.services import create_token
from fleet.devices import credentials
from tests import fleet_world as world

released = world.release("1.0.0", model="fast-poll")
world.running(released, group=world.group("fast-poll", site=["fast-poll"]))
world.running_set({})
for name in ("fast-one", "fast-two"):
    device = world.device(name, model_names=["fast-poll"])
    print(device.pk, credentials.credential_for(device))
print(world.api_token(User.objects.get(username="admin"), "operate", "read"))
"""


class Poller:
    """Polls over new connections, which the kernel spreads over the web processes."""

    def __init__(self, server: LiveServer, credential: str) -> None:
        self._at, self._credential = urlsplit(server.url), credential
        self.tag = str(Tag(0, running_digest({})))

    def poll(self) -> tuple[int, bool]:
        """The status, and whether it came from memory. Takes a new view, as a device does."""
        with closing(http.client.HTTPConnection(self._at.hostname or "", self._at.port, timeout=30)) as connection:
            headers = {"Authorization": f"Bearer {self._credential}", "If-None-Match": self.tag}
            connection.request("GET", f"{polls.POLL}?root=1", headers=headers)
            answer = connection.getresponse()
            answer.read()
        if answer.status == 200:
            self.tag = answer.headers["ETag"]
        return answer.status, answer.headers["Server"] == "Fleet"

    def until(self, wanted: Callable[[set[tuple[int, bool]]], bool]) -> set[tuple[int, bool]]:
        """Twelve polls at a time, so that every process has its turn; until what they are told is as wanted."""
        deadline = time.monotonic() + 60
        while not wanted(told := {self.poll() for _ in range(12)}):
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
        return told


def test_what_one_process_is_told_every_process_obeys(production: LiveServer) -> None:
    """Two web processes on PostgreSQL. At rest both answer from memory; then a label, then a revocation, by HTTP."""
    told = production.manage("shell", "-v0", "-c", PREPARE).split("\n")
    (one_key, one), (two_key, two) = ((int(key), Poller(production, text)) for key, text in map(str.split, told[:2]))
    for poller in (one, two):
        poller.until(lambda told: told == {(304, True)})
    before = two.tag
    operate(production, told[2], two_key, "labels", {"labels": {"site": "fast-poll"}})
    two.until(lambda told: two.tag != before and told == {(304, True)})
    operate(production, told[2], one_key, "revoke", {"comment": "stolen"})
    one.until(lambda told: {status for status, _ in told} == {401})
    assert {one.poll()[0] for _ in range(24)} == {401}
    assert {two.poll() for _ in range(12)} == {(304, True)}


def operate(server: LiveServer, token: str, device: int, action: str, body: dict[str, Any]) -> None:
    request = Request(  # our own server
        f"{server.url}/api/v1/devices/{device}/{action}/",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    with urlopen(request, timeout=30) as answer:
        assert answer.status in {200, 204}
