"""Counts over the whole fleet: the same as one device after the other, and no dearer with more devices."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from device_sdk.protocol.cohorts import cohort
from fleet.devices.models import Device, Group, ModelStatus
from fleet.releases.models import Variant
from fleet.rollouts import objective, policy, selectors, services, snapshots, tasks
from fleet.rollouts.counting import admission, cohorts, summary, survey, tallies
from fleet.rollouts.counting.admission import Admission
from fleet.rollouts.counting.cohorts import Cohorts, OverBudgetError, Places
from fleet.rollouts.models import Outcome, Rollout
from fleet.rollouts.services import StagePlan
from fleet.rollouts.terms.pace import Pace
from tests.fleet_world import completed, device, devices, group, release, running
from tests.server import slow_counts

pytestmark = pytest.mark.django_db
State = Rollout.State
ago = lambda **span: timezone.now() - timedelta(**span)  # noqa: E731
VERSIONS = ("1.0.0", "1.1.0", "1.2.0")
LACKING = 2  # of three devices the last has an SDK too old for 1.2.0
WHEN_IT_BEGAN = -1  # instead of minutes: at the very moment of the first rollout's stage
RUNS = st.sampled_from([None, {}, *({"digits": f"{version}/default"} for version in VERSIONS)])


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallies.Tallies, "_last", None)
    monkeypatch.setattr(tallies.Tallies, "_kept", {})


# Each rollout: version, state, percent, its group's site, minutes since its stage began, excludes, ring.
ROLLOUTS = st.lists(
    st.tuples(
        st.sampled_from(VERSIONS),
        st.sampled_from([State.RUNNING, State.RUNNING, State.PAUSED, State.COMPLETED, State.HALTED]),
        st.sampled_from([0.5, 30.0, 60.0, 100.0]),
        st.sampled_from(["", "", "north", "south"]),
        st.sampled_from([1, 60]),
        st.sampled_from(["", "", "site=south", "@name in (cam-1, cam-2)"]),  # excluded
        st.sampled_from(["", "", "site=north", "@name=cam-3"]),  # a ring that goes first
    ),
    min_size=1,
    max_size=4,
)
# Each device: site, what it runs, minutes since it was seen, pin, outcomes by rollout, last status, refuses, models.
DEVICES = st.lists(
    st.tuples(
        st.sampled_from(["north", "south"]),
        RUNS,
        st.sampled_from([None, 0, 5, 30, 120, WHEN_IT_BEGAN]),
        st.sampled_from(["", "", "", "1.0.0", "0.9.0"]),
        st.lists(st.sampled_from(["", *Outcome.State.values]), min_size=4, max_size=4),
        st.sampled_from(["", "waiting 1.1.0", "testing 1.1.0", "committed 1.0.0", "waiting 1.2.0"]),
        st.sampled_from([False, False, False, True]),
        st.sampled_from([["digits"], ["digits", "wine"], ["wine"]]),
        st.sampled_from([Device.State.ACTIVE, Device.State.ACTIVE, Device.State.REVOKED]),
    ),
    max_size=12,
)


def rolled(version: str, *, state: str = State.RUNNING, percent: float = 100.0, exclude: str = "") -> tuple[Any, ...]:
    return (version, state, percent, "", 60, exclude, "")


def entry(*outcomes: str, runs: Any = None, seen: int | None = 0, status: str = "", refuses: bool = False) -> Any:
    """`outcomes` by rollout, the oldest first."""
    padded = [*outcomes, "", "", "", ""][:4]
    return ("north", runs, seen, "", padded, status, refuses, ["digits"], Device.State.ACTIVE)


@example([rolled("1.1.0"), rolled("1.2.0")], [entry("", "failed"), entry("", "failed"), entry("updating", "failed")])
@example([rolled("1.1.0")], [entry(seen=WHEN_IT_BEGAN), entry(seen=None), entry(seen=30, status="testing 1.1.0")])
@example([rolled("1.1.0")], [entry(seen=None, refuses=True), entry(refuses=True, status="waiting 1.1.0")])
@example([rolled("1.2.0")], [entry(), entry(), entry(seen=None), entry()])
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(drawn=ROLLOUTS, entries=DEVICES)
def test_the_fast_counts_are_those_of_one_device_after_the_other(drawn: list[Any], entries: list[Any]) -> None:
    with transaction.atomic():
        rollouts = make_rollouts(drawn)
        make_devices(entries, rollouts)
        compare(rollouts)
        transaction.set_rollback(True)
    snapshots._kept = None


def compare(rollouts: list[Rollout]) -> None:
    look = Admission(snapshots.current())
    for rollout in rollouts:
        assert tallies.counted(rollout, look) == slow_counts.tally(rollout)
        assert tallies.progress(rollout) == slow_counts.progress(rollout)
    found, ids = list(survey.behind(look)), look.roster.ids
    fast = [(int(ids[place]), each.model, each.why) for each in found for place in each.places]
    slow = slow_counts.laggards()
    assert set(fast) == slow
    assert len(fast) == len(slow)


def make_rollouts(drawn: list[Any]) -> list[Rollout]:
    releases = {version: release(version) for version in VERSIONS}
    Variant.objects.filter(release=releases["1.2.0"]).update(requires={"sdk": "2.0.0"})
    groups = {"": None, "north": group("north", site=["north"]), "south": group("south", site=["south"])}
    made = []
    for number, (version, state, percent, site, minutes, exclude, ring) in enumerate(drawn):
        canary = Group.objects.create(name=f"ring-{number}", selector=ring) if ring else None
        stages = [*([StagePlan(0, ring=canary)] if canary else []), StagePlan(100)]
        terms = {"release": releases[version], "group": groups[site], "stages": stages, "exclude": exclude}
        row = services.create(**terms, actor="ann")
        row.stages.filter(ring=None).update(percent=percent)
        since = ago(minutes=minutes)
        changes = {"state": state, "salt": f"salt-{number}", "started_at": since, "stage_since": since}
        changes["stage_index"] = len(stages) - 1
        Rollout.objects.filter(pk=row.pk).update(**changes)
        made.append(Rollout.objects.select_related("release__model", "group", "exclude_group").get(pk=row.pk))
    snapshots.bump()
    return made


def make_devices(entries: list[Any], rollouts: list[Rollout]) -> None:
    for number, (site, runs, minutes, pin, outcomes, status, refuses, models, state) in enumerate(entries):
        row = device(
            f"cam-{number}", runs=runs, labels={"site": site}, model_names=models, state=state,
            last_seen=rollouts[0].stage_since if minutes == WHEN_IT_BEGAN else _seen(minutes),
            sdk="1.0.0" if number % 3 == LACKING else "",
            pins={"digits": pin} if pin and "digits" in models else {},
            refusal={"code": "expired", "message": "", "model": "", "at": ago().isoformat()} if refuses else {},
        )  # fmt: skip
        for rollout, outcome in zip(rollouts, outcomes, strict=False):
            if outcome:
                again = ago() if outcome == "failed" and number % 2 else None  # to be tried again
                Outcome.objects.create(rollout=rollout, device=row, state=outcome, retry_at=again)
        if status:
            said, version = status.split()
            path = f"digits/{version}/default"
            ModelStatus.objects.create(device=row, model="digits", state=said, release=path, since=ago())


def _seen(minutes: int | None) -> Any:
    return None if minutes is None else ago(minutes=minutes)


# --- no scan of rows ---------------------------------------------------------------------------------------------


def queries(look: Any) -> int:
    with CaptureQueriesContext(connection) as captured:
        look()
    return len(captured)


def test_trap_13_a_tick_asks_as_much_of_nine_hundred_devices_as_of_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    """hawkBit #983: at 1.2 M devices its periodic scan of all devices loads the database."""
    monkeypatch.setattr(snapshots, "MAX_AGE", 1e9)
    rollout = running(release("1.1.0"), stages=[StagePlan(100, success_threshold=1.0)])
    devices(10)
    Outcome.objects.bulk_create(
        Outcome(rollout=rollout, device=row, state="committed") for row in Device.objects.all()[:2]
    )
    services.tick()
    few = queries(services.tick)
    bare = [Device(name=f"more-{n}", model_names=["digits"], last_seen=timezone.now()) for n in range(900)]
    Device.objects.bulk_create(bare)
    services.tick()
    assert queries(services.tick) == few
    assert "2 of 910 committed" in Rollout.objects.get().reason


def test_a_tick_asks_for_the_outcomes_of_all_rollouts_at_once_and_for_no_device() -> None:
    """Nothing speaks for passing any stage: what is read is outcomes, by as many queries whatever runs.

    To be tried again, taking too long, by state, and failures that are not final.
    """
    asked = []
    for number in range(3):
        running(release(f"1.{number}.0"), stages=[StagePlan(100, min_reports=5)])
        services.tick()
        asked.append(captured_tables(services.tick))
    assert [tables.count("rollouts_outcome") for tables in asked] == [4, 4, 4]
    assert len({len(tables) for tables in asked}) == 1, asked
    assert not any("devices_device" in tables for tables in asked)


def captured_tables(look: Any) -> list[str]:
    with CaptureQueriesContext(connection) as captured:
        look()
    asked = [query["sql"] for query in captured.captured_queries if "SAVEPOINT" not in query["sql"]]  # the test's
    return [sql.split("FROM ", 1)[-1].split()[0].strip('"') for sql in asked]


def test_a_large_fleet_is_counted_again_only_when_the_older_count_would_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallies, "LARGE", 5)
    monkeypatch.setattr(tallies, "SHARE", 1e9)
    monkeypatch.setattr(tallies, "LOOKS", 0)
    looks = []
    count = tallies.counted
    monkeypatch.setattr(tallies, "counted", lambda *given: looks.append(1) or count(*given))
    entries, rollout = devices(10), running(release("1.1.0"), stages=[StagePlan(100, success_threshold=0.8)])
    for number, row in enumerate(entries[:8], start=1):
        Outcome.objects.create(rollout=rollout, device=row, state="committed")
        services.tick()
        assert len(looks) == (1 if number < 8 else 2)
        assert Rollout.objects.get().state == (State.RUNNING if number < 8 else State.COMPLETED)


def test_a_large_fleet_is_looked_at_seldom_and_an_older_look_never_passes_a_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tallies, "LARGE", 5)
    monkeypatch.setattr(tallies, "LOOKS", 1e9)
    monkeypatch.setattr(tallies, "SHARE", 0)
    entries, rollout = devices(10), running(release("1.1.0"), stages=[StagePlan(100, success_threshold=1.0)])
    Outcome.objects.create(rollout=rollout, device=entries[0], state="committed")
    services.tick()
    assert "1 of 10 committed" in Rollout.objects.get().reason
    Device.objects.filter(pk__in=[each.pk for each in entries[1:]]).update(state=Device.State.REVOKED)
    newcomer = device("newcomer")
    for each in [*entries[1:], newcomer]:
        Outcome.objects.create(rollout=rollout, device=each, state="committed")
    assert "devices_device" not in captured_tables(services.tick)
    assert Rollout.objects.get().reason == "the admitted devices are not counted"
    tallies.Tallies._last = replace(tallies.Tallies._last, until=0.0)
    services.tick()
    assert Rollout.objects.get().state == State.COMPLETED


def test_a_tick_without_time_holds_and_the_next_one_gets_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohorts of a large fleet are hashed over several ticks; meanwhile nothing passes."""
    monkeypatch.setattr(cohorts, "KEPT_FROM", 1)
    monkeypatch.setattr(admission, "KEPT_FROM", 1)
    monkeypatch.setattr(cohorts, "CHUNK", 4)
    monkeypatch.setattr(tallies, "BUDGET", 1e-9)
    entries = devices(20)
    rollout = running(release("1.1.0"), stages=[StagePlan(50, success_threshold=0), StagePlan(100)])
    Outcome.objects.create(rollout=rollout, device=entries[0], state="committed")
    seen = []
    for _ in range(8):
        services.tick()
        row = Rollout.objects.get()
        seen.append((row.stage_index, row.reason))
    assert seen[0] == (0, "the admitted devices are not counted")
    assert seen[-1][0] == 1


def test_cohorts_are_hashed_once_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohorts, "KEPT_FROM", 1)
    monkeypatch.setattr(admission, "KEPT_FROM", 1)
    hashed: list[str] = []
    place = policy.in_cohort
    monkeypatch.setattr(
        policy, "in_cohort", lambda salt, name, percent: hashed.append(name) or place(salt, name, percent)
    )
    devices(30)
    ids = np.array(Device.objects.order_by("-pk").values_list("pk", flat=True))
    kept = Cohorts()
    first = kept.inside("salt", 40, ids, until=float("inf"))
    names = dict(Device.objects.values_list("pk", "name"))
    assert first.tolist() == [cohort("salt", names[pk]) < 4_000 for pk in ids.tolist()]
    device("newcomer")
    more = np.array(Device.objects.order_by("pk").values_list("pk", flat=True))
    again = kept.inside("salt", 40, more, until=float("inf"))
    assert again[:30].tolist() == first[::-1].tolist()
    assert sorted(hashed) == sorted([*names.values(), "newcomer"])


def test_hashing_stops_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohorts, "KEPT_FROM", 1)
    monkeypatch.setattr(admission, "KEPT_FROM", 1)
    devices(3)
    ids = np.array(Device.objects.values_list("pk", flat=True))
    with pytest.raises(OverBudgetError):
        Cohorts().inside("salt", 40, ids, until=0.0)


def test_whose_cohorts_are_kept_is_hashed_once_and_over_several_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohorts, "CHUNK", 10)
    devices(25)
    ids = np.array(Device.objects.order_by("-pk").values_list("pk", flat=True))
    kept = Places(salts=1)
    for _ in range(3):
        with pytest.raises(OverBudgetError):
            kept.of("salt", ids, until=0.0)
    names = dict(Device.objects.values_list("pk", "name"))
    assert queries(lambda: kept.of("salt", ids, until=0.0)) == 0
    assert kept.of("salt", ids, until=0.0).tolist() == [cohort("salt", names[pk]) for pk in ids.tolist()]


def test_what_traits_are_made_of_is_what_the_database_hashes() -> None:
    device(labels={"site": "berlin"})
    (row,) = Device.objects.only(*selectors.TRAITS)
    assert queries(lambda: selectors.traits_of(row)) == 0, "traits_of reads a field that TRAITS does not name"


# --- starting ----------------------------------------------------------------------------------------------------


def test_starting_a_rollout_writes_no_row_for_a_device() -> None:
    devices(30, runs={"digits": "1.0.0/default"})
    completed(release("1.0.0"))
    rollout = running(release("1.1.0"))
    assert not Outcome.objects.filter(rollout=rollout).exists()


# --- pages -------------------------------------------------------------------------------------------------------


def test_a_large_fleet_is_counted_by_a_task_and_the_page_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(tasks.summarise, "delay", lambda: counted.append(1))
    monkeypatch.setattr(summary, "SMALL", 5)
    devices(6, runs={"digits": "1.0.0/default"})
    rollout = running(release("1.1.0"))
    with committed():
        first = summary.of([rollout])
        again = summary.of([rollout])
    assert (first, again, counted) == (summary.NOTHING, summary.NOTHING, [1])
    summary.count()
    shown = summary.of([rollout])
    assert (shown.total, shown.reasons, len(shown.rows)) == (6, {"not_polled": 6}, 6)
    assert shown.progress == {rollout.pk: selectors.progress(rollout)}
    assert shown.as_of is not None
    assert counted == [1]
    device("newcomer")
    Outcome.objects.create(rollout=rollout, device=Device.objects.latest("pk"), state="committed")
    found = summary.progress(rollout)
    assert (found.as_of, found.progress.total, found.progress.committed) == (shown.as_of, 6, 1)


def test_a_large_fleet_that_was_never_counted_has_no_forecast_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "SMALL", 1)
    monkeypatch.setattr(tasks.summarise, "delay", lambda: None)
    devices(6)
    rollout = running(release("1.1.0"), pace=Pace(objective_percent=90, objective_days=1))
    with committed():
        found = objective.of(rollout)
    assert (found.verdict, found.why) == ("unknown", "the devices are being counted: look again in a minute")
    summary.count()
    assert "being counted" not in objective.of(rollout).why


def test_of_a_small_fleet_the_page_is_of_now() -> None:
    devices(3, runs={"digits": "1.0.0/default"})
    rollout = running(release("1.1.0"))
    shown = summary.of([rollout])
    assert (shown.total, shown.as_of) == (3, None)


def test_laggards_are_explained_by_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(7, runs={"digits": "1.0.0/default"})
    running(release("1.1.0"))
    pages = survey.Pages("digits")
    explained: list[int] = []
    explain = survey.explain
    monkeypatch.setattr(survey, "explain", lambda pairs: explained.append(len(pairs)) or explain(pairs))
    assert len(pages) == 7
    assert [row.why for row in pages[2:5]] == ["not_polled"] * 3
    assert explained == [3]


def committed() -> Any:
    from django.test import TestCase

    return TestCase.captureOnCommitCallbacks(execute=True)
