"""From received to ingested: exactly once, however often it is tried and wherever it is cut off."""

import hashlib
import io
import os
from datetime import UTC, date, datetime, timedelta
from uuid import uuid4

import numpy as np
import pyarrow.parquet as pq
import pytest
from django.db import connection
from django.utils import timezone

from device_sdk.protocol.assignment import Assignment, Sampling, Window
from fleet.errors import Conflict, Invalid
from fleet.feedback import compaction, selectors, services, tasks
from fleet.feedback.models import Batch, Campaign, DatasetPart
from fleet.releases import storage
from tests.server.batch_world import NOON, World, bring, files_under, head, image, npy, pack, received, sample

State = Batch.State


@pytest.fixture
def world(feedback_world: World) -> World:
    return feedback_world


def rows(part: DatasetPart) -> list[dict]:
    with storage.open_object(part.path) as file:
        return pq.read_table(io.BytesIO(file.read()), partitioning=None).to_pylist()


def states() -> set[str]:
    return set(Batch.objects.values_list("state", flat=True))


# --- compaction ------------------------------------------------------------------------------------------------------
def test_the_batches_of_all_devices_become_one_part_for_each_version_and_day(world):
    tomorrow = NOON + 86_400
    received(world.device, [sample(0), sample(1, at=tomorrow), sample(2, release="digits/1.1.0/int8")])
    received(world.other, [sample(0), sample(1)])
    parts = compaction.compact(model=world.digits)
    assert [(part.version, part.day, part.rows) for part in parts] == [
        ("1.0.0", date(2025, 6, 16), 3),
        ("1.0.0", date(2025, 6, 17), 1),
        ("1.1.0", date(2025, 6, 16), 1),
    ]
    assert parts[0].batches.count() == 2
    assert all(storage.size(part.path) == part.length for part in parts)
    assert states() == {State.INGESTED}
    assert all(batch.ingested_at for batch in Batch.objects.all())


def test_a_row_says_what_the_device_saw(world):
    members = {"t0.npy": npy(image(3)), "t1.npy": npy(np.array([3], np.int64))}
    received(world.device, [sample(0, sample_id="c" * 32, probability=0.25)], members=members)
    (part,) = compaction.compact(model=world.digits)
    assert rows(part) == [
        {
            "sample_id": "c" * 32,
            "device": "cam-1",
            "release": "digits/1.0.0/default",
            "variant": "default",
            "at": datetime(2025, 6, 16, 12, tzinfo=UTC),
            "probability": 0.25,
            "input.image": [3.0] * 64,
            "input.image.shape": [1, 8, 8],
            "output.label": [3],
            "output.label.shape": [1],
        }
    ]


def test_compacting_twice_is_compacting_once(world):
    received(world.device)
    assert len(compaction.compact(model=world.digits)) == 1
    assert compaction.compact(model=world.digits) == []
    assert DatasetPart.objects.count() == 1


def test_the_sweep_finds_what_no_message_announced(world):
    received(world.device)
    received(world.other, model="wine", samples=[sample(0, release="wine/1.0.0/default")])
    tasks.sweep.delay()
    assert states() == {State.INGESTED}
    assert DatasetPart.objects.count() == 2


def test_a_sample_that_came_in_two_batches_is_one_row(world):
    twin = sample(0)
    received(world.device, [twin])
    received(world.device, [twin, sample(1)])
    (part,) = compaction.compact(model=world.digits)
    assert part.rows == 2
    assert part.batches.count() == 2


def test_releases_with_other_tensors_get_parts_of_their_own(world):
    received(world.device, [sample(0)])
    received(world.other, [sample(0)], members={"t0.npy": npy(np.zeros(3, np.uint8))})
    other_name = sample(0, members={"pixels": "t0.npy"})
    received(world.other, [other_name])
    parts = compaction.compact(model=world.digits)
    assert len({part.path for part in parts}) == 3
    assert {part.path.rsplit("/", 1)[0] for part in parts} == {
        "datasets/model=digits/version=1.0.0/day=2025-06-16",
    }


def test_shapes_may_differ_within_a_part(world):
    received(world.device, [sample(0)], members={"t0.npy": npy(np.ones((1, 2, 2), np.float32))})
    received(world.other, [sample(0)])
    (part,) = compaction.compact(model=world.digits)
    assert sorted(row["input.image.shape"] for row in rows(part)) == [[1, 2, 2], [1, 8, 8]]


def test_a_crash_between_the_object_and_the_commit_is_healed_by_the_next_run(world, monkeypatch, local_objects):
    received(world.device)
    with monkeypatch.context() as patch:
        patch.setattr(compaction, "_record", _crash)
        with pytest.raises(RuntimeError):
            compaction.compact(model=world.digits)
    orphans = [path for path in files_under(local_objects / "objects") if path.suffix == ".parquet"]
    assert len(orphans) == 1
    assert (states(), DatasetPart.objects.count()) == ({State.RECEIVED}, 0)
    (part,) = compaction.compact(model=world.digits)
    assert local_objects / "objects" / part.path == orphans[0]  # the same work has the same name
    assert part.rows == 1


def test_a_crash_in_the_middle_of_the_commit_leaves_nothing_half(world, monkeypatch):
    received(world.device, [sample(0), sample(1, release="digits/1.1.0/default")])
    create, calls = DatasetPart.objects.create, []

    def second_fails(**fields):
        calls.append(fields)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return create(**fields)

    with monkeypatch.context() as patch:
        patch.setattr(DatasetPart.objects, "create", second_fails)
        with pytest.raises(RuntimeError):
            compaction.compact(model=world.digits)
    assert (states(), DatasetPart.objects.count()) == ({State.RECEIVED}, 0)
    assert len(compaction.compact(model=world.digits)) == 2


def _crash(*_args) -> None:
    raise RuntimeError("power cut")


def test_two_workers_do_not_compact_the_same_batch(world, monkeypatch):
    received(world.device)
    first = compaction._claim(world.digits, set())
    assert compaction._claim(world.digits, set()) == []
    with compaction._lease(first):
        pass
    assert len(compaction._claim(world.digits, set())) == 1


def test_a_worker_that_was_killed_gives_its_batches_back_when_the_lease_runs_out(world):
    received(world.device)
    compaction._claim(world.digits, set())
    assert compaction.compact(model=world.digits) == []
    Batch.objects.update(claimed_at=timezone.now() - selectors.LEASE - timedelta(seconds=1))
    assert len(compaction.compact(model=world.digits)) == 1


def test_a_worker_that_lost_its_claim_records_nothing(world, monkeypatch):
    received(world.device)
    record = compaction._record

    def late(batches, written):
        Batch.objects.update(claim="another")
        return record(batches, written)

    monkeypatch.setattr(compaction, "_record", late)
    with pytest.raises(Conflict):
        compaction.compact(model=world.digits)
    assert (states(), DatasetPart.objects.count()) == ({State.RECEIVED}, 0)


def test_memory_bounds_a_run_and_every_batch_is_taken_in_the_end(world, monkeypatch):
    monkeypatch.setattr(compaction, "COMPACT_BYTES", 1)
    for _ in range(3):
        received(world.device)
    parts = compaction.compact(model=world.digits)
    assert [part.rows for part in parts] == [1, 1, 1]
    assert states() == {State.INGESTED}


def test_batches_wait_for_company_but_not_for_ever(world, settings, monkeypatch):
    settings.COMPACT_SECONDS = 600
    received(world.device)
    assert compaction.compact_due() == []
    monkeypatch.setattr(compaction, "COMPACT_BYTES", 10)
    assert len(compaction.compact_due()) == 1  # there is a full part's worth
    received(world.device)
    monkeypatch.undo()
    Batch.objects.filter(state=State.RECEIVED).update(received_at=timezone.now() - timedelta(seconds=601))
    assert len(compaction.compact_due()) == 1


# --- what is bad is rejected alone -----------------------------------------------------------------------------------
def bad_batch(world: World, data: bytes = b"not a zip") -> Batch:
    return bring(world.device, data, head(data, batch_id=uuid4().hex))


def test_a_bad_batch_is_rejected_with_the_reason_soon_after_it_came(world):
    batch = bad_batch(world)
    tasks.ingest.delay(batch.pk)
    batch.refresh_from_db()
    assert batch.state == State.REJECTED
    assert batch.reason.startswith("bad_zip: expected a whole zip")


def test_a_bad_batch_costs_the_others_nothing(world):
    bad, good = bad_batch(world), received(world.device)
    (part,) = compaction.compact(model=world.digits)
    assert list(part.batches.all()) == [good]
    bad.refresh_from_db()
    assert bad.state == State.REJECTED


def test_a_good_batch_stays_received_until_it_is_compacted(world):
    batch = received(world.device)
    for _ in range(2):
        tasks.ingest.delay(batch.pk)
    batch.refresh_from_db()
    assert batch.state == State.RECEIVED
    assert compaction.compact(model=world.digits)[0].rows == 1


def test_a_batch_that_was_overwritten_after_it_was_received_is_rejected(world):
    """A presigned address still works for a while after `complete`."""
    batch = received(world.device)
    forged = pack([sample(0), sample(1)], batch_id=batch.batch_id)
    storage.put(storage.batch_name(batch.sha256), io.BytesIO(forged))
    compaction.compact(model=world.digits)
    batch.refresh_from_db()
    assert (batch.state, batch.reason.split(":")[0]) == (State.REJECTED, "hash_mismatch")


def test_a_batch_whose_bytes_are_gone_is_rejected(world):
    batch = received(world.device)
    storage.delete(storage.batch_name(batch.sha256))
    compaction.compact(model=world.digits)
    batch.refresh_from_db()
    assert (batch.state, batch.reason.split(":")[0]) == (State.REJECTED, "missing")


def test_samples_of_a_release_that_never_was_are_rejected(world):
    batch = received(world.device, [sample(0, release="digits/6.6.6/default")])
    compaction.compact(model=world.digits)
    batch.refresh_from_db()
    assert (batch.state, batch.reason.split(":")[0]) == (State.REJECTED, "unknown_release")


def test_a_batch_that_would_make_a_crowd_of_files_is_rejected(world):
    batch = received(world.device, [sample(n, at=NOON + n * 86_400) for n in range(401)])
    compaction.compact(model=world.digits)
    batch.refresh_from_db()
    assert (batch.state, batch.reason.split(":")[0]) == (State.REJECTED, "too_scattered")


def test_storage_that_is_away_rejects_nothing_and_holds_up_no_other_batch(world, monkeypatch):
    stuck, good = received(world.device), received(world.other)
    open_object = storage.open_object

    def away(name: str):
        if name.endswith(stuck.sha256):
            raise OSError("object storage is away")
        return open_object(name)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_object", away)
        (part,) = compaction.compact_due()
    assert list(part.batches.all()) == [good]
    stuck.refresh_from_db()
    assert (stuck.state, stuck.claim) == (State.RECEIVED, "")
    assert len(compaction.compact_due()) == 1


def test_a_model_that_cannot_be_compacted_does_not_hold_up_the_next(world, monkeypatch):
    received(world.device)
    received(world.other, model="wine", samples=[sample(0, release="wine/1.0.0/default")])
    compact = compaction.compact

    def digits_fail(*, model):
        if model == world.digits:
            raise OSError("disk full")
        return compact(model=model)

    monkeypatch.setattr(compaction, "compact", digits_fail)
    assert [part.model for part in compaction.compact_due()] == [world.wine]


# --- housekeeping ----------------------------------------------------------------------------------------------------
def test_an_upload_that_never_came_is_forgotten_and_may_be_announced_again(world, local_objects):
    data = pack([sample(0)], batch_id="d" * 32)
    announced = head(data, batch_id="d" * 32)
    batch, _ = services.announce(device=world.device, head=announced)
    services.receive_content(batch=batch, content=io.BytesIO(data))  # uploaded, but never completed
    assert services.expire() == 0
    Batch.objects.update(announced_at=timezone.now() - services.ANNOUNCED_FOR - timedelta(minutes=1))
    tasks.sweep.delay()
    assert not Batch.objects.exists()
    assert files_under(local_objects) == []
    assert bring(world.device, data, announced).state == State.RECEIVED


def test_announcing_again_keeps_a_slow_upload_alive(world):
    announced = head(b"x", batch_id="d" * 32)
    services.announce(device=world.device, head=announced)
    Batch.objects.update(announced_at=timezone.now() - services.ANNOUNCED_FOR - timedelta(minutes=1))
    services.announce(device=world.device, head=announced)
    assert services.expire() == 0


def test_partial_uploads_of_a_killed_process_are_swept_away(world, settings, local_objects):
    old, new, foreign = (settings.INCOMING / name for name in ("batch-old", "batch-new", "blob-old"))
    for path in (old, new, foreign):
        path.write_bytes(b"x")
    for path in (old, foreign):
        os.utime(path, (0, 0))
    services.expire()
    assert sorted(settings.INCOMING.iterdir()) == [new, foreign]


def age(batch: Batch, days: int) -> None:
    Batch.objects.filter(pk=batch.pk).update(received_at=timezone.now() - timedelta(days=days))


def test_retention_deletes_old_bytes_that_are_in_a_data_set_and_keeps_the_rest(world, settings):
    settings.BATCH_RETENTION_DAYS = 30
    young, old = received(world.device), received(world.device)
    compaction.compact(model=world.digits)
    waiting, bad = received(world.device), bad_batch(world)
    compaction.ingest(pk=bad.pk)
    for batch in (old, waiting, bad):
        age(batch, 31)
    tasks.retention.delay()
    kept = {batch.pk for batch in Batch.objects.all() if storage.exists(storage.batch_name(batch.sha256))}
    assert kept == {young.pk, waiting.pk}
    assert Batch.objects.count() == 4  # rows stay: the same batch again is still the same batch
    assert services.retire() == 0


def test_retention_keeps_bytes_whose_part_was_deleted(world):
    batch = received(world.device)
    compaction.compact(model=world.digits)
    DatasetPart.objects.all().delete()
    age(batch, 1000)
    assert services.retire() == 0
    assert storage.exists(storage.batch_name(batch.sha256))


# --- campaigns -------------------------------------------------------------------------------------------------------
def campaign(world: World, name: str = "night", **options) -> Campaign:
    options = {"model": world.digits, "expires_at": timezone.now() + timedelta(days=1), **options}
    return services.create_campaign(name=name, **options)


def test_a_device_samples_its_models_by_the_newest_campaign_in_force(world):
    campaign(world, "first", rate=0.5)
    newest = campaign(world, "second", rate=0.1, max_samples=7, window_start=60, window_end=90, jitter_seconds=5)
    campaign(world, "over", expires_at=timezone.now() - timedelta(seconds=1))
    services.end_campaign(campaign=campaign(world, "ended"))
    campaign(world, "wine", model=world.wine)
    expected = Sampling("second", 0.1, 7, int(newest.expires_at.timestamp()), Window(60, 90), 5)
    assert selectors.sampling_for(world.device) == {"digits": expected}
    assert set(selectors.sampling_for(world.other)) == {"digits", "wine"}


def test_what_is_in_force_is_one_query_for_the_whole_fleet(world, django_assert_num_queries):
    made = campaign(world)
    with django_assert_num_queries(2):
        assert [*selectors.campaigns_in_force()] == ["digits"]
    with django_assert_num_queries(1):  # nothing changed since
        assert [*selectors.campaigns_in_force()] == ["digits"]
    assert selectors.campaigns_in_force(timezone.now() + timedelta(days=9_999)) == {}
    services.end_campaign(campaign=made)
    assert selectors.campaigns_in_force() == {}


def test_the_window_can_be_pulled_forward(world):
    night = campaign(world, window_start=120, window_end=300)
    services.change_campaign(campaign=night, window_start=0, window_end=0, jitter_seconds=0)
    sampling = selectors.sampling_for(world.device)["digits"]
    assert (sampling.window, sampling.jitter_seconds) == (Window(0, 0), 0)
    assert sampling.window.contains(720)


def test_a_night_may_pass_over_midnight(world):
    campaign(world, window_start=23 * 60, window_end=4 * 60)
    window = selectors.sampling_for(world.device)["digits"].window
    assert [window.contains(minute) for minute in (22 * 60, 23 * 60, 0, 4 * 60)] == [False, True, True, False]


@pytest.mark.parametrize(
    "bad",
    [
        {"rate": 1.1},
        {"rate": -0.1},
        {"rate": float("nan")},
        {"window_start": 1440},
        {"window_end": -1},
        {"jitter_seconds": 86_401},
        {"max_samples": 10**7 + 1},
        {"name": "x" * 65},
    ],
    ids=str,
)
def test_a_campaign_that_devices_would_refuse_is_refused_here(world, bad):
    with pytest.raises(Invalid) as caught:
        campaign(world, **bad)
    assert caught.value.code == "invalid_campaign"
    assert set(caught.value.detail) == set(bad)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.1, 1.0])
def test_every_rate_that_is_accepted_is_one_that_a_device_reads(world, rate):
    campaign(world, rate=rate)
    sampling = selectors.sampling_for(world.device)["digits"]
    custom = Assignment("digits", sampling=sampling).to_custom()
    assert Assignment.parse("digits", 0, hashlib.sha256().hexdigest(), custom).sampling == sampling


def test_a_campaign_cannot_move_to_another_model(world):
    with pytest.raises(Invalid):
        services.change_campaign(campaign=campaign(world), model=world.wine)


def test_two_campaigns_of_one_name_are_refused(world):
    campaign(world)
    with pytest.raises(Invalid):
        campaign(world)


def test_the_database_keeps_a_hash_to_one_batch(world):
    received(world.device)
    assert ("sha256",) in {tuple(columns) for _, columns in _unique_columns()}


def _unique_columns() -> list[tuple[str, list[str]]]:
    with connection.cursor() as cursor:
        found = connection.introspection.get_constraints(cursor, Batch._meta.db_table)
    return [(name, item["columns"]) for name, item in found.items() if item["unique"]]
