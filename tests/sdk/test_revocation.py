"""What a device does when CI takes back the release that it runs, tries, or would fall back to."""

import pytest

from device_sdk.errors import ModelStoppedError, NoModelError
from device_sdk.protocol.assignment import Window
from tests.sdk.world import World, X, answer, judge, nan_emitting, prove, scaling

OLD, NEW, NEXT = (f"detector/{version}/default" for version in ("1.0.0", "1.1.0", "1.2.0"))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


def updated(world):
    """A device that committed 1.0.0, then 1.1.0; the manifests of both."""
    old = world.server.publish(OLD, scaling(1))
    world.server.assign(old)
    fleet = world.open()
    fleet.update_once()
    prove(fleet)
    new = world.server.publish(NEW, scaling(2))
    world.server.assign(new)
    fleet.update_once()
    prove(fleet)
    assert answer(fleet) == 2.0
    return fleet, old, new


def revoke(world, path, assign=None, **changes):
    world.server.simulator.withdraw(path)
    world.server.assign(assign, **changes)


def test_the_active_release_is_left_for_an_older_one_in_one_update_without_a_download(world):
    fleet, old, _ = updated(world)
    with fleet:
        revoke(world, NEW, old)
        world.server.calls.clear()
        fleet.update_once()
        assert answer(fleet) == 1.0
        assert not [call for call in world.server.calls if "blobs" in call]
        prove(fleet)
        assert fleet.status().models["detector"].state == "committed"
    with world.open() as again:
        assert answer(again) == 1.0


def test_nothing_is_marked_bad_by_a_revocation(world):
    fleet, old, _ = updated(world)
    with fleet:
        revoke(world, NEW, old)
        fleet.update_once()
        prove(fleet)
    assert list((world.path / "store" / "manifests").glob("*.bad")) == []
    assert not {"failed", "rolled_back"} & set(world.server.kinds())


def test_without_a_release_to_go_to_the_last_one_is_kept_by_default(world):
    fleet, _, _ = updated(world)
    with fleet:
        revoke(world, NEW)
        fleet.update_once()
        assert answer(fleet) == 2.0
    with world.open() as again:
        assert answer(again) == 2.0


def test_a_model_is_stopped_where_that_is_the_policy_and_says_why(world):
    fleet, _, _ = updated(world)
    with fleet:
        revoke(world, NEW, stop=True)
        fleet.update_once()
        with pytest.raises(ModelStoppedError) as caught:
            fleet.model("detector").run(X)
        assert (caught.value.code, isinstance(caught.value, NoModelError)) == ("stopped", True)
        with pytest.raises(ModelStoppedError):
            fleet.model("detector").run_on(X)
        status = fleet.status().models["detector"]
        assert (status.state, status.reason, status.release) == ("stopped", "nothing_may_run", "")
        fleet.update_once()
        assert fleet.model("detector").wait(0) is False
    stops = [event for event in world.server.events if event.kind == "stopped"]
    assert [(str(event.release), event.reason) for event in stops] == [(NEW, "nothing_may_run")]
    assert world.server.posts[-1].runs == {}


@pytest.mark.parametrize("read_only", [True, False])
def test_a_stopped_model_stays_stopped_when_the_process_starts_again_without_a_network(world, read_only):
    fleet, _, _ = updated(world)
    with fleet:
        revoke(world, NEW, stop=True)
        fleet.update_once()
    with world.open(read_only=read_only) as again, pytest.raises(ModelStoppedError):
        again.model("detector").run(X)


def test_a_stopped_model_serves_again_with_the_next_release(world):
    fleet, _, _ = updated(world)
    with fleet:
        revoke(world, NEW, stop=True)
        fleet.update_once()
        world.server.assign(world.server.publish(NEXT, scaling(3)), stop=True)
        fleet.update_once()
        assert answer(fleet) == 3.0
        prove(fleet)
        assert fleet.status().models["detector"].state == "committed"


def test_a_stopped_model_serves_again_when_its_release_may_run_after_all(world):
    """Nothing was assigned, though nothing was revoked: a rollout was cancelled, and another started."""
    fleet, _, new = updated(world)
    with fleet:
        world.server.assign(None, stop=True)
        fleet.update_once()
        world.server.assign(new, stop=True)
        fleet.update_once()
        assert answer(fleet) == 2.0


def test_a_device_that_never_had_a_release_is_not_stopped(world):
    world.server.assign(None, stop=True)
    with world.open() as fleet:
        fleet.update_once()
        with pytest.raises(NoModelError):
            fleet.model("detector").run(X)
    assert world.server.kinds() == []


@pytest.mark.parametrize("stop", [False, True])
def test_a_trial_that_is_revoked_is_left_for_what_was_active(world, stop):
    """With `stop` too: there is something that may run."""
    fleet = world.committed(OLD, scaling(1))
    with fleet:
        old = world.server.simulator.assigned["detector"]
        world.server.assign(world.server.publish(NEW, scaling(2)))
        fleet.update_once()
        assert answer(fleet) == 2.0
        world.server.simulator.withdraw(NEW)
        world.server.simulator.assigned["detector"] = old
        world.server.renew()
        fleet.update_once()
        assert answer(fleet) == 1.0
        assert fleet.status().models["detector"].state == "committed"
    assert list((world.path / "store" / "manifests").glob("*.bad")) == []


def test_a_revoked_trial_is_left_though_nothing_is_assigned(world):
    with world.committed(OLD, scaling(1)) as fleet:
        world.server.assign(world.server.publish(NEW, scaling(2)))
        fleet.update_once()
        revoke(world, NEW)
        fleet.update_once()
        assert answer(fleet) == 1.0
        assert fleet.status().models["detector"].state == "withdrawn"


def test_a_trial_that_ci_still_lists_goes_on_when_nothing_is_assigned(world):
    with world.committed(OLD, scaling(1)) as fleet:
        world.server.assign(world.server.publish(NEW, scaling(2)))
        fleet.update_once()
        world.server.assign(None)
        fleet.update_once()
        prove(fleet)
        assert fleet.status().models["detector"].state == "committed"
        assert answer(fleet) == 2.0


def test_a_trial_is_stopped_with_its_model(world):
    with world.committed(OLD, scaling(1)) as fleet:
        world.server.assign(world.server.publish(NEW, scaling(2)))
        fleet.update_once()
        world.server.simulator.withdraw(OLD)
        revoke(world, NEW, stop=True)
        fleet.update_once()
        with pytest.raises(ModelStoppedError):
            fleet.model("detector").run(X)
    assert world.server.kinds()[-2:] == ["withdrawn", "stopped"]


def failing_successor(world, **changes):
    """1.1.0 was active and is revoked; 1.2.0 in its place fails its probation."""
    fleet, _, _ = updated(world)
    world.server.simulator.withdraw(OLD)
    revoke(world, NEW, world.server.publish(NEXT, nan_emitting()), **changes)
    fleet.update_once()
    prove(fleet)
    return fleet


def test_a_device_does_not_roll_back_to_a_revoked_release(world):
    with failing_successor(world) as fleet:
        assert str(fleet.model("detector").release) == NEXT
        assert fleet.status().models["detector"].state == "rolled_back"
        assert world.server.kinds()[-1] == "rolled_back"
    with world.open() as again, pytest.raises(NoModelError):
        again.model("detector").run(X)


def test_a_failed_successor_of_a_revoked_release_is_stopped_where_that_is_the_policy(world):
    with failing_successor(world, stop=True) as fleet:
        judge(fleet)
        with pytest.raises(ModelStoppedError):
            fleet.model("detector").run(X)
    assert world.server.kinds()[-2:] == ["rolled_back", "stopped"]


def test_a_roll_back_passes_over_a_revoked_release_to_a_listed_one(world):
    fleet, _, _ = updated(world)
    with fleet:
        revoke(world, NEW, world.server.publish(NEXT, nan_emitting()))
        fleet.update_once()
        prove(fleet)
        assert answer(fleet) == 1.0


def test_a_crash_loop_does_not_bring_a_revoked_release_back(world):
    fleet, _, _ = updated(world)
    world.server.simulator.withdraw(OLD)
    revoke(world, NEW, world.server.publish(NEXT, scaling(3)))
    fleet.update_once()
    for _ in range(3):  # the process is killed: nothing is closed
        fleet._lock.release()
        fleet._lock = None
        fleet = world.open()
        fleet._restore_all()
    with pytest.raises(NoModelError):
        fleet.model("detector").run(X)
    fleet.stop()


def test_a_device_that_is_offline_goes_on_with_what_was_revoked_meanwhile(world):
    fleet, _, _ = updated(world)
    fleet.stop()
    world.server.simulator.withdraw(NEW)
    with world.open() as again:
        assert answer(again) == 2.0


def test_a_revoked_release_is_left_at_once_whatever_the_window_of_its_successor(world):
    fleet, old, _ = updated(world)
    with fleet:
        world.time.second_of_day = 12 * 3600.0
        revoke(world, NEW, old, window=Window(60, 120))
        fleet.update_once()
        assert answer(fleet) == 1.0


def test_a_model_whose_only_way_out_is_known_bad_is_stopped_where_that_is_the_policy(world):
    bad = world.server.publish(OLD, nan_emitting())
    with world.committed(NEW, scaling(2)) as fleet:
        world.server.assign(bad)
        fleet.update_once()
        prove(fleet)
        assert answer(fleet) == 2.0
        revoke(world, NEW, bad, stop=True)
        fleet.update_once()
        with pytest.raises(ModelStoppedError):
            fleet.model("detector").run(X)
        fleet.update_once()
    assert world.server.kinds().count("stopped") == 1


def test_an_expired_role_is_no_refusal_where_nothing_is_assigned(world):
    """Expiry stops updates, never inference."""
    with world.committed(OLD, scaling(1)) as fleet:
        world.server.assign(None)
        world.server.simulator.now += 200 * 86_400
        world.server.simulator.sign_targets()
        fleet.update_once()
        assert answer(fleet) == 1.0


def test_a_trial_that_is_taken_back_does_not_give_way_to_what_was_revoked(world):
    fleet, _, _ = updated(world)
    with fleet:
        world.server.simulator.withdraw(OLD)
        revoke(world, NEW, world.server.publish(NEXT, scaling(3)))
        fleet.update_once()
        last = world.server.publish("detector/1.3.0/default", scaling(4))
        world.server.assign(last, window=Window(60, 120))
        fleet.update_once()
        assert answer(fleet) == 3.0
    with world.open() as fleet:
        assert answer(fleet) == 3.0
        world.time.second_of_day = 90 * 60.0
        judge(fleet)
        assert answer(fleet) == 4.0
