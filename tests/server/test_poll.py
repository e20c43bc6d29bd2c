from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from device_sdk.protocol.polls import Bundle, Tag, running_digest
from fleet.devices import seen
from fleet.devices.models import Device, RunningSet
from fleet.feedback.services import create_campaign
from fleet.releases.models import Model, Release
from fleet.rollouts import services as rollouts
from fleet.rollouts import snapshots
from fleet.trust.models import DeviceView
from tests.fleet_world import Caller, completed, device, devices, event, refusal, running, running_set
from tests.registry import Registry

pytestmark = pytest.mark.django_db
RUNS = {"digits": "1.0.0/default"}


@pytest.fixture
def published(registry: Registry) -> Release:
    assert registry.publish("1.0.0").status_code == 201
    release = Release.objects.get()
    assert release.state == Release.State.VALID, release.reason
    return release


@pytest.fixture
def caller(registry: Registry, client: Client) -> Caller:
    return Caller(client, device())


def test_a_device_without_a_view_gets_a_bundle_with_all_it_needs(caller: Caller, published: Release) -> None:
    completed(published)
    answer = caller.poll()
    assert answer.status_code == 200
    bundle = Bundle.parse(answer.content)
    version = Tag.parse(answer["ETag"]).view
    assert {
        "1.root.json", "timestamp.json", f"{version}.snapshot.json", f"{version}.director.json",
    } <= bundle.metadata.keys()  # fmt: skip
    assert {"targets", "digits"} <= {name.split(".")[1] for name in bundle.metadata}
    assert list(bundle.manifests.values()) == [published.variants.get().manifest]
    assert f"assign/{caller.device.name}/digits" in bundle.metadata[f"{version}.director.json"]


def test_an_idle_poll_is_answered_304_without_a_body(caller: Caller, published: Release) -> None:
    caller.poll()
    answer = caller.poll()
    assert (answer.status_code, answer.content) == (304, b"")
    assert Tag.parse(answer["ETag"]) == Tag(caller.view, running_digest({}))


def test_a_device_that_holds_a_newer_view_than_a_restored_database_gets_one_above_it(
    caller: Caller, published: Release
) -> None:
    completed(published)
    caller.poll()
    DeviceView.objects.update(version=caller.view - 500)  # the backup is older
    newer = caller.view
    answer = caller.poll()
    assert answer.status_code == 200
    assert newer < caller.view <= newer + 100
    assert caller.poll().status_code == 304


def test_a_version_that_no_honest_server_can_have_signed_moves_nothing(caller: Caller, published: Release) -> None:
    caller.poll()
    honest = caller.view
    caller.view = 2**31
    assert caller.poll().status_code == 200
    assert DeviceView.objects.get().version == honest


def test_every_answer_carries_the_interval(caller: Caller, settings: Any) -> None:
    settings.POLL_INTERVAL = 42.5
    assert [caller.poll()["Fleet-Poll-Interval"] for _ in range(2)] == ["42.5", "42.5"]


def test_a_change_of_the_policy_shows_in_the_next_poll(caller: Caller, published: Release) -> None:
    caller.poll()
    rollout = running(published)
    first = caller.poll()
    assert (first.status_code, len(Bundle.parse(first.content).manifests)) == (200, 1)
    rollouts.pause(rollout=rollout, actor="ann")
    second = caller.poll()
    assert (second.status_code, Bundle.parse(second.content).manifests) == (200, {})


def test_two_devices_get_views_of_their_own(registry: Registry, client: Client) -> None:
    one, two = (Caller(client, entry) for entry in devices(2))
    directors = [
        next(v for k, v in Bundle.parse(c.poll().content).metadata.items() if "director" in k) for c in (one, two)
    ]
    assert "assign/cam-0/" in directors[0]
    assert "assign/cam-0/" not in directors[1]


def test_an_idle_poll_writes_nothing_and_asks_little(
    caller: Caller, published: Release, django_assert_max_num_queries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MAX_AGE", 3600)
    completed(published)
    Device.objects.update(runs=running_set(RUNS), last_seen=None)
    caller.runs = RUNS
    caller.poll()
    with (
        CaptureQueriesContext(
            connection,
        ) as captured,
        django_assert_max_num_queries(7),
    ):
        assert caller.poll().status_code == 304
    assert all(query["sql"].lstrip().upper().startswith("SELECT") for query in captured)
    assert Device.objects.get().last_seen is None


def test_the_number_of_queries_does_not_grow_with_rollouts_and_devices(
    caller: Caller, published: Release, django_assert_num_queries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MAX_AGE", 3600)
    running(published)
    caller.poll()
    with CaptureQueriesContext(connection) as captured:
        caller.poll()
    before = len(captured)
    for _ in range(5):
        running(published)
    for number in range(10):
        device(f"other-{number}", runs=RUNS)
    caller.poll()
    with django_assert_num_queries(before):
        assert caller.poll().status_code == 304


def test_a_poll_doubles_as_the_version_report(caller: Caller, published: Release) -> None:
    known = running_set(RUNS)
    caller.runs = RUNS
    answer = caller.poll()
    assert "Fleet-Want" not in answer
    assert seen.flush_seen() == 1
    caller.device.refresh_from_db()
    assert caller.device.runs == known
    assert caller.device.last_seen is not None


def test_a_running_set_that_nobody_described_is_asked_for(caller: Caller, published: Release) -> None:
    caller.runs = RUNS
    assert caller.poll()["Fleet-Want"] == "runs"
    seen.flush_seen()
    assert not RunningSet.objects.exists()
    assert caller.post().status_code == 200
    assert "Fleet-Want" not in caller.poll()
    caller.device.refresh_from_db()
    assert caller.device.runs is not None
    assert caller.device.runs.runs == RUNS


def test_what_a_device_says_it_runs_decides_at_once_whether_it_is_recalled(caller: Caller, published: Release) -> None:
    """The server may not have written it down yet."""
    rollouts.pause(rollout=running(published), actor="ann")
    running_set(RUNS)
    caller.runs = RUNS
    assert Bundle.parse(caller.poll().content).manifests


def test_a_failure_takes_the_release_away_from_the_device_with_the_next_poll(
    caller: Caller, published: Release
) -> None:
    rollout = running(published)
    caller.poll()
    caller.post(event("failed", published, rollout=rollout))
    assert Bundle.parse(caller.poll().content).manifests == {}


def test_a_campaign_is_signed_into_the_view(caller: Caller, registry: Registry) -> None:
    caller.poll()
    expires = timezone.now() + timezone.timedelta(days=1)  # type: ignore[attr-defined]
    create_campaign(name="night", model=Model.objects.get(), expires_at=expires)
    answer = caller.poll()
    assert answer.status_code == 200
    assert '"night"' in next(v for k, v in Bundle.parse(answer.content).metadata.items() if "director" in k)


def test_a_device_that_knows_the_newest_root_is_not_sent_it_again(caller: Caller) -> None:
    answer = caller.poll(query="?root=1")
    assert "1.root.json" not in Bundle.parse(answer.content).metadata


@pytest.mark.parametrize("tag", ["*", '"1"', "nonsense", '"1-x"', '"1-0000000000000000", "2-0000000000000000"'])
def test_a_malformed_tag_is_refused(caller: Caller, tag: str) -> None:
    assert refusal(caller.poll(tag=tag)) == (400, "malformed_tag")


@pytest.mark.parametrize("root", ["-1", "x", "1.5", "", "9" * 30, "%D9%A1"])
def test_a_malformed_root_version_is_refused(caller: Caller, root: str) -> None:
    assert refusal(caller.poll(query=f"?root={root}")) == (400, "malformed")


def test_a_poll_without_a_tag_is_a_first_poll(caller: Caller) -> None:
    answer = caller.client.get("/api/device/v1/poll", headers=caller.headers())
    assert answer.status_code == 200
    assert Tag.parse(answer["ETag"]).runs == running_digest({})


def test_without_a_trust_root_the_server_says_so(db: None, own_folder: Any, client: Client) -> None:
    assert refusal(Caller(client, device()).poll()) == (503, "no_trust_root")


def test_a_revoked_device_gets_no_view(caller: Caller) -> None:
    Device.objects.update(state=Device.State.REVOKED)
    assert refusal(caller.poll()) == (401, "unauthorized")
    assert not DeviceView.objects.exists()


def test_posting_to_the_poll_is_refused(client: Client) -> None:
    assert refusal(client.post("/api/device/v1/poll")) == (405, "method_not_allowed")
