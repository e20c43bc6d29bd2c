"""Mutated requests at every door that machines use: any answer but a failure of ours, in the API's shape.

Not `Content-Length`: what is no number there never gets past a web server.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from django.db import transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_sdk.protocol.polls import EnrolRequest, Tag
from fleet.devices import credentials
from tests.fleet_world import enrolment_token
from tests.fuzz.mutations import NAMES, bytes_mutants, mutants
from tests.fuzz.targets import HEAD, POST, dumped
from tests.registry import MODEL, Registry, make_device, manifest_for, onnx_model

EXAMPLES = 40  # of each door


@dataclass(frozen=True)
class Door:
    """`path` may hold `{}`, for a hostile name. `headers`: values to start from."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class Caller:
    def __init__(self, registry: Registry, door: Door, credential: str) -> None:
        self._registry, self._door, self._credential = registry, door, credential

    def ask(self, name: str, query: str, headers: dict[str, str], body: bytes) -> Any:
        where = self._door.path.replace("{}", name) + query
        headers = {"Authorization": f"Bearer {self._credential}", **headers}
        kind = "application/octet-stream" if self._door.method == "PUT" else "application/json"
        client = self._registry.client
        return client.generic(self._door.method, where, body, content_type=kind, headers=headers)


def header_values(seed: str) -> st.SearchStrategy[str]:
    """What a server's HTTP parser lets through to the application: no line breaks, no NUL."""
    mutated = bytes_mutants(seed.encode()).map(lambda data: data.decode("latin-1"))
    return mutated.map(lambda text: text.translate(dict.fromkeys(range(32))))


names = st.sampled_from([name for name in NAMES if name]) | st.text(max_size=12)
queries = st.sampled_from(
    ["", "?root=1", "?root=-1", "?root=9999999999", "?root=%00", "?root=٣", "?page=x", "?format=x"]
)


@pytest.fixture
def fuzz(registry: Registry) -> Callable[[Door, str], set[int]]:
    """Try a door with mutated requests; the statuses that were seen."""

    def fuzz(door: Door, credential: str) -> set[int]:
        caller, seen = Caller(registry, door, credential), set()
        bodies = mutants([door.body], is_json=door.method != "PUT") if door.body else st.just(b"")

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(
            name=names,
            query=queries,
            headers=st.fixed_dictionaries({key: header_values(value) for key, value in door.headers}),
            body=bodies,
        )
        def try_it(name: str, query: str, headers: dict[str, str], body: bytes) -> None:
            with transaction.atomic():
                answer = caller.ask(name.encode("utf-8", "replace").decode(), query, headers, body)
                transaction.set_rollback(True)
            seen.add(answer.status_code)
            assert answer.status_code < 500, answer.content
            if answer.status_code >= 400 and "json" in answer.get("Content-Type", ""):
                assert {"code", "message", "detail"} <= answer.json().keys()
            answer.close()

        try_it()
        return seen

    return fuzz


DEVICE = "/api/device/v1"
DEVICE_DOORS = (
    Door("GET", f"{DEVICE}/poll", headers=(("If-None-Match", str(Tag(1, "0" * 16))),)),
    Door("POST", f"{DEVICE}/events", dumped(POST.to_json())),
    Door("POST", f"{DEVICE}/batches", dumped(HEAD.to_json())),
    Door("PUT", f"{DEVICE}/batches/{{}}/content", b"x" * 100),
    Door("POST", f"{DEVICE}/batches/{{}}/complete"),
    Door("GET", f"{DEVICE}/blobs/{{}}", headers=(("Range", "bytes=0-9"), ("If-Range", '"x"'))),
    Door("GET", "/tuf/cam-1/{}/metadata/timestamp.json"),
    Door("GET", "/tuf/{}/x/targets/digits/1/x"),
)


@pytest.mark.parametrize("door", DEVICE_DOORS, ids=lambda door: f"{door.method} {door.path}")
def test_no_request_of_a_device_makes_the_server_fail(
    registry: Registry, fuzz: Callable[[Door, str], set[int]], door: Door
) -> None:
    credential = credentials.credential_for(make_device())
    assert fuzz(door, credential)


def test_no_credential_makes_the_server_fail(registry: Registry, fuzz: Callable[[Door, str], set[int]]) -> None:
    device = make_device()
    header = f"Bearer {credentials.credential_for(device)}"
    for path in (f"{DEVICE}/poll", "/api/v1/models/", f"/api/ci/v1/models/{MODEL}/role"):
        seen = fuzz(Door("GET", path, headers=(("Authorization", header),)), "")
        assert seen & {401, 403}


def test_no_enrolment_makes_the_server_fail(registry: Registry, fuzz: Callable[[Door, str], set[int]]) -> None:
    _, token = enrolment_token(max_uses=1000)
    body = dumped(EnrolRequest("cam-9", "0" * 32, {"site": "x"}, "0.1.0").to_json())
    assert fuzz(Door("POST", f"{DEVICE}/enrol", body), token) & {400, 401, 413}


def test_no_release_of_ci_makes_the_server_fail(registry: Registry, fuzz: Callable[[Door, str], set[int]]) -> None:
    manifest = manifest_for("1.0.0", {"model.onnx": onnx_model()})
    registry.upload(onnx_model())
    role = registry.role([manifest])
    body = {"version": "1.0.0", "manifests": {"default": manifest.to_bytes().decode()}, "role": role}
    assert fuzz(Door("POST", f"/api/ci/v1/models/{MODEL}/releases", json.dumps(body).encode()), registry.token)
    role_alone = json.dumps({"role": registry.role([])}).encode()
    assert fuzz(Door("POST", f"/api/ci/v1/models/{MODEL}/role", role_alone), registry.token)
    assert fuzz(Door("POST", "/api/ci/v1/models/{}/role", role_alone), registry.token)
    pieces = (("Upload-Offset", "0"), ("Upload-Length", "100"))
    assert fuzz(Door("PUT", f"/api/ci/v1/blobs/{'0' * 64}", b"x" * 100, pieces), registry.token)
    assert fuzz(Door("GET", f"/api/ci/v1/models/{MODEL}/releases/{{}}"), registry.token)
