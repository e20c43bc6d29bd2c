"""The fast poll in two web processes on PostgreSQL, by HTTP: what one of them is told, both obey. Under granian, which
is the server's own, and under gunicorn, as deploy/README.md has it.
"""

import http.client
import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from device_sdk.protocol import polls
from device_sdk.protocol.polls import Tag, running_digest
from tests.live import KNOWN, ROOT, LiveServer, probe
from tests.services import free_port, running

pytestmark = pytest.mark.e2e
PREPARE = """
from django.contrib.auth.models import User
from fleet.devices import credentials
from tests import fleet_world as world

released = world.release("1.0.0", model="fast-{name}")
world.running(released, group=world.group("fast-{name}", site=["fast-{name}"]))
world.running_set({{}})
for number in (1, 2):
    device = world.device(f"fast-{name}-{{number}}", model_names=["fast-{name}"])
    print(device.pk, credentials.credential_for(device))
print(world.api_token(User.objects.get(username="admin"), "operate", "read"))
"""
POLLS = 16  # over new connections, which the kernel spreads over the processes


class Poller:
    def __init__(self, url: str, credential: str) -> None:
        self._at, self._credential = urlsplit(url), credential
        self.tag = str(Tag(0, running_digest({})))

    def poll(self) -> tuple[int, bool]:
        """The status, and whether it came from memory: that 304 says less. Takes a new view, as a device does."""
        with closing(http.client.HTTPConnection(self._at.hostname or "", self._at.port, timeout=30)) as connection:
            headers = {"Authorization": f"Bearer {self._credential}", "If-None-Match": self.tag}
            connection.request("GET", f"{polls.POLL}?root=1", headers=headers)
            answer = connection.getresponse()
            answer.read()
        if answer.status == 200:
            self.tag = answer.headers["ETag"]
        return answer.status, answer.status == 304 and "Cache-Control" not in answer.headers

    def told(self) -> set[tuple[int, bool]]:
        return {self.poll() for _ in range(POLLS)}

    def rest(self) -> None:
        """Poll until every process answers from memory."""
        deadline = time.monotonic() + 60
        while (told := self.told()) != {(304, True)}:
            assert time.monotonic() < deadline, told
            time.sleep(0.2)


@contextmanager
def gunicorn(server: LiveServer, log: Path) -> Iterator[str]:
    """Beside the server, on the same database."""
    url = f"http://127.0.0.1:{free_port()}"
    options = ["-w", "2", "-k", "gthread", "--threads", "4", "--no-control-socket", "--bind", urlsplit(url).netloc]
    command = [sys.executable, "-m", "gunicorn", *options, "fleet.wsgi:application"]
    with running(command, log, ready=lambda: probe(f"{url}/healthz"), cwd=ROOT, env=server.env):
        yield url


@pytest.fixture(params=["granian", "gunicorn"])
def url(request: pytest.FixtureRequest, production: LiveServer, tmp_path: Path) -> Iterator[str]:
    if request.param == "granian":
        yield production.url
    else:
        with gunicorn(production, tmp_path / "gunicorn.log") as url:
            yield url


def test_what_one_process_is_told_every_process_obeys(
    production: LiveServer, url: str, request: pytest.FixtureRequest
) -> None:
    """At rest both answer from memory. Then a label that brings another release, then a revocation, by HTTP."""
    name = request.node.callspec.params["url"]
    first, second, token = production.manage("shell", "-v0", "-c", PREPARE.format(name=name)).strip().split("\n")
    (one_key, one), (two_key, two) = ((key, Poller(url, text)) for key, text in (first.split(), second.split()))
    one.rest()
    two.rest()
    before = two.tag
    operate(production, token, two_key, "labels", {"labels": {"site": f"fast-{name}"}})
    time.sleep(KNOWN)
    assert two.poll() == (200, False)
    assert two.tag != before
    two.rest()
    operate(production, token, one_key, "revoke", {"comment": "stolen"})
    time.sleep(KNOWN)
    assert one.told() == {(401, False)}
    assert two.told() == {(304, True)}


def operate(server: LiveServer, token: str, device: str, action: str, body: dict[str, Any]) -> None:
    request = Request(  # our own server
        f"{server.url}/api/v1/devices/{device}/{action}/",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    with urlopen(request, timeout=30) as answer:
        assert answer.status in {200, 204}
