"""Each parser for a moment, and every message that ever made one fail. For longer: `make fuzz SECONDS=600`."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz import __main__ as long_run
from tests.fuzz.mutations import mutants, replacements
from tests.fuzz.targets import BY_NAME, TARGETS, Target, attempt

EXAMPLES = 80  # of a target of weight 1
QUICK = [target for target in TARGETS if target.is_json and target.weight >= 1]
CRASHES = sorted(path for path in (Path(__file__).parent / "crashes").iterdir() if path.suffix == ".bin")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_mutated_message_is_understood_or_refused_by_name(target: Target) -> None:
    tried = []

    @settings(
        max_examples=max(int(EXAMPLES * target.weight), 10),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=mutants(target.seeds(), is_json=target.is_json))
    def try_it(data: bytes) -> None:
        tried.append(data)
        attempt(target, data)

    try_it()
    assert len(tried) >= 10


@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.name)
def test_every_place_of_a_message_withstands_every_hostile_value(target: Target) -> None:
    tried = 0
    for seed in target.seeds():
        for data in replacements(seed):
            attempt(target, data)
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_messages_that_mutations_start_from_are_good(target: Target) -> None:
    seeds = target.seeds()
    assert seeds
    good = []
    for seed in seeds:
        try:
            target.run(seed)
        except target.errors:
            continue
        good.append(seed)
    assert good


def test_what_made_a_parser_fail_once_does_so_no_more() -> None:
    assert CRASHES
    for path in CRASHES:
        name = path.stem.rpartition(".")[0]
        assert name in BY_NAME, f"{path.name}: expected <target>.<any>.bin"
        attempt(BY_NAME[name], path.read_bytes())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Target:
    """A parser with a hole: it fails on any message with an `A` at its end."""

    def run(data: bytes) -> None:
        if data.endswith(b"A"):
            raise KeyError("a hole")

    target = Target("broken", run, lambda: [b"BBBA", b"AAA"], errors=(ValueError,), is_json=False)
    monkeypatch.setitem(BY_NAME, "broken", target)
    return target


def test_a_long_run_keeps_and_names_what_made_a_parser_fail(
    broken: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried, data = long_run.try_for(broken, 60)
    assert tried >= 1
    assert data is not None
    path = long_run.keep(broken, data, tmp_path)
    assert path.name.startswith("broken.")
    with pytest.raises(KeyError):
        attempt(broken, path.read_bytes())
    assert "a hole" in capsys.readouterr().err


def test_a_message_that_takes_too_long_is_a_crash(broken: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_run, "SECONDS_EACH", 0.02)
    before = signal.signal(signal.SIGALRM, long_run._too_slow)
    try:
        tried, data = long_run.try_for(replace(broken, run=lambda _: signal.pause()), 60)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert tried >= 1
    assert data is not None
