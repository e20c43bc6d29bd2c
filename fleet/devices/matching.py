"""Find the devices that a selector chooses in the database: one query, for PostgreSQL and SQLite alike.

Labels have no index of their own: last-seen marks rewrite a device's row all the time, and each would write to it.
"""

from typing import Any

from django.db.models import F, Func, Q, QuerySet, TextField
from django.db.models.lookups import In, IsNull

from fleet.devices import selection
from fleet.devices.models import Device, Group
from fleet.devices.selection import Requirement, Selector


class _Label(Func):
    """The text of one label, NULL where a device has none. Not a key transform: those read `0` as a place in a list."""

    output_field = TextField()

    def __init__(self, label: str) -> None:
        self.label = label
        super().__init__(F("labels"))

    def as_sql(self, compiler: Any, connection: Any, *_: Any, **__: Any) -> tuple[str, tuple[str | int, ...]]:
        sql, parameters = compiler.compile(self.source_expressions[0])
        if connection.vendor == "postgresql":
            return f"({sql} ->> %s)", (*parameters, self.label)
        return f"JSON_EXTRACT({sql}, %s)", (*parameters, f'$."{self.label}"')  # a label's name has no quote in it


def where(selector: Selector) -> Q:
    """A condition on devices that holds where `selector.matches` does."""
    condition = Q()
    for each in selector.requirements:
        condition &= ~_has(each) if each.negated else _has(each)
    return condition


def _has(each: Requirement) -> Q:
    if each.label == selection.NAME:
        return Q(name__in=sorted(each.values)) if each.values else Q(pk__isnull=False)
    label = _Label(each.label)
    there = Q(IsNull(label, False))
    return there & Q(In(label, sorted(each.values))) if each.values else there


def chosen(selector: Selector) -> QuerySet[Device]:
    """The active devices that a selector chooses."""
    return Device.objects.filter(where(selector), state=Device.State.ACTIVE)


def selector_of(group: Group | None) -> Selector:
    """None is every device. Raises Invalid where the stored text does not parse."""
    return selection.parse(group.selector) if group else selection.EVERY
