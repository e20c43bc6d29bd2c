"""Batches over HTTP: announce, upload, complete. Bad input gets a status and a code, and costs nobody a sample."""

import hashlib
import io
import json
from uuid import uuid4

import pytest
from django.core.files.storage import storages
from django.test import Client

from fleet.devices.models import Device
from fleet.feedback import compaction, services, tasks
from fleet.feedback.models import Batch, Campaign
from fleet.releases import storage
from tests.server.batch_world import NOON, URL, World, bearer, files_under, head, pack, sample

ID = "0" * 31 + "1"


@pytest.fixture
def world(feedback_world: World) -> World:
    return feedback_world


@pytest.fixture
def data() -> bytes:
    return pack([sample(0)], batch_id=ID)


def announce(device: Device, value: object):
    body = value if isinstance(value, bytes) else json.dumps(value if isinstance(value, dict) else value.to_json())
    return Client().post(URL, body, content_type="application/json", headers=bearer(device))


def put(device: Device, data: bytes, batch_id: str = ID, **headers: str):
    address = f"{URL}/{batch_id}/content"
    return Client().put(address, data, content_type="application/zip", headers=bearer(device) | headers)


def complete(device: Device, batch_id: str = ID):
    return Client().post(f"{URL}/{batch_id}/complete", headers=bearer(device))


def refusal(answer) -> tuple[int, str]:
    assert set(answer.json()) == {"code", "message", "detail"}
    return answer.status_code, answer.json()["code"]


def test_a_batch_is_announced_uploaded_and_received(world, data, local_objects):
    first = announce(world.device, head(data, batch_id=ID))
    assert first.status_code == 201
    assert first.json() == {
        "state": "announced",
        "upload": {"url": f"{URL}/{ID}/content", "method": "PUT", "headers": {}, "credential": True},
    }
    assert put(world.device, data).json() == {"state": "announced"}
    answer = complete(world.device)
    assert (answer.status_code, answer.json()) == (200, {"state": "received"})
    batch = Batch.objects.get()
    assert (batch.state, batch.samples, batch.device, batch.model) == ("received", 1, world.device, world.digits)
    with storage.open_object(storage.batch_name(hashlib.sha256(data).hexdigest())) as file:
        assert file.read() == data
    assert files_under(local_objects / "incoming") == []


def test_received_wakes_the_ingest_task_once_it_is_committed(
    world, data, monkeypatch, django_capture_on_commit_callbacks
):
    woken: list[int] = []
    monkeypatch.setattr(tasks.ingest, "delay", woken.append)
    announce(world.device, head(data, batch_id=ID))
    put(world.device, data)
    with django_capture_on_commit_callbacks(execute=True):
        complete(world.device)
    assert woken == [Batch.objects.get().pk]


def test_a_broker_that_is_away_does_not_keep_a_batch_from_being_received(
    world, data, monkeypatch, django_capture_on_commit_callbacks
):
    def away(pk: int) -> None:
        raise OSError("no broker")

    monkeypatch.setattr(tasks.ingest, "delay", away)
    announce(world.device, head(data, batch_id=ID))
    put(world.device, data)
    with django_capture_on_commit_callbacks(execute=True) as callbacks:
        answer = complete(world.device)
    assert answer.json() == {"state": "received"}
    assert len(callbacks) == 1
    assert compaction.compact_due() != []  # the sweep needs no message


def test_the_same_batch_twice_is_one_batch(world, data):
    announced = head(data, batch_id=ID)
    for _ in range(2):
        announce(world.device, announced)
        put(world.device, data)
        assert complete(world.device).json() == {"state": "received"}
    again = announce(world.device, announced)
    assert (again.status_code, again.json()) == (200, {"state": "received"})
    assert Batch.objects.count() == 1


def test_announcing_again_before_the_upload_gives_the_address_again(world, data):
    announce(world.device, head(data, batch_id=ID))
    again = announce(world.device, head(data, batch_id=ID))
    assert (again.status_code, again.json()["upload"]["url"]) == (200, f"{URL}/{ID}/content")


def test_a_received_batch_is_not_overwritten_by_a_late_upload(world, data):
    announce(world.device, head(data, batch_id=ID))
    put(world.device, data)
    complete(world.device)
    assert put(world.device, b"x" * len(data)).json() == {"state": "received"}
    with storage.open_object(storage.batch_name(hashlib.sha256(data).hexdigest())) as file:
        assert file.read() == data


def test_a_rejected_batch_counts_as_received_for_the_device_so_that_it_is_not_sent_for_ever(world):
    data = b"not a zip"
    announce(world.device, head(data, batch_id=ID))
    put(world.device, data)
    complete(world.device)
    compaction.ingest(pk=Batch.objects.get().pk)
    assert Batch.objects.get().state == "rejected"
    assert announce(world.device, head(data, batch_id=ID)).json() == {"state": "received"}


def test_a_wrong_hash_is_refused_and_leaves_nothing_behind(world, data, local_objects):
    announce(world.device, head(data, batch_id=ID))
    wrong = bytes([data[0] ^ 1]) + data[1:]
    assert refusal(put(world.device, wrong)) == (422, "hash_mismatch")
    assert refusal(complete(world.device)) == (409, "not_uploaded")
    assert files_under(local_objects) == []
    assert Batch.objects.get().state == "announced"
    put(world.device, data)  # and the right bytes are still welcome
    assert complete(world.device).json() == {"state": "received"}


def test_half_an_upload_is_refused_and_the_whole_one_is_welcome(world, data, local_objects):
    announce(world.device, head(data, batch_id=ID))
    assert refusal(put(world.device, data[: len(data) // 2])) == (422, "hash_mismatch")
    assert files_under(local_objects) == []
    put(world.device, data)
    assert complete(world.device).json() == {"state": "received"}


def test_more_than_was_announced_is_refused_before_it_is_read(world, data):
    announce(world.device, head(data, batch_id=ID))
    assert refusal(put(world.device, data + b"!")) == (413, "too_large")


def test_a_body_that_is_longer_than_it_says_is_cut_off(world, data, local_objects):
    batch, _ = services.announce(device=world.device, head=head(data, batch_id=ID))

    class Endless(io.RawIOBase):
        read_so_far = 0

        def read(self, size: int = -1) -> bytes:
            self.read_so_far += size
            return b"x" * size

    source = Endless()
    with pytest.raises(services.TooLarge):
        services.receive_content(batch=batch, content=source)
    assert source.read_so_far <= services.CHUNK
    assert files_under(local_objects) == []


def test_complete_before_the_upload_says_so(world, data):
    announce(world.device, head(data, batch_id=ID))
    assert refusal(complete(world.device)) == (409, "not_uploaded")


@pytest.mark.parametrize("stored", [b"short", b""], ids=["short", "empty"])
def test_complete_hashes_what_is_stored_and_deletes_what_is_wrong(world, data, stored):
    """With S3 the bytes do not pass through the server: only this check sees them."""
    announce(world.device, head(data, batch_id=ID))
    name = storage.batch_name(hashlib.sha256(data).hexdigest())
    storage.put(name, io.BytesIO(stored))
    assert refusal(complete(world.device)) == (422, "hash_mismatch")
    assert not storage.exists(name)


def test_complete_hashes_all_of_a_stored_file_of_the_right_length(world, data):
    announce(world.device, head(data, batch_id=ID))
    name = storage.batch_name(hashlib.sha256(data).hexdigest())
    storage.put(name, io.BytesIO(data[:-1] + bytes([data[-1] ^ 1])))
    assert refusal(complete(world.device)) == (422, "hash_mismatch")
    assert not storage.exists(name)


def test_a_batch_of_a_model_that_the_device_does_not_run_is_refused(world, data):
    assert refusal(announce(world.device, head(data, batch_id=ID, model="wine"))) == (422, "wrong_model")
    assert refusal(announce(world.device, head(data, batch_id=ID, model="unheard-of"))) == (422, "wrong_model")
    assert not Batch.objects.exists()


def test_one_id_with_other_content_is_refused(world, data):
    announce(world.device, head(data, batch_id=ID))
    other = pack([sample(0, at=NOON + 1)], batch_id=ID)
    assert refusal(announce(world.device, head(other, batch_id=ID))) == (409, "batch_exists")
    assert refusal(announce(world.device, head(data, batch_id=ID, samples=2))) == (409, "batch_exists")


def test_another_devices_batch_cannot_be_announced_written_or_completed(world, data):
    announce(world.device, head(data, batch_id=ID))
    assert refusal(announce(world.other, head(data, batch_id=ID))) == (409, "batch_exists")
    assert refusal(put(world.other, data)) == (404, "unknown_batch")
    assert refusal(complete(world.other)) == (404, "unknown_batch")
    assert Batch.objects.get().state == "announced"


def test_the_bytes_of_another_batch_cannot_be_announced_under_a_new_id(world, data):
    """Else a device that knows a hash could have the object deleted, or get a URL that overwrites it."""
    announce(world.device, head(data, batch_id=ID))
    put(world.device, data)
    complete(world.device)
    assert refusal(announce(world.other, head(data, batch_id=uuid4().hex))) == (409, "batch_exists")
    assert Batch.objects.count() == 1


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../../etc/passwd"},
        {"id": ID.upper().replace("1", "A")},
        {"sha256": "../x"},
        {"length": 0},
        {"length": 33 * 1024**2},
        {"samples": 0},
        {"samples": True},
        {"model": "assign"},
        {"dropped": -1},
        {"campaign": "c" * 65},
    ],
    ids=str,
)
def test_a_malformed_announcement_is_refused(world, data, change):
    answer = announce(world.device, head(data, batch_id=ID).to_json() | change)
    assert refusal(answer)[0] == 400
    assert not Batch.objects.exists()


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 10_000], ids=range(5))
def test_what_is_not_json_is_refused(world, body):
    assert refusal(announce(world.device, body)) == (400, "malformed")


def test_a_huge_announcement_is_refused(world):
    assert refusal(announce(world.device, b" " * 20_000)) == (413, "too_large")


def test_no_credential_no_batch(world, data):
    for method, address in (("post", URL), ("put", f"{URL}/{ID}/content"), ("post", f"{URL}/{ID}/complete")):
        answer = getattr(Client(), method)(address, data, content_type="application/octet-stream")
        assert refusal(answer) == (401, "unauthorized")


@pytest.mark.parametrize("batch_id", ["%00" * 32, "%ff", "a" * 31, "A" * 32], ids=str)
def test_an_address_that_holds_no_batch_id_is_not_found(world, batch_id):
    assert refusal(complete(world.device, batch_id)) == (404, "unknown_batch")
    assert refusal(put(world.device, b"x", batch_id)) == (404, "unknown_batch")


@pytest.mark.parametrize("text", ["a\0b", "\ud800"], ids=ascii)
def test_text_that_no_database_can_keep_is_refused(world, data, text):
    answer = announce(world.device, head(data, batch_id=ID).to_json() | {"campaign": text})
    assert refusal(answer)[0] == 400


def test_other_methods_are_refused(world):
    assert refusal(Client().get(URL, headers=bearer(world.device))) == (405, "method_not_allowed")


def test_the_campaign_that_asked_is_noted(world, data):
    campaign = Campaign.objects.create(name="night", model=world.digits, expires_at="2030-01-01T00:00Z")
    announce(world.device, head(data, batch_id=ID, campaign="night"))
    assert Batch.objects.get().campaign == campaign


def test_a_campaign_that_is_gone_does_not_cost_the_samples(world, data):
    assert announce(world.device, head(data, batch_id=ID, campaign="long-gone")).status_code == 201
    assert Batch.objects.get().campaign is None


def test_on_s3_the_device_gets_a_presigned_address_for_exactly_these_bytes(world, data, settings):
    settings.STORAGES = {
        **settings.STORAGES,
        "objects": {
            "BACKEND": "storages.backends.s3.S3Storage",
            "OPTIONS": {
                "bucket_name": "fleet",
                "endpoint_url": "http://objects.test",
                "access_key": "key",
                "secret_key": "secret",
                "region_name": "us-east-1",
                "addressing_style": "path",
                "signature_version": "s3v4",
            },
        },
    }
    assert type(storages["objects"]).__name__ == "S3Storage"
    upload = announce(world.device, head(data, batch_id=ID)).json()["upload"]
    assert upload["url"].startswith(f"http://objects.test/fleet/batches/{hashlib.sha256(data).hexdigest()}?")
    assert "X-Amz-SignedHeaders=content-length%3Bhost" in upload["url"]
    assert upload["credential"] is False
