"""The counts over the whole fleet on real PostgreSQL, where they come as packed columns."""

import os
import subprocess
import sys
from pathlib import Path

from tests.live import ROOT
from tests.services import Postgres

SCRIPT = """
import django
django.setup()
from django.core.management import call_command
from django.db import transaction
from hypothesis import given, settings
from fleet.rollouts import snapshots
from fleet.rollouts.counting import admission, cohorts
from fleet.trust import keystore
from tests.server import test_counting

call_command("migrate", verbosity=0)
keystore.initialise(keystore.at(None))
admission.KEPT_FROM = cohorts.KEPT_FROM = 3  # so that small fleets take the way of large ones, too
sizes = []


@settings(max_examples=15, deadline=None, database=None)
@given(drawn=test_counting.ROLLOUTS, entries=test_counting.DEVICES)
def compare(drawn, entries):
    admission._cohorts = cohorts.Cohorts()
    with transaction.atomic():
        rollouts = test_counting.make_rollouts(drawn)
        test_counting.make_devices(entries, rollouts)
        test_counting.compare(rollouts)
        transaction.set_rollback(True)
    snapshots._kept = None
    sizes.append(len(entries))


compare()
assert max(sizes) > 3, sizes
print("equal")
"""


def test_the_fast_counts_on_postgresql_are_those_of_one_device_after_the_other(
    postgres: Postgres, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "fleet.settings",
        "FLEET_DATABASE_URL": postgres.new_database(),
        "FLEET_VAR": str(tmp_path),
        "FLEET_REDIS_URL": "",
        "FLEET_LOG_LEVEL": "CRITICAL",
    }
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=150)
    assert done.stdout.split("\n")[-2:] == ["equal", ""], done.stdout[-2000:] + done.stderr[-5000:]
