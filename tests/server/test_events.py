import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from device_sdk.protocol import limits
from fleet.devices import services
from fleet.devices.models import Device, DeviceEvent, ModelStatus, RunningSet
from fleet.rollouts.selectors import laggards, releases_exist
from tests.fleet_world import Caller, device, event, post, refusal, release, running, running_set

pytestmark = pytest.mark.django_db


@pytest.fixture
def caller(client: Client) -> Caller:
    return Caller(client, device())


def status() -> ModelStatus:
    return ModelStatus.objects.get()


def test_events_are_kept_as_the_device_told_them(caller: Caller) -> None:
    target = release("1.1.0")
    answer = caller.post(event("failed", target, rollout="7", reason="hash_mismatch", detail={"bytes": 12.5}))
    assert (answer.status_code, answer.json()) == (200, {"accepted": 1})
    row = DeviceEvent.objects.get()
    assert (row.kind, row.release, row.rollout, row.reason) == ("failed", "digits/1.1.0/default", "7", "hash_mismatch")
    assert row.detail == {"bytes": 12.5}


def test_posting_twice_is_posting_once(caller: Caller) -> None:
    told = event("downloading", release())
    assert caller.post(told, dropped=3).json() == {"accepted": 1}
    assert caller.post(told, dropped=3).json() == {"accepted": 0}
    assert caller.post(told, event("verifying", release("2"))).json() == {"accepted": 1}
    assert DeviceEvent.objects.count() == 2
    caller.device.refresh_from_db()
    assert caller.device.dropped_events == 3


def test_twins_in_one_post_are_one_event(caller: Caller) -> None:
    told = event("downloading", release())
    assert caller.post(told, told).json() == {"accepted": 1}


def test_two_devices_may_use_the_same_event_id(caller: Caller, client: Client) -> None:
    told = event("downloading", release())
    other = Caller(client, device("cam-2"))
    assert [each.post(told).json()["accepted"] for each in (caller, other)] == [1, 1]


def test_the_last_word_on_a_model_is_its_status(caller: Caller) -> None:
    target = release("1.1.0")
    caller.post(event("downloading", target), event("waiting", target, reason="window"))
    assert (status().state, status().reason, status().release) == ("waiting", "window", "digits/1.1.0/default")
    caller.post(event("committed", target))
    assert (status().state, status().reason) == ("committed", "")


def test_health_changes_no_state(caller: Caller) -> None:
    target = release("1.1.0")
    caller.post(event("committed", target))
    since = status().since
    caller.post(event("health", target, detail={"calls": 10, "errors": 1}))
    assert (status().state, status().since, status().health) == ("committed", since, {"calls": 10, "errors": 1})


def test_a_status_lasts_from_when_it_began(caller: Caller) -> None:
    target, begin = release("1.1.0"), timezone.now() - timedelta(hours=3)
    caller.post(event("waiting", target, at=begin.timestamp(), reason="window"))
    caller.post(event("waiting", target, reason="metered"))
    assert (status().reason, status().since) == ("metered", begin)


@pytest.mark.parametrize("clock", [0.0, 2.0**40])
def test_a_clock_that_cannot_be_right_is_kept_but_not_believed(caller: Caller, clock: float) -> None:
    assert caller.post(event("waiting", release(), at=clock)).status_code == 200
    assert abs(status().since - timezone.now()) < timedelta(minutes=1)
    assert DeviceEvent.objects.get().at in {datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)}


def test_an_event_about_a_model_that_the_device_has_not_makes_no_status(caller: Caller) -> None:
    assert caller.post(event("waiting", release(model="wine"))).json() == {"accepted": 1}
    assert not ModelStatus.objects.exists()


def test_what_a_device_runs_is_kept_once_for_all_devices(caller: Caller, client: Client) -> None:
    release("1.0.0")
    caller.runs = {"digits": "1.0.0/default"}
    other = Caller(client, device("cam-2"), runs=caller.runs)
    assert [each.post().status_code for each in (caller, other)] == [200, 200]
    assert RunningSet.objects.get().runs == caller.runs
    assert Device.objects.filter(runs=RunningSet.objects.get()).count() == 2


@pytest.mark.parametrize("runs", [{"digits": "9.9.9/default"}, {"digits": "1.0.0/nosuch"}, {"wine": "1.0.0/default"}])
def test_a_running_set_of_things_nobody_published_is_not_kept(caller: Caller, runs: dict[str, str]) -> None:
    """It is the device's own text: else any device could fill the table."""
    release("1.0.0")
    release("1.0.0", model="wine")
    before = running_set({"digits": "1.0.0/default"})
    Device.objects.update(runs=before)
    caller.runs = runs
    assert caller.post(event("waiting")).status_code == 200
    caller.device.refresh_from_db()
    assert (RunningSet.objects.count(), caller.device.runs) == (1, before)


def test_a_device_that_runs_nothing_says_so(caller: Caller) -> None:
    caller.post()
    caller.device.refresh_from_db()
    assert caller.device.runs is not None
    assert caller.device.runs.runs == {}


def test_a_post_is_a_sign_of_life_and_tells_the_sdk(caller: Caller) -> None:
    Device.objects.update(last_seen=None)
    caller.post(sdk="0.2.0")
    caller.device.refresh_from_db()
    assert caller.device.sdk == "0.2.0"
    assert caller.device.last_seen is not None


def test_a_full_post_takes_no_more_queries_than_a_small_one(caller: Caller, django_assert_max_num_queries: Any) -> None:
    target = release("1.1.0")
    rollout = running(target)
    told = [event("waiting", target, rollout=rollout) for _ in range(limits.EVENTS_PER_POST)]
    with CaptureQueriesContext(connection) as small:
        caller.post(told[0])
    few = len(small)
    slack = 2  # SQLite inserts so many rows in two statements
    with django_assert_max_num_queries(few + slack):
        assert caller.post(*told).json() == {"accepted": limits.EVENTS_PER_POST - 1}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed"), (b"null", 400, "malformed"), (b"{", 400, "malformed"),
        (b"[" * 9_999, 400, "malformed"),
        (b'{"events": [{"id": "zz"}], "runs": {}}', 400, "malformed"), (b'{"events": [], "runs": 1}', 400, "malformed"),
        (json.dumps({"events": [{"id": "0" * 32, "at": 1, "kind": "boom"}], "runs": {}}).encode(), 400, "unknown_kind"),
        (json.dumps({"events": [{"id": "0" * 32, "at": 1, "kind": "failed", "reason": "a\0b"}], "runs": {}}).encode(),
         400, "malformed"),
        (b'{"events": [{"id": "' + b"0" * 32 + b'", "at": 1, "kind": "health", "detail": {"a": 1e999}}], "runs": {}}',
         400, "malformed"),
        (b'{"events": [], "runs": {"../x": "1/a"}}', 400, "invalid_name"),
        (b" " * (limits.EVENT_BODY + 1), 413, "too_large"),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_hostile_post_is_refused_and_changes_nothing(caller: Caller, body: bytes, status: int, code: str) -> None:
    assert refusal(caller.post(body=body)) == (status, code)
    assert not DeviceEvent.objects.exists()
    assert not RunningSet.objects.exists()


def test_events_need_a_credential(client: Client) -> None:
    assert refusal(client.post("/api/device/v1/events", b"{}", content_type="application/json")) == (
        401,
        "unauthorized",
    )


def test_old_history_goes_and_the_rest_stays() -> None:
    entry, target = device(), release()
    kinds = ["committed", "health", "committed", "health"]
    services.record_events(entry, post(*(event(kind, target) for kind in kinds)), exists=releases_exist)
    rows = list(DeviceEvent.objects.order_by("pk"))
    for row, age in zip(rows, [1, 1, 200, 3], strict=True):
        DeviceEvent.objects.filter(pk=row.pk).update(received_at=timezone.now() - timedelta(days=age))
    services.thin_history()
    assert list(DeviceEvent.objects.order_by("pk").values_list("pk", flat=True)) == [rows[0].pk, rows[1].pk]


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusing(caller: Caller) -> dict[str, Any]:
    caller.device.refresh_from_db()
    return {key: value for key, value in caller.device.refusal.items() if key != "at"}


def test_a_refusal_stands_until_the_device_says_that_it_accepted_a_view(caller: Caller) -> None:
    caller.post(event("refused", model="", reason="wrong_device", detail={"message": "expected a view of cam-1"}))
    assert refusing(caller) == {"code": "wrong_device", "message": "expected a view of cam-1", "model": ""}
    caller.poll()
    caller.post(event("committed", release()), event("health"))
    assert refusing(caller)["code"] == "wrong_device"
    caller.post(event("accepted", model="", reason="wrong_device"))
    assert refusing(caller) == {}


def test_a_refused_file_stands_until_the_model_is_brought(caller: Caller) -> None:
    target = release("1.1.0")
    caller.post(event("refused", target, reason="hash_mismatch"), event("failed", target, reason="hash_mismatch"))
    assert refusing(caller) == {"code": "hash_mismatch", "message": "", "model": "digits"}
    caller.post(event("accepted", model=""), event("downloading", target))
    assert refusing(caller)["code"] == "hash_mismatch"
    caller.post(event("testing", target))
    assert refusing(caller) == {}


def test_of_several_refusals_the_last_is_shown(caller: Caller) -> None:
    caller.post(event("refused", model="", reason="replayed"), event("refused", model="", reason="expired"))
    assert refusing(caller)["code"] == "expired"


def test_a_refusal_posted_twice_is_not_revived(caller: Caller) -> None:
    told = event("refused", model="", reason="replayed")
    caller.post(told)
    caller.post(event("accepted", model=""))
    caller.post(told)
    assert refusing(caller) == {}


def test_a_device_that_refuses_lags_because_of_it(caller: Caller) -> None:
    running(release("1.1.0"))
    caller.post(event("refused", model="", reason="replayed"))
    (row,) = laggards()
    assert (row.why, row.detail) == ("refused", "refused: replayed")
    Device.objects.update(last_seen=timezone.now() - timedelta(days=1))  # whoever attacks lets no poll through
    (row,) = laggards()
    assert row.why == "refused"
    Device.objects.update(last_seen=timezone.now())
    caller.post(event("accepted", model=""))
    (row,) = laggards()
    assert row.why == "not_polled"
