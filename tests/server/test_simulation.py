"""A month in a second: the simulator plays the server's own policy, and the same seed gives the same play."""

import json
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from django.core.management import CommandError, call_command

from device_sdk.protocol.cohorts import cohort
from fleet.rollouts import guards, policy
from fleet.rollouts.simulation import devices, picture
from fleet.rollouts.simulation.devices import Devices
from fleet.rollouts.simulation.play import play
from fleet.rollouts.simulation.scenario import Quality, Scenario, Stage
from tests.fleet_world import device, release
from tests.fleet_world import running as started

STAGES = (Stage(5, budget=20), Stage(100, budget=20))
SMALL = Scenario(devices=2_000, days=12, releases=(Quality("1.1.0", 0.001),), stages=STAGES)


def told(scenario: Scenario) -> list[tuple[str, str]]:
    return [(each.version, each.what) for each in play(scenario).happenings]


def test_a_good_release_reaches_every_device_that_comes_back() -> None:
    played = play(SMALL)
    assert [each.what for each in played.happenings] == ["started", "advanced", "completed"]
    last = played.moments[-1].versions
    assert last["1.1.0"] > 0.95 * SMALL.devices
    assert sum(last.values()) == SMALL.devices


def test_a_bad_release_is_halted_and_those_who_had_it_go_back() -> None:
    scenario = Scenario(devices=2_000, days=6, releases=(Quality("1.1.0", 0.5), Quality("1.2.0", 0.0)), stages=STAGES)
    assert told(scenario)[:3] == [("1.1.0", "started"), ("1.1.0", "halted"), ("1.2.0", "started")]
    assert play(scenario).moments[-1].versions["1.1.0"] == 0


def test_the_guard_halts_where_the_budget_does_not_and_not_a_good_release() -> None:
    """The guard's own code, looked at in each step, as the engine does."""
    generous = (Stage(20, budget=10_000), Stage(100, budget=10_000))
    terms = guards.Terms({guards.FAILURES: guards.GuardTerms(effect=0.02)})
    bad = Scenario(devices=2_000, days=4, releases=(Quality("1.1.0", 0.15),), stages=generous)
    assert ("1.1.0", "halted") not in told(bad)
    found = play(replace(bad, guards=terms)).happenings[-1]
    assert (found.what, found.reason.split(":")[0]) == ("halted", "update failures")
    good = replace(bad, guards=terms, releases=(Quality("1.1.0", 0.01),))
    assert [what for _, what in told(good)] == ["started", "advanced", "completed"]


def test_the_same_seed_gives_the_same_play_and_another_one_another() -> None:
    plays = [play(Scenario(devices=300, days=2, seed=seed, stages=STAGES)) for seed in (1, 1, 2)]
    assert plays[0] == plays[1]
    assert plays[0] != plays[2]


def test_every_device_gets_what_the_policy_says_to_it_alone() -> None:
    """The answer of its bucket is its own: asked one by one, by what it runs and whether it failed."""
    fleet = Devices(Scenario(devices=400), ["1.0.0", "1.1.0"])
    fleet.place("salt")
    refs = [policy.ReleaseRef("model", each, {"default": policy.ManifestRef(1, "")}) for each in ("1.0.0", "1.1.0")]
    rules = [policy.RolloutRules(0, policy.COMPLETED, refs[0], "old", 100)]
    for state, percent in ((policy.RUNNING, 30.0), (policy.PAUSED, 30.0)):
        newest = policy.RolloutRules(1, state, refs[1], "salt", percent)
        snapshot = policy.Snapshot(rollouts={"model": [newest, *rules]})
        fleet.runs = np.arange(400, dtype=np.int8) % 2
        fleet.said = np.where(np.arange(400) % 7 == 0, devices.FAILED, devices.SILENT).astype(np.int8)
        fleet.show(snapshot, rollout=1)
        assert [f"1.{place}.0" for place in fleet.wanted()] == [alone(snapshot, fleet, each) for each in range(400)]
    assert {cohort("salt", devices.name(each)) < 3_000 for each in range(400)} == {True, False}


def alone(snapshot: policy.Snapshot, fleet: Devices, number: int) -> str:
    facts = policy.DeviceFacts(
        name=devices.name(number),
        traits=devices.TRAITS,
        runs={"model": f"1.{fleet.runs[number]}.0/default"},
        failed=frozenset({1} if fleet.said[number] == devices.FAILED else ()),
    )
    wanted = policy.desired(snapshot, facts)["model"].release
    assert wanted
    return wanted.version


# --- the command -------------------------------------------------------------------------------------------------


def simulate(*arguments: Any) -> str:
    out = StringIO()
    call_command("simulate", *map(str, arguments), stdout=out)
    return out.getvalue()


def test_the_command_tells_and_draws(tmp_path: Any) -> None:
    said = simulate("--devices", 500, "--days", 8, "--stage", 10, "--stage", 100, "--budget", 0.05, "--out", tmp_path)
    assert "1.1.0      completed at stage 2" in said
    curve = (tmp_path / "adoption.svg").read_text()
    assert curve.startswith("<svg")
    assert "polyline" in curve
    rows = (tmp_path / "adoption.csv").read_text().splitlines()
    assert rows[0] == "at,1.0.0,1.1.0,updating,failed"
    assert len(rows) == 1 + 8 * 24
    assert json.loads((tmp_path / "adoption.json").read_text())["scenario"]["devices"] == 500


@pytest.mark.parametrize(
    "wrong",
    [
        ["--release", "1.1.0:2"],
        ["--release", "1.1.0:x"],
        ["--stage", 60, "--stage", 20],
        ["--devices", -5],
        ["--days", 0],
    ],
)
def test_nonsense_is_refused(wrong: list[Any]) -> None:
    with pytest.raises(CommandError):
        simulate("--devices", 10, *wrong)


@pytest.mark.django_db
def test_a_real_rollout_is_played_on_a_fleet_of_its_size() -> None:
    for number in range(30):
        device(f"cam-{number}")
    rollout = started(release("1.1.0"))
    assert "30 virtual devices" in simulate("--rollout", rollout.pk, "--days", 2)
    with pytest.raises(CommandError, match="there is no rollout"):
        simulate("--rollout", rollout.pk + 1)


def test_text_in_the_picture_is_escaped() -> None:
    played = play(Scenario(devices=10, days=1, releases=(Quality("<b>", 0.0),), stages=STAGES))
    assert "<b>" not in picture.svg(played, "<script>")
