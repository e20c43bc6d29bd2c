"""How the background behaves towards the server, and towards errors that nobody foresaw."""

import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from device_sdk.errors import TransferError, UnauthorizedError, UntrustedError
from device_sdk.install import Clock
from device_sdk.loop import Loop
from device_sdk.protocol.assignment import Sampling
from device_sdk.protocol.polls import EVENTS, POLL, running_digest
from tests.sdk.world import Server, World, X, answer, nan_emitting, scaling
from tests.simulator import DAY, Simulator


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


@pytest.fixture
def fleet(world):
    world.server.assign(world.server.publish("detector/1.0.0/default", scaling(2)))
    with world.open() as fleet:
        yield fleet


def polls(world):
    return [call for call in world.server.calls if call == f"GET {POLL}"]


def eventually(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        threading.Event().wait(0.01)


def test_unchanged_view_is_answered_304_and_nothing_is_posted(world, fleet):
    poller = fleet._worker.poller
    poller.poll()
    posts = len(world.server.posts)
    poller.poll()
    assert world.server.tags[-1].view == world.server.simulator.version
    assert len(world.server.posts) == posts
    assert poller.state().failures == 0


def test_tag_reports_what_runs(world, fleet):
    fleet.update_once()
    fleet._worker.poller.poll()
    assert world.server.tags[0].runs == running_digest({})
    assert world.server.tags[-1].runs == running_digest({"detector": "1.0.0/default"})


def test_server_that_does_not_know_the_running_set_is_told(world, fleet):
    fleet.update_once()
    posts = len(world.server.posts)
    world.server.want_runs = True
    fleet._worker.poller.poll()
    assert len(world.server.posts) == posts + 1
    assert world.server.posts[-1].runs == {"detector": "1.0.0/default"}


def test_server_sets_the_interval_and_the_device_adds_its_own_jitter(world, fleet):
    world.server.interval = "300"
    delay = fleet._worker.poller.step()
    assert 270 <= delay <= 330
    assert fleet._worker.poller.step() == delay


@pytest.mark.parametrize("interval", ["", "soon", "-5", "0", "1e99", "nan"])
def test_senseless_interval_neither_stops_polling_nor_spins(world, fleet, interval):
    world.server.interval = interval
    delay = fleet._worker.poller.step()
    assert 0.9 <= delay <= 86_400 * 1.1


def test_401_pauses_polling_loudly_and_inference_goes_on(world, fleet, caplog):
    fleet.update_once()
    world.server.faults[POLL] = [UnauthorizedError("revoked", status=401) for _ in range(2)]
    with caplog.at_level(logging.CRITICAL, "device_sdk"):
        delay = fleet._worker._poll_step()
    assert 3_600 <= delay <= 4_500
    assert "asks again in an hour" in caplog.text
    assert fleet.status().poll.stopped == "unauthorized"
    seen = len(polls(world))
    world.time.seconds += 3_000
    assert fleet._worker._poll_step() < 1_500
    assert len(polls(world)) == seen
    assert answer(fleet) == 2.0
    world.time.seconds += 1_500
    assert 3_600 <= fleet._worker._poll_step() <= 4_500  # turned away again
    assert len(polls(world)) == seen + 1
    assert caplog.text.count("asks again in an hour") == 1


def test_device_that_a_forged_401_silenced_is_back_within_two_hours(world, fleet):
    world.server.faults[POLL] = [UnauthorizedError("says who?", status=401)]
    fleet._worker._poll_step()
    assert fleet.status().poll.stopped == "unauthorized"
    world.time.seconds += 4_501
    assert fleet._worker._poll_step() <= 60 * 1.1
    assert fleet.status().poll.stopped == ""
    fleet._worker.install()
    assert answer(fleet) == 2.0


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_left_alone_for_longer_each_time(world, fleet, status):
    world.server.faults[POLL] = [TransferError("busy", status=status) for _ in range(4)]
    delays = [fleet._worker.poller.step() for _ in range(4)]
    assert delays[0] >= 60
    assert delays[1] == 2 * delays[0]
    assert delays[3] == 8 * delays[0]
    assert fleet._worker.poller.step() < delays[0] * 1.2
    assert fleet._worker.poller.failures == 0


def test_retry_after_is_honoured(world, fleet):
    world.server.faults[POLL] = [TransferError("busy", status=429, retry_after=1_800.0)]
    assert 1_800 <= fleet._worker.poller.step() <= 1_800 * 1.25


def test_silence_is_tried_again_soon_and_then_ever_more_rarely(world, fleet):
    world.server.faults[POLL] = [TransferError("no route") for _ in range(30)]
    delays = [fleet._worker.poller.step() for _ in range(30)]
    assert delays[0] < 5
    assert delays == sorted(delays)
    assert 3_600 <= delays[-1] <= 4_500


def test_device_that_waits_for_approval_polls_on_at_the_interval(world, fleet):
    world.server.faults[POLL] = [TransferError("pending", status=403, code="device_pending") for _ in range(3)]
    delays = {fleet._worker.poller.step() for _ in range(3)}
    assert len(delays) == 1
    assert fleet.status().poll.error.startswith("device_pending")


def test_events_wait_for_the_network_and_are_sent_once_it_is_back(world, fleet):
    world.server.faults[EVENTS] = [TransferError("reset")]
    with pytest.raises(TransferError):
        fleet.update_once()
    assert world.server.posts == []
    fleet.update_once()
    assert world.server.kinds()[-1] == "probation"
    assert len(fleet._outbox) == 0


def test_lost_acknowledgement_sends_the_same_ids_again(world, fleet):
    answer_events = world.server._events

    def lost(content):
        answer_events(content)
        world.server._events = answer_events
        raise TransferError("the answer got lost")

    world.server._events = lost
    with pytest.raises(TransferError):
        fleet.update_once()
    fleet.update_once()
    first, second = world.server.posts[:2]
    assert {event.id for event in first.events} <= {event.id for event in second.events}


def test_post_that_the_server_never_takes_is_dropped_and_the_count_is_sent(world, fleet):
    world.server.faults[EVENTS] = [TransferError("malformed", status=400, code="malformed")]
    with pytest.raises(TransferError):
        fleet.update_once()
    fleet.update_once()
    assert world.server.posts[-1].dropped > 0


def test_campaign_of_the_view_switches_sampling_on_and_off(world, fleet):
    fleet.update_once()
    model = fleet.model("detector")
    model.run(X)
    assert fleet.status().samples_waiting == {"detector": 0}
    manifest_assignment = world.server.simulator.assigned["detector"]
    sampling = Sampling(campaign="c", rate=1.0, max_samples=10, expires=2**33)
    world.server.simulator.assigned["detector"] = replace(manifest_assignment, sampling=sampling)
    world.server.renew()
    fleet.update_once()
    for _ in range(3):
        model.run(X)
    assert fleet.upload_now().samples == 3
    assert next(iter(world.server.batches.values()))["campaign"] == "c"
    world.server.simulator.assigned["detector"] = manifest_assignment
    world.server.renew()
    fleet.update_once()
    model.run(X)
    assert fleet.upload_now().samples == 0


def test_health_is_told_as_sums_since_the_release_was_loaded(world, fleet):
    fleet.update_once()
    model = fleet.model("detector")
    told = []
    for calls in (3, 5, 0):
        for _ in range(calls):
            model.run(X)
        fleet._worker._tell_health()
        fleet._worker.poller.report()
        told.append([event.detail["calls"] for event in world.server.events if event.kind == "health"])
    assert told == [[3], [3, 8], [3, 8]]
    details = [event.detail for event in world.server.events if event.kind == "health"]
    assert {detail["load"] for detail in details} == {fleet._slots["detector"].current.load}
    assert {"calls", "errors", "checked", "invalid", "rejected", "p50_us", "p95_us", "seconds"} <= details[-1].keys()


def test_background_threads_do_it_all(world):
    world.server.interval = "1"
    world.server.assign(world.server.publish("detector/1.0.0/default", scaling(2)))
    with world.open(clock=_real(world), poll_seconds=0.05) as fleet:
        model = fleet.model("detector")
        fleet.start()
        assert model.wait(20)
        for _ in range(6):
            model.run(X)
        eventually(lambda: world.server.kinds()[-1:] == ["committed"])
        world.server.assign(world.server.publish("detector/1.1.0/default", nan_emitting()))
        eventually(lambda: model.release.version == "1.1.0")
        for _ in range(6):
            model.run(X)
        eventually(lambda: world.server.kinds()[-1:] == ["rolled_back"])
        assert float(model.run({"x": np.ones((1, 4), np.float32)})["y"][0, 0]) == 2.0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fleet-")]


def test_loop_goes_on_after_an_unexpected_error(caplog, monkeypatch):
    monkeypatch.setattr("device_sdk.worker.backoff", lambda *_, **__: 0.0)
    done, calls = threading.Event(), []

    def step():
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("nobody foresaw this")
        done.set()

    loop = Loop("fleet-test", step)
    with caplog.at_level(logging.ERROR, "device_sdk"):
        loop.start()
        assert done.wait(10)
        loop.stop()
    assert caplog.text.count("unexpected error in fleet-test") == 2


def test_stopping_cuts_a_long_wait_short():
    entered = threading.Event()

    def step():
        entered.set()
        return 3_600.0

    loop = Loop("fleet-test", step)
    loop.start()
    entered.wait(10)
    began = time.monotonic()
    loop.stop()
    assert time.monotonic() - began < 5


def test_one_model_that_fails_unexpectedly_does_not_hold_up_the_others(tmp_path, monkeypatch):
    world = World(tmp_path / "device", Server(Simulator(models=("broken", "detector"))))
    world.server.assign(world.server.publish("detector/1.0.0/default", scaling(2)))
    world.server.simulator.list_release(world.server.publish("broken/1.0.0/default", scaling(1)))
    with world.open() as fleet:

        def fails():
            raise RuntimeError("nobody foresaw this")

        monkeypatch.setattr(fleet._installers["broken"], "pursue", fails)
        fleet.update_once()
        assert answer(fleet) == 2.0


def test_model_with_an_expired_role_is_told_once_and_serves_on_while_the_other_updates(tmp_path):
    world = World(tmp_path / "device", Server(Simulator(models=("detector", "digits"))))
    server, simulator = world.server, world.server.simulator
    server.assign(server.publish("detector/1.0.0/default", scaling(2)))
    server.assign(server.publish("digits/1.0.0/default", scaling(3)))
    with world.open() as fleet:
        fleet.update_once()
        assert answer(fleet) == 2.0
        simulator.now += 100 * 86_400
        server.assign(server.publish("digits/1.1.0/default", scaling(4)))
        simulator.now += 81 * 86_400  # the detector's role has run out; CI of digits has renewed its own
        for _ in range(3):
            fleet.update_once()
            server.renew()
        x = {"x": np.ones((1, 4), np.float32)}
        assert (answer(fleet), float(fleet.model("digits").run(x)["y"][0, 0])) == (2.0, 4.0)
        told = [(event.model, event.reason) for event in server.events if event.kind == "refused"]
        assert told == [("detector", "expired")]
        assert fleet._worker.poller.state().failures == 0


def _real(world):
    return Clock(now=lambda: float(world.server.simulator.now))


def forge(world):
    """The server answers every poll by another device's view."""
    world.server.current = world.server.simulator.copy().bundle(device="cam-2")
    world.server.simulator.version += 1  # so that it is not answered 304


def told(world, *kinds):
    return [(event.kind, event.reason) for event in world.server.events if event.kind in kinds]


def test_refusal_reaches_the_server_while_the_attack_lasts(world, fleet):
    fleet.update_once()
    forge(world)
    for _ in range(3):
        assert fleet._worker.poller.step() is not None
    assert told(world, "refused", "accepted") == [("refused", "wrong_device")]
    assert fleet._worker.poller.failures == 3


def test_refusal_is_kept_while_events_cannot_be_posted(world, fleet):
    fleet.update_once()
    forge(world)
    world.server.faults[EVENTS] = [TransferError("held back") for _ in range(3)]
    for _ in range(3):
        fleet._worker.poller.step()
    assert told(world, "refused") == []
    fleet._worker.poller.step()
    assert told(world, "refused") == [("refused", "wrong_device")]


def test_signed_view_ends_a_refusal_and_the_server_is_told_once(world, fleet):
    fleet.update_once()
    forge(world)
    fleet._worker.poller.step()
    world.server.renew()
    fleet.update_once()
    fleet.update_once()
    assert told(world, "refused", "accepted") == [("refused", "wrong_device"), ("accepted", "wrong_device")]
    assert fleet._worker.poller.failures == 0


def test_refusing_device_asks_for_the_whole_view_since_304_proves_nothing(world, fleet):
    fleet.update_once()
    fleet._worker.poller.poll()
    forge(world)
    fleet._worker.poller.step()
    assert world.server.tags[-1].view > 0
    fleet._worker.poller.step()
    assert world.server.tags[-1].view == 0
    world.server.renew()
    fleet.update_once()
    fleet._worker.poller.poll()
    assert world.server.tags[-1].view == world.server.simulator.version


def test_end_of_a_refusal_is_told_by_the_next_process_too(world, fleet):
    fleet.update_once()
    forge(world)
    fleet._worker.poller.step()
    fleet.stop()
    with world.open() as again:
        world.server.renew()
        again.update_once()
        assert told(world, "accepted") == [("accepted", "wrong_device")]


def test_each_reason_is_told_once_an_hour_also_when_attacks_take_turns(world, fleet):
    fleet.update_once()
    mallory = world.server.simulator.copy().bundle(timestamp_key="mallory")
    for _ in range(4):
        forge(world)
        fleet._worker.poller.step()
        world.server.current = mallory
        fleet._worker.poller.step()
    assert told(world, "refused") == [("refused", "wrong_device"), ("refused", "bad_signature")]
    world.time.seconds += 3_601
    fleet._worker.poller.step()
    assert told(world, "refused")[2:] == [("refused", "bad_signature")]


@pytest.mark.parametrize("fault", [TransferError("silence"), TransferError("busy", status=503)])
def test_view_that_expires_is_reported_stale_however_polls_fail(world, fleet, fault):
    fleet.update_once()
    world.server.simulator.now += 25 * 3_600
    world.server.faults[POLL] = [fault]
    fleet._worker.poller.step()
    assert told(world, "refused") == [("refused", "stale")]


def test_view_that_expires_between_two_polls_is_reported_stale(world, fleet):
    """The attacker may have set the interval to a day."""
    fleet.update_once()
    fleet._worker._next_poll = fleet._worker._next_health = world.time.seconds + 86_400
    world.server.simulator.now += 25 * 3_600
    fleet._worker._poll_step()
    fleet._worker._poll_step()
    assert told(world, "refused") == [("refused", "stale")]


def test_events_turned_elsewhere_are_kept_and_no_unexpected_error(world, fleet, caplog):
    fleet.update_once()
    fleet._worker._next_poll = fleet._worker._next_health = world.time.seconds + 86_400
    fleet._journal.note("waiting", fleet._journal.get("detector"))
    world.server.faults[EVENTS] = [UntrustedError("not a pinned host", code="redirect")]
    with caplog.at_level(logging.INFO, "device_sdk"):
        fleet._worker._poll_step()
    assert "events wait" in caplog.text
    assert len(fleet._outbox) == 1


def test_a_model_that_alone_is_refused_is_told_when_it_begins_and_when_it_is_over(tmp_path):
    server = Server(Simulator(models=("detector", "digits")))
    sim = server.simulator
    world = World(tmp_path / "device", server)
    for model in ("detector", "digits"):
        server.assign(server.publish(f"{model}/1.0.0/default", scaling(2)))
    with world.open() as fleet:
        fleet.update_once()
        sim.now += 100 * DAY
        sim.sign_targets()
        server.assign(server.publish("digits/1.1.0/default", scaling(3)))
        sim.now += 81 * DAY  # the detector's CI has not renewed its role
        fleet.update_once()
        server.renew()
        fleet.update_once()
    server.publish("detector/1.1.0/default", scaling(4))  # its role is signed anew
    server.renew()
    with world.open() as fleet:
        fleet.update_once()
    said = [(event.kind, event.reason) for event in server.events if event.model == "detector"]
    assert [each for each in said if each[0] in {"refused", "accepted"}] == [
        ("refused", "expired"),
        ("accepted", "expired"),
    ]
