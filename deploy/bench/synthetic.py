"""A synthetic fleet on PostgreSQL, made by the database itself: a million devices in some twenty seconds.

Nothing in it was ever a device. Shapes are what matter: labels of twelve sites and four kinds of hardware, three
models each, one running set in eight, last seen within the poll interval but for one in ten.
"""

from collections.abc import Sequence
from typing import Any

MODELS = ("detector", "reader", "sorter")
SITES, KINDS = 12, 4

# `i` counts devices. One in ten is silent since days, the others polled within five minutes.
DEVICES = """
    INSERT INTO devices_device (name, state, labels, model_names, epoch, nonce_digest, sdk, abilities, runs_id, pins,
                                dropped_events, refusal, enrolled_at, last_seen)
    SELECT 'unit-' || lpad(i::text, 7, '0'), 'active',
           jsonb_build_object('site', 'site-' || i %% %(sites)s,
                              'hw', (ARRAY['jetson', 'pi', 'nuc', 'x86'])[1 + i %% 4],
                              'plan', CASE WHEN i %% 50 = 0 THEN 'lab' ELSE 'field' END),
           %(models)s::jsonb, 1, '', '1.0.0', '{}', (%(sets)s::bigint[])[1 + (i * 7 + i / 1000) %% %(number)s],
           '{}', 0, '{}', now() - interval '90 days',
           CASE WHEN i %% 10 = 3 THEN now() - interval '3 days' ELSE now() - (i %% 290) * interval '1 second' END
    FROM generate_series(%(first)s, %(last)s) AS i
"""
OUTCOMES = """
    INSERT INTO rollouts_outcome (rollout_id, device_id, state, step, reason, first_at, changed_at, tried_at, tries)
    SELECT r.id, d.id, CASE WHEN d.id % 5 > 0 THEN 'committed' ELSE 'updating' END, 'committed', '',
           current_timestamp, current_timestamp, current_timestamp, 0
    FROM rollouts_rollout r JOIN devices_device d ON (d.id * 7919 + r.id * 104729) % 100 = 3
    WHERE r.state = 'running'
"""


def add_releases(versions: Sequence[str], models: Sequence[str] = MODELS) -> dict[tuple[str, str], Any]:
    """Valid releases without files: nobody downloads them here."""
    from fleet.releases.models import Model, Release, Variant

    made = {}
    for name in models:
        line, _ = Model.objects.get_or_create(name=name)
        for version in versions:
            release = Release.objects.create(model=line, version=version, state=Release.State.VALID)
            Variant.objects.create(
                release=release, name="default", manifest="{}", manifest_sha256=f"{release.pk:064x}",
                manifest_length=2, state=Variant.State.VALID,
            )  # fmt: skip
            made[name, version] = release
    return made


def add_devices(number: int, *, versions: Sequence[str] = ("1.0.0", "1.1.0")) -> None:
    """`number` more devices; each of the eight running sets of two versions is as common as the others."""
    from django.db import connection

    from fleet.devices.models import Device

    first, sets = Device.objects.count(), _running_sets(versions)
    if connection.vendor != "postgresql":
        Device.objects.bulk_create(_device(place, sets) for place in range(first, first + number))
        return
    values = {
        "first": first, "last": first + number - 1, "sites": SITES, "sets": sets, "number": len(sets),
        "models": '["' + '", "'.join(MODELS) + '"]',
    }  # fmt: skip
    with connection.cursor() as cursor:
        cursor.execute(DEVICES, values)
        cursor.execute("VACUUM ANALYZE")  # as autovacuum does on a server that runs


def _device(place: int, sets: Sequence[int]) -> Any:
    from django.utils import timezone

    from fleet.devices.models import Device

    labels = {"site": f"site-{place % SITES}", "hw": "jetson"}
    name = f"unit-{place:07}"
    runs, now = sets[place % len(sets)], timezone.now()
    return Device(name=name, labels=labels, model_names=[*MODELS], sdk="1.0.0", runs_id=runs, last_seen=now)


def add_outcomes() -> None:
    """In each rollout one device in a hundred reported, some four in five of them that they committed."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(OUTCOMES)
        if connection.vendor == "postgresql":
            cursor.execute("VACUUM ANALYZE")


def _running_sets(versions: Sequence[str]) -> list[int]:
    from itertools import product

    from device_sdk.protocol.polls import running_digest
    from fleet.devices.models import RunningSet

    found = []
    for combination in product(versions, repeat=len(MODELS)):
        runs = {model: f"{version}/default" for model, version in zip(MODELS, combination, strict=True)}
        found.append(RunningSet.objects.get_or_create(digest=running_digest(runs), defaults={"runs": runs})[0].pk)
    return found
