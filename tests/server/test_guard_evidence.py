"""Evidence through the devices' door into the engine: who is compared, what halts, what holds, what begins anew."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.models import Count
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from device_sdk.protocol import events
from fleet.devices.models import Device
from fleet.rollouts import evidence, services, tasks
from fleet.rollouts.models import Finding, GuardReading, Outcome, Rollout, RolloutAction, Watch
from tests.fleet_world import event, group
from tests.server.guard_world import GUARDS, HALVES, NEW_LOAD, OLD_LOAD, GuardedFleet, numbers

pytestmark = pytest.mark.django_db
State = Rollout.State


# --- the verdict --------------------------------------------------------------------------------------------------


def test_a_regression_of_20_percent_halts_by_the_guard_and_says_why(client: Client) -> None:
    fleet = GuardedFleet(client).live(errors=20)
    rollout = fleet.tick()
    assert rollout.state == State.HALTED
    assert rollout.reason.startswith(f"inference errors: 20 % on {len(fleet.exposed)} exposed devices against 1 % on ")
    halt = RolloutAction.objects.get(rollout=rollout, action=services.HALT)
    assert (halt.actor, halt.comment) == (services.GUARD, rollout.reason)


def test_a_healthy_rollout_passes_its_stages_under_its_guards(client: Client) -> None:
    fleet = GuardedFleet(client).live()
    assert (fleet.tick().state, fleet.rollout.stage_index) == (State.RUNNING, 1)
    for caller in fleet.others:
        fleet.updates(caller)
    assert fleet.tick().state == State.COMPLETED


@pytest.mark.parametrize(
    ("on_failure", "state"), [("hold", State.RUNNING), ("pause", State.PAUSED), ("roll_back", State.HALTED)]
)
def test_a_tripped_guard_does_what_the_rollout_says(client: Client, on_failure: str, state: str) -> None:
    fleet = GuardedFleet(client, on_failure=on_failure).live(errors=50)
    assert (fleet.tick().state, fleet.rollout.stage_index) == (state, 0)
    assert fleet.rollout.reason.startswith("inference errors")
    assert fleet.tick().state == state, "and goes on to"


def test_evidence_that_halted_once_holds_on_though_later_devices_are_well(client: Client) -> None:
    fleet = GuardedFleet(client, 12, on_failure="hold")
    half = len(fleet.exposed) // 2 + 1
    fleet.live(errors=50, exposed=fleet.exposed[:half])
    assert fleet.tick().reason.startswith("inference errors")
    reading = GuardReading.objects.get(rollout=fleet.rollout)
    GuardReading.objects.update(peak=reading.peak, evidence=0)
    for caller in fleet.exposed[half:]:
        fleet.updates(caller)
    assert fleet.tick().reason.startswith("inference errors")
    assert GuardReading.objects.get(rollout=fleet.rollout).peak >= reading.peak


def test_a_plain_limit_halts_without_any_unexposed_device(client: Client) -> None:
    terms = {"errors": {"test": False, "limit": 0.03}, "limit_devices": 3}
    fleet = GuardedFleet(client, guards=terms)
    for caller in fleet.exposed:
        fleet.updates(caller, errors=4)
    assert fleet.tick().state == State.HALTED
    assert "above the limit of 3 %" in fleet.rollout.reason


def test_failing_updates_halt_by_evidence_within_a_generous_failure_budget(client: Client) -> None:
    stages = [services.StagePlan(percent=100, failure_budget=1_000)]
    fleet = GuardedFleet(client, guards={"failures": {}, "false_alarm": 0.01}, stages=stages)
    for caller in fleet.exposed[:4]:
        began = event(events.DOWNLOADING, fleet.new, rollout=fleet.rollout)
        fleet.say(caller, began, event(events.ROLLED_BACK, fleet.new, rollout=fleet.rollout, reason="errors"))
    assert fleet.tick().state == State.HALTED
    assert fleet.rollout.reason.startswith("update failures: 100 % of 4 devices that began, tolerated 2 %")


# --- traps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guards", "state", "stage"), [(GUARDS, State.HALTED, 0), (None, State.RUNNING, 1)])
def test_trap_1_a_stage_whose_devices_all_committed_passes_only_without_the_guard(
    client: Client, guards: Any, state: str, stage: int
) -> None:
    fleet = GuardedFleet(client, guards=guards).live(errors=20)
    assert set(Outcome.objects.values_list("state", flat=True)) == {"committed"}
    assert (fleet.tick().state, fleet.rollout.stage_index) == (state, stage)


def test_trap_3_devices_that_commit_and_fall_silent_are_no_evidence_and_hold(client: Client) -> None:
    fleet = GuardedFleet(client, guards={**GUARDS, "devices": 3})
    for caller in fleet.exposed:
        fleet.commits(caller)
    for caller in fleet.exposed[:2]:
        fleet.health(caller, fleet.new, numbers(NEW_LOAD, 100))
    for _ in range(3):
        assert (fleet.tick().state, fleet.rollout.stage_index) == (State.RUNNING, 0)
    assert fleet.rollout.reason == "guard waits for evidence: inference errors compared on 2 of 3 devices"


MALFORMED: list[Any] = [
    {"errors": {"effect": "much"}}, {"errors": {"effect": -1}}, {"errors": None}, {"mood": {}}, [1], "errors",
    {"errors": {}, "false_alarm": 0}, {"errors": {}, "devices": "all"}, {"errors": {"test": False}}, {"false_alarm": 2},
]  # fmt: skip


def test_trap_7_guards_that_cannot_be_read_hold_and_never_advance(client: Client) -> None:
    fleet = GuardedFleet(client, 4, stages=[HALVES[1]])
    for caller in fleet.exposed:
        fleet.updates(caller)
    for malformed in MALFORMED:
        Rollout.objects.filter(pk=fleet.rollout.pk).update(guards=malformed)
        assert fleet.tick().state == State.RUNNING, malformed
        assert fleet.rollout.reason.startswith("the guards' terms are malformed"), malformed
    fleet.say(fleet.callers[0], event(events.FAILED, fleet.new, rollout=fleet.rollout))
    assert fleet.tick().state == State.HALTED, "errors still come before success"


def test_devices_that_do_not_say_which_load_they_count_are_no_evidence(client: Client) -> None:
    """An older SDK counts from one report to the next: its sums cannot be told apart."""
    fleet = GuardedFleet(client, 4, stages=[HALVES[1]])
    for caller in fleet.exposed:
        fleet.commits(caller)
        fleet.health(caller, fleet.new, {"calls": 100, "errors": 100})
    assert fleet.tick().state == State.RUNNING
    assert "compared on 0 of 1" in fleet.rollout.reason


# --- who is compared ----------------------------------------------------------------------------------------------


def test_a_device_counts_once_at_each_age_however_often_it_reports(client: Client) -> None:
    fleet = GuardedFleet(client, 4, guards={**GUARDS, "devices": 5}).live()
    one = fleet.exposed[0]
    for more in range(2, 6):
        fleet.health(one, fleet.new, numbers(NEW_LOAD, 100 * more, 100 * more))
    fleet.tick()
    everyone = {(0, 0): (len(fleet.exposed), len(fleet.others))}
    assert fleet.compared() == everyone
    Watch.objects.filter(device=one.device).update(since=timezone.now() - timedelta(hours=2))
    fleet.health(one, fleet.new, numbers(NEW_LOAD, 1_000, 1_000))
    fleet.health(one, fleet.new, numbers(NEW_LOAD, 2_000, 2_000))
    fleet.tick()
    assert fleet.compared() == everyone | {(0, 1): (1, 0)}


def test_the_same_post_twice_and_two_engines_at_once_count_it_once(client: Client) -> None:
    fleet = GuardedFleet(client, 4)
    fleet.commits(fleet.exposed[0])
    told = event(events.HEALTH, fleet.new, rollout=fleet.rollout, detail=numbers(NEW_LOAD, 100))
    for _ in range(2):
        fleet.say(fleet.exposed[0], told)
    stale = Rollout.objects.get(pk=fleet.rollout.pk)
    assert [evidence.fold(fleet.rollout), evidence.fold(stale)] == [1, 0]
    assert fleet.compared() == {(0, 0): (1, 0)}


def test_a_fold_that_dies_half_way_loses_and_repeats_nothing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = GuardedFleet(client, 4).live()
    waiting = Finding.objects.count()
    with monkeypatch.context() as patch:
        patch.setattr(evidence.Sheet, "save", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evidence.fold(fleet.rollout)
    assert (Finding.objects.count(), fleet.compared()) == (waiting, {})
    assert evidence.fold(fleet.rollout) == waiting


def test_devices_of_other_groups_and_those_that_ran_it_before_are_on_neither_side(client: Client) -> None:
    fleet = GuardedFleet(client, 6)
    theirs, before, mine = fleet.others[0], fleet.others[1], fleet.exposed[0]
    Watch.objects.all().delete()
    Rollout.objects.filter(pk=fleet.rollout.pk).update(group=group(site=["here"]))
    Device.objects.filter(pk=mine.device.pk).update(labels={"site": "here"})
    fleet.stays(theirs)
    fleet.health(before, fleet.new, numbers(NEW_LOAD, 100))
    Outcome.objects.create(rollout=fleet.rollout, device=before.device, state="committed", reason="ran it before")
    fleet.health(before, fleet.new, numbers(NEW_LOAD, 200))
    assert not Watch.objects.exists()
    mine.device.refresh_from_db()
    fleet.updates(mine)
    assert Watch.objects.get().device == mine.device


def test_a_device_that_restarts_keeps_its_yardstick(client: Client) -> None:
    """A new load of the same release: its counts begin at zero, what it was before the rollout does not change."""
    fleet = GuardedFleet(client, 4)
    fleet.commits(fleet.exposed[0])
    fleet.health(fleet.exposed[0], fleet.new, numbers(NEW_LOAD, 20))
    fleet.health(fleet.exposed[0], fleet.new, numbers("0000000c", 80, 8))
    finding = Finding.objects.get(exposed=True)
    assert finding.changes["errors"] == [0.1, pytest.approx(0.1 - 0.005)]


def test_the_unexposed_are_compared_anew_in_each_stage(client: Client) -> None:
    """So that both sides are of the same hours."""
    fleet = GuardedFleet(client).live()
    assert fleet.tick().stage_index == 1
    last = fleet.others[0]
    fleet.stays(last, calls=200)
    fleet.stays(last, calls=400)
    fleet.tick()
    assert fleet.compared()[1, 0] == (0, 1)


def test_after_a_resume_all_evidence_begins_anew_with_the_same_yardsticks(client: Client) -> None:
    fleet = GuardedFleet(client).live(errors=20)
    services.resume(rollout=fleet.tick(), actor="ann", comment="it was the lens service")
    assert "compared on 0 of 1" in fleet.tick().reason
    assert fleet.rollout.state == State.RUNNING
    for caller in fleet.exposed:
        fleet.updates(caller, load="0000000c")
    fleet.tick()
    first, second = (
        {row.device_id: row.before for row in Watch.objects.filter(run=run, exposed=True)} for run in (0, 1)
    )
    assert second == first
    assert set(fleet.compared().values()) == {(len(fleet.exposed), 0)}
    assert (fleet.rollout.state, fleet.rollout.stage_index) == (State.RUNNING, 1)


def test_a_rollout_that_was_paused_goes_on_though_nobody_begins_again(client: Client) -> None:
    fleet = GuardedFleet(client, guards={"failures": {}}, stages=[HALVES[1]])
    for caller in fleet.exposed:
        fleet.updates(caller)
    services.pause(rollout=fleet.rollout, actor="ann", comment="lunch")
    services.resume(rollout=fleet.rollout, actor="ann", comment="lunch is over")
    assert fleet.tick().state == State.COMPLETED


def test_trap_13_what_a_tick_asks_does_not_grow_with_the_fleet(client: Client) -> None:
    fleet = GuardedFleet(client, 10).live()
    asked = []
    for number in (1, len(fleet.others) + len(fleet.exposed)):
        kept = list(Finding.objects.order_by("pk")[:number])
        with CaptureQueriesContext(
            connection,
        ) as seen:
            evidence.ask(fleet.rollout, timezone.now())
        asked.append(len(seen))
        Finding.objects.bulk_create(kept)
    assert asked[1] <= asked[0]


def test_a_release_that_nobody_guards_costs_a_report_one_question(client: Client) -> None:
    fleet = GuardedFleet(client, 4, guards=None)
    told = [event(events.HEALTH, fleet.old, detail=numbers(OLD_LOAD, 2_000))]
    with CaptureQueriesContext(connection) as seen:
        evidence.note(fleet.callers[0].device, told, {})
    assert len(seen) == 1


def test_what_no_comparison_reads_again_is_forgotten_in_the_night_and_the_rest_is_kept(client: Client) -> None:
    fleet = GuardedFleet(client, 4).live()

    def sides() -> dict[bool, int]:
        return dict(Watch.objects.order_by().values_list("exposed").annotate(number=Count("pk")))

    assert sides() == {True: 2, False: 4}  # who is exposed now was not before
    tasks.retention()
    assert sides() == {True: 2, False: 4}, "all of it is of the stage in force"
    Rollout.objects.filter(pk=fleet.rollout.pk).update(stage_index=1)
    tasks.retention()
    assert sides() == {True: 2}
    services.roll_back(rollout=fleet.rollout.pk, actor="ann")
    tasks.retention()
    assert sides() == {True: 2}, "it may be resumed"
    Rollout.objects.update(finished_at=timezone.now() - timedelta(days=31))
    assert Finding.objects.exists()
    tasks.retention()
    assert sides() == {}
    assert not Finding.objects.exists()
