"""Two engines, killed workers, a lost broker, a crashed database, a jumping clock: states stay right, nothing doubled.

On a PostgreSQL of its own, which is crashed; all in one process of `chaos_world`, started once.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.chaos_world import RESULT, SCENARIOS
from tests.services import Postgres, temporary_folder


@pytest.fixture(scope="module")
def verdicts(mortal_postgres: Postgres) -> Iterator[dict[str, str]]:
    with temporary_folder("chaos") as folder:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path.cwd()),
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "FLEET_VAR": str(folder),
            "FLEET_DATABASE_URL": mortal_postgres.new_database(),
        }
        command = [sys.executable, "-m", "tests.server.chaos_world"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=170, check=False)
        told = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
        assert told, done.stderr[-4000:]
        yield json.loads(told[0].removeprefix(RESULT))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_states_stay_right_and_nothing_is_doubled_with(verdicts: dict[str, str], scenario: str) -> None:
    assert verdicts[scenario] == "held", verdicts[scenario]


def test_trap_8_counts_are_computed_and_changes_are_claimed(verdicts: dict[str, str]) -> None:
    """Several engines at one moment, each rollout moved once, each retry counted once: where `save()` loses."""
    assert {verdicts[name] for name in ("two engines at once", "two people at once")} == {"held"}
