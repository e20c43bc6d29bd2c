"""What a mirror's token fetches: files of valid releases of its models, as they are; and nothing else."""

from datetime import timedelta
from io import BytesIO

import pytest
from django.test import Client

from device_sdk.protocol.manifest import digest
from fleet.accounts.services import create_token
from fleet.releases import storage
from fleet.releases.models import Artifact, Release
from tests.fleet_world import release

pytestmark = pytest.mark.django_db

CONTENT = b"a model of some length"
PATH = f"/api/mirror/v1/blobs/{digest(CONTENT)}"


@pytest.fixture
def served() -> Release:
    made = release("1.0.0")
    artifact = Artifact.objects.create(sha256=digest(CONTENT), length=len(CONTENT))
    made.variants.get().artifacts.add(artifact)
    storage.put(storage.blob_name(digest(CONTENT)), BytesIO(CONTENT))
    return made


def mirror(*models: str) -> Client:
    _, text = create_token(name="site", scopes=["mirror"], models=models, lifetime=timedelta(days=1))
    return Client(headers={"Authorization": f"Bearer {text}"})


@pytest.mark.parametrize("models", [(), ("digits",), ("digits", "wine")])
def test_a_mirror_gets_the_file(served: Release, models: tuple[str, ...]) -> None:
    answer = mirror(*models).get(PATH)
    assert (answer.status_code, answer.getvalue()) == (200, CONTENT)


def test_a_mirror_gets_ranges_of_it(served: Release) -> None:
    answer = mirror().get(PATH, headers={"Range": "bytes=2-6"})
    assert (answer.status_code, answer.getvalue()) == (206, CONTENT[2:7])
    assert answer.headers["Content-Range"] == f"bytes 2-6/{len(CONTENT)}"


def test_a_mirror_of_other_models_does_not(served: Release) -> None:
    assert mirror("wine").get(PATH).status_code == 404


@pytest.mark.parametrize("state", [Release.State.WITHDRAWN, Release.State.REVOKED, Release.State.INVALID])
def test_what_devices_may_not_run_a_mirror_does_not_get(served: Release, state: str) -> None:
    Release.objects.filter(pk=served.pk).update(state=state)
    assert mirror().get(PATH).status_code == 404


@pytest.mark.parametrize("name", ["x", "ab" * 31, "AB" * 32])
def test_a_name_that_is_no_hash_is_refused(served: Release, name: str) -> None:
    assert mirror().get(f"/api/mirror/v1/blobs/{name}").status_code in {400, 404, 422}


def test_the_token_belongs_to_nobody_who_may_look(served: Release) -> None:
    client = mirror()
    assert client.get("/api/v1/devices/").status_code == 403
    assert client.get("/api/ci/v1/models/digits/role").status_code == 403
