"""What the host program hears, and what it may put off."""

import logging

import pytest

from device_sdk.protocol.assignment import MAX_HOLD, Assignment
from tests.sdk.world import World, answer, nan_emitting, prove, scaling

OLD, NEW = "detector/1.0.0/default", "detector/2.0.0/default"


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


def heard(**more):
    told = []
    return told, {
        "on_update": lambda *said: told.append(("update", *said)),
        "on_rollback": lambda *said: told.append(("rollback", *said)),
        **more,
    }


def update_to(world, fleet, path, data, **changes):
    world.server.assign(world.server.publish(path, data), **changes)
    fleet.update_once()


def test_program_hears_of_updates_and_roll_backs_once(world):
    told, hooks = heard()
    with world.committed(OLD, scaling(1), **hooks) as fleet:
        assert told == [("update", "detector", "1.0.0/default")]
        update_to(world, fleet, NEW, nan_emitting())
        assert told[1:] == [("update", "detector", "2.0.0/default")]
        prove(fleet)
        assert told[2][:3] == ("rollback", "detector", "2.0.0/default")
        assert "invalid_rate" in told[2][3]
        fleet.update_once()
        assert len(told) == 3
    told.clear()
    with world.open(**hooks) as again:
        again.update_once()
        assert told == []  # it serves what it served


def test_hook_that_raises_breaks_nothing_and_may_ask_the_fleet(world, caplog):
    fleets = []

    def broken(model, release):
        fleets[0].status()
        fleets[0].health()
        assert fleets[0]._worker._installing.acquire(blocking=False)
        fleets[0]._worker._installing.release()
        raise RuntimeError("the program's own")

    world.server.assign(world.server.publish(OLD, scaling(1)))
    with world.open(on_update=broken) as fleet, caplog.at_level(logging.ERROR, "device_sdk"):
        fleets.append(fleet)
        fleet.update_once()
        assert answer(fleet) == 1.0
    assert "the program's own" in caplog.text


def test_health_is_plain_and_says_what_is_wrong(world):
    with world.committed(OLD, scaling(1)) as fleet:
        health = fleet.health()
        assert health["ok"] is True
        assert health["models"]["detector"]["release"] == "1.0.0/default"
        fleet._worker.poller.stopped = "revoked"
        assert fleet.health()["ok"] is False
        fleet._worker.poller.stopped = ""
        fleet._slots["detector"].clear()
        assert fleet.health()["ok"] is False


def test_hold_puts_off_the_activation_and_not_the_download_and_says_why(world):
    with world.committed(OLD, scaling(1)) as fleet:
        with fleet.hold("driving"):
            update_to(world, fleet, NEW, scaling(2))
            status = fleet.status().models["detector"]
            assert (answer(fleet), status.state, status.reason) == (1.0, "waiting", "hold: driving")
            downloads = [call for call in world.server.calls if call.startswith("GET") and "blob" in call]
            events = len(world.server.events)
            for _ in range(3):
                fleet.update_once()
            assert len(world.server.events) == events  # said once
            assert [event.reason for event in world.server.events if event.kind == "waiting"] == ["hold: driving"]
        fleet._worker.install()
        assert answer(fleet) == 2.0
        assert [call for call in world.server.calls if call.startswith("GET") and "blob" in call] == downloads


def test_hold_ends_when_the_assignment_says_so(world):
    with world.committed(OLD, scaling(1)) as fleet, fleet.hold("driving"):
        update_to(world, fleet, NEW, scaling(2), max_hold=600)
        world.time.seconds += 599
        fleet.update_once()
        assert answer(fleet) == 1.0
        world.time.seconds += 2
        fleet.update_once()
        assert answer(fleet) == 2.0


def test_deadline_of_a_hold_does_not_begin_anew_after_a_restart(world):
    world.committed(OLD, scaling(1)).stop()
    for hour in range(3):
        with world.open() as fleet:
            fleet.hold("driving")
            if not hour:
                update_to(world, fleet, NEW, scaling(2), max_hold=2 * 3_600)
            fleet.update_once()
            assert answer(fleet) == (1.0 if hour < 2 else 2.0)
        world.server.simulator.now += 3_600  # the wall: the next process's monotonic clock begins anew, as after a boot


def test_wall_clock_that_was_set_back_does_not_end_or_lengthen_a_hold_without_end(world):
    world.committed(OLD, scaling(1)).stop()
    with world.open() as fleet:
        fleet.hold("driving")
        update_to(world, fleet, NEW, scaling(2), max_hold=600)
        told = fleet._journal.get("detector").held_at
    assert told == world.server.simulator.now
    world.server.simulator.now -= 50_000
    with world.open() as fleet:
        fleet.hold("driving")
        fleet._worker.install()
        assert answer(fleet) == 1.0
        world.time.seconds += 601
        fleet._worker.install()
        assert answer(fleet) == 2.0


def test_hold_is_begun_and_released_by_hand_too(world):
    with world.committed(OLD, scaling(1)) as fleet:
        first, second = fleet.hold("driving"), fleet.hold("parking")
        assert fleet.health()["hold"] == "parking"
        second.release()
        second.release()
        assert fleet.health()["hold"] == "driving"
        update_to(world, fleet, NEW, scaling(2))
        assert answer(fleet) == 1.0
        first.release()
        fleet._worker.install()
        assert (answer(fleet), fleet.health()["hold"]) == (2.0, "")


def test_urgent_release_is_not_put_off(world):
    with world.committed(OLD, scaling(1)) as fleet, fleet.hold("driving"):
        update_to(world, fleet, NEW, scaling(2), urgent=True)
        assert answer(fleet) == 2.0


@pytest.mark.parametrize("seconds", [0, 600, MAX_HOLD])
def test_deadline_of_a_hold_is_signed_only_where_it_is_another_than_usual(seconds):
    assignment = Assignment("m", sha256="a" * 64, max_hold=seconds)
    custom = assignment.to_custom()
    assert ("max_hold" in custom) is (seconds != MAX_HOLD)
    assert Assignment.parse("m", 0, "a" * 64, custom) == assignment
