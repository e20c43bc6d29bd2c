"""The policy is pure: no database, no clock. What must never happen is stated for any numbers."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_sdk.protocol.names import ReleasePath
from fleet.devices.selection import parse
from fleet.rollouts import policy
from fleet.rollouts.policy import (
    Advance,
    Complete,
    DeviceFacts,
    Halt,
    Hold,
    ManifestRef,
    Pause,
    ReleaseRef,
    RolloutRules,
    Snapshot,
    StageRules,
    Tally,
    Traits,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
OLD = ReleaseRef("digits", "1.0.0", {"default": ManifestRef(10, "aa" * 32)})
NEW = ReleaseRef("digits", "1.1.0", {"default": ManifestRef(11, "bb" * 32), "int8": ManifestRef(12, "cc" * 32)})
CAM = DeviceFacts("cam-1", Traits.of({"site": "berlin"}, ["digits"]))
STANDING = RolloutRules(1, policy.COMPLETED, OLD, "salt", 100)
RUNNING = RolloutRules(2, policy.RUNNING, NEW, "salt", 100)

names = st.from_regex(r"[a-z0-9]{1,12}", fullmatch=True)
percents = st.floats(0.01, 100)
states = st.sampled_from(
    [
        policy.DRAFT,
        policy.AWAITING_APPROVAL,
        policy.RUNNING,
        policy.PAUSED,
        policy.HALTED,
        policy.CANCELLED,
        policy.COMPLETED,
    ]
)


def wanted(*rollouts: RolloutRules, device: DeviceFacts = CAM) -> str | None:
    """The version that the device should run, with the newest rollout first."""
    release = policy.desired(Snapshot({"digits": rollouts}), device)["digits"].release
    return release.version if release else None


# --- what a device should run ------------------------------------------------------------------------------------


def test_without_any_rollout_a_device_keeps_what_it_runs() -> None:
    assert wanted() is None


def test_the_newest_rollout_that_admits_a_device_wins() -> None:
    assert wanted(RUNNING, STANDING) == "1.1.0"
    assert wanted(replace(RUNNING, percent=0.0), STANDING) == "1.0.0"


@pytest.mark.parametrize("state", [policy.DRAFT, policy.AWAITING_APPROVAL, policy.HALTED, policy.CANCELLED])
def test_a_rollout_that_is_not_in_force_admits_nobody(state: str) -> None:
    ran = replace(CAM, runs={"digits": "1.1.0/default"})
    assert wanted(replace(RUNNING, state=state), STANDING, device=ran) == "1.0.0"


def test_a_paused_rollout_admits_only_those_who_already_run_it() -> None:
    paused = replace(RUNNING, state=policy.PAUSED)
    assert wanted(paused, STANDING) == "1.0.0"
    assert wanted(paused, STANDING, device=replace(CAM, runs={"digits": "1.1.0/int8"})) == "1.1.0"
    assert wanted(paused, STANDING, device=replace(CAM, runs={"digits": "1.1.0.1/int8"})) == "1.0.0"


def test_a_completed_rollout_is_the_standing_answer_for_its_group() -> None:
    narrow = replace(STANDING, selector=parse("site=paris"))
    assert wanted(STANDING, device=replace(CAM, name="just-enrolled")) == "1.0.0"
    assert wanted(narrow) is None


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("", "1.1.0"),
        ("site in (berlin, paris)", "1.1.0"),
        ("site=paris", None),
        ("hw=a", None),
        ("@name=cam-1", "1.1.0"),
    ],
)
def test_a_rollout_admits_only_its_group(selector: str, expected: str | None) -> None:
    assert wanted(replace(RUNNING, selector=parse(selector))) == expected


def test_a_device_that_failed_in_a_rollout_is_not_offered_it_again() -> None:
    assert wanted(RUNNING, STANDING, device=replace(CAM, failed=frozenset({2}))) == "1.0.0"
    assert wanted(replace(RUNNING, state=policy.COMPLETED), device=replace(CAM, failed=frozenset({2}))) is None


def test_a_pin_overrides_every_rollout() -> None:
    assert wanted(RUNNING, device=replace(CAM, pins={"digits": OLD})) == "1.0.0"


def test_a_pin_to_a_release_that_is_gone_changes_nothing_on_the_device() -> None:
    assert wanted(RUNNING, device=replace(CAM, pins={"digits": None})) is None


def test_every_model_of_the_device_is_answered_and_no_other() -> None:
    device = replace(CAM, traits=Traits.of({}, ["digits", "wine"]))
    answers = policy.desired(Snapshot({"digits": [RUNNING], "other": [RUNNING]}), device)
    assert {model: answer.release for model, answer in answers.items()} == {
        "digits": ReleasePath("digits", "1.1.0", "default"),
        "wine": None,
    }


def test_the_answer_carries_manifest_and_conditions() -> None:
    answer = policy.desired(Snapshot({"digits": [replace(RUNNING, urgent=True)]}), CAM)["digits"]
    assert (answer.length, answer.sha256, answer.rollout, answer.urgent) == (11, "bb" * 32, "2", True)


def test_a_release_without_a_variant_is_never_assigned() -> None:
    assert wanted(replace(RUNNING, release=replace(NEW, variants={}))) is None


@given(salt=names, device=names, low=percents, high=percents)
def test_cohorts_are_nested(salt: str, device: str, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert policy.in_cohort(salt, device, low) <= policy.in_cohort(salt, device, high)


@given(salt=names, device=names)
def test_a_hundred_percent_is_everybody_and_zero_is_nobody(salt: str, device: str) -> None:
    assert policy.in_cohort(salt, device, 100)
    assert not policy.in_cohort(salt, device, 0)
    assert not policy.in_cohort(salt, device, float("nan"))


@pytest.mark.parametrize("percent", [1, 10, 50])
def test_a_cohort_is_as_large_as_its_percentage_says(percent: float) -> None:
    admitted = sum(policy.in_cohort("salt", f"device-{n}", percent) for n in range(20_000))
    assert abs(admitted / 20_000 - percent / 100) < 0.01


@given(state=states, percent=percents, site=st.sampled_from(["berlin", "paris"]), failed=st.booleans())
def test_the_answer_is_always_the_release_of_a_rollout_that_admits_the_device(
    state: str, percent: float, site: str, failed: bool
) -> None:
    rollout = replace(RUNNING, state=state, percent=percent, selector=parse(f"site={site}"))
    device = replace(CAM, failed=frozenset({2} if failed else ()))
    assert wanted(rollout, STANDING, device=device) == ("1.1.0" if policy.admits(rollout, device) else "1.0.0")
    if failed or site == "paris" or state not in policy.IN_FORCE:
        assert not policy.admits(rollout, device)


@given(low=percents, high=percents)
def test_growing_a_rollout_never_takes_its_release_away_from_a_device(low: float, high: float) -> None:
    low, high = sorted((low, high))
    if wanted(replace(RUNNING, percent=low), STANDING) == "1.1.0":
        assert wanted(replace(RUNNING, percent=high), STANDING) == "1.1.0"


# --- whether a stage may pass ------------------------------------------------------------------------------------

STAGE = StageRules(
    percent=10, soak_seconds=60, min_reports=2, success_threshold=0.9, failure_budget=1, last=False,
    since=NOW - timedelta(seconds=60),
)  # fmt: skip
GOOD = Tally(committed=9, failed=1, admitted=10)

counts = st.integers(0, 50)
stages = st.builds(
    StageRules,
    percent=percents,
    soak_seconds=st.integers(0, 200),
    min_reports=counts,
    success_threshold=st.floats(0, 1),
    failure_budget=counts,
    last=st.booleans(),
    on_failure=st.sampled_from([policy.HOLD, policy.PAUSE, policy.ROLL_BACK]),
    since=st.integers(0, 300).map(lambda seconds: NOW - timedelta(seconds=seconds)),
)
tallies = st.builds(Tally, counts, counts, counts)
garbage = st.sampled_from([None, float("nan"), float("inf"), -1, "9", [], True, object()])


def passes(decision: policy.Decision) -> bool:
    return isinstance(decision, Advance | Complete)


def test_a_good_stage_advances_and_the_last_one_completes() -> None:
    assert policy.next_step(STAGE, GOOD, NOW) == Advance()
    assert policy.next_step(replace(STAGE, last=True), GOOD, NOW) == Complete()


@pytest.mark.parametrize(
    ("on_failure", "decision"), [(policy.ROLL_BACK, Halt), (policy.PAUSE, Pause), (policy.HOLD, Hold), ("typo", Halt)]
)
def test_a_spent_failure_budget_is_answered_as_the_rollout_says(on_failure: str, decision: type) -> None:
    answer = policy.next_step(replace(STAGE, on_failure=on_failure), Tally(100, 2, 102), NOW)
    assert isinstance(answer, decision)
    assert "2 failed, 1 allowed" in answer.reason  # type: ignore[union-attr]


def test_errors_are_looked_at_before_success_and_before_the_soak() -> None:
    fresh = replace(STAGE, since=NOW, min_reports=50)
    assert isinstance(policy.next_step(fresh, Tally(0, 2), NOW), Halt)


def test_a_budget_of_zero_means_any_failure() -> None:
    assert isinstance(policy.next_step(replace(STAGE, failure_budget=0), Tally(99, 1, 100), NOW), Halt)


@pytest.mark.parametrize(
    ("change", "tally", "reason"),
    [
        ({"since": NOW - timedelta(seconds=59)}, GOOD, "soaking"),
        ({"min_reports": 11}, GOOD, "waiting for reports: 10 of 11"),
        ({}, Tally(8, 1, 10), "waiting for success: 8 of 10 committed, 9 needed"),
        ({}, Tally(9, 1, 12), "waiting for success"),
        ({}, Tally(9, 1), "not counted"),
        ({"since": NOW}, Tally(9, 1), "soaking"),
        ({"since": None}, GOOD, "no beginning"),
        ({"since": datetime(2026, 1, 1)}, GOOD, "no beginning"),  # no zone
    ],
)
def test_a_stage_holds_and_says_why(change: dict[str, Any], tally: Tally, reason: str) -> None:
    decision = policy.next_step(replace(STAGE, **change), tally, NOW)
    assert isinstance(decision, Hold)
    assert reason in decision.reason


def test_nobody_admitted_is_not_success() -> None:
    assert isinstance(policy.next_step(STAGE, Tally(0, 0, 0), NOW), Hold)


def test_a_first_release_may_be_told_to_need_no_device() -> None:
    free = replace(STAGE, min_reports=0, success_threshold=0.0)
    assert policy.next_step(free, Tally(0, 0, 0), NOW) == Advance()


@given(stage=stages, tally=tallies)
def test_a_stage_passes_only_when_everything_speaks_for_it(stage: StageRules, tally: Tally) -> None:
    if passes(policy.next_step(stage, tally, NOW)):
        assert stage.since is not None
        assert tally.failed <= stage.failure_budget
        assert NOW - stage.since >= timedelta(seconds=stage.soak_seconds)
        assert tally.committed + tally.failed >= stage.min_reports
        assert tally.committed >= stage.success_threshold * (tally.admitted or 0) - 1e-6


@given(
    stage=stages,
    tally=tallies,
    bad=garbage,
    where=st.sampled_from(
        ["percent", "soak_seconds", "min_reports", "success_threshold", "failure_budget", "since", "committed",
         "failed", "admitted", "now"]
    ),
)  # fmt: skip
def test_any_doubt_is_hold_or_worse_never_progress(stage: StageRules, tally: Tally, bad: Any, where: str) -> None:
    now: Any = bad if where == "now" else NOW
    if hasattr(stage, where):
        stage = replace(stage, **{where: bad})
    elif hasattr(tally, where):
        tally = replace(tally, **{where: bad})
    assert not passes(policy.next_step(stage, tally, now))


@given(stage=stages, tally=tallies, more=counts)
def test_more_failures_never_help(stage: StageRules, tally: Tally, more: int) -> None:
    """Devices that had not answered fail: what did not pass before does not pass now."""
    worse = replace(tally, failed=tally.failed + more)
    if not passes(policy.next_step(stage, tally, NOW)) and tally.committed + tally.failed >= stage.min_reports:
        assert not passes(policy.next_step(stage, worse, NOW))
    if isinstance(policy.next_step(stage, tally, NOW), Halt):
        assert isinstance(policy.next_step(stage, worse, NOW), Halt)


@given(stage=stages, tally=tallies, more=counts, later=st.integers(0, 1_000))
def test_more_success_and_more_time_never_hurt(stage: StageRules, tally: Tally, more: int, later: int) -> None:
    """Devices that were admitted commit."""
    better = replace(tally, committed=tally.committed + more)
    if passes(policy.next_step(stage, tally, NOW)):
        assert passes(policy.next_step(stage, better, NOW + timedelta(seconds=later)))


@given(stage=stages, tally=tallies)
def test_counting_the_admitted_is_only_spared_where_it_could_not_matter(stage: StageRules, tally: Tally) -> None:
    quick = replace(tally, admitted=None)
    if not policy.enough_reports(stage, quick, NOW):
        assert not passes(policy.next_step(stage, tally, NOW))
