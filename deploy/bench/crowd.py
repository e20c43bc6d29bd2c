"""A fleet at rest in a database of its own, and the polls of its devices. A process each: settings are read once.

`python -m deploy.bench.crowd FOLDER DEVICES ROLLOUTS` makes the database in FOLDER and writes there, line by line as
`requests.json` has them, the polls of some of its devices, and one with a token for the plain view.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from deploy.bench import server
from deploy.bench.models import MODEL

ASKED = 20_000  # devices that poll: enough that no cache of the processor holds what is known of them
BATCH = 50_000
RUNS = {MODEL: "1.0.0/default"}
HEAD = "GET {path} HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUser-Agent: fleet-device\r\nIf-None-Match: {tag}\r\n"


def make(folder: Path, devices: int, rollouts: int) -> None:
    server.set_up(folder)
    from django.db import connection

    world = server.Server()
    resting = server.add_idle_fleet(world)
    for _ in range(rollouts - 1):
        _begin_rollout()
    version = int(datetime.now(UTC).timestamp())
    signed_for = _signed_for()
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA synchronous = OFF")  # nobody needs it after a power cut
    first = resting.pk + 1
    for start in range(first, first + devices, BATCH):
        _insert(range(start, min(start + BATCH, first + devices)), resting.runs_id, version, signed_for)
    asked = Random(1).sample(range(first, first + devices), min(devices, ASKED))  # noqa: S311  # not a secret
    tag = f'"{version}-{resting.runs.digest}"'
    (folder / "requests.json").write_text(json.dumps({"polls": list(_polls(asked, tag)), "plain": _plain(first, tag)}))


def _begin_rollout() -> None:
    """To a tenth of a percent of the fleet: nearly every device has to be tried against all of them."""
    from fleet.releases.models import Release
    from fleet.rollouts import services

    stages = [services.StagePlan(percent=0.1), services.StagePlan(percent=100)]
    services.start(
        rollout=services.create(release=Release.objects.get(), group=None, stages=stages, actor="bench"), actor="bench"
    )


def _signed_for() -> Any:
    """What the view of a device is signed for, by its name."""
    from fleet.rollouts import policy, snapshots
    from fleet.trust import inputs, selectors

    trust, traits = inputs.of_trust(selectors.in_force()), policy.Traits.of({}, [MODEL])
    plan, known = policy.plan(snapshots.compile_policy(), traits), dict[Any, str]()

    def signed_for(name: str) -> str:
        assigned = tuple(policy.decide(plan, policy.DeviceFacts(name, traits, runs=RUNS)).values())
        if assigned not in known:
            known[assigned] = inputs.of_assignments(assigned)
        return inputs.of_view(name, known[assigned], trust)

    return signed_for


def _insert(keys: range, runs: int, version: int, signed_for: Any) -> None:
    """Rows as enrolment and signing leave them, without the signed files, which no idle poll reads."""
    from django.db import connection, transaction

    from fleet.devices.models import Device
    from fleet.trust.models import DeviceView

    now, expires = (datetime.now(UTC) + timedelta(hours=hours) for hours in (0, 24))
    device = Device(model_names=[MODEL], runs_id=runs)
    view = DeviceView(version=version, signed_at=now, expires_at=expires)
    with transaction.atomic(), connection.cursor() as cursor:
        _copy(cursor, device, ("id", "name"), ((key, f"cam-{key}") for key in keys))
        _copy(cursor, view, ("device_id", "inputs_digest"), ((key, signed_for(f"cam-{key}")) for key in keys))


def _copy(cursor: Any, row: Any, own: Sequence[str], values: Iterable[tuple[Any, ...]]) -> None:
    """Many rows like this one, but for the columns that each has of its `own`. The ORM puts together one, not each."""
    table = row._meta  # noqa: SLF001  # documented all the same
    fields = [field for field in table.concrete_fields if field.column not in own and not field.primary_key]
    shared = tuple(field.get_db_prep_save(field.pre_save(row, add=True), cursor.db) for field in fields)
    columns = ", ".join(f'"{column}"' for column in (*own, *(field.column for field in fields)))
    places = ", ".join(["%s"] * (len(own) + len(fields)))
    statement = f"INSERT INTO {table.db_table} ({columns}) VALUES ({places})"  # noqa: S608  # names of our own
    cursor.executemany(statement, [(*value, *shared) for value in values])


def _polls(keys: Sequence[int], tag: str) -> Iterator[str]:
    from device_sdk.protocol import polls
    from fleet.devices import credentials
    from fleet.devices.models import Device

    for key in keys:
        bearer = credentials.credential_for(Device(pk=key, epoch=1))
        yield HEAD.format(path=f"{polls.POLL}?root=1", tag=tag) + f"Authorization: Bearer {bearer}\r\n\r\n"


def _plain(key: int, tag: str) -> str:
    from django.contrib.auth.models import User
    from rest_framework.authtoken.models import Token

    token = Token.objects.create(user=User.objects.create(username=f"cam-{key}"))
    return HEAD.format(path="/bench/poll?root=1", tag=tag) + f"Authorization: Token {token.key}\r\n\r\n"


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
