"""Batches travel by announce, put, complete; the local copy goes only after "received"."""

from datetime import date, timedelta

import numpy as np
import pytest

from device_sdk.errors import TransferError, UnauthorizedError
from device_sdk.protocol.assignment import Sampling, Window
from device_sdk.protocol.names import ReleasePath
from device_sdk.spool import Spool
from device_sdk.traffic import Clock, Limits, Traffic
from device_sdk.uploader import Uploader
from tests.sdk.world import Server, World, X, _json, scaling
from tests.simulator import DAY

BATCHES = "/api/device/v1/batches"
NIGHT = Sampling(campaign="night", rate=1.0, max_samples=100, expires=2**33, window=Window(120, 300))


class Yard:
    def __init__(self, path):
        self.path = path
        self.server = Server()
        self.second = 3 * 3600.0
        self.open()

    def open(self):
        self.spool = Spool(self.path, device="cam-1", max_bytes=10_000_000)
        self.spool.configure("detector", NIGHT)
        self.uploader = Uploader(self.server, self.spool, "cam-1", second_of_day=lambda: self.second)

    def offer(self, count=3):
        for number in range(count):
            self.spool.lane("detector").offer(
                ReleasePath("detector", "1.0.0", "default"), {"x": np.full(4, number, np.float32)}, {}
            )
        self.spool.drain()

    def files(self):
        return len(list(self.path.rglob("batches/*.zip")))

    def batch_calls(self):
        return [call.replace(BATCHES, "") for call in self.server.calls]


@pytest.fixture
def yard(tmp_path):
    return Yard(tmp_path)


def test_batch_is_announced_put_completed_and_then_deleted(yard):
    yard.offer()
    report = yard.uploader.run()
    assert (report.sent, report.samples) == (1, 3)
    (identifier,) = yard.server.batches
    assert yard.batch_calls() == ["POST ", f"PUT /{identifier}/content", f"POST /{identifier}/complete"]
    assert yard.files() == 0
    assert yard.spool.waiting() == {"detector": 0}


@pytest.mark.parametrize("step", ["", "/content", "/complete"])
def test_failure_at_any_step_keeps_the_batch_and_sends_the_same_bytes_after_a_restart(yard, step):
    yard.offer()
    (batch,) = yard.spool.seal("detector")
    path = BATCHES if not step else f"{BATCHES}/{batch.head.id}{step}"
    yard.server.faults[path] = [TransferError("reset", status=503)]
    with pytest.raises(TransferError):
        yard.uploader.run()
    assert yard.files() == 1
    yard.open()
    assert yard.uploader.run().sent == 1
    assert list(yard.server.batches) == [batch.head.id]
    assert yard.server.batches[batch.head.id]["state"] == "received"
    assert yard.files() == 0


def test_acknowledgement_that_got_lost_is_asked_for_again_without_a_second_upload(yard):
    yard.offer()
    (batch,) = yard.spool.seal("detector")
    yard.server.batches[batch.head.id] = {**batch.head.to_json(), "state": "received"}
    assert yard.uploader.run().sent == 1
    assert yard.batch_calls() == ["POST "]
    assert yard.files() == 0


def test_bytes_that_did_not_arrive_are_sent_again_next_time(yard):
    yard.offer()
    (batch,) = yard.spool.seal("detector")
    missing = TransferError("not there", status=409, code="not_uploaded")
    yard.server.faults[f"{BATCHES}/{batch.head.id}/complete"] = [missing]
    assert yard.uploader.run().failed == 1
    assert yard.files() == 1
    assert yard.uploader.run().sent == 1


@pytest.mark.parametrize("said", [{"state": "announced"}, {"state": "pending"}, {}])
def test_nothing_but_received_counts_as_acknowledged(yard, said, monkeypatch):
    yard.offer()
    batches = yard.server._batches

    def odd(path, content):
        return _json(said) if path.endswith("/complete") else batches(path, content)

    monkeypatch.setattr(yard.server, "_batches", odd)
    with pytest.raises(TransferError):
        yard.uploader.run()
    assert yard.files() == 1


def test_nothing_travels_outside_the_window_unless_it_is_forced(yard):
    yard.offer()
    yard.second = 12 * 3600.0
    assert yard.uploader.run().sent == 0
    assert yard.server.calls == []
    assert yard.uploader.run(force=True).sent == 1


def test_batch_that_can_never_be_taken_is_given_up_and_counted(yard):
    yard.offer()
    yard.server.faults[BATCHES] = [TransferError("no", status=422, code="wrong_model")]
    report = yard.uploader.run()
    assert (report.lost, report.sent) == (1, 0)
    assert yard.files() == 0
    yard.offer(1)
    (batch,) = yard.spool.seal("detector")
    assert batch.head.dropped == 3


def test_refused_batch_does_not_hold_up_the_next(yard):
    yard.offer()
    yard.spool.seal("detector")
    yard.offer()
    yard.server.faults[BATCHES] = [TransferError("odd", status=404, code="not_found")]
    report = yard.uploader.run()
    assert (report.failed, report.sent) == (1, 1)
    assert yard.files() == 1


def test_damaged_local_copy_is_given_up_a_sound_one_is_kept(yard):
    yard.offer()
    (batch,) = yard.spool.seal("detector")
    complete = f"{BATCHES}/{batch.head.id}/complete"
    yard.server.faults[complete] = [TransferError("hash", status=422, code="hash_mismatch")]
    assert yard.uploader.run().failed == 1
    assert yard.files() == 1
    data = bytearray(batch.path.read_bytes())
    data[50] ^= 1
    batch.path.write_bytes(data)
    assert yard.uploader.run().lost == 1
    assert yard.files() == 0


def test_revoked_device_keeps_its_samples(yard):
    yard.offer()
    yard.server.faults[BATCHES] = [UnauthorizedError("revoked", status=401)]
    with pytest.raises(UnauthorizedError):
        yard.uploader.run()
    assert yard.files() == 1


class Metered(Yard):
    """Uploads under limits, on a clock that only waiting moves."""

    def __init__(self, path, **limits):
        self.now, self.day, self.limits = 0.0, date(2026, 11, 21), Limits(**limits)
        super().__init__(path)

    def open(self):
        super().open()
        self.spool = Spool(self.path, device="cam-1", max_bytes=10**7, batch_bytes=self.limits.daily // 2 or 2**25)
        self.spool.configure("detector", NIGHT)
        clock = Clock(today=lambda: self.day, monotonic=lambda: self.now, wait=self.wait)
        self.traffic = Traffic(self.path / "uploads.json", self.limits, clock)
        self.uploader = Uploader(
            self.server, self.spool, "cam-1", second_of_day=lambda: self.second, traffic=self.traffic
        )

    def wait(self, seconds):
        self.now += seconds

    @property
    def sent(self):
        return sum(batch["length"] for batch in self.server.batches.values())


def test_uploads_keep_to_a_rate(tmp_path):
    yard = Metered(tmp_path, rate=1_000)
    yard.offer(20)
    assert yard.uploader.run().samples == 20
    assert yard.now == pytest.approx(yard.sent / 1_000, rel=0.01)
    assert yard.now > 5


def test_uploads_keep_to_a_daily_budget_over_restarts_and_go_on_the_next_day(tmp_path):
    yard = Metered(tmp_path, daily=10_000)
    yard.offer(60)
    report = yard.uploader.run()
    assert report.sent > 0
    assert report.put_off > 0
    assert 5_000 < yard.sent <= 10_000
    yard.open()
    assert yard.uploader.run(force=True).sent == 0
    days = 1
    while yard.spool.waiting()["detector"]:
        before, yard.day, days = yard.sent, yard.day + timedelta(days=1), days + 1
        yard.uploader.run()
        assert 0 < yard.sent - before <= 10_000
    assert 2 < days < 10


def test_sample_that_is_larger_than_a_days_budget_goes_first_on_its_day(tmp_path):
    yard = Metered(tmp_path, daily=100)
    yard.offer(2)
    assert [yard.uploader.run().sent for _ in range(2)] == [1, 0]
    yard.day += timedelta(days=1)
    assert [yard.uploader.run().sent for _ in range(2)] == [1, 0]
    assert yard.files() == 0


def test_slow_upload_ends_when_the_device_stops_and_the_batch_stays(tmp_path):
    yard = Metered(tmp_path, rate=10)
    yard.offer()
    yard.uploader.stopping = lambda: yard.now > 3
    with pytest.raises(TransferError, match="stops"):
        yard.uploader.run()
    assert yard.now < 10
    assert yard.files() == 1


def test_deadline_of_an_upload_leaves_time_for_the_rate(tmp_path, monkeypatch):
    yard, deadlines = Metered(tmp_path, rate=1), []
    yard.offer()
    real = yard.server.request

    def request(method, url, **options):
        deadlines.append(options["deadline"])
        return real(method, url, **options)

    monkeypatch.setattr(yard.server, "request", request)
    yard.uploader.run()
    assert max(deadlines) > yard.sent


def test_devices_uploads_keep_to_the_budget_that_it_was_opened_with_through_restarts(tmp_path):
    world, path = World(tmp_path / "device"), "detector/1.0.0/default"
    limits = {"max_upload_bytes_per_day": 20_000}
    with world.committed(path, scaling(1), **limits) as fleet:
        asked = Sampling("c", 1.0, 1_000, world.server.simulator.now + DAY)
        world.server.assign(world.server.publish(path, scaling(1)), sampling=asked)
        fleet.update_once()
        for _ in range(60):
            fleet.model("detector").run(X)
        fleet._worker.spool.drain()
        assert fleet.upload_now().sent > 0
    with world.open(**limits) as fleet:
        assert fleet.status().samples_waiting["detector"] > 0
        report = fleet.upload_now()
        assert (report.sent, report.put_off > 0) == (0, True)
        assert 10_000 < sum(batch["length"] for batch in world.server.batches.values()) <= 20_000
