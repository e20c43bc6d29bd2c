"""The active devices at one moment, as columns, and in crowds of equal traits: the policy is asked once for each crowd.

A million devices are four arrays of 8 MB for as long as somebody counts. What is read is read in one statement.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

import numpy as np
from django.db import connection
from django.db.models import BigIntegerField, QuerySet
from django.db.models.expressions import RawSQL

from fleet.devices.bulk import Numbers, columns
from fleet.devices.models import Device
from fleet.rollouts import policy
from fleet.rollouts.selectors import TRAITS, traits_of

NEVER = 0  # as `seen`
AT_ONCE = 1_000  # devices that are looked at as rows
TRIES = 3


@dataclass(frozen=True, slots=True)
class Crowd:
    """Devices of the same traits, by their places in the roster."""

    traits: policy.Traits
    places: Numbers


@dataclass(frozen=True, slots=True)
class Roster:
    """Parallel columns. `seen`: microseconds since 1970, or NEVER. `runs`: key of the running set, or 0."""

    ids: Numbers
    seen: Numbers
    runs: Numbers
    crowds: tuple[Crowd, ...]

    @property
    def size(self) -> int:
        """Above every id."""
        return int(self.ids.max(initial=0)) + 1


def load() -> Roster:
    """Every active device, now. Two statements on PostgreSQL, whatever the number of devices."""
    return _copied() if connection.vendor == "postgresql" else _iterated()


def micros(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000_000)


def _active() -> QuerySet[Device]:
    return Device.objects.filter(state=Device.State.ACTIVE)


def _iterated() -> Roster:
    rows, places = [], defaultdict[policy.Traits, list[int]](list)
    for place, device in enumerate(_active().only("last_seen", "runs_id", *TRAITS).iterator(chunk_size=AT_ONCE)):
        seen = micros(device.last_seen) if device.last_seen else NEVER
        rows.append((device.pk, seen, device.runs_id or 0))
        places[traits_of(device)].append(place)
    ids, seen_, runs = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Roster(ids, seen_, runs, tuple(Crowd(traits, np.array(found)) for traits, found in places.items()))


# --- on PostgreSQL -----------------------------------------------------------------------------------------------
# A crowd's number is the database's own hash of what traits are made of: 64 bits, within one statement.
_CODE = f"hash_record_extended(ROW({', '.join(f'devices_device.{name}' for name in TRAITS)}), 0)"
_SEEN = "coalesce(extract(epoch from devices_device.last_seen) * 1000000, 0)::bigint"
_RUNS = "coalesce(devices_device.runs_id, 0)"


def _copied() -> Roster:
    rows = _active().annotate(code=_raw(_CODE), seen=_raw(_SEEN), run=_raw(_RUNS))
    ids, seen, runs, codes = columns(rows, "pk", "seen", "run", "code")
    return Roster(ids, seen, runs, tuple(_crowds(ids, codes)))


def _raw(sql: str) -> RawSQL:
    return RawSQL(sql, (), output_field=BigIntegerField())  # noqa: S611  # constants of this module


def _crowds(ids: Numbers, codes: Numbers) -> Iterator[Crowd]:
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=~codes[order[:1]]))
    members = dict(zip(codes[order[starts]].tolist(), np.split(order, starts[1:]), strict=True)) if len(ids) else {}
    traits = _traits({code: ids[places] for code, places in members.items()})
    for code, places in members.items():
        yield Crowd(traits[code], places)


def _traits(members: Mapping[int, Numbers]) -> dict[int, policy.Traits]:
    """Of each code those of a member that still has it: labels may change between two statements."""
    found: dict[int, policy.Traits] = {}
    for attempt in range(TRIES):
        missing = [ids[min(attempt, len(ids) - 1)] for code, ids in members.items() if code not in found]
        found.update(_traits_now(map(int, missing)))
    if len(lost := members.keys() - found.keys()):
        raise LookupError(f"the traits of {len(lost)} crowds changed while they were counted")
    return found


def _traits_now(ids: Iterator[int]) -> Iterator[tuple[int, policy.Traits]]:
    while some := list(islice(ids, AT_ONCE)):
        for device in _active().filter(pk__in=some).only(*TRAITS).annotate(code=_raw(_CODE)):
            yield device.code, traits_of(device)
