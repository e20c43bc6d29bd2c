"""Many processes sign for one device: versions grow, and a role never goes back. On real PostgreSQL."""

import os
import subprocess
import sys
from pathlib import Path

from tests.services import Postgres

SCRIPT = """
import json, sys, threading
import django
django.setup()
from django.core.management import call_command
from django.db import connection
call_command("migrate", verbosity=0)
from device_sdk.protocol.assignment import Assignment
from fleet.devices.models import Device
from fleet.trust import keystore, services
from fleet.trust.models import DeviceView
from securesystemslib.signer import CryptoSigner

store = keystore.at(None)
keystore.initialise(store)
device = Device.objects.create(name="cam-1", model_names=["digits"], nonce_digest="0" * 64)
seen, roles, wrong, lock = [], [], [], threading.Lock()


def poll(rollout):
    try:
        view = services.current_view(device, [Assignment("digits", rollout=str(rollout))])
        with lock:
            seen.append((view.version, json.loads(view.snapshot)["signed"]["meta"]["targets.json"]["version"]))
    except Exception as error:
        wrong.append(repr(error))
    finally:
        connection.close()


def delegate():
    try:
        for n in range(6):
            keystore.add_model(store, model=f"m{n}", public_keys=[CryptoSigner.generate_ed25519().public_key])
    finally:
        connection.close()


threads = [threading.Thread(target=poll, args=(n % 4,)) for n in range(24)] + [threading.Thread(target=delegate)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
distinct = sorted(set(seen))
print(json.dumps({
    "wrong": wrong,
    "polls": len(seen),
    "one_version_two_views": len({version for version, _ in distinct}) != len(distinct),
    "roles_go_back": [role for _, role in distinct] != sorted(role for _, role in distinct),
    "rows": DeviceView.objects.count(),
}))
"""


def test_views_signed_at_once_have_growing_versions_and_roles(postgres: Postgres, tmp_path: Path) -> None:
    environment = {
        "PATH": os.defpath,
        "PYTHONPATH": str(Path.cwd()),
        "DJANGO_SETTINGS_MODULE": "fleet.settings",
        "FLEET_VAR": str(tmp_path),
        "FLEET_DATABASE_URL": postgres.new_database(),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = '{"wrong": [], "polls": 24, "one_version_two_views": false, "roles_go_back": false, "rows": 1}'
    assert done.stdout.strip().splitlines()[-1] == expected, done.stderr
