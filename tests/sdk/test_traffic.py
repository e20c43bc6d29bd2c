"""A device's rate and its bytes a day: on virtual time, over a loopback, and through restarts."""

import json
import threading
from contextlib import closing
from dataclasses import dataclass
from datetime import date, timedelta

import pytest

from device_sdk.download import fetch
from device_sdk.errors import StorageError, TransferError
from device_sdk.protocol.polls import BLOBS
from device_sdk.store import Store
from device_sdk.traffic import DAYS, BudgetError, Clock, Limits, Traffic
from device_sdk.transport import Transport
from tests.sdk.loopback import Reply, blob_route, loopback
from tests.simulator import release

DATA = b"weights " * 100_000
MANIFEST, BLOBS_BY_SHA = release("detector/1.0.0/default", {"model.onnx": DATA})
(FILE,) = MANIFEST.files


@dataclass
class Days:
    """Time that passes when somebody waits."""

    seconds: float = 0.0
    today: date = date(2026, 11, 21)

    def clock(self):
        return Clock(today=lambda: self.today, monotonic=lambda: self.seconds, wait=self._wait)

    def _wait(self, seconds):
        assert 0 < seconds <= 1
        self.seconds += seconds


@pytest.fixture
def days():
    return Days()


@pytest.fixture
def server():
    with loopback() as server:
        for sha, data in BLOBS_BY_SHA.items():
            server.on(BLOBS + sha, blob_route(data))
        yield server


@pytest.fixture
def transport(server):
    with closing(Transport(server.url, [], "7.1.k1.mac", stall_seconds=5)) as transport:
        yield transport


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "traffic.json"


def ranges(server):
    return [asked.headers.get("Range") for asked in server.asked]


def sent(server):
    """Bytes of bodies that were asked for."""
    total = 0
    for asked in ranges(server):
        first, _, last = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        total += int(last or FILE.length - 1) + 1 - int(first)
    return total


def download(transport, store, traffic):
    fetch(transport, store, MANIFEST, deadline=60, traffic=traffic)


# Rate


@pytest.mark.parametrize("rate", [1000, 50_000, 10**6])
def test_a_download_takes_as_long_as_the_rate_says(transport, store, days, rate):
    download(transport, store, Traffic(None, Limits(rate=rate), days.clock()))
    assert store.has_blob(FILE)
    assert days.seconds == pytest.approx(len(DATA) / rate, rel=0.01)


def test_a_slow_rate_asks_for_little_at_a_time(server, transport, store, days):
    download(transport, store, Traffic(None, Limits(rate=5000), days.clock()))
    assert ranges(server)[0] == "bytes=0-99999"
    assert sent(server) == len(DATA)


def test_a_capped_download_is_no_stalled_one(server, store):
    """It rests longer than the whole time in which a sender must have brought more than the file is long."""
    server.on(BLOBS + FILE.sha256, lambda _: Reply(200, drips(DATA), {}))
    clock, rest = {"now": 0.0, "waits": 0}, threading.Event()

    def wait(seconds):
        rest.wait(0.4)
        clock["now"] += seconds
        clock["waits"] += 1

    traffic = Traffic(None, Limits(rate=400_000), Clock(monotonic=lambda: clock["now"], wait=wait))
    with closing(Transport(server.url, [], "7.1.k1.mac", stall_seconds=0.5, slowest=2_000_000)) as transport:
        download(transport, store, traffic)
    assert clock["waits"] >= 2
    assert store.has_blob(FILE)


def drips(data):
    step = 256 * 1024
    for at in range(0, len(data), step):
        yield data[at : at + step]


def test_the_smaller_limit_counts(path, days):
    traffic = Traffic(path, Limits(rate=10, daily=500), days.clock())
    traffic.obey(Limits(rate=20, daily=300), urgent=False)
    assert traffic._limits == Limits(10, 300)
    traffic.obey(Limits(rate=5), urgent=False)
    assert traffic._limits == Limits(5, 500)


def test_an_urgent_release_ignores_the_budget_and_keeps_the_rate(path, days):
    traffic = Traffic(path, Limits(rate=10, daily=1), days.clock())
    traffic.obey(Limits(), urgent=True)
    assert (traffic.left(), traffic._limits.rate) == (None, 10)
    traffic.took(5000)
    traffic.settle()
    traffic.obey(Limits(), urgent=False)
    assert traffic.left() == 0  # but what it took has been taken
    assert Traffic(path, Limits(daily=6000), days.clock()).left() == 1000


# Budget


def test_no_more_than_the_budget_comes_each_day_and_the_next_goes_on(server, transport, store, path, days):
    counts = []
    for _ in range(10):
        traffic = Traffic(path, Limits(daily=150_000), days.clock())  # each day is another process
        before = sent(server)
        if store.has_blob(FILE):
            break
        try:
            download(transport, store, traffic)
        except BudgetError:
            with pytest.raises(BudgetError):
                download(transport, store, traffic)
        counts.append(sent(server) - before)
        days.today += timedelta(days=1)
    assert counts == [150_000] * 5 + [50_000]
    assert store.has_blob(FILE)


def test_bytes_of_failed_tries_count(server, transport, store, path, days):
    server.on(BLOBS + FILE.sha256, lambda _: Reply(200, DATA[:100_000], {"Content-Length": str(len(DATA))}))
    traffic = Traffic(path, Limits(daily=10**6), days.clock())
    with pytest.raises(TransferError):
        download(transport, store, traffic)
    assert traffic.left() == 900_000
    store.discard(FILE.sha256)
    with pytest.raises(TransferError):
        download(transport, store, traffic)
    assert Traffic(path, Limits(daily=10**6), days.clock()).left() == 800_000


def test_a_server_that_sends_more_than_it_was_asked_for_is_hung_up_on(server, transport, store, path, days):
    server.on(BLOBS + FILE.sha256, blob_route(DATA, ranges=False))
    traffic = Traffic(path, Limits(daily=300_000), days.clock())
    with pytest.raises(BudgetError):
        download(transport, store, traffic)
    assert 300_000 <= traffic._days["2026-11-21"] <= 300_000 + 256 * 1024


def test_a_restart_in_the_middle_does_not_win_bytes_back(path, days):
    traffic = Traffic(path, Limits(daily=10**7), days.clock())
    assert traffic.slice(10**7) == 10**7
    for _ in range(20):
        traffic.took(200_000)
        left = Traffic(path, Limits(daily=10**7), days.clock()).left()
        assert 10**7 - traffic._days["2026-11-21"] - 2**20 <= left <= 10**7 - traffic._days["2026-11-21"] - 200_000
    traffic.settle()
    assert Traffic(path, Limits(daily=10**7), days.clock()).left() == 6 * 10**6


def test_a_clock_that_starts_at_1970_does_not_begin_the_day_anew(path, days):
    today = days.today
    for _ in range(3):
        for days.today in (date(1970, 1, 1), today):
            traffic = Traffic(path, Limits(daily=1000), days.clock())
            traffic.took(100)
            traffic.settle()
    assert traffic.left() == 700


def test_a_clock_that_runs_wild_does_not_push_today_out(path, days):
    today = days.today
    for each in range(20):
        for days.today in (date(2030, 1, 1) + timedelta(days=each), today):
            traffic = Traffic(path, Limits(daily=1000), days.clock())
            traffic.took(10)
            traffic.settle()
    assert traffic.left() == 800


def test_the_file_stays_small(path, days):
    traffic = Traffic(path, Limits(daily=1000), days.clock())
    for _ in range(400):
        days.today += timedelta(days=1)
        traffic.took(10)
        traffic.settle()
    assert list(json.loads(path.read_bytes())) == [str(days.today - timedelta(days=each)) for each in range(DAYS)][::-1]
    assert len(traffic._days) <= DAYS


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"2026-11-21": -5}', '{"x": 1}', '{"2026-11-21": "all"}', "{}" + " " * 9999]
)
def test_a_spoilt_file_is_an_empty_one(path, days, text):
    path.write_text(text)
    traffic = Traffic(path, Limits(daily=1000), days.clock())
    assert traffic.left() == 1000
    traffic.took(1)
    traffic.settle()
    assert json.loads(path.read_bytes()) == {"2026-11-21": 1}


def test_what_cannot_be_counted_is_not_fetched(server, transport, store, path, days):
    path.parent.joinpath(".traffic.json.tmp").mkdir()
    with pytest.raises(StorageError):
        download(transport, store, Traffic(path, Limits(daily=1000), days.clock()))
    assert server.asked == []


def test_without_a_limit_nothing_is_written_and_nothing_waited_for(transport, store, path, days):
    download(transport, store, Traffic(path, clock=days.clock()))
    assert not path.exists()
    assert days.seconds == 0
