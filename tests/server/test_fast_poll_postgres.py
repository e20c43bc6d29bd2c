"""The change log and the last-seen marks on real PostgreSQL, where transactions run beside each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live import ROOT
from tests.services import Postgres

pytestmark = pytest.mark.usefixtures("bounded_memory")

SCRIPT = """
import threading, time
import django
django.setup()
from django.core.management import call_command
from django.db import connection, transaction
from django.utils import timezone
from fleet.api.fastpoll.feed import Feed
from fleet.devices import changes, seen
from fleet.devices import services as devices
from fleet.devices.models import Change, Device, RunningSet
from fleet.trust import keystore

call_command("migrate", verbosity=0)
keystore.initialise(keystore.at(None))
runs = RunningSet.objects.create(digest="a" * 16, runs={"digits": "1.0.0/default"})
Device.objects.bulk_create(
    [Device(name=f"cam-{number}", model_names=["digits"], nonce_digest="0" * 64) for number in range(5)]
)
one, two, *others = Device.objects.order_by("pk")


def in_thread(act):
    def run():
        try:
            act()
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def waiting():
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return cursor.fetchone()[0]


# Who stamps first and commits last holds the others up: nobody can read past what is still to come.
stamped, commit = threading.Event(), threading.Event()


def slow():
    with transaction.atomic():
        changes.device_changed(one.pk)
        stamped.set()
        assert commit.wait(60)


feed = Feed()
feed.look()
start = changes.newest()
threads = [in_thread(slow)]
assert stamped.wait(60)
threads.append(in_thread(lambda: devices.revoke(device=two, actor="ann")))
deadline = time.monotonic() + 60
while not waiting():
    assert time.monotonic() < deadline, "the second does not wait for the counter's row"
    time.sleep(0.01)
assert changes.since(start).devices == frozenset()
feed.look()
assert feed.table.epoch[two.pk] == 1
commit.set()
for thread in threads:
    thread.join()
assert [row.device for row in Change.objects.order_by("revision")][-2:] == [one.pk, two.pk]
feed.look()
assert feed.table.epoch[two.pk] == 0  # revoked
print("ordered")

# Two processes write marks of the same devices at once, in whatever order they came.
now = timezone.now()


def flush(devices, at):
    buffer = seen.SeenBuffer()
    for device in devices:
        buffer.mark(device.pk, runs="a" * 16, now=at)
    return in_thread(buffer.flush)


for _ in range(5):
    threads = [flush(others, now.timestamp()), flush(others[::-1], now.timestamp() - 60)]
    for thread in threads:
        thread.join()
rows = Device.objects.filter(pk__in=[device.pk for device in others])
assert {(row.last_seen, row.runs_id) for row in rows} == {(now, runs.pk)}, [row.last_seen for row in rows]
print("marked")

# A rollout's transaction that holds a device's row makes the flush wait, and no poll: marking takes no lock.
with transaction.atomic():
    Device.objects.select_for_update().get(pk=others[0].pk)
    writer = flush(others, now.timestamp() + 60)
    while not waiting():
        assert time.monotonic() < deadline + 60, "the flush does not wait for the row"
        time.sleep(0.01)
    seen._flusher.ensure = lambda: None
    for _ in range(1_000):
        seen.mark_seen(others[0].pk, runs="a" * 16)
writer.join()
print("not held up")
"""


def test_no_process_can_pass_over_a_change_and_marks_of_two_processes_do_not_collide(
    postgres: Postgres, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "fleet.settings",
        "FLEET_DATABASE_URL": postgres.new_database(),
        "FLEET_VAR": str(tmp_path),
        "FLEET_REDIS_URL": "",
    }
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=150)
    assert done.stdout.split("\n")[-4:-1] == ["ordered", "marked", "not held up"], done.stdout + done.stderr
