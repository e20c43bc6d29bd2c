"""Whatever is sent, the answer is a refusal in the API's shape: no page, no trace, no failure of the server."""

import json
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.http import HttpRequest
from django.test import Client
from django.urls import path

from fleet.api import errors, tuf
from fleet.devices import credentials
from tests.fleet_world import Caller, api_token, device, operator, refusal, release
from tests.registry import publish_token

pytestmark = pytest.mark.django_db
DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
MEGABYTES = b'{"name":"' + b"x" * 2_000_000 + b'"}'


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def operate(client: Client) -> Any:
    """Send an operator's bytes."""
    headers = bearer(api_token(operator(), "operate"))

    def call(where: str, content: bytes = b"", *, method: str = "POST", kind: str = "application/json") -> Any:
        return client.generic(method, f"/api/v1/{where}", content, kind, headers=headers)

    return call


# --- addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["/api/", "/api/v1/", "/api/device/v2/poll", "/api/ci/v1/models//role", "/tuf/", "/x"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_an_unknown_address_is_refused_in_json(client: Client, where: str, method: str) -> None:
    assert refusal(client.generic(method, where)) == (404, "not_found")


def test_an_unknown_page_of_the_admin_is_a_page(client: Client) -> None:
    client.force_login(User.objects.create_superuser("anna"))
    answer = client.get("/admin/nosuch/")
    assert (answer.status_code, answer["Content-Type"]) == (404, "text/html; charset=utf-8")


def test_a_host_that_is_not_ours_is_refused_in_json(client: Client) -> None:
    assert refusal(client.get("/api/device/v1/poll", headers={"Host": "evil.example"})) == (400, "bad_request")
    assert client.get("/admin/", headers={"Host": "evil.example"})["Content-Type"].startswith("text/html")


def _break(request: HttpRequest) -> None:
    raise RuntimeError("the secret of the server")


urlpatterns = [path("api/breaks", _break), path("admin/breaks", _break)]
handler500 = errors.server_error


@pytest.mark.urls(__name__)
def test_a_failure_of_ours_says_so_in_json_and_tells_no_more(client: Client) -> None:
    client.raise_request_exception = False
    answer = client.get("/api/breaks")
    assert refusal(answer) == (500, "server_error")
    assert b"secret" not in answer.content
    assert client.get("/admin/breaks")["Content-Type"].startswith("text/html")


@pytest.mark.parametrize("where", ["/api/schema/", "/api/docs/"])
def test_schema_and_its_page_refuse_in_json(client: Client, where: str) -> None:
    assert refusal(client.get(where, headers={"Accept": "text/html"}))[0] in {401, 403, 406}
    client.force_login(operator())
    for method in ("POST", "OPTIONS"):
        assert refusal(client.generic(method, where)) == (405, "method_not_allowed")


@pytest.mark.parametrize("method", ["POST", "OPTIONS", "DELETE"])
def test_metrics_are_only_read(method: str) -> None:
    assert refusal(Client(enforce_csrf_checks=True).generic(method, "/metrics")) == (405, "method_not_allowed")


# --- bodies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (DEEP, 400, "malformed"),
        (b'{"name":"\\ud800","selector":""}', 400, "malformed"),
        (b'{"name":"a","selector":"\\u0000=a"}', 400, "malformed"),
        (b'{"name":"\xff"}', 400, "malformed"),
        (b"[]", 400, "malformed"),
        (MEGABYTES, 413, "too_large"),
    ],
    ids=["deep", "half a character", "NUL", "not UTF-8", "no object", "megabytes"],
)
def test_a_body_of_rubbish_is_refused(operate: Any, content: bytes, status: int, code: str) -> None:
    assert refusal(operate("groups/", content)) == (status, code)


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "text/html"])
def test_only_json_is_parsed(operate: Any, kind: str) -> None:
    assert refusal(operate("groups/", b"x" * 100, kind=kind)) == (415, "unsupported_media_type")


@pytest.mark.parametrize("name", ["release", "group"])
def test_an_infinite_number_is_refused(operate: Any, name: str) -> None:
    body = f'{{"release":{release().pk},"stages":[{{"percent":100}}],"{name}":1e999}}'
    assert refusal(operate("rollouts/", body.encode())) == (400, "malformed")


def test_a_time_beyond_any_float_is_refused(client: Client) -> None:
    event = {"id": "0" * 32, "at": 10**400, "kind": "failed", "model": "digits"}
    body = json.dumps({"events": [event], "runs": {}, "sdk": "1", "dropped": 0}).encode()
    assert refusal(Caller(client, device()).post(body=body)) == (400, "malformed")


# --- names and pages ---------------------------------------------------------------------------------------------


def test_a_page_has_a_ceiling(operate: Any) -> None:
    """A limit beyond 64 bits was an error of the database."""
    release()
    answer = operate(f"models/?limit={10**23}&offset=0", method="GET")
    assert (answer.status_code, len(answer.json()["results"])) == (200, 1)


def test_a_version_with_nul_is_no_version(client: Client) -> None:
    """PostgreSQL would raise; SQLite would not, so this looks at the code."""
    answer = client.get("/api/ci/v1/models/digits/releases/%00", headers=bearer(publish_token("digits")))
    assert refusal(answer) == (400, "invalid_name")


def test_nul_in_a_plain_tuf_address_reaches_no_database(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, asked = device(), []
    key = credentials.view_key(entry)
    monkeypatch.setattr(tuf.trust_selectors, "metadata_file", lambda _device, name: asked.append(name))
    assert refusal(client.get(f"/tuf/{entry.name}/{key}/metadata/1.a%00.json")) == (404, "unknown_metadata")
    assert asked == ["1.a?.json"]


def test_nul_for_a_device_is_nobody(client: Client, django_assert_num_queries: Any) -> None:
    with django_assert_num_queries(1) as queries:
        assert refusal(client.get("/tuf/a%00/key/metadata/timestamp.json")) == (404, "not_found")
    assert "\0" not in queries[0]["sql"]
