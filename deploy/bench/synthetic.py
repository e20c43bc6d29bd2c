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
    INSERT INTO devices_device (name, state, labels, model_names, epoch, nonce_digest, sdk, runs_id, pins,
                                dropped_events, refusal, enrolled_at, last_seen)
    SELECT 'unit-' || lpad(i::text, 7, '0'), 'active',
           jsonb_build_object('site', 'site-' || i %% %(sites)s,
                              'hw', (ARRAY['jetson', 'pi', 'nuc', 'x86'])[1 + i %% 4],
                              'plan', CASE WHEN i %% 50 = 0 THEN 'lab' ELSE 'field' END),
           %(models)s::jsonb, 1, '', '1.0.0', (%(sets)s::bigint[])[1 + (i * 7 + i / 1000) %% %(number)s], '{}', 0, '{}',
           now() - interval '90 days',
           CASE WHEN i %% 10 = 3 THEN now() - interval '3 days' ELSE now() - (i %% 290) * interval '1 second' END
    FROM generate_series(%(first)s, %(last)s) AS i
"""
STATUSES = """
    INSERT INTO devices_modelstatus (device_id, model, state, release, reason, health, since)
    SELECT d.id, m.name, 'committed', m.name || '/' || r.runs ->> m.name, '', '{}', now() - interval '5 days'
    FROM devices_device d JOIN devices_runningset r ON r.id = d.runs_id,
         jsonb_array_elements_text(d.model_names) AS m(name)
    WHERE d.name >= %(name)s
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


def add_devices(number: int, *, versions: Sequence[str] = ("1.0.0", "1.1.0"), statuses: bool = False) -> None:
    """`number` more devices; each of the eight running sets of two versions is as common as the others."""
    from django.db import connection

    from fleet.devices.models import Device

    first = Device.objects.count()
    sets = _running_sets(versions)
    values = {
        "first": first, "last": first + number - 1, "sites": SITES, "sets": sets, "number": len(sets),
        "models": '["' + '", "'.join(MODELS) + '"]',
    }  # fmt: skip
    with connection.cursor() as cursor:
        cursor.execute(DEVICES, values)
        if statuses:
            cursor.execute(STATUSES, {"name": f"unit-{first:07}"})
        cursor.execute("VACUUM ANALYZE")  # as autovacuum does on a server that runs


def _running_sets(versions: Sequence[str]) -> list[int]:
    from itertools import product

    from device_sdk.protocol.polls import running_digest
    from fleet.devices.models import RunningSet

    found = []
    for combination in product(versions, repeat=len(MODELS)):
        runs = {model: f"{version}/default" for model, version in zip(MODELS, combination, strict=True)}
        found.append(RunningSet.objects.get_or_create(digest=running_digest(runs), defaults={"runs": runs})[0].pk)
    return found
