"""The real server as processes, on both backends."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.live import BACKENDS, environment, prepare, probe
from tests.manager import CommandFailed, Manager
from tests.services import free_port, running, temporary_folder

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.e2e
CLIENTS = 30
TAKEN = r"cannot listen on 127\.0\.0\.1:.*try another --port"


def test_a_live_server_is_ready_in_all_its_parts(live):
    assert probe(f"{live.url}/readyz") == {"status": "ok", "database": "ok", "objects": "ok", "broker": "ok"}


def test_both_backends_are_what_they_say(live):
    engine, objects, broker = live.manage(
        "shell",
        "-v0",
        "-c",
        "from django.conf import settings as s; from fleet.releases.storage import is_local;"
        "print(s.DATABASES['default']['ENGINE'].split('.')[-1], is_local(), s.CELERY_BROKER_URL.split(':')[0])",
    ).split()
    expected = {"embedded": ("sqlite3", "True", "fleet-files"), "production": ("postgresql", "False", "redis")}

    assert live.backend in BACKENDS
    assert (engine, objects, broker) == expected[live.backend]


def test_the_admin_lets_the_superuser_in(live):
    with requests.Session() as browser:
        page = browser.get(f"{live.url}/admin/login/", timeout=20)
        form = {"username": live.user, "password": live.password, "csrfmiddlewaretoken": browser.cookies["csrftoken"]}
        answer = browser.post(f"{live.url}/admin/login/?next=/admin/", data=form, timeout=20)

        assert page.status_code == 200
        assert (answer.status_code, answer.url) == (200, f"{live.url}/admin/")
        style = browser.get(f"{live.url}/static/admin/css/base.css", timeout=20)
        assert style.status_code == 200


def test_objects_are_stored_and_read_back(live):
    name = f"blobs/{secrets.token_hex(8)}"
    script = (
        "import io; from fleet.releases import storage as s;"
        f"s.put({name!r}, io.BytesIO(b'abc')); print(s.exists({name!r}), s.size({name!r}));"
        f"s.delete({name!r}); print(s.exists({name!r}))"
    )
    assert live.manage("shell", "-v0", "-c", script).split() == ["True", "3", "False"]


def test_a_presigned_url_reads_and_writes_one_object(production):
    name = f"blobs/{secrets.token_hex(8)}"
    script = (
        f"from fleet.releases import storage as s; print(s.presigned_put({name!r}, length=10));"
        f"print(s.presigned_get({name!r}))"
    )
    put, get = production.manage("shell", "-v0", "-c", script).split()

    assert requests.put(put, data=b"0123456789", timeout=20).status_code == 200
    assert requests.get(get, headers={"Range": "bytes=2-4"}, timeout=20).content == b"234"
    assert requests.get(get.partition("?")[0], timeout=20).status_code in {400, 403}


def test_logs_are_json_lines_in_production_and_plain_ones_by_default(live):
    requests.get(f"{live.url}/tuf/cam-7/{'k' * 32}/x", headers={"X-Test": "1"}, timeout=20)
    line = next(line for line in until_logged(live, "/tuf/cam-7/").splitlines() if "/tuf/cam-7/" in line)

    if live.backend == "production":
        assert json.loads(line)["request"] == "GET /tuf/cam-7/[redacted]/x"
    else:
        assert line.startswith("web    | ")
    assert "k" * 32 not in live.logged()


def until_logged(server, text: str) -> str:
    deadline = time.monotonic() + 20
    while text not in server.logged():
        assert time.monotonic() < deadline, server.logged()[-3000:]
        time.sleep(0.05)
    return server.logged()


def test_metrics_gather_all_processes(production):
    """Two web processes: whichever answers, it gives the sum of both."""
    path = f"{production.url}/admin/login/"
    before = logins_served(production)
    for _ in range(20):  # each on a connection of its own, so that both have some
        assert requests.get(path, timeout=20).status_code == 200

    assert {logins_served(production) for _ in range(10)} == {before + 20}


def logins_served(server) -> float:
    headers = {"Authorization": f"Bearer {server.env['FLEET_METRICS_TOKEN']}"}
    page = requests.get(f"{server.url}/metrics", headers=headers, timeout=20).text
    wanted = {"view": "admin:login", "method": "GET"}
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "django_http_requests_total_by_view_transport_method_total"
        and wanted.items() <= sample.labels.items()
    )


def test_serve_names_a_port_that_is_taken(tmp_path):
    env = environment(tmp_path / "var", "http://127.0.0.1:1")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with closing(Manager(env)) as manage, pytest.raises(CommandFailed, match=TAKEN):
            manage("serve", "--no-migrate", "--port", str(other.getsockname()[1]))


@pytest.fixture
def own_server():
    """An embedded server of the test's own, that it may kill."""
    with embedded_server() as server:
        yield server


@pytest.fixture(scope="module")
def sturdy_server():
    """One that a few tests may harm, because it must recover."""
    with embedded_server() as server:
        yield server


@contextmanager
def embedded_server():
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "manage.py", "serve", "--port", str(port), "--workers", "2", "--no-migrate"]
    with temporary_folder("own") as folder:
        env = environment(folder / "var", url)
        with closing(Manager(env)) as manage:
            prepare(manage, folder / "var" / "keystore")
            with running(command, folder / "log", ready=lambda: probe(f"{url}/readyz"), cwd=ROOT, env=env) as process:
                yield process, url, manage


def test_a_web_server_that_dies_is_back_soon(sturdy_server):
    process, url, _ = sturdy_server
    web = next(child for child in psutil.Process(process.pid).children() if "granian" in child.cmdline())
    family = [web, *web.children(recursive=True)]
    web.kill()

    until(lambda: not any(runs(member) for member in family))  # first: the old one's orphan answers for a moment yet
    until(lambda: answers(f"{url}/healthz"))
    assert [member for member in family if runs(member)] == []


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        return bool(probe(url))
    except OSError:
        return False


def test_nothing_outlives_a_server_that_is_killed(own_server):
    process, _, _ = own_server
    family = whole_family(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(40)

    until(lambda: not any(runs(member) for member in family))
    assert [member for member in family if runs(member)] == []


def runs(process: psutil.Process) -> bool:
    """A zombie runs no more: it waits for whoever adopted it to take notice, which is not ours to hurry."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def whole_family(pid: int) -> list[psutil.Process]:
    """Granian and its two, Celery with its clock and its two."""
    deadline = time.monotonic() + 30
    while len(family := psutil.Process(pid).children(recursive=True)) < 7:
        assert time.monotonic() < deadline, family
        time.sleep(0.05)
    return family


WRITER = f"""
import django; django.setup()
from concurrent.futures import ThreadPoolExecutor
from django.db import connection, transaction
from fleet.devices.models import EnrolmentToken, RunningSet

def work(number):
    for step in range(10):
        with transaction.atomic():  # read, then write: without IMMEDIATE this is what fails as "locked"
            token = EnrolmentToken.objects.get(digest="contended")
            EnrolmentToken.objects.filter(pk=token.pk).update(uses=token.uses + 1)
    connection.close()

with ThreadPoolExecutor({CLIENTS // 3}) as pool:
    list(pool.map(work, range({CLIENTS // 3})))
"""


def test_sqlite_takes_writers_of_several_processes_while_clients_ask_and_none_finds_it_locked(sturdy_server):
    _, url, manage = sturdy_server
    env = manage.env | {"DJANGO_SETTINGS_MODULE": "fleet.settings"}
    create = (
        "from datetime import timedelta; from django.utils import timezone; from fleet.devices.models import *;"
        "EnrolmentToken.objects.create(digest='contended', max_uses=9999, expires_at=timezone.now() + timedelta(1))"
    )
    manage("shell", "-v0", "-c", create)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    with ThreadPoolExecutor(CLIENTS) as pool:
        statuses = set(pool.map(lambda _: requests.get(f"{url}/readyz", timeout=60).status_code, range(CLIENTS * 10)))
    told = [writer.communicate(timeout=120)[1] for writer in writers]

    assert [writer.returncode for writer in writers] == [0, 0, 0], told
    assert statuses == {200}
    count = "from fleet.devices.models import *; print(EnrolmentToken.objects.get(digest='contended').uses)"
    assert manage("shell", "-v0", "-c", count).strip() == str(CLIENTS * 10)


def test_control_c_ends_all_at_once(sturdy_server):
    """The sturdy server has served by now; it ends as a person would end it."""
    process, _, _ = sturdy_server
    family = whole_family(process.pid)
    process.send_signal(signal.SIGINT)

    assert process.wait(60) == 0
    assert [member for member in family if runs(member)] == []
