"""Many processes sign for one device: versions grow, and a role never goes back. On real PostgreSQL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import Postgres

PREPARE = """
import json, threading, time
import django
django.setup()
from django.core.management import call_command
from django.db import connection, transaction
from securesystemslib.signer import CryptoSigner
from device_sdk.protocol.assignment import Assignment
from fleet.devices.models import Device
from fleet.trust import keystore, services
from fleet.trust.models import DeviceView

call_command("migrate", verbosity=0)
store = keystore.at(None)
keystore.initialise(store)
device = Device.objects.create(name="cam-1", model_names=["digits"], nonce_digest="0" * 64)
views, wrong = [], []


def poll(rollout):
    try:
        view = services.current_view(device, [Assignment("digits", rollout=str(rollout))])
        views.append((view.version, json.loads(view.snapshot)["signed"]["meta"]["targets.json"]["version"]))
    except Exception as error:
        wrong.append(repr(error))
    finally:
        connection.close()


def add_model(name):
    keystore.add_model(store, model=name, public_keys=[CryptoSigner.generate_ed25519().public_key])


def waiting():
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return cursor.fetchone()[0]
"""

STORM = """
threads = [threading.Thread(target=poll, args=(n % 4,)) for n in range(24)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
rows = list(DeviceView.objects.values_list("version", flat=True))
assert not wrong, wrong
assert len(views) == 24
assert rows == [max(version for version, _ in views)], (rows, views)
print("held")
"""

# A poll that waits for the row while a new targets version is committed must sign the new one, not the one it saw.
OVERTAKEN = """
poll(0)
with transaction.atomic():
    DeviceView.objects.select_for_update().get()
    thread = threading.Thread(target=poll, args=(1,))
    thread.start()
    deadline = time.monotonic() + 30
    while not waiting():
        assert time.monotonic() < deadline, "the poll does not wait for the row's lock"
        time.sleep(0.01)
    add_model("other")
thread.join()
assert not wrong, wrong
assert [targets for _, targets in views] == [1, 2], views
assert views[1][0] > views[0][0]
print("held")
"""


@pytest.mark.parametrize("script", [STORM, OVERTAKEN], ids=["at once", "overtaken"])
def test_views_signed_concurrently_never_go_back(postgres: Postgres, tmp_path: Path, script: str) -> None:
    assert run(postgres, tmp_path, script) == "held"


# Twelve people sign the same proposal at once, while CI posts it again and again: no signature may be lost, and the
# role comes into being once.
COSIGN = """
from fleet.releases import services as releases
from fleet.trust import repository, selectors
from fleet.trust.models import PendingRole, RoleMetadata
from tuf.api.metadata import Metadata, Targets
from datetime import datetime, timedelta, UTC

signers = [CryptoSigner.generate_ed25519() for _ in range(13)]
keystore.add_model(store, model="safe", public_keys=[each.public_key for each in signers], threshold=13)
LOCK = "%s"
if LOCK:
    releases.create_model(name="safe")
role = Targets(expires=(datetime.now(UTC) + timedelta(days=9)).replace(microsecond=0))
answers = []


def add(signer):
    try:
        content = repository.sign(role, [signer])
        change = releases.update_role(model="safe", role=content.decode()).role
        answers.append(change)
    except Exception as error:
        wrong.append(repr(error))
    finally:
        connection.close()


add(signers[0])
threads = [threading.Thread(target=add, args=(signer,)) for signer in signers[1:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, wrong
assert sorted(len(each.signatures.signed) for each in answers) == list(range(1, 14)), answers
assert [each.is_pending for each in answers].count(False) == 1
assert (RoleMetadata.objects.filter(role="safe").count(), PendingRole.objects.count()) == (1, 0)
print("held")
"""


@pytest.mark.parametrize("lock", ["by the model's row", ""], ids=["in a queue", "by compare-and-set alone"])
def test_signatures_that_come_at_once_are_all_kept(postgres: Postgres, tmp_path: Path, lock: str) -> None:
    assert run(postgres, tmp_path, COSIGN % lock) == "held"


def run(postgres: Postgres, folder: Path, script: str) -> str:
    environment = {
        "PATH": os.defpath,
        "PYTHONPATH": str(Path.cwd()),
        "DJANGO_SETTINGS_MODULE": "fleet.settings",
        "FLEET_VAR": str(folder),
        "FLEET_DATABASE_URL": postgres.new_database(),
    }
    command = [sys.executable, "-c", PREPARE + script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]
