"""Samples: taken at once, redacted before the first write, bounded, sealed once."""

import io
import json
import threading
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from device_sdk.intake import QUEUE_SAMPLES
from device_sdk.protocol import limits
from device_sdk.protocol.assignment import Sampling
from device_sdk.protocol.batches import INDEX, BatchIndex
from device_sdk.protocol.manifest import digest
from device_sdk.protocol.names import ReleasePath
from device_sdk.spool import Spool

RELEASE = ReleasePath("detector", "1.0.0", "default")
CAMPAIGN = Sampling(campaign="night", rate=0.5, max_samples=1_000, expires=2**33)


def spool_in(path, **options):
    return Spool(path / "spool", device="cam-1", **{"max_bytes": 10_000_000, **options})


def offer(spool, count, *, size=4, start=0):
    intake = spool.lane("detector")
    for number in range(start, start + count):
        inputs = {"x": np.full((1, size), number, np.float32)}
        intake.offer(RELEASE, inputs, {"y": np.array([number], np.int64)})
        spool.drain()


def opened(batch):
    with zipfile.ZipFile(batch.path) as archive:
        index = BatchIndex.parse(archive.read(INDEX))
        return index, {name: archive.read(name) for name in archive.namelist()}


def values(batch):
    index, members = opened(batch)
    return [int(np.load(io.BytesIO(members[sample.outputs["y"]]), allow_pickle=False)[0]) for sample in index.samples]


def files_on_disk(path):
    return sum(file.stat().st_size for file in path.rglob("*.zip"))


def test_sealed_batch_holds_the_samples_as_the_protocol_says(tmp_path):
    spool = spool_in(tmp_path)
    spool.configure("detector", CAMPAIGN)
    offer(spool, 3)
    (batch,) = spool.seal("detector")
    index, members = opened(batch)
    assert (index.device, index.model, index.id) == ("cam-1", "detector", batch.head.id)
    assert [sample.release for sample in index.samples] == [RELEASE] * 3
    assert [sample.probability for sample in index.samples] == [0.5] * 3
    first = index.samples[0]
    np.testing.assert_array_equal(np.load(io.BytesIO(members[first.inputs["x"]])), np.zeros((1, 4), np.float32))
    assert sorted(values(batch)) == [0, 1, 2]
    data = batch.path.read_bytes()
    assert (batch.head.sha256, batch.head.length, batch.head.samples) == (digest(data), len(data), 3)
    assert batch.head.campaign == "night"
    assert spool.waiting() == {"detector": 3}


def test_nothing_is_sampled_without_a_campaign_or_after_its_end(tmp_path):
    spool = spool_in(tmp_path)
    assert spool.configure("detector", None).rate == 0
    assert spool.configure("detector", CAMPAIGN).rate == 0.5
    assert spool.configure("detector", replace(CAMPAIGN, expires=1)).rate == 0
    offer(spool, 3)
    assert spool.seal("detector") == []


def test_caller_may_reuse_its_buffers(tmp_path):
    spool = spool_in(tmp_path)
    intake = spool.configure("detector", CAMPAIGN)
    buffer = np.ones((1, 4), np.float32)
    intake.offer(RELEASE, {"x": buffer}, {"y": np.array([1], np.int64)})
    buffer[:] = 9
    spool.drain()
    (batch,) = spool.seal("detector")
    index, members = opened(batch)
    np.testing.assert_array_equal(np.load(io.BytesIO(members[index.samples[0].inputs["x"]])), np.ones((1, 4)))


def test_redaction_runs_before_the_first_write(tmp_path):
    spool = spool_in(tmp_path, redact=lambda inputs: {"x": np.zeros_like(inputs["x"])})
    intake = spool.configure("detector", CAMPAIGN)
    secret = np.frombuffer(b"a face, a face! ", np.uint8)
    intake.offer(RELEASE, {"x": secret}, {})
    spool.drain()
    spool.seal("detector")
    assert files_on_disk(tmp_path) > 0
    assert not any(b"a face" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_sample_that_cannot_be_redacted_is_lost_and_counted_never_written(tmp_path):
    def fails(_):
        raise RuntimeError("no face found")

    spool = spool_in(tmp_path, redact=fails)
    spool.configure("detector", CAMPAIGN)
    offer(spool, 4)
    assert files_on_disk(tmp_path) == 0
    assert spool.dropped() == {"detector": 4}


def test_full_queue_drops_and_counts_and_never_blocks(tmp_path):
    spool = spool_in(tmp_path)
    intake = spool.configure("detector", CAMPAIGN)
    for number in range(QUEUE_SAMPLES + 30):
        intake.offer(RELEASE, {"x": np.zeros(4, np.float32)}, {"y": np.array([number], np.int64)})
    spool.drain()
    assert spool.waiting() == {"detector": QUEUE_SAMPLES}
    (batch,) = spool.seal("detector")
    assert batch.head.dropped == 30
    index, _ = opened(batch)
    assert index.samples[0].probability == pytest.approx(0.5 * QUEUE_SAMPLES / (QUEUE_SAMPLES + 30))


def test_offer_never_raises_into_the_inference(tmp_path):
    spool = spool_in(tmp_path)
    intake = spool.configure("detector", CAMPAIGN)

    class Odd:
        def __array__(self, *_, **__):
            raise RuntimeError("no array")

    intake.offer(RELEASE, {"x": Odd()}, {})
    spool.drain()
    assert spool.dropped() == {"detector": 1}


def test_disk_is_bounded_whatever_is_offered_and_drops_are_counted(tmp_path):
    bound = 100_000
    spool = spool_in(tmp_path, max_bytes=bound)
    spool.configure("detector", CAMPAIGN)
    for round_ in range(30):
        offer(spool, 10, size=500, start=round_ * 10)
        assert spool.size() <= bound
        assert files_on_disk(tmp_path) <= bound
    assert files_on_disk(tmp_path) == spool.size()
    assert spool.dropped()["detector"] > 0
    kept = spool.waiting()["detector"]
    (batch,) = spool.seal("detector")
    index, _ = opened(batch)
    assert index.samples[0].probability == pytest.approx(0.5 * kept / 300)


def test_disk_stays_bounded_while_uploads_fail(tmp_path):
    bound = 100_000
    spool = spool_in(tmp_path, max_bytes=bound)
    spool.configure("detector", CAMPAIGN)
    for round_ in range(10):
        offer(spool, 20, size=500, start=round_ * 20)
        spool.seal("detector")
    # Sealing adds an index to what was kept within the bound.
    assert files_on_disk(tmp_path) < bound * 1.2
    assert spool.dropped()["detector"] > 0


def test_samples_over_the_campaigns_number_replace_others_at_random(tmp_path):
    spool = spool_in(tmp_path)
    spool.configure("detector", replace(CAMPAIGN, rate=1.0, max_samples=10))
    offer(spool, 200)
    (batch,) = spool.seal("detector")
    index, _ = opened(batch)
    assert len(index.samples) == 10
    assert index.samples[0].probability == pytest.approx(10 / 200)
    assert max(values(batch)) > 20  # all of the first ten left with a chance of 1e-13


def test_campaigns_number_counts_from_upload_to_upload(tmp_path):
    spool = spool_in(tmp_path)
    spool.configure("detector", replace(CAMPAIGN, max_samples=10))
    offer(spool, 20)
    spool.seal("detector")
    offer(spool, 5)
    batches = spool.seal("detector")
    assert [batch.head.samples for batch in batches] == [10, 5]
    assert opened(batches[1])[0].samples[0].probability == 0.5


def test_other_rate_or_campaign_seals_what_was_kept_before_under_its_own_name(tmp_path):
    spool = spool_in(tmp_path)
    spool.configure("detector", CAMPAIGN)
    offer(spool, 3)
    spool.configure("detector", replace(CAMPAIGN, campaign="dawn", rate=0.1))
    offer(spool, 2)
    first, second = spool.seal("detector")
    assert (first.head.campaign, first.head.samples) == ("night", 3)
    assert (second.head.campaign, second.head.samples) == ("dawn", 2)
    assert opened(first)[0].samples[0].probability == 0.5
    assert opened(second)[0].samples[0].probability == 0.1


def test_restart_takes_up_samples_batches_and_counts(tmp_path):
    spool = spool_in(tmp_path)
    spool.configure("detector", replace(CAMPAIGN, rate=1.0, max_samples=4))
    offer(spool, 3)
    spool.seal("detector")
    offer(spool, 8)
    again = spool_in(tmp_path)
    again.lane("detector")
    assert again.waiting() == {"detector": 7}
    first, second = again.seal("detector")
    assert (first.head.samples, second.head.samples) == (3, 4)
    assert opened(second)[0].samples[0].probability == 0.5


def test_sealed_batch_is_the_same_bytes_after_a_restart(tmp_path):
    spool = spool_in(tmp_path)
    spool.configure("detector", CAMPAIGN)
    offer(spool, 3)
    (before,) = spool.seal("detector")
    data = before.path.read_bytes()
    again = spool_in(tmp_path)
    (after,) = again.seal("detector")
    assert after == before
    assert after.path.read_bytes() == data


def test_sealing_cut_off_before_the_rename_loses_no_sample(tmp_path, monkeypatch):
    spool = spool_in(tmp_path)
    spool.configure("detector", CAMPAIGN)
    offer(spool, 3)

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("device_sdk.spool._sync_directory", cut)
        patch.setattr("pathlib.Path.replace", cut)
        with pytest.raises(KeyboardInterrupt):
            spool.seal("detector")
    again = spool_in(tmp_path)
    (batch,) = again.seal("detector")
    assert sorted(values(batch)) == [0, 1, 2]


def test_sealing_cut_off_after_the_rename_doubles_no_sample(tmp_path, monkeypatch):
    spool = spool_in(tmp_path)
    spool.configure("detector", CAMPAIGN)
    offer(spool, 3)

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("device_sdk.spool._sync_directory", cut)
        with pytest.raises(KeyboardInterrupt):
            spool.seal("detector")
    again = spool_in(tmp_path)
    (batch,) = again.seal("detector")
    assert sorted(values(batch)) == [0, 1, 2]


def test_broken_sample_file_costs_only_itself(tmp_path):
    spool = spool_in(tmp_path)
    spool.configure("detector", CAMPAIGN)
    offer(spool, 3)
    next(iter(tmp_path.rglob("samples/*.zip"))).write_bytes(b"torn")
    (batch,) = spool.seal("detector")
    assert (batch.head.samples, spool.dropped()["detector"]) == (2, 1)


def test_lost_state_file_costs_the_counts_not_the_samples(tmp_path):
    spool = spool_in(tmp_path)
    spool.configure("detector", CAMPAIGN)
    offer(spool, 3)
    next(iter(tmp_path.rglob("state.json"))).write_text("{", encoding="utf-8")
    (batch,) = spool_in(tmp_path).seal("detector")
    assert batch.head.samples == 3


def test_batches_respect_the_protocols_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "SAMPLES_PER_BATCH", 4)
    spool = spool_in(tmp_path)
    spool.configure("detector", CAMPAIGN)
    offer(spool, 10)
    assert [batch.head.samples for batch in spool.seal("detector")] == [4, 4, 2]


def test_full_disk_loses_the_sample_and_counts_it(tmp_path, monkeypatch):
    spool = spool_in(tmp_path)
    spool.configure("detector", CAMPAIGN)
    offer(spool, 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("device_sdk.spool._write", full)
        offer(spool, 3)
    assert spool.waiting() == {"detector": 2}
    assert spool.dropped() == {"detector": 3}


def test_text_inputs_are_stored_without_pickle(tmp_path):
    spool = spool_in(tmp_path)
    intake = spool.configure("detector", CAMPAIGN)
    intake.offer(RELEASE, {"x": np.array([["a", "bc"]], dtype=object)}, {"map": [{0: 0.5}]})
    spool.drain()
    (batch,) = spool.seal("detector")
    index, members = opened(batch)
    sample = index.samples[0]
    assert np.load(io.BytesIO(members[sample.inputs["x"]]), allow_pickle=False).tolist() == [["a", "bc"]]
    assert sample.outputs == {}


def test_thread_writes_what_calls_offer(tmp_path):
    spool = spool_in(tmp_path)
    intake = spool.configure("detector", CAMPAIGN)
    spool.start()
    written = threading.Event()
    keep = spool._keep
    spool._keep = lambda *arguments: (keep(*arguments), written.set())
    intake.offer(RELEASE, {"x": np.zeros(4, np.float32)}, {})
    assert written.wait(10)
    spool.stop()
    assert spool.waiting() == {"detector": 1}


def test_offering_takes_microseconds(tmp_path):
    spool = spool_in(tmp_path)
    intake = spool.configure("detector", CAMPAIGN)
    x, y = np.zeros((1, 64), np.float32), np.zeros((1, 10), np.float32)
    began = time.perf_counter()
    for _ in range(QUEUE_SAMPLES):
        intake.offer(RELEASE, {"x": x}, {"y": y})
    assert (time.perf_counter() - began) / QUEUE_SAMPLES < 1e-3


def test_head_on_disk_parses_as_the_protocol_says(tmp_path):
    spool = spool_in(tmp_path)
    spool.configure("detector", CAMPAIGN)
    offer(spool, 1)
    (batch,) = spool.seal("detector")
    assert type(batch.head).parse(json.loads(batch.path.with_suffix(".json").read_bytes())) == batch.head
