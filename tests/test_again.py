"""A second chance is for few tests, and says so."""

import json

import pytest

from tests import again

NAMES = ["tests/a.py::test_a", "tests/b.py::test_b"]


@pytest.fixture
def alone(monkeypatch):
    """What was run alone; each run ends as `result` says."""
    ran, result = [], {"status": 0}
    monkeypatch.setattr(again, "run_alone", lambda names: ran.append(names) or result["status"])
    return ran, result


def test_what_failed_runs_alone_and_is_named_when_it_passes(alone, capsys):
    assert again.main(again.FAILED, NAMES) == 0
    assert alone[0] == [NAMES]
    said = capsys.readouterr().out
    assert "wants mending" in said
    assert all(said.count(name) == 2 for name in NAMES)


def test_what_fails_alone_too_fails_the_suite(alone, capsys):
    alone[1]["status"] = again.FAILED
    assert again.main(again.FAILED, NAMES) == again.FAILED
    assert "wants mending" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "names"),
    [
        pytest.param(again.FAILED, [f"test_{number}" for number in range(again.MOST + 1)], id="too many"),
        pytest.param(again.FAILED, [], id="nothing is known of it"),
        pytest.param(2, NAMES, id="interrupted"),
        pytest.param(4, NAMES, id="not understood"),
    ],
)
def test_everything_else_stays_failed(alone, status, names):
    assert again.main(status, names) == status
    assert alone[0] == []


def test_it_knows_what_failed_from_what_pytest_keeps(tmp_path):
    assert again.failed(tmp_path) == []
    path = tmp_path / again.LAST_FAILED
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict.fromkeys(NAMES, True)))
    assert again.failed(tmp_path) == NAMES
    assert again.ROOT.joinpath("pyproject.toml").exists()
