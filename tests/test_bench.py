"""The benchmarks run, each figure has its baseline, and the page shows them. What they measure is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.bench.__main__ import NAMES, RESULTS
from deploy.bench.measure import Row, Section, interleaved
from deploy.bench.report import page

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = {"wrapper": 3, "swap": 19, "store": 2, "memory": 3, "poll": 4, "signing": 2, "wire": 4}


@pytest.fixture(scope="module")
def measured():
    """A process of its own: settings, a database and a web server that are no test's."""
    command = [sys.executable, "-m", "deploy.bench", "--tiny", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.xdist_group("bench")
@pytest.mark.parametrize("name", NAMES)
def test_every_figure_stands_beside_a_baseline(measured, name):
    section = measured[name]
    assert len(section["rows"]) == EXPECTED[name]
    for row in section["rows"]:
        assert row["value"] > 0, row
        assert row["baseline"] > 0, row
        assert row["against"], row


@pytest.mark.xdist_group("bench")
def test_no_call_fails_during_a_swap(measured):
    counted = [row for row in measured["swap"]["rows"] if row["unit"] == "calls"]
    assert [row["met"] for row in counted] == [True] * 3, counted


def test_a_missed_bar_is_called_missed():
    rows = [
        Row("fast", 1.0, "us", 2.0, "slow", "<= 2 us", met=True),
        Row("late", 3.0, "us", 2.0, "slow", "<= 2 us", met=False),
    ]
    text = page([Section("Speed", rows)])
    assert "2 bars, 1 missed" in text
    assert "| late | 3 us | 2 us | slow | x 1.50 | <= 2 us | **missed** |" in text


def test_every_action_has_its_turn_in_each_round():
    turns: list[str] = []
    actions = {name: lambda name=name: turns.append(name) for name in "ab"}
    clock = iter(range(100))
    spent = interleaved(actions, rounds=2, calls=2, clock=lambda: next(clock))
    assert turns == list("aabb") * 3
    assert spent == {"a": 500_000, "b": 500_000}


def test_the_committed_page_has_every_section():
    assert RESULTS.read_text().count("\n## ") == len(NAMES)
