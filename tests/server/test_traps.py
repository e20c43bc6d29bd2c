"""The thirteen traps of rollout servers (shared/PEERS.md in short), and the tests that hold each of them shut.

A row names its tests by `folder/file::name`; add yours to the row of the trap that it holds.
"""

import ast
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from device_sdk.protocol.cohorts import jitter
from device_sdk.protocol.events import COMMITTED, DOWNLOADING, FAILED, PROBATION, TESTING
from fleet.rollouts import policy, selectors, services, snapshots
from fleet.rollouts.models import Outcome, Rollout
from fleet.rollouts.policy import Advance, Complete, Halt, Hold, StageRules, Tally
from fleet.rollouts.services import StagePlan
from tests.fleet_world import completed, device, devices, event, group, release, running
from tests.server.test_policy import GOOD, NOW, STAGE

TESTS = Path(__file__).resolve().parent.parent
HERE = "server/test_traps"
TRAPS: dict[int, tuple[str, Sequence[str]]] = {
    1: ("a stage advances when all are terminal, though the success threshold was missed", [
        f"{HERE}::test_trap_1_a_stage_whose_devices_are_all_done_holds_where_too_few_succeeded",
        "server/test_policy::test_a_stage_passes_only_when_everything_speaks_for_it",
        "server/test_rollouts::test_a_recalled_device_is_neither_success_nor_failure_and_a_stage_waits_for_it",
        "server/test_guard_evidence::test_trap_1_a_stage_whose_devices_all_committed_passes_only_without_the_guard",
    ]),
    2: ("pausing leaves running groups running", [
        f"{HERE}::test_trap_2_pausing_recalls_every_device_that_has_not_activated_yet",
        "server/test_policy::test_a_paused_rollout_admits_only_those_who_already_run_it",
    ]),
    3: ("a silent device counts neither as success nor as failure, for ever", [
        "server/test_rollouts::test_a_device_that_goes_silent_with_the_new_release_is_waited_for",
        "server/test_rollouts::test_a_device_that_has_been_offline_since_before_the_stage_is_not_waited_for",
        "server/test_rollout_time::test_trap_3_a_device_that_goes_silent_fails_in_time_and_one_never_seen_holds_nobody",
        "server/test_guard_evidence::test_trap_3_devices_that_commit_and_fall_silent_are_no_evidence_and_hold",
    ]),
    4: ("success is whatever the device posts, before it has proved itself", [
        f"{HERE}::test_trap_4_success_is_counted_after_probation_and_only_from_devices_that_were_admitted",
        "server/test_rollouts::test_installing_is_not_yet_success",
        "server/test_rollouts::test_only_committed_is_success_and_only_failures_are_failures",
    ]),
    5: ("the author of a rollout approves it", [
        "server/test_people::test_trap_5_the_author_of_a_rollout_never_approves_it_not_even_as_a_superuser",
    ]),
    6: ("poll jitter in the body breaks the entity tag", [
        f"{HERE}::test_trap_6_what_a_device_is_told_is_the_same_at_every_poll_and_jitter_is_its_own",
        "server/test_poll::test_an_idle_poll_is_answered_304_without_a_body",
        "protocol/test_cohorts::test_jitter_is_a_fixed_fraction",
    ]),
    7: ("a malformed threshold fails open", [
        f"{HERE}::test_trap_7_a_malformed_threshold_holds",
        f"{HERE}::test_trap_7_a_selector_that_cannot_be_read_admits_nobody",
        "server/test_policy::test_any_doubt_is_hold_or_worse_never_progress",
        "server/test_guard_evidence::test_trap_7_guards_that_cannot_be_read_hold_and_never_advance",
        "server/test_selection::test_any_text_parses_or_is_refused_and_never_means_every_device_by_accident",
    ]),
    8: ("counters are incremented, and race", [
        f"{HERE}::test_trap_8_counts_are_computed_so_telling_twice_counts_once",
        "server/test_rollouts::test_of_two_engines_that_decide_at_once_one_acts",
        "server/test_rollouts::test_of_two_people_who_act_at_once_one_is_told_to_look_again",
        "server/test_chaos::test_trap_8_counts_are_computed_and_changes_are_claimed",
    ]),
    9: ("polls write rows and block rollouts", [
        "server/test_poll::test_an_idle_poll_writes_nothing_and_asks_little",
        "server/test_fast_poll::test_trap_9_a_poll_writes_nothing_and_so_holds_no_rollout_up",
    ]),
    10: ("the device's credential is sent on to another host", [
        "sdk/test_transport::test_a_redirect_to_a_pinned_host_is_followed_without_the_credential",
        "sdk/test_transport::test_the_credential_is_sent_and_cannot_be_replaced_by_a_header",
    ]),
    11: ("a switch for anonymous downloads opens the whole device API", [
        f"{HERE}::test_trap_11_no_door_of_the_device_api_is_open_to_nobody",
        "server/test_doors::test_who_gets_in_is_what_the_table_says",
    ]),
    12: ("what a device denied is offered again at each poll", [
        f"{HERE}::test_trap_12_what_failed_on_a_device_is_not_offered_again_even_as_a_step_on_the_way",
        "server/test_people::test_trap_12_what_was_denied_is_never_offered_again",
        "server/test_rollouts::test_a_device_that_failed_is_not_offered_the_release_again",
        "server/test_poll::test_a_failure_takes_the_release_away_from_the_device_with_the_next_poll",
    ]),
    13: ("a periodic scan of all devices loads the database", [
        f"{HERE}::test_trap_13_a_new_device_is_admitted_without_any_scan_or_row_of_its_own",
        "server/test_fast_poll::test_trap_13_what_is_looked_at_now_and_then_does_not_grow_with_the_fleet",
        "server/test_guard_evidence::test_trap_13_what_a_tick_asks_does_not_grow_with_the_fleet",
        "server/test_counting::test_trap_13_a_tick_asks_as_much_of_nine_hundred_devices_as_of_ten",
    ]),
}  # fmt: skip
AWAITED: set[int] = set()  # traps that nothing holds yet


@cache
def names(path: str) -> set[str]:
    tree = ast.parse((TESTS / f"{path}.py").read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_is_held_by_tests_that_exist(trap: int) -> None:
    _, held_by = TRAPS[trap]
    assert [test for test in held_by if test.partition("::")[2] not in names(test.partition("::")[0])] == []
    assert bool(held_by) != (trap in AWAITED)


def test_there_are_thirteen_traps() -> None:
    assert list(TRAPS) == list(range(1, 14))


def gives(row: Any) -> str | None:
    (answer,) = selectors.assignments_for(row)
    return answer.release.version if answer.release else None


# --- 1, 7: stages ------------------------------------------------------------------------------------------------


def test_trap_1_a_stage_whose_devices_are_all_done_holds_where_too_few_succeeded() -> None:
    done = Tally(committed=8, failed=1, admitted=10)  # all ten have ended; one was withdrawn
    assert isinstance(policy.next_step(STAGE, done, NOW), Hold)
    assert policy.next_step(STAGE, GOOD, NOW) == Advance()


@pytest.mark.parametrize("threshold", ["0,9", None, float("nan"), 90, -1])
def test_trap_7_a_malformed_threshold_holds(threshold: Any) -> None:
    stage: StageRules = replace(STAGE, success_threshold=threshold)
    decision = policy.next_step(stage, GOOD, NOW)
    assert isinstance(decision, Hold)
    assert "malformed" in decision.reason
    assert not isinstance(policy.next_step(replace(stage, last=True), GOOD, NOW), Complete | Halt)


@pytest.mark.django_db
@pytest.mark.parametrize("column", ["selector", "exclude", "group", "exclude_group", "ring"])
def test_trap_7_a_selector_that_cannot_be_read_admits_nobody(column: str) -> None:
    """Wherever it stands. Read as "nothing is asked", it would admit everyone, or exclude nobody."""
    broken, row = group("broken"), device()
    named = {column: broken} if column in {"group", "exclude_group"} else {}
    stages = [StagePlan(ring=broken), StagePlan(percent=100)] if column == "ring" else [StagePlan(percent=100)]
    rollout = running(release(), stages=stages, **named)
    if column in {"selector", "exclude"}:
        Rollout.objects.filter(pk=rollout.pk).update(**{column: "site in (berlin"})
    type(broken).objects.update(selector="site in (berlin")
    snapshots.bump()
    assert gives(row) is None


# --- 2, 4, 8, 12, 13: devices ------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_trap_2_pausing_recalls_every_device_that_has_not_activated_yet() -> None:
    """In every stage: those of the ring that went first, too."""
    completed(release("1.0.0"))
    first = device("first", labels={"tier": "canary"})
    active = device("active", labels={"tier": "canary"}, runs={"digits": "1.1.0/default"})
    stages = [StagePlan(ring=group(tier=["canary"])), StagePlan(percent=100)]
    rollout = running(release("1.1.0"), stages=stages)
    assert (gives(first), gives(active)) == ("1.1.0", "1.1.0")
    services.pause(rollout=rollout, actor="ann")
    assert (gives(first), gives(active)) == ("1.0.0", "1.1.0")


@pytest.mark.django_db
def test_trap_4_success_is_counted_after_probation_and_only_from_devices_that_were_admitted() -> None:
    made = release("1.0.0")
    rollout = running(made, exclude="@name=stranger")
    inside, stranger = device("inside"), device("stranger")
    for kind in (DOWNLOADING, TESTING, PROBATION):
        services.note_events(inside, [event(kind, made, rollout=rollout)])
    services.note_events(stranger, [event(COMMITTED, made, rollout=rollout)])
    assert selectors.outcome_counts(rollout)["committed"] == 0
    services.note_events(inside, [event(COMMITTED, made, rollout=rollout)])
    assert selectors.outcome_counts(rollout)["committed"] == 1


def test_trap_6_what_a_device_is_told_is_the_same_at_every_poll_and_jitter_is_its_own() -> None:
    """Nothing of the answer depends on when it is asked: the policy has no clock, and jitter is the device's name."""
    rules = policy.RolloutRules(1, policy.RUNNING, policy.ReleaseRef("digits", "1.0.0", {}), "salt", 50)
    facts = policy.DeviceFacts("cam-1", policy.Traits.of({}, ["digits"]))
    answers = [policy.desired(policy.Snapshot({"digits": [rules]}), facts) for _ in range(3)]
    assert answers == [answers[0]] * 3
    assert jitter("cam-1", "poll") == jitter("cam-1", "poll") != jitter("cam-2", "poll")


@pytest.mark.django_db
def test_trap_8_counts_are_computed_so_telling_twice_counts_once() -> None:
    made = release("1.0.0")
    rollout = running(made)
    for row in devices(3):
        for _ in range(2):
            services.note_events(row, [event(FAILED, made, rollout=rollout)])
    assert selectors.outcome_counts(rollout)["failed"] == 3
    assert {field.name for field in Rollout._meta.get_fields()} & {"failures", "successes", "count"} == set()


@pytest.mark.django_db
def test_trap_11_no_door_of_the_device_api_is_open_to_nobody() -> None:
    from tests.server.test_doors import DOORS

    doors = {name: door for name, door in DOORS.items() if name.startswith("api/device/")}
    assert len(doors) >= 8
    assert [name for name, door in doors.items() if any("nobody" in callers for callers in door.values())] == []


@pytest.mark.django_db
def test_trap_12_what_failed_on_a_device_is_not_offered_again_even_as_a_step_on_the_way() -> None:
    completed(release("1.0.0"))
    floor, made = release("1.5.0"), release("2.0.0")
    made.variants.update(requires={"release": "1.5.0"})
    rollout = running(made)
    row = device(runs={"digits": "1.0.0/default"})
    assert gives(row) == "1.5.0"
    services.note_events(row, [event(FAILED, floor, rollout=rollout)])
    assert gives(row) == "1.0.0"
    assert Outcome.objects.get().state == "failed"


@pytest.mark.django_db
def test_trap_13_a_new_device_is_admitted_without_any_scan_or_row_of_its_own() -> None:
    """It is evaluated when it asks, from the compiled policy; others are not looked at, and nothing is written."""
    devices(20)
    running(release("1.0.0"))
    newcomer = device("newcomer")
    with CaptureQueriesContext(connection) as captured:
        answers = selectors.assignments_for(newcomer)
    assert answers[0].release is not None
    assert [query["sql"] for query in captured if "devices_device" in query["sql"]] == []
    assert all(query["sql"].lstrip().upper().startswith("SELECT") for query in captured)
    assert not Outcome.objects.exists()
