from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from device_sdk.protocol.assignment import Conditions
from fleet.devices import services as device_services
from fleet.devices.models import Device, ModelStatus
from fleet.errors import Conflict, Invalid
from fleet.releases.models import Release
from fleet.rollouts import policy, selectors, services, snapshots, tasks
from fleet.rollouts.models import Outcome, PolicyRevision, Rollout, RolloutAction, Stage
from fleet.rollouts.services import StagePlan
from tests.fleet_world import AT_ONCE, completed, device, devices, event, group, operator, release, running, running_set

pytestmark = pytest.mark.django_db
State = Rollout.State
HALVES = (StagePlan(percent=50, success_threshold=1.0), StagePlan(percent=100, success_threshold=1.0))
OLD_RUNS, NEW_RUNS = {"digits": "1.0.0/default"}, {"digits": "1.1.0/default"}


def wanted(entry: Device) -> str | None:
    """The version that the policy in force gives a device."""
    (assignment,) = selectors.assignments_for(entry)
    return assignment.release.version if assignment.release else None


def admitted(rollout: Rollout) -> list[Device]:
    return [entry for entry in Device.objects.order_by("pk") if wanted(entry) == rollout.release.version]


def report(kind: str, rollout: Rollout, *entries: Device, reason: str = "") -> None:
    for entry in entries:
        services.note_events(entry, [event(kind, rollout.release, rollout=rollout, reason=reason)])


def fresh(rollout: Rollout) -> Rollout:
    return Rollout.objects.select_related("release__model", "group").get(pk=rollout.pk)


def history(rollout: Rollout) -> list[tuple[str, str]]:
    return list(RolloutAction.objects.filter(rollout=rollout).values_list("action", "actor"))


# --- drafting ----------------------------------------------------------------------------------------------------


def test_a_draft_changes_nothing_on_any_device() -> None:
    entry = device()
    drafted = services.create(release=release(), group=None, stages=AT_ONCE, actor="ann")
    assert (drafted.state, wanted(entry)) == (State.DRAFT, None)


@pytest.mark.parametrize("state", [Release.State.VALIDATING, Release.State.INVALID, Release.State.REVOKED])
def test_only_a_valid_release_can_be_rolled_out(state: str) -> None:
    with pytest.raises(Invalid) as caught:
        services.create(release=release(state=state), group=None, stages=AT_ONCE, actor="ann")
    assert caught.value.code == "release_not_valid"
    assert not Rollout.objects.exists()


@pytest.mark.parametrize("action", [services.start, services.resume])
def test_a_release_that_was_revoked_meanwhile_is_not_started_or_resumed(action: Callable[..., Rollout]) -> None:
    target = release()
    drafted = services.create(release=target, group=None, stages=AT_ONCE, actor="ann")
    Release.objects.update(state=Release.State.REVOKED)
    with pytest.raises(Invalid):
        action(rollout=drafted, actor="ann")
    assert fresh(drafted).state == State.DRAFT


@pytest.mark.parametrize(
    "stages",
    [
        [], [StagePlan(50)], [StagePlan(100), StagePlan(100)], [StagePlan(50), StagePlan(20), StagePlan(100)],
        [StagePlan(0), StagePlan(100)], [StagePlan(-1), StagePlan(100)], [StagePlan(101)], [StagePlan(float("nan"))],
        [StagePlan(float("nan")), StagePlan(100)], [StagePlan(100, success_threshold=1.1)],
        [StagePlan(100, success_threshold=float("nan"))], [StagePlan(100, failure_budget=-1)],
        [StagePlan(100, min_reports=-1)], [StagePlan(100, soak_seconds=-1)],
    ],
    ids=range(14),
)  # fmt: skip
def test_stages_that_make_no_sense_are_refused(stages: list[StagePlan]) -> None:
    with pytest.raises(Invalid) as caught:
        services.create(release=release(), group=None, stages=stages, actor="ann")
    assert caught.value.code == "stages_malformed"
    assert not Rollout.objects.exists()


@pytest.mark.parametrize(
    "more",
    [
        {"window": {"start": 0}}, {"window": {"start": 0, "end": 1440}}, {"probation": {"calls": -1}},
        {"probation": {"max_error_rate": 2}}, {"on_failure": "shrug"}, {"conditions": {"full_moon": True}},
        {"conditions": {"charging": "yes"}}, {"conditions": {"free_disk": -1}}, {"conditions": {"rate": 1.5}},
    ],
)  # fmt: skip
def test_conditions_that_make_no_sense_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        services.create(release=release(), group=None, stages=AT_ONCE, actor="ann", **more)


def test_the_conditions_of_a_rollout_reach_the_device() -> None:
    window, probation = {"start": 60, "end": 120}, {"calls": 7, "max_error_rate": 0.25}
    rollout = running(release(), urgent=True, window=window, probation=probation)
    (assignment,) = selectors.assignments_for(device())
    assert (assignment.rollout, assignment.urgent) == (str(rollout.pk), True)
    assert (assignment.window.start, assignment.window.end) == (60, 120)
    assert (assignment.probation.calls, assignment.probation.max_error_rate, assignment.probation.seconds) == (
        7,
        0.25,
        10,
    )


def test_what_a_device_waits_for_reaches_it_in_the_signed_assignment() -> None:
    asked = {"charging": True, "idle": False, "free_disk": 10**9, "daily": 5 * 10**6}
    rollout = running(release(), conditions=asked)
    (assignment,) = selectors.assignments_for(device())
    assert assignment.conditions == Conditions(charging=True, free_disk=10**9, daily=5 * 10**6)
    assert rollout.conditions == {
        "charging": True,
        "free_disk": 10**9,
        "daily": 5 * 10**6,
    }  # what is not asked is not kept


def test_conditions_that_cannot_be_read_admit_nobody() -> None:
    entry = device()
    completed(release("1.0.0"))
    rollout = running(release("1.1.0"))
    Rollout.objects.filter(pk=rollout.pk).update(conditions={"charging": "perhaps"})
    snapshots.bump()
    assert wanted(entry) == "1.0.0"


# --- the state table ---------------------------------------------------------------------------------------------

BY_PEOPLE = {
    "start": services.start,
    "pause": services.pause,
    "resume": services.resume,
    "cancel": services.cancel,
    "roll_back": services.roll_back,
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("action", BY_PEOPLE)
def test_every_action_follows_the_table_or_is_refused(state: State, action: str) -> None:
    rollout = services.create(release=release(), group=None, stages=AT_ONCE, actor="ann")
    Rollout.objects.filter(pk=rollout.pk).update(state=state)
    after = services.TRANSITIONS.get((state, action))
    if after is None:
        with pytest.raises(Conflict) as caught:
            BY_PEOPLE[action](rollout=rollout.pk, actor="ann")
        assert caught.value.code == "wrong_state"
        assert (fresh(rollout).state, history(rollout)) == (state, [("create", "ann")])
    else:
        BY_PEOPLE[action](rollout=rollout.pk, actor="ann", comment="because")
        assert (fresh(rollout).state, history(rollout)[-1]) == (after, (action, "ann"))
        assert fresh(rollout).reason == "because"


def test_the_table_is_that_of_the_design() -> None:
    """Nothing leaves cancelled; only a person resumes; the guard halts only what runs."""
    table = services.TRANSITIONS
    assert not [key for key in table if key[0] == State.CANCELLED]
    assert {state for state, action in table if action == services.RESUME} == {State.PAUSED, State.HALTED}
    assert {state for state, action in table if action == services.HALT} == {State.RUNNING}
    assert {state for state, action in table if action == services.START} == {State.DRAFT, State.SCHEDULED}


def test_a_person_is_named_in_the_history() -> None:
    person = operator()
    rollout = services.create(release=release(), group=None, stages=AT_ONCE, actor=person)
    services.start(rollout=rollout, actor=person, comment="go")
    assert history(rollout) == [("create", "otto"), ("start", "otto")]
    assert rollout.created_by == person


def test_of_two_people_who_act_at_once_one_is_told_to_look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = running(release())
    fetch = services.fetch

    def fetch_then_rival(target: Any) -> Rollout:
        row = fetch(target)
        monkeypatch.setattr(services, "fetch", fetch)
        services.pause(rollout=rollout.pk, actor="rival")
        return row

    monkeypatch.setattr(services, "fetch", fetch_then_rival)
    with pytest.raises(Conflict) as caught:
        services.cancel(rollout=rollout, actor="ann")
    assert caught.value.code == "wrong_state"
    assert (fresh(rollout).state, history(rollout)[-1]) == (State.PAUSED, ("pause", "rival"))


# --- what devices get --------------------------------------------------------------------------------------------


def test_a_stage_admits_its_cohort_and_the_next_one_contains_it() -> None:
    entries = devices(40)
    rollout = running(release("1.1.0"), stages=HALVES)
    half = admitted(rollout)
    assert 8 < len(half) < 32
    report("committed", rollout, *half)
    services.tick()
    assert fresh(rollout).stage_index == 1
    assert set(half) < set(admitted(rollout)) == set(entries)


def test_halting_sends_everybody_back_and_pausing_only_those_who_have_not_activated() -> None:
    one, two = devices(2)
    completed(release("1.0.0"))
    rollout = running(release("1.1.0"))
    Device.objects.filter(pk=one.pk).update(runs=running_set(NEW_RUNS))
    one.refresh_from_db()
    services.pause(rollout=rollout, actor="ann")
    assert [wanted(one), wanted(two)] == ["1.1.0", "1.0.0"]
    services.resume(rollout=rollout, actor="ann")
    assert [wanted(one), wanted(two)] == ["1.1.0", "1.1.0"]
    services.roll_back(rollout=rollout, actor="ann")
    assert [wanted(one), wanted(two)] == ["1.0.0", "1.0.0"]


def test_a_completed_rollout_is_rolled_back_by_a_person() -> None:
    entry = device()
    completed(release("1.0.0"))
    newest = completed(release("1.1.0"))
    assert wanted(entry) == "1.1.0"
    services.roll_back(rollout=newest, actor="ann", comment="customers complain")
    assert wanted(entry) == "1.0.0"


def test_a_device_that_enrols_later_gets_the_standing_answer_at_once() -> None:
    completed(release("1.0.0"))
    assert wanted(device("newcomer")) == "1.0.0"


def test_what_was_started_last_wins_not_what_was_drafted_last() -> None:
    early = services.create(release=release("1.0.0"), group=None, stages=AT_ONCE, actor="ann")
    running(release("1.1.0"))
    services.start(rollout=early, actor="ann")
    assert wanted(device()) == "1.0.0"


def test_a_rollout_to_a_group_leaves_others_alone() -> None:
    running(release(), group=group(site=["berlin"]))
    assert wanted(device("a", labels={"site": "berlin"})) == "1.0.0"
    assert wanted(device("b", labels={"site": "paris"})) is None


def test_the_variant_follows_the_devices_label() -> None:
    running(release(variants=("default", "int8")))
    (assignment,) = selectors.assignments_for(device(labels={"variant": "int8"}))
    assert str(assignment.release) == "digits/1.0.0/int8"
    assert list(selectors.manifests_for([assignment])) == [assignment.sha256]
    assert selectors.manifests_for(selectors.assignments_for(device("b", model_names=["wine"]))) == {}


def test_a_pin_overrides_and_can_be_let_go() -> None:
    entry = device()
    release("1.0.0")
    running(release("1.1.0"))
    services.pin(device=entry, model="digits", version="1.0.0", actor="ann")
    assert wanted(entry) == "1.0.0"
    Release.objects.filter(version="1.0.0").update(state=Release.State.REVOKED)
    assert wanted(entry) == "1.1.0"  # a pin to what is revoked binds no more
    services.pin(device=entry, model="digits", version=None, actor="ann")
    assert wanted(entry) == "1.1.0"


@pytest.mark.parametrize(
    ("model", "version", "code"),
    [
        ("digits", "9.9.9", "release_not_valid"),
        ("digits", "2.0.0", "release_not_valid"),
        ("wine", "1.0.0", "wrong_model"),
    ],
)
def test_a_pin_to_what_cannot_run_is_refused(model: str, version: str, code: str) -> None:
    release("2.0.0", state=Release.State.REVOKED)
    release("1.0.0", model="wine")
    entry = device()
    with pytest.raises(Invalid) as caught:
        services.pin(device=entry, model=model, version=version, actor="ann")
    assert caught.value.code == code
    entry.refresh_from_db()
    assert entry.pins == {}


# --- what devices report -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("waiting", "updating"), ("downloading", "updating"), ("probation", "updating"), ("committed", "committed"),
        ("failed", "failed"), ("rolled_back", "failed"), ("withdrawn", "withdrawn"), ("health", None),
        ("refused", None),
    ],
)  # fmt: skip
def test_only_committed_is_success_and_only_failures_are_failures(kind: str, expected: str | None) -> None:
    entry, rollout = device(), running(release())
    report(kind, rollout, entry)
    assert list(Outcome.objects.values_list("state", flat=True)) == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["probation", "committed"], "committed"), (["committed", "downloading"], "committed"),
        (["committed", "rolled_back"], "failed"), (["failed", "committed"], "failed"),
        (["failed", "downloading"], "failed"), (["failed", "withdrawn"], "failed"),
        (["committed", "withdrawn"], "committed"), (["withdrawn", "downloading"], "updating"),
    ],
)  # fmt: skip
def test_an_outcome_never_improves_after_a_failure(kinds: list[str], expected: str) -> None:
    entry, rollout = device(), running(release())
    for kind in kinds:
        report(kind, rollout, entry)
    assert Outcome.objects.get().state == expected
    Outcome.objects.all().delete()
    services.note_events(entry, [event(kind, rollout.release, rollout=rollout) for kind in kinds])
    assert Outcome.objects.get().state == expected


def test_the_outcome_tells_step_and_reason() -> None:
    entry, rollout = device(), running(release())
    report("waiting", rollout, entry, reason="metered")
    outcome = Outcome.objects.get()
    assert (outcome.step, outcome.reason) == ("waiting", "metered")


@pytest.mark.parametrize("rollout_id", ["", "999", "x", "-1", "\u0663", "9" * 64, "9" * 19, "1.0"])
def test_an_event_that_names_no_rollout_counts_for_none(rollout_id: str) -> None:
    target = release()
    running(target)
    services.note_events(device(), [event("failed", target, rollout=rollout_id)])
    assert not Outcome.objects.exists()


def test_an_event_about_another_release_does_not_count() -> None:
    rollout = running(release("1.1.0"))
    other = release("1.0.0")
    services.note_events(device(), [event("failed", other, rollout=rollout), event("failed", rollout=rollout)])
    assert not Outcome.objects.exists()


def test_a_device_that_was_not_admitted_cannot_fail_a_rollout() -> None:
    """Its credential lets it tell about itself, not halt the others' rollout."""
    entries = devices(20)
    rollout = running(release("1.1.0"), stages=HALVES, group=group(site=["berlin"]))
    report("failed", rollout, *entries)
    assert not Outcome.objects.exists()
    draft = services.create(release=rollout.release, group=None, stages=AT_ONCE, actor="ann")
    report("failed", draft, *entries)
    assert not Outcome.objects.exists()


def test_a_device_reports_on_a_rollout_that_was_ended_meanwhile() -> None:
    entry, rollout = device(), running(release())
    services.cancel(rollout=rollout, actor="ann")
    report("rolled_back", rollout, entry)
    assert Outcome.objects.get().state == "failed"


def test_a_device_that_failed_is_not_offered_the_release_again() -> None:
    entry = device()
    completed(release("1.0.0"))
    rollout = running(release("1.1.0"), stages=[StagePlan(100, failure_budget=9)])
    report("failed", rollout, entry)
    assert wanted(entry) == "1.0.0"


def test_a_failure_wakes_the_engine_after_the_commit(django_capture_on_commit_callbacks: Any) -> None:
    entries = devices(2)
    rollout = running(release("1.1.0"))
    with django_capture_on_commit_callbacks(execute=True) as callbacks:
        report("committed", rollout, entries[0])
    assert not callbacks
    with django_capture_on_commit_callbacks(execute=True):
        report("failed", rollout, entries[1])
        assert fresh(rollout).state == State.RUNNING
    assert fresh(rollout).state == State.HALTED


def test_a_broker_that_is_away_does_not_cost_a_device_its_report(
    monkeypatch: pytest.MonkeyPatch, django_capture_on_commit_callbacks: Any
) -> None:
    def away() -> None:
        raise ConnectionError

    monkeypatch.setattr(tasks.tick, "delay", away)
    entry, rollout = device(), running(release())
    with django_capture_on_commit_callbacks(execute=True):
        report("failed", rollout, entry)
    assert Outcome.objects.get().state == "failed"
    tasks.tick()  # the beat's
    assert fresh(rollout).state == State.HALTED


# --- the engine --------------------------------------------------------------------------------------------------


def test_a_rollout_goes_through_its_stages_and_completes() -> None:
    entries = devices(10)
    rollout = running(release("1.1.0"), stages=HALVES)
    services.tick()
    assert (fresh(rollout).stage_index, fresh(rollout).reason) == (0, "waiting for reports: 0 of 1")
    report("committed", rollout, *admitted(rollout))
    services.tick()
    assert (fresh(rollout).state, fresh(rollout).stage_index) == (State.RUNNING, 1)
    report("committed", rollout, *entries)
    services.tick()
    assert fresh(rollout).state == State.COMPLETED
    assert fresh(rollout).finished_at is not None
    assert history(rollout)[2:] == [("advance", "guard"), ("complete", "guard")]
    assert all(stage.entered_at and stage.passed_at for stage in Stage.objects.all())


def test_ticking_again_changes_nothing() -> None:
    devices(10)
    rollout = running(release("1.1.0"), stages=HALVES)
    report("committed", rollout, *admitted(rollout))
    services.tick()
    before = list(Rollout.objects.values()), history(rollout)
    for _ in range(3):
        services.tick()
    after = list(Rollout.objects.values()), history(rollout)
    assert before[1] == after[1]
    assert {**before[0][0], "reason": ""} == {**after[0][0], "reason": ""}


def test_installing_is_not_yet_success() -> None:
    entries = devices(3)
    rollout = running(release("1.1.0"))
    report("probation", rollout, *entries)
    services.tick()
    assert fresh(rollout).state == State.RUNNING


def test_a_stage_soaks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = device()
    rollout = running(release("1.1.0"), stages=[StagePlan(100, soak_seconds=60)])
    report("committed", rollout, entry)
    services.tick()
    assert (fresh(rollout).state, fresh(rollout).reason) == (State.RUNNING, "soaking for 60 s")
    Rollout.objects.update(stage_since=timezone.now() - timedelta(seconds=61))
    services.tick()
    assert fresh(rollout).state == State.COMPLETED


def test_a_stage_waits_for_devices_that_have_not_polled_since_it_began() -> None:
    entries = devices(10)
    rollout = running(release("1.1.0"), stages=HALVES)
    first = admitted(rollout)
    report("committed", rollout, *first)
    services.tick()
    services.tick()
    assert fresh(rollout).reason == f"waiting for success: {len(first)} of {len(entries)} committed, 10 needed"


def test_a_device_that_goes_silent_with_the_new_release_is_waited_for() -> None:
    """The release may be why."""
    entries = devices(3)
    rollout = running(release("1.1.0"), stages=[StagePlan(100, success_threshold=1.0)])
    report("committed", rollout, entries[0])
    report("activating", rollout, entries[1])
    seen = timezone.now()
    Rollout.objects.update(stage_since=seen - timedelta(days=2))
    Device.objects.filter(pk=entries[2].pk).update(last_seen=seen - timedelta(days=1))  # seen since it began
    Device.objects.filter(pk=entries[1].pk).update(last_seen=seen - timedelta(days=3))  # not seen, but heard of
    services.tick()
    assert fresh(rollout).reason == "waiting for success: 1 of 3 committed, 3 needed"


def test_a_device_that_has_been_offline_since_before_the_stage_is_not_waited_for() -> None:
    entries = devices(4)
    rollout = running(release("1.1.0"), stages=[StagePlan(100, success_threshold=1.0)])
    Device.objects.filter(pk=entries[3].pk).update(last_seen=timezone.now() - timedelta(days=1))
    report("committed", rollout, *entries[:2])
    services.tick()
    assert fresh(rollout).reason == "waiting for success: 2 of 3 committed, 3 needed"
    report("committed", rollout, entries[2])
    services.tick()
    assert fresh(rollout).state == State.COMPLETED


@pytest.mark.parametrize(
    ("on_failure", "state"), [("roll_back", State.HALTED), ("pause", State.PAUSED), ("hold", State.RUNNING)]
)
def test_a_spent_budget_is_answered_as_the_rollout_says(on_failure: str, state: str) -> None:
    entries = devices(4)
    rollout = running(release("1.1.0"), stages=[StagePlan(100, failure_budget=1)], on_failure=on_failure)
    report("failed", rollout, entries[0])
    services.tick()
    assert fresh(rollout).state == State.RUNNING
    report("rolled_back", rollout, entries[1])
    report("committed", rollout, *entries[2:])
    services.tick()
    assert (fresh(rollout).state, fresh(rollout).reason) == (state, "failure budget spent: 2 failed, 1 allowed")


def test_resuming_accepts_the_failures_so_far_and_not_one_more() -> None:
    entries = devices(5)
    rollout = running(release("1.1.0"))
    report("failed", rollout, entries[0])
    services.tick()
    services.resume(rollout=rollout, actor="ann", comment="a bad cable")
    services.tick()
    assert fresh(rollout).state == State.RUNNING
    assert fresh(rollout).finished_at is None
    report("failed", rollout, entries[1])
    services.tick()
    assert fresh(rollout).state == State.HALTED
    assert history(rollout)[1:] == [("start", "ann"), ("halt", "guard"), ("resume", "ann"), ("halt", "guard")]


def test_a_rollout_that_was_resumed_can_still_complete() -> None:
    entries = devices(5)
    rollout = running(release("1.1.0"), stages=[StagePlan(100, success_threshold=1.0)])
    report("failed", rollout, entries[0])
    services.tick()
    services.resume(rollout=rollout, actor="ann")
    report("committed", rollout, *entries[1:])
    services.tick()
    assert fresh(rollout).state == State.COMPLETED


@pytest.mark.parametrize("kind", ["committed", "failed"])
def test_of_two_engines_that_decide_at_once_one_acts(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The second one works from the first look to the last write while the first is between its own."""
    devices(10)
    rollout = running(release("1.1.0"), stages=HALVES)
    report(kind, rollout, *admitted(rollout))
    apply, ticked = services._apply, []

    def apply_after_a_rival(*arguments: Any) -> None:
        if not ticked:
            ticked.append(True)
            services.tick()
        apply(*arguments)

    monkeypatch.setattr(services, "_apply", apply_after_a_rival)
    services.tick()
    assert len(history(rollout)) == 3
    assert fresh(rollout).stage_index == (1 if kind == "committed" else 0)


def test_a_person_who_pauses_while_the_engine_decides_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(10)
    rollout = running(release("1.1.0"), stages=HALVES)
    report("committed", rollout, *admitted(rollout))
    apply = services._apply

    def apply_after_a_pause(*arguments: Any) -> None:
        services.pause(rollout=rollout.pk, actor="ann")
        apply(*arguments)

    monkeypatch.setattr(services, "_apply", apply_after_a_pause)
    services.tick()
    assert (fresh(rollout).state, fresh(rollout).stage_index) == (State.PAUSED, 0)


def test_a_rollout_that_cannot_be_judged_does_not_keep_another_from_being_halted(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    entry = device()
    other = running(release("1.0.0"))
    broken = running(release("1.1.0"))
    report("failed", other, entry)
    rules = services._stage_rules

    def rules_or_not(rollout: Rollout) -> policy.StageRules:
        if rollout.pk == broken.pk:
            raise RuntimeError
        return rules(rollout)

    monkeypatch.setattr(services, "_stage_rules", rules_or_not)
    services.tick()
    assert (fresh(other).state, fresh(broken).state) == (State.HALTED, State.RUNNING)


def test_a_rollout_whose_stage_is_gone_holds_and_admits_nobody() -> None:
    entry, rollout = device(), running(release())
    Stage.objects.all().delete()
    snapshots.bump()
    services.tick()
    assert (fresh(rollout).state, wanted(entry)) == (State.RUNNING, None)
    assert "malformed" in fresh(rollout).reason


def test_a_row_that_cannot_be_read_admits_nobody_and_hurts_no_other() -> None:
    entry = device()
    completed(release("1.0.0"))
    rollout = running(release("1.1.0"))
    Rollout.objects.filter(pk=rollout.pk).update(window={"start": "midnight"})
    snapshots.bump()
    assert wanted(entry) == "1.0.0"


def test_each_stage_gets_the_reports_that_it_needs_where_the_group_has_them() -> None:
    """A tenth of eight devices is often nobody, half of them now and then one: such stages would wait for ever."""
    devices(8)
    stages = [StagePlan(10, min_reports=1), StagePlan(50, min_reports=4), StagePlan(100)]
    for number in range(5):
        rollout = running(release(f"1.{number}.0"), stages=stages)
        for index, enough in ((0, 1), (1, 4), (2, 8)):
            Rollout.objects.filter(pk=rollout.pk).update(stage_index=index)
            snapshots.bump()
            assert len(admitted(fresh(rollout))) >= enough
        services.cancel(rollout=fresh(rollout), actor="ann")


def test_devices_that_run_the_release_already_count_from_the_start_but_not_those_in_a_trial() -> None:
    target = release("1.1.0")
    there, trial, other = devices(3)
    Device.objects.exclude(pk=other.pk).update(runs=running_set(NEW_RUNS))
    ModelStatus.objects.create(device=trial, model="digits", state="probation", since=timezone.now())
    rollout = running(target)
    assert list(Outcome.objects.values_list("device__name", "state")) == [(there.name, "committed")]
    assert selectors.progress(rollout).committed == 1


def test_a_first_release_completes_without_devices_if_told_to_need_none() -> None:
    rollout = running(release(), stages=[StagePlan(100, min_reports=0, success_threshold=0.0)])
    services.tick()
    assert fresh(rollout).state == State.COMPLETED


# --- the snapshot ------------------------------------------------------------------------------------------------


def test_the_compiled_policy_is_kept_until_somebody_changes_it(
    django_assert_num_queries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MAX_AGE", 3600)
    rollout = running(release())
    kept = snapshots.current()
    with django_assert_num_queries(1):
        assert snapshots.current() is kept
    services.pause(rollout=rollout, actor="ann")
    assert snapshots.current().rollouts["digits"][0].state == State.PAUSED


def test_a_revoked_release_leaves_the_policy_when_the_snapshot_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, _ = device(), running(release())
    assert wanted(entry) == "1.0.0"
    Release.objects.update(state=Release.State.REVOKED)  # another room's doing: it bumps no revision
    monkeypatch.setattr(snapshots, "MAX_AGE", 0)
    assert wanted(entry) is None


def test_a_policy_without_a_revision_is_never_kept() -> None:
    running(release())
    PolicyRevision.objects.all().delete()
    assert snapshots.current() is not snapshots.current()


def test_every_policy_write_gets_a_key_of_its_own() -> None:
    rollout, keys = running(release()), set()
    for action in (services.pause, services.resume, services.roll_back, services.resume, services.cancel):
        action(rollout=rollout, actor="ann")
        keys.add(PolicyRevision.objects.get().key)
    assert len(keys) == 5


def test_old_completed_rollouts_do_not_pile_up_in_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "COMPLETED_KEPT", 2)
    for number in range(4):
        completed(release(f"1.{number}.0"))
    newest = [rules.release.version for rules in snapshots.current().rollouts["digits"]]
    assert newest == ["1.3.0", "1.2.0"]


# --- progress and laggards ---------------------------------------------------------------------------------------


def test_progress_counts_the_devices_of_the_group() -> None:
    entries = devices(5)
    device("other", model_names=["wine"])
    rollout = running(release("1.1.0"), stages=[StagePlan(100, failure_budget=9)])
    for kind, entry in zip(["committed", "failed", "downloading"], entries, strict=False):
        report(kind, rollout, entry)
    progress = selectors.progress(fresh(rollout))
    assert (progress.total, progress.admitted, progress.waiting) == (5, 5, 2)
    assert (progress.committed, progress.failed, progress.updating) == (1, 1, 1)
    assert progress.percent == 20


def test_a_recalled_device_is_neither_success_nor_failure_and_a_stage_waits_for_it() -> None:
    entries = devices(2)
    rollout = running(release("1.1.0"), stages=[StagePlan(100, success_threshold=1.0)])
    report("probation", rollout, entries[0])
    report("withdrawn", rollout, entries[0])
    report("committed", rollout, entries[1])
    progress = selectors.progress(fresh(rollout))
    assert (progress.withdrawn, progress.updating, progress.failed, progress.waiting) == (1, 0, 0, 0)
    services.tick()
    assert fresh(rollout).state == State.RUNNING
    report("committed", rollout, entries[0])
    services.tick()
    assert fresh(rollout).state == State.COMPLETED


def test_progress_of_a_halted_rollout_tells_how_many_had_been_exposed() -> None:
    entries = devices(5)
    rollout = running(release("1.1.0"))
    report("failed", rollout, entries[0])
    services.tick()
    assert selectors.progress(fresh(rollout)).admitted == 1


def test_an_older_rollout_does_not_wait_for_devices_that_a_newer_one_took() -> None:
    one, two = device("a", labels={"site": "berlin"}), device("b")
    older = running(release("1.0.0"))
    running(release("1.1.0"), group=group(site=["berlin"]))
    Device.objects.update(last_seen=timezone.now())
    report("committed", older, two)
    services.tick()
    assert fresh(older).state == State.COMPLETED
    assert wanted(one) == "1.1.0"


def test_every_laggard_has_its_reason(settings: Any) -> None:
    target, old = release("1.1.0"), running_set(OLD_RUNS)
    release("1.0.0")
    long_ago = timezone.now() - timedelta(days=3)
    entries = {
        name: device(name, runs=OLD_RUNS)
        for name in ("busy", "failed", "new", "offline", "outside", "pinned", "waiting")
    }
    device("fine", runs=NEW_RUNS)
    rollout = running(target, stages=[StagePlan(100, failure_budget=9)])
    for name, kind, reason in (("busy", "testing", ""), ("failed", "failed", "nan"), ("waiting", "waiting", "metered")):
        told = [event(kind, target, rollout=rollout, reason=reason)]
        post_events(entries[name], told)
    Device.objects.filter(name="offline").update(last_seen=long_ago)
    services.pin(device=entries["pinned"], model="digits", version="1.0.0", actor="ann")
    Rollout.objects.update(salt="x")
    Stage.objects.update(percent=99.99)  # of which at most one device in ten thousand is not
    snapshots.bump()
    found = {lag.device.name: lag for lag in selectors.laggards()}
    assert {name: lag.why for name, lag in found.items() if name != "outside"} == {
        "busy": "updating", "failed": "failed", "new": "not_polled", "offline": "offline", "pinned": "pinned",
        "waiting": "waiting",
    }  # fmt: skip
    assert (found["waiting"].detail, found["failed"].detail) == ("metered", "nan")
    assert found["offline"].since == long_ago
    assert {(lag.runs, lag.target) for lag in found.values()} == {("1.0.0", "1.1.0")}
    assert old.device_set.count() == 7


def test_a_device_outside_the_cohort_lags_because_it_is_not_admitted_yet() -> None:
    entries = devices(20, runs=OLD_RUNS)
    rollout = running(release("1.1.0"), stages=HALVES)
    reasons = {lag.device: lag.why for lag in selectors.laggards("digits")}
    outside = set(entries) - set(admitted(rollout))
    assert outside
    assert {reasons[entry] for entry in outside} == {"not_admitted"}
    assert list(selectors.laggards("wine")) == []


def test_a_paused_rollout_is_a_reason_and_a_halted_one_makes_nobody_lag() -> None:
    device(runs=OLD_RUNS)
    completed(release("1.0.0"))
    rollout = running(release("1.1.0"))
    services.pause(rollout=rollout, actor="ann")
    assert [lag.why for lag in selectors.laggards()] == ["paused"]
    services.roll_back(rollout=rollout, actor="ann")
    assert list(selectors.laggards()) == []


def post_events(entry: Device, told: list[Any]) -> None:
    from tests.fleet_world import post

    new = device_services.record_events(entry, post(*told, runs=OLD_RUNS), exists=selectors.releases_exist)
    services.note_events(entry, new)
