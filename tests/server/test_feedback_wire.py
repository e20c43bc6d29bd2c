"""The two ends meet: batches that the SDK's own spool made, and object storage that is really S3."""

import hashlib
import io
from collections.abc import Iterator
from urllib.parse import urlsplit
from uuid import uuid4

import numpy as np
import pyarrow.parquet as pq
import pytest
import requests
from django.core.files.storage import storages
from django.test import Client

from device_sdk.protocol.assignment import Sampling
from device_sdk.protocol.names import ReleasePath
from device_sdk.spool import Sealed, Spool
from fleet.feedback import compaction, exports, selectors, services
from fleet.feedback.models import Batch
from fleet.releases import storage
from tests.server.batch_world import URL, World, bearer, bring, head, pack, received, sample
from tests.services import S3

RELEASE = ReleasePath("digits", "1.1.0", "int8")


@pytest.fixture
def world(feedback_world: World) -> World:
    return feedback_world


@pytest.fixture
def sealed(tmp_path) -> list[Sealed]:
    """Twenty inferences of every kind of tensor, through the SDK's spool."""
    spool = Spool(tmp_path / "spool", device="cam-1", max_bytes=10**7)
    intake = spool.configure("digits", Sampling("night", rate=1.0, max_samples=100, expires=2**33))
    for number in range(20):
        inputs = {"image": np.full((1, 8, 8), number, np.float32), "flags": np.array([True, False])}
        outputs = {
            "label": np.array([number], np.int64),
            "name": np.array([f"digit {number}", "é"], object),
            "half": np.array(number / 2, np.float16),
        }
        intake.offer(RELEASE, inputs, outputs)
    spool.drain()
    return spool.seal("digits")


def test_what_the_sdk_spools_becomes_rows_unchanged(world, sealed):
    for batch in sealed:
        bring(world.device, batch.path.read_bytes(), batch.head)
    (part,) = compaction.compact(model=world.digits)
    with storage.open_object(part.path) as file:
        rows = pq.read_table(io.BytesIO(file.read())).to_pylist()
    assert {row["output.label"][0] for row in rows} == set(range(20))
    for row in rows:
        number = row["output.label"][0]
        assert row["release"] == str(RELEASE)
        assert row["device"] == "cam-1"
        assert row["probability"] == 1.0
        assert row["input.image"] == [float(number)] * 64
        assert row["input.flags"] == [True, False]
        assert row["output.name"] == [f"digit {number}", "é"]
        assert (row["output.half"], row["output.half.shape"]) == ([number / 2], [])


@pytest.fixture
def on_s3(settings, s3: S3, world: World) -> Iterator[World]:
    """The same world with its objects in a bucket of a real S3 server."""
    options = {
        "bucket_name": s3.new_bucket(),
        "endpoint_url": s3.endpoint,
        "access_key": s3.access_key,
        "secret_key": s3.secret_key,
        "region_name": "us-east-1",
        "addressing_style": "path",
        "signature_version": "s3v4",
        "file_overwrite": True,
        "querystring_expire": 900,
    }
    backend = {"BACKEND": "storages.backends.s3.S3Storage", "OPTIONS": options}
    settings.STORAGES = {**settings.STORAGES, "objects": backend}
    yield world
    storages["objects"].connection.meta.client.close()


def announce(world: World, data: bytes, batch_id: str) -> dict:
    body = head(data, batch_id=batch_id).to_json()
    return Client().post(URL, body, content_type="application/json", headers=bearer(world.device)).json()


def complete(world: World, batch_id: str):
    return Client().post(f"{URL}/{batch_id}/complete", headers=bearer(world.device))


def test_a_device_uploads_straight_to_s3_and_the_server_hashes_what_lies_there(on_s3, s3):
    batch_id = uuid4().hex
    data = pack([sample(0)], batch_id=batch_id)
    upload = announce(on_s3, data, batch_id)["upload"]
    assert urlsplit(upload["url"]).netloc == urlsplit(s3.endpoint).netloc
    assert complete(on_s3, batch_id).json()["code"] == "not_uploaded"
    assert requests.put(upload["url"], data, headers=upload["headers"], timeout=10).status_code == 200
    assert complete(on_s3, batch_id).json() == {"state": "received"}
    (part,) = compaction.compact(model=on_s3.digits)
    assert part.rows == 1
    assert services.retire() == 0


def test_other_bytes_on_s3_are_found_out_and_deleted(on_s3):
    batch_id = uuid4().hex
    data = pack([sample(0)], batch_id=batch_id)
    upload = announce(on_s3, data, batch_id)["upload"]
    assert requests.put(upload["url"], data[:-1] + b"!", timeout=10).status_code == 200
    answer = complete(on_s3, batch_id)
    assert (answer.status_code, answer.json()["code"]) == (422, "hash_mismatch")
    assert not storage.exists(storage.batch_name(hashlib.sha256(data).hexdigest()))
    assert requests.put(announce(on_s3, data, batch_id)["upload"]["url"], data, timeout=10).status_code == 200
    assert complete(on_s3, batch_id).json() == {"state": "received"}


@pytest.mark.parametrize("change", [b"more than was announced", b""], ids=["longer", "empty"])
def test_a_presigned_address_takes_only_the_announced_length(on_s3, change):
    batch_id = uuid4().hex
    data = pack([sample(0)], batch_id=batch_id)
    upload = announce(on_s3, data, batch_id)["upload"]
    answer = requests.put(upload["url"], data + change if change else b"", timeout=10)
    assert answer.status_code == 403
    assert complete(on_s3, batch_id).json()["code"] == "not_uploaded"


def test_a_data_set_on_s3_is_exported(on_s3, tmp_path):
    for _ in range(2):
        received(on_s3.device)
    compaction.compact_due()
    summary = exports.export(selectors.dataset_parts(model="digits"), tmp_path / "out", on_progress=lambda _: None)
    assert (summary.files, summary.rows) == (1, 2)
    assert pq.read_table(tmp_path / "out").num_rows == 2


def test_raw_batches_on_s3_are_retired(on_s3, settings):
    batch = received(on_s3.device)
    compaction.compact_due()
    settings.BATCH_RETENTION_DAYS = -1
    assert services.retire() == 1
    assert not storage.exists(storage.batch_name(batch.sha256))
    batch.refresh_from_db()
    assert batch.state == Batch.State.INGESTED


def test_an_object_that_is_missing_on_s3_rejects_its_batch_alone(on_s3):
    gone, good = received(on_s3.device), received(on_s3.other)
    storage.delete(storage.batch_name(gone.sha256))
    (part,) = compaction.compact_due()
    assert list(part.batches.all()) == [good]
    gone.refresh_from_db()
    assert gone.reason.startswith("missing:")
