"""The log of what may alter the answer to a poll. Each process reads it on; nothing in it can be passed over.

Whoever changes such a thing stamps it here in the same transaction, as late in it as can be: the counter's row stays
locked until the commit. That lock is what makes the log complete: revision 8 cannot be seen before 7 is, whichever
transaction began first. An autoincrement key would not do: rows with lower ones may be committed later.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from secrets import token_hex

from django.db import transaction

from fleet import sql
from fleet.devices.models import Change, Revision

KEPT = 100_000  # revisions; a process that is farther behind reads everything anew


def policy_changed() -> None:
    """What holds for all devices, or for many of them, changes in this transaction."""
    _stamp([None])


def device_changed(*devices: int) -> None:
    """These devices change in this transaction: standing, credential, labels, abilities, pins or failures."""
    if devices:
        _stamp(devices)


@transaction.atomic
def _stamp(devices: Iterable[int | None]) -> None:
    counter, _ = Revision.objects.select_for_update().get_or_create(pk=1)
    counter.number += 1
    counter.save(update_fields=["number"])
    key = token_hex(8)
    Change.objects.bulk_create([Change(revision=counter.number, key=key, device=device) for device in devices])


@dataclass(frozen=True, slots=True)
class Position:
    """How far somebody has read."""

    revision: int = 0
    key: str = ""


@dataclass(frozen=True, slots=True)
class News:
    """What was changed since a position. `policy`: something that holds for many."""

    position: Position
    policy: bool
    devices: frozenset[int]


def newest() -> Position:
    """Where to read on from, for who reads everything after this. The same position: nothing was stamped since."""
    found = sql.fetch("SELECT revision, key FROM devices_change ORDER BY revision DESC LIMIT 1")
    return Position(*found[0]) if found else Position()


def since(position: Position) -> News | None:
    """What came after. None: that cannot be told, as the log was thinned or the database restored. One query."""
    rows = _rows(position.revision)
    if position.revision:
        if not rows or (rows[0][0], rows[0][1]) != (position.revision, position.key):
            return None
    elif rows and rows[0][0] != 1:
        return None
    new = [row for row in rows if row[0] > position.revision]
    devices = frozenset(device for _, _, device in new if device is not None)
    end = Position(*new[-1][:2]) if new else position
    return News(end, policy=any(device is None for _, _, device in new), devices=devices)


def thin() -> None:
    """Forget what every process has read long ago; the newest revision always stays."""
    newest_number = Revision.objects.filter(pk=1).values_list("number", flat=True).first() or 0
    Change.objects.filter(revision__lt=newest_number - KEPT).delete()


def _rows(revision: int) -> list[tuple[int, str, int | None]]:
    rows = Change.objects.filter(revision__gte=revision).order_by("revision", "pk")
    return list(rows.values_list("revision", "key", "device"))
