"""When rollouts begin, how long devices may take, who is tried again, how fast it goes, and whether it is in time."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.utils import timezone

from device_sdk.protocol.cohorts import COHORTS
from fleet.devices.models import Device
from fleet.errors import Invalid
from fleet.operations.metrics import FleetCollector
from fleet.releases.models import Release
from fleet.rollouts import attempts, engine_clock, forecast, limits, objective, retries, selectors, services, throttle
from fleet.rollouts.forecast import Adoption, Objective
from fleet.rollouts.models import EngineClock, Outcome, Rollout
from fleet.rollouts.services import StagePlan
from fleet.rollouts.terms.pace import Pace
from tests.fleet_world import AT_ONCE, device, devices, event, release, running

pytestmark = pytest.mark.django_db

State = Rollout.State
HOUR = timedelta(hours=1)
PATIENT = (StagePlan(percent=100, failure_budget=2, success_threshold=0.5, soak_seconds=10**6),)


class Clock:
    """The server's, as the test likes it. `run` lets the engine tick on the way, as it does."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def run(self, span: timedelta, *, ticks: float = 900) -> None:
        end = self.now + span
        while self.now < end:
            self.now = min(self.now + timedelta(seconds=ticks), end)
            services.tick()

    def jump(self, span: timedelta) -> None:
        self.now += span


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, settings: Any) -> Clock:
    settings.TICK_SECONDS = 120.0  # so that steps of twenty minutes count
    made = Clock(datetime(2026, 11, 21, 12, tzinfo=UTC))
    monkeypatch.setattr(timezone, "now", lambda: made.now)
    monkeypatch.setattr(Outcome._meta.get_field("tried_at"), "_get_default", lambda: made.now)
    monkeypatch.setattr(throttle, "_kept", {})
    return made


def fresh(rollout: Rollout) -> Rollout:
    return Rollout.objects.get(pk=rollout.pk)


def outcome(entry: Device) -> Outcome:
    return Outcome.objects.get(device=entry)


def report(kind: str, rollout: Rollout, *entries: Device, **more: Any) -> None:
    for entry in entries:
        Device.objects.filter(pk=entry.pk).update(last_seen=timezone.now())
        services.note_events(entry, [event(kind, rollout.release, rollout=rollout, **more)])


def offered(entry: Device) -> bool:
    return any(each.release for each in selectors.assignments_for(entry))


# --- start at -----------------------------------------------------------------------------------------------------


def test_a_rollout_begins_by_itself_at_its_moment_and_not_before(clock: Clock) -> None:
    entry = device()
    rollout = services.create(
        release=release(), group=None, stages=AT_ONCE, actor="ann", pace=Pace(start_at=clock.now + HOUR)
    )
    rollout = services.start(rollout=rollout, actor="ann")
    clock.run(timedelta(minutes=59))
    assert (fresh(rollout).state, offered(entry)) == (State.SCHEDULED, False)
    clock.run(timedelta(minutes=2))
    assert (fresh(rollout).state, offered(entry)) == (State.RUNNING, True)
    assert fresh(rollout).stage_since == fresh(rollout).started_at == clock.now
    assert list(rollout.actions.values_list("action", "actor")) == [
        ("create", "ann"), ("schedule", "ann"), ("start", "guard"),
    ]  # fmt: skip


def test_what_waits_for_its_time_is_begun_at_once_or_cancelled_by_a_person(clock: Clock) -> None:
    pace = Pace(start_at=clock.now + HOUR)
    now, never = (
        services.start(
            rollout=services.create(release=release(version), group=None, stages=AT_ONCE, actor="ann", pace=pace),
            actor="ann",
        )
        for version in ("1.0.0", "2.0.0")
    )
    services.start(rollout=now, actor="ann")
    services.cancel(rollout=never, actor="ann")
    clock.run(2 * HOUR)
    assert (fresh(now).state, fresh(never).state) == (State.RUNNING, State.CANCELLED)


def test_a_release_that_may_not_run_when_the_time_comes_is_not_begun_and_the_page_says_why(clock: Clock) -> None:
    target = release()
    rollout = services.create(
        release=target, group=None, stages=AT_ONCE, actor="ann", pace=Pace(start_at=clock.now + HOUR)
    )
    services.start(rollout=rollout, actor="ann")
    Release.objects.filter(pk=target.pk).update(state=Release.State.INVALID)
    clock.run(2 * HOUR)
    assert fresh(rollout).state == State.SCHEDULED
    assert "only a valid release" in fresh(rollout).reason


@pytest.mark.parametrize(
    "more",
    [
        {"start_at": datetime(2026, 1, 1)}, {"timeout_seconds": -1}, {"retries": 99}, {"retry_seconds": -1},
        {"max_in_flight": -1}, {"starts_per_minute": float("nan")}, {"objective_percent": 95.0},
        {"objective_percent": 0.0, "objective_days": 1.0}, {"objective_percent": 101.0, "objective_days": 1.0},
    ],
)  # fmt: skip
def test_terms_that_make_no_sense_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(Invalid) as caught:
        services.create(release=release(), group=None, stages=AT_ONCE, actor="ann", pace=Pace(**more))
    assert caught.value.code == "pace_malformed"


# --- timeouts -----------------------------------------------------------------------------------------------------


def test_trap_3_a_device_that_goes_silent_fails_in_time_and_one_never_seen_holds_nobody(
    clock: Clock,
) -> None:
    good, silent = devices(2)
    away = device("away", last_seen=clock.now - timedelta(days=3))
    rollout = running(release(), stages=AT_ONCE, pace=Pace(timeout_seconds=7200))
    report("committed", rollout, good)
    report("downloading", rollout, silent)
    clock.run(timedelta(minutes=110))
    assert (fresh(rollout).state, outcome(silent).state) == (State.RUNNING, "updating")
    clock.run(timedelta(minutes=20))
    assert (outcome(silent).state, outcome(silent).reason) == ("failed", "timed out: not done within 7200 s")
    assert (fresh(rollout).state, fresh(rollout).reason) == (
        State.HALTED,
        "failure budget spent: 1 failed, 0 allowed",
    )
    assert not Outcome.objects.filter(device=away).exists()


def test_a_silent_device_alone_does_not_keep_a_stage_from_passing(clock: Clock) -> None:
    good = device()
    device("away", last_seen=clock.now - timedelta(days=3))
    rollout = running(release(), pace=Pace(timeout_seconds=7200))
    report("committed", rollout, good)
    clock.run(timedelta(minutes=5))
    assert fresh(rollout).state == State.COMPLETED


def test_a_device_that_polls_and_says_nothing_is_noticed_and_gets_its_time_from_then(clock: Clock) -> None:
    mute = device("mute")
    rollout = running(release(), stages=PATIENT, pace=Pace(timeout_seconds=7200))
    Device.objects.filter(pk=mute.pk).update(last_seen=clock.now + HOUR)
    clock.run(timedelta(hours=2, minutes=10))
    assert (outcome(mute).state, outcome(mute).reason) == ("updating", attempts.MUTE)
    clock.run(timedelta(minutes=100))
    assert outcome(mute).state == "updating"
    clock.run(timedelta(minutes=30))
    assert outcome(mute).step == attempts.TIMED_OUT
    assert fresh(rollout).state == State.RUNNING  # within its budget


def test_who_made_it_after_all_counts_and_who_only_goes_on_does_not(clock: Clock) -> None:
    late, later = devices(2)
    rollout = running(release(), stages=PATIENT, pace=Pace(timeout_seconds=3600))
    report("downloading", rollout, late, later)
    clock.run(2 * HOUR)
    assert [outcome(each).state for each in (late, later)] == ["failed", "failed"]
    report("committed", rollout, late)
    report("testing", rollout, later)
    assert [outcome(each).state for each in (late, later)] == ["committed", "failed"]


def test_no_timeout_where_none_is_asked_for(clock: Clock) -> None:
    entry = device()
    rollout = running(release(), stages=PATIENT, pace=Pace(timeout_seconds=0))
    report("downloading", rollout, entry)
    clock.run(timedelta(hours=1))
    attempts.look_after(engine_clock.Moment(clock.now + timedelta(days=90)))
    assert outcome(entry).state == "updating"


# --- retries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "reason", "passing"),
    [
        ("failed", "network: no route", True), ("failed", "disk", True), ("failed", "memory", True),
        ("failed", "no_rehearsal", True), ("rolled_back", "network", False), ("rolled_back", "error_rate", False),
        ("failed", "known_bad", False), ("failed", "crash_loop", False), ("failed", "test_failed", False),
        ("failed", "requires_sdk", False), ("failed", "hash_mismatch", False), ("failed", "", False),
        ("timed_out", "timed out: not done within 60 s", False),
    ],
)  # fmt: skip
def test_only_what_may_pass_by_itself_is_worth_another_try(step: str, reason: str, passing: bool) -> None:
    assert retries.is_passing(step, reason) is passing


def test_the_time_before_a_retry_doubles_and_is_bounded() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    waits = [retries.next_try(tries=tries, retries=20, first=3600, now=now) - now for tries in range(10)]
    assert waits[:4] == [HOUR, 2 * HOUR, 4 * HOUR, 8 * HOUR]
    assert max(waits) == retries.LONGEST
    assert retries.next_try(tries=2, retries=2, first=1, now=now) is None


def test_a_device_that_failed_for_the_network_gets_the_assignment_again_so_often_and_no_more(clock: Clock) -> None:
    entry, _other = devices(2)
    rollout = running(release(), stages=AT_ONCE, pace=Pace(retries=2, retry_seconds=3600))
    for wait in (HOUR, 2 * HOUR):
        report("failed", rollout, entry, reason="network: unreachable")
        assert (offered(entry), outcome(entry).retry_at) == (False, clock.now + wait)
        clock.run(wait - timedelta(minutes=4))
        assert not offered(entry)  # not at every poll
        assert fresh(rollout).state == State.RUNNING  # a failure that is not final spends no budget
        clock.run(timedelta(minutes=8))
        assert offered(entry)
    report("failed", rollout, entry, reason="network: unreachable")
    assert outcome(entry).retry_at is None
    services.tick()
    assert (fresh(rollout).state, offered(entry)) == (State.HALTED, False)


def test_a_device_that_made_it_at_the_second_try_counts_as_updated(clock: Clock) -> None:
    entry = device()
    rollout = running(release(), pace=Pace(retries=1, retry_seconds=60))
    report("failed", rollout, entry, reason="disk")
    clock.run(timedelta(minutes=4))
    report("committed", rollout, entry)
    services.tick()
    assert (fresh(rollout).state, outcome(entry).tries) == (State.COMPLETED, 1)


def test_a_stage_does_not_pass_over_the_heads_of_those_who_are_to_be_tried_again(clock: Clock) -> None:
    good, bad = devices(2)
    rollout = running(release(), pace=Pace(retries=1, retry_seconds=3600))
    report("committed", rollout, good)
    report("failed", rollout, bad, reason="disk")
    services.tick()
    assert fresh(rollout).reason == "waiting for success: 1 of 2 committed, 2 needed"


def test_resuming_accepts_final_failures_only(clock: Clock) -> None:
    final, passing = devices(2)
    rollout = running(release(), pace=Pace(retries=1, retry_seconds=3600))
    report("failed", rollout, passing, reason="disk")
    report("rolled_back", rollout, final, reason="error_rate")
    services.tick()
    assert fresh(rollout).state == State.HALTED
    services.resume(rollout=rollout, actor="ann")
    assert fresh(rollout).forgiven == 1


# --- limits -------------------------------------------------------------------------------------------------------


def test_no_more_are_admitted_than_may_update_at_a_time(clock: Clock) -> None:
    fleet = devices(12)
    stages = (StagePlan(percent=50, success_threshold=1), StagePlan(percent=100, success_threshold=1))
    rollout = running(release(), stages=stages, pace=Pace(max_in_flight=3))
    assert not any(offered(each) for each in fleet)
    done: set[Device] = set()
    for _ in range(60):
        Device.objects.update(last_seen=clock.now)  # they poll
        clock.run(timedelta(minutes=4))
        under_way = [each for each in fleet if each not in done and offered(each)]
        assert len(under_way) <= 3
        if fresh(rollout).state == State.COMPLETED:
            break
        report("downloading", rollout, *under_way)
        clock.run(timedelta(minutes=4))
        still = {each for each in fleet if each not in done and offered(each)}
        assert still == set(under_way) or not under_way  # a stage has just passed
        report("committed", rollout, *under_way)
        done |= set(under_way)
    assert (fresh(rollout).state, len(done)) == (State.COMPLETED, 12)


def test_so_many_start_a_minute_and_a_pause_is_not_caught_up_with(clock: Clock) -> None:
    fleet = devices(40)
    rollout = running(release(), stages=PATIENT, pace=Pace(starts_per_minute=2))
    counts = []
    for _ in range(4):
        clock.run(timedelta(minutes=1), ticks=10)
        counts.append(sum(offered(each) for each in fleet))
    assert counts == [2, 4, 6, 8]
    clock.jump(timedelta(hours=1))
    services.tick()
    assert sum(offered(each) for each in fleet) <= 10
    assert "soaking" in fresh(rollout).reason


def test_a_stage_is_not_passed_before_all_of_it_was_admitted(clock: Clock) -> None:
    fleet = devices(10)
    rollout = running(release(), stages=(StagePlan(percent=100, success_threshold=0),), pace=Pace(max_in_flight=2))
    clock.run(timedelta(minutes=4))
    (first, *_rest) = [each for each in fleet if offered(each)]
    report("committed", rollout, first)
    clock.run(timedelta(minutes=4))
    assert fresh(rollout).state == State.RUNNING
    assert fresh(rollout).reason.startswith("admitting as the limits allow: ")


def test_limits_are_pure_and_exact_but_for_twins() -> None:
    cohorts = sorted([5, 100, 100, 2500, 5000, 9999])
    reach, seen = 0.0, []
    while reach < 100:
        reach = limits.wider(reach, 100, 1, cohorts)
        seen.append(limits.granted(cohorts, reach))
    assert seen == [1, 3, 4, 5, 6]  # the twins of cohort 100 come together
    assert limits.wider(10, 50, 99, cohorts) == 50
    assert limits.wider(10, 50, 0.5, cohorts) == 10
    assert COHORTS == 10_000
    none = limits.Load(heard=0, updating=0, seconds=0, settled=False)
    assert limits.room(limits.Limits(), none, 0) == float("inf")
    assert limits.room(limits.Limits(in_flight=5), limits.Load(4, 2, 0, settled=False), granted=6) == 1
    assert limits.room(limits.Limits(in_flight=5), limits.Load(4, 2, 999, settled=True), granted=6) == 3
    assert limits.room(limits.Limits(in_flight=1), limits.Load(9, 4, 0, settled=True), granted=9) == 0
    assert limits.room(limits.Limits(per_minute=0.1), limits.Load(0, 0, 600, settled=True), granted=0) == 1


# --- the aim ------------------------------------------------------------------------------------------------------

NOW = datetime(2026, 6, 3, tzinfo=UTC)
BEGUN = NOW - timedelta(days=2)
GOOD = {
    "total": 1000, "committed": 600, "recent": 100, "window": 8 * 3600.0, "lost": 0, "reach": 100.0, "soak_left": 0.0,
    "moving": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "verdict", "why"),
    [
        ({}, "likely", "100 committed in the last 8.0 h"),
        ({"committed": 950}, "met", "950 of 1000"),
        ({"recent": 11, "window": 86400.0}, "unlikely", "11 committed"),
        ({"recent": 85, "window": 40000.0}, "open", "85 committed"),
        ({"lost": 51}, "unlikely", "51 of 1000 failed"),
        ({"soak_left": 6 * 86400.0}, "unlikely", "stages to come alone"),
        ({"recent": 9}, "unknown", "too few to tell"),
        ({"reach": 25.0}, "unknown", "only 25 %"),
        ({"moving": False}, "unknown", "depends on people"),
        ({"total": 0, "committed": 0, "recent": 0}, "unknown", "no device"),
    ],
)
def test_the_forecast_says_what_it_can_and_why_where_it_cannot(more: dict[str, Any], verdict: str, why: str) -> None:
    found = forecast.forecast(Objective(95, 7), Adoption(**{**GOOD, **more}), started=BEGUN, now=NOW)
    assert (found.verdict, why in found.why) == (verdict, True), found
    if verdict in {"unknown", "met"}:
        assert found.earliest is None
    assert found.deadline == BEGUN + timedelta(days=7)


def test_what_is_late_is_missed() -> None:
    found = forecast.forecast(Objective(95, 1), Adoption(**GOOD), started=BEGUN, now=NOW)
    assert found.verdict == forecast.MISSED


def test_the_forecasts_bounds_hold_the_truth_as_often_as_they_say() -> None:
    """Devices that commit at a constant rate, thrown 400 times: the day of the 95th percent lies within, 9 of 10."""
    from random import Random

    dice, held, rate = Random(7), 0, 1 / 86_400
    for _ in range(400):
        times = sorted(dice.expovariate(rate) for _ in range(500))
        now = 43_200.0
        committed = sum(each <= now for each in times)
        recent = sum(now - 20_000 < each <= now for each in times)
        adoption = Adoption(500, committed, recent, 20_000.0, 0, 100.0, 0.0, moving=True)
        found = forecast.forecast(Objective(80, 30), adoption, started=NOW - timedelta(seconds=now), now=NOW)
        truth = NOW + timedelta(seconds=times[399] - now)
        held += bool(found.earliest and found.latest and found.earliest <= truth <= found.latest)
    assert 0.84 <= held / 400 <= 0.97, held


def test_a_rollout_is_compared_with_its_aim_from_what_devices_reported(clock: Clock) -> None:
    fleet = devices(20)
    pace = Pace(objective_percent=90, objective_days=1)
    rollout = running(release(), stages=PATIENT, pace=pace)
    assert objective.of(rollout).verdict == "unknown"
    clock.run(timedelta(minutes=40))
    report("committed", rollout, *fleet[:12])
    found = objective.of(fresh(rollout))
    assert (found.verdict, found.reached) == ("likely", 60.0)
    course = next(each for each in FleetCollector().collect() if each.name == "fleet_rollout_on_course")
    assert [(each.labels, each.value) for each in course.samples] == [({"rollout": str(rollout.pk)}, 1.0)]
    report("committed", rollout, *fleet[12:18])
    assert objective.of(fresh(rollout)).verdict == "met"
    assert objective.of(running(release("2.0.0"))) is None


# --- a clock that jumps ---------------------------------------------------------------------------------------------

SOAKING = (StagePlan(percent=100, soak_seconds=7200, success_threshold=1),)


@pytest.mark.parametrize("jump", [timedelta(days=365), timedelta(days=-365)])
def test_a_clock_that_jumps_neither_ends_a_soak_nor_fails_the_slow(clock: Clock, jump: timedelta) -> None:
    good, slow = devices(2)
    rollout = running(release(), stages=SOAKING, pace=Pace(timeout_seconds=14_400))
    report("committed", rollout, good)
    report("downloading", rollout, slow)
    clock.run(HOUR)
    for step in (jump, -jump):
        clock.jump(step)
        services.tick()
        services.tick()
        assert (fresh(rollout).state, outcome(slow).state) == (State.RUNNING, "updating")
    report("committed", rollout, slow)
    clock.run(timedelta(minutes=50))
    assert "soaking" in fresh(rollout).reason
    clock.run(timedelta(minutes=20))
    assert fresh(rollout).state == State.COMPLETED


def test_hours_in_which_no_engine_ran_are_no_soaking_and_fail_nobody(clock: Clock) -> None:
    entry = device()
    rollout = running(release(), stages=SOAKING, pace=Pace(timeout_seconds=3600))
    report("downloading", rollout, entry)
    services.tick()
    clock.jump(timedelta(hours=30))
    services.tick()
    assert outcome(entry).state == "updating"
    report("committed", rollout, entry)
    clock.run(timedelta(minutes=110))
    assert fresh(rollout).state == State.RUNNING
    clock.run(timedelta(minutes=20))
    assert fresh(rollout).state == State.COMPLETED


def test_what_was_noted_by_a_clock_that_ran_ahead_does_not_last_for_ever(clock: Clock) -> None:
    entry, failed = devices(2)
    rollout = running(release(), stages=SOAKING, pace=Pace(timeout_seconds=3600, retry_seconds=60))
    services.tick()
    clock.jump(timedelta(days=365))  # only the web process sees it: no tick in between
    services.pause(rollout=rollout, actor="ann")
    services.resume(rollout=rollout, actor="ann")
    report("downloading", rollout, entry)
    report("failed", rollout, failed, reason="disk")
    clock.jump(timedelta(days=-365))
    clock.run(timedelta(minutes=8))
    assert outcome(failed).step == attempts.RETRY
    report("committed", rollout, failed)
    clock.run(timedelta(minutes=70))
    assert outcome(entry).step == attempts.TIMED_OUT
    assert fresh(rollout).stage_since <= clock.now


def test_two_engines_whose_clocks_differ_a_little_do_not_make_time_run_faster(clock: Clock) -> None:
    engine_clock.look()
    for _ in range(60):
        clock.jump(timedelta(seconds=40))
        engine_clock.look()
        clock.jump(timedelta(seconds=-30))
        moment = engine_clock.look()
    assert (moment.lost, EngineClock.objects.count()) == (0, 1)
