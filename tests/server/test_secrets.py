"""No secret lies readable in the database, and none leaves in a log or an answer that should not have it."""

import http.client
import json
import re
import secrets
import socket
import time
from base64 import b64encode
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.conf import settings
from django.db import connection
from django.test import Client

from fleet.accounts.sessions import SessionStore, stored
from fleet.devices import credentials
from fleet.devices import services as devices
from fleet.devices.models import Device
from tests.fleet_world import api_token, enrolment_token, operator, superuser
from tests.live import LiveServer, serving
from tests.registry import Registry, publish_token

PASSWORD = "correct horse battery"


# --- at rest -----------------------------------------------------------------------------------------------------


def dump() -> str:
    """Every row of every table, as text and as hex."""
    lines = []
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            cursor.execute(f"SELECT * FROM {connection.ops.quote_name(table)}")
            lines += [f"{table} {row!r}" for row in cursor.fetchall()]
    return "\n".join(lines)


@pytest.mark.django_db
def test_no_secret_lies_readable_in_the_database(client: Client, registry: Registry) -> None:
    registry.publish("1.0.0")
    superuser()
    logged_in = client.post("/admin/login/", {"username": "sue", "password": PASSWORD})
    assert logged_in.status_code == 302
    _, enrolment = enrolment_token()
    nonce = secrets.token_hex(16)
    headers = {"Authorization": f"Bearer {enrolment}"}
    body = {"device": "cam-1", "nonce": nonce, "labels": {}, "sdk": "1"}
    enrolled = client.post("/api/device/v1/enrol", body, content_type="application/json", headers=headers)
    device = Device.objects.get()
    credential = enrolled.json()["credential"]
    client.get("/api/device/v1/poll", headers={"Authorization": f"Bearer {credential}"})
    kept = {
        "enrolment token": enrolment,
        "nonce": nonce,
        "device credential": credential,
        "its mac": credential.rpartition(".")[2],
        "re-issued credential": devices.reissue(device=device, actor="ann"),
        "view key": credentials.view_key(device),
        "API token": api_token(operator(), "operate"),
        "CI token": publish_token("digits"),
        "CI token that was used": registry.token,
        "session": client.cookies[settings.SESSION_COOKIE_NAME].value,
        "password": PASSWORD,
        "SECRET_KEY": settings.SECRET_KEY,
        **{f"device secret {n}": text.partition(":")[2] for n, text in enumerate(settings.DEVICE_SECRETS)},
    }
    everything = dump()
    assert "cam-1" in everything  # it is a dump
    readable = [name for name, value in kept.items() if value in everything or value.encode().hex() in everything]
    assert readable == []
    assert stored(kept["session"]) in everything


@pytest.mark.django_db
def test_a_stored_sessions_key_is_nobodys_session() -> None:
    session = SessionStore()
    session["who"] = "ann"
    session.save()
    key = session.session_key
    assert SessionStore(key).load() == {"who": "ann"}
    assert SessionStore(stored(key)).load() == {}
    assert SessionStore(key).exists(key)
    SessionStore(key).delete()
    assert SessionStore(key).load() == {}


@pytest.mark.django_db
def test_logging_out_and_cycling_end_the_stored_session(client: Client) -> None:
    superuser()
    client.post("/admin/login/", {"username": "sue", "password": PASSWORD})
    key = client.cookies[settings.SESSION_COOKIE_NAME].value
    assert client.get("/admin/").status_code == 200
    client.post("/admin/logout/")
    again = Client()
    again.cookies[settings.SESSION_COOKIE_NAME] = key
    assert again.get("/admin/").status_code == 302


# --- in logs and answers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talkative() -> Iterator[LiveServer]:
    """A server of our own that logs all it can, and refuses without counting."""
    names = ("LOGIN", "LOGIN_USER", "LOGIN_ADDRESS", "ENROL_ADDRESS", "ENROL_TOKEN", "API_TOKEN")
    with serving("embedded", {"FLEET_LOG_LEVEL": "DEBUG", **{f"FLEET_LIMIT_{name}": "" for name in names}}) as server:
        yield server


def secret() -> str:
    return secrets.token_hex(24)


def shapes(value: str) -> dict[str, str]:
    """The same secret as each kind of caller shows it."""
    return {
        "api token": f"Bearer flt_{value}",
        "enrolment token": f"Bearer fle_{value}",
        "credential": f"Bearer cam-1.1.demo.{value}",
        "bare": value,
        "basic": "Basic " + b64encode(f"ann:{value}".encode()).decode(),
        "malformed": f"Bearer  flt_{value} {value}",
        "not ascii": f"Bearer flt_{value}ä",
        "scheme of its own": f"Secret {value}",
    }


Doors = [
    ("GET", "/api/device/v1/poll"), ("POST", "/api/device/v1/enrol"), ("POST", "/api/device/v1/events"),
    ("GET", "/api/v1/devices/"), ("POST", "/api/v1/rollouts/"), ("GET", "/api/ci/v1/models/digits/role"),
    ("POST", "/api/ci/v1/models/digits/releases"), ("GET", "/metrics"), ("GET", "/admin/"), ("GET", "/nowhere"),
    ("DELETE", "/api/device/v1/poll"), ("GET", "/healthz"),
]  # fmt: skip
QUERY = ("token", "access_token", "key", "password", "secret", "credential", "X-Amz-Signature", "X-Amz-Credential")


def ask(server: LiveServer, method: str, path: str, *, headers: dict[str, str] | None = None, body: bytes = b"") -> Any:
    place = urlsplit(server.url)
    link = http.client.HTTPConnection(place.hostname or "", place.port, timeout=20)
    try:
        sent = {name: value.encode("utf-8") for name, value in (headers or {}).items()}
        link.request(method, path, body=body, headers=sent)
        answer = link.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace") + str(answer.headers)
    finally:
        link.close()


def logged(server: LiveServer, *expected: str) -> str:
    """The log once these lines are in it: they take a moment from the web process to the file."""
    ends = time.monotonic() + 30
    while not all(line in server.logged() for line in expected):
        assert time.monotonic() < ends, f"the log lacks one of {expected}"
        time.sleep(0.05)
    return server.logged()


def test_no_secret_leaves_in_a_log_or_an_answer(talkative: LiveServer) -> None:
    value = secret()
    as_basic = b64encode(f"ann:{value}".encode()).decode()
    told, seen = [], set()

    def send(what: str, method: str, path: str, **more: Any) -> None:
        status, text = ask(talkative, method, path, **more)
        seen.add(status)
        if status == 302:  # to the log-in page, which leads back to the caller's own address
            text = re.sub(r"(?mi)^location: .*$", "", text)
        if value in text or as_basic in text:
            told.append(f"{what}: {method} {path[:60]}: {status}")

    for method, path in Doors:
        for what, header in shapes(value).items():
            send(what, method, path, headers={"Authorization": header})
        for name in QUERY:
            send(f"?{name}", method, f"{path}?{name}={value}&x=1")
        for kind in ("application/json", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain"):
            body = json.dumps({"password": value, "token": value, "nonce": value}).encode()
            send("body", method, path, headers={"Content-Type": kind}, body=body)
            send("broken body", method, path, headers={"Content-Type": kind}, body=b'{"token": "%s' % value.encode())
        send("cookie", method, path, headers={"Cookie": f"sessionid={value}; csrftoken={value}"})
        send("referer", method, path, headers={"Referer": f"http://127.0.0.1/?token={value}"})
        send("no host of ours", method, path, headers={"Host": "example.org", "Authorization": f"Bearer {value}"})
    for path in (
        f"/tuf/cam-1/{value}/metadata/timestamp.json", f"/tuf/cam-1/{value}/targets/digits/1.0.0/x.default",
        f"/tuf/cam-1/{value}/../../x", f"/tuf/cam-1/{value}%2Fmetadata", f"/api/device/v1/blobs/flt_{value}",
        f"/api/device/v1/poll/fle_{value}", f"/nowhere/flt_{value}", f"/admin/devices/device/flt_{value}/change/",
    ):  # fmt: skip
        send("path", "GET", path)
    send("log-in", "POST", "/admin/login/", body=f"username=admin&password={value}".encode(),
         headers={"Content-Type": "application/x-www-form-urlencoded"})  # fmt: skip
    send(
        "too long", "POST", "/api/device/v1/enrol", headers={"Authorization": f"Bearer fle_{value}"}, body=b"x" * 70_000
    )
    send("the last", "GET", "/the-last-of-them")
    log = logged(talkative, "GET /the-last-of-them", "request_finished")  # it is the log that we read
    leaks = [line for line in log.splitlines() if value in line or as_basic in line]
    assert [line.replace(value, "SECRET") for line in leaks[:9]] == []
    assert told == []
    assert {400, 401, 403, 404, 405, 413} <= seen


def test_a_request_that_is_no_http_leaves_nothing_behind(talkative: LiveServer) -> None:
    value, place = secret(), urlsplit(talkative.url)
    for text in (
        f"GET /{value}\r\nAuthorization: Bearer flt_{value}\r\n\r\n",
        f"Bearer flt_{value}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization Bearer flt_{value}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {value}\r\n\r\n",
    ):
        with socket.create_connection((place.hostname or "", place.port or 0), timeout=10) as link:
            link.sendall(text.encode())
            link.shutdown(socket.SHUT_WR)
            assert value not in link.recv(65536).decode("utf-8", "replace")
    assert value not in talkative.logged()


def test_a_working_devices_view_key_and_credential_are_not_logged(talkative: LiveServer) -> None:
    """Also where all goes well, and at the most talkative level."""
    talkative.manage("trust_add_model", "digits", "--keystore", str(talkative.keystore))
    script = (
        "from datetime import timedelta\nfrom fleet.devices.services import create_token\n"
        "print(create_token(name='x', model_names=['digits'], max_uses=1, lifetime=timedelta(days=1))[1])"
    )
    token = talkative.manage("shell", "--verbosity", "0", "-c", script).split()[-1]
    body = json.dumps({"device": "cam-9", "nonce": "5" * 32, "labels": {}, "sdk": "1"}).encode()
    kind = {"Content-Type": "application/json"}
    status, text = ask(
        talkative, "POST", "/api/device/v1/enrol", headers={"Authorization": f"Bearer {token}", **kind}, body=body
    )
    assert status == 201
    credential = re.search(r'"credential": "([^"]+)"', text)[1]  # type: ignore[index]
    shown = {"Authorization": f"Bearer {credential}"}
    assert ask(talkative, "GET", "/api/device/v1/poll", headers=shown)[0] == 200
    script = (
        "from fleet.devices.models import Device; from fleet.devices import credentials\n"
        "print(credentials.view_key(Device.objects.get(name='cam-9')))"
    )
    key = talkative.manage("shell", "--verbosity", "0", "-c", script).split()[-1]
    assert ask(talkative, "GET", f"/tuf/cam-9/{key}/metadata/timestamp.json")[0] == 200
    log = logged(talkative, "/tuf/cam-9/[redacted]/metadata")
    assert [what for what in (token, credential, credential.rpartition(".")[2], key) if what in log] == []


def test_a_broken_page_shows_nothing_of_why(talkative: LiveServer) -> None:
    """Last in this file: it breaks the server's database."""
    value = secret()
    for table in ("devices_device", "devices_enrolmenttoken", "django_session"):
        script = (
            f"from django.db import connection as c\nc.cursor().execute('ALTER TABLE {table} RENAME TO gone_{table}')"
        )
        talkative.manage("shell", "--verbosity", "0", "-c", script)
    body = json.dumps({"device": "x", "nonce": "0" * 32, "labels": {}, "sdk": "1", "token": value}).encode()
    headers = {"Authorization": f"Bearer fle_{value}", "Cookie": f"sessionid={value}"}
    for method, path in [("POST", "/api/device/v1/enrol"), ("GET", "/api/v1/devices/"), ("GET", "/admin/")]:
        status, text = ask(talkative, method, f"{path}?token={value}", headers=headers, body=body)
        assert status == 500
        assert "server_error" in text or "<h1>Server Error (500)</h1>" in text
        assert not re.search(r"Traceback|devices_device|OperationalError|/fleet/|settings|no such table", text)
        assert value not in text
    log = logged(talkative, "no such table: devices_enrolmenttoken", "no such table: django_session")
    assert value not in log
