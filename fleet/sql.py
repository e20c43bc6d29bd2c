"""Statements written out: for the few that each signing of a view asks, which the ORM takes ten times as long to put
together as the database to answer. Everything else goes by the ORM.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from django.db import connection
from django.db.models import Model

if TYPE_CHECKING:
    from django.db.models.query import RawQuerySet

Row = TypeVar("Row", bound=Model)


def fetch(statement: str, *parameters: str | int) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return list(cursor.fetchall())


def one(found: "RawQuerySet[Row]") -> Row | None:
    """The row, if there is one."""
    return next(iter(found), None)


def update(row: Model, values: Mapping[str, str | int | datetime]) -> None:
    """These columns of a row, by its primary key."""
    table = row._meta  # noqa: SLF001  # documented all the same
    columns = ", ".join(f'"{name}" = %s' for name in values)
    adapt = connection.ops.adapt_datetimefield_value
    parameters = [adapt(value) if isinstance(value, datetime) else value for value in values.values()]
    with connection.cursor() as cursor:
        statement = f'UPDATE "{table.db_table}" SET {columns} WHERE "{table.pk.column}" = %s'  # noqa: S608  # our own names
        cursor.execute(statement, [*parameters, row.pk])


def for_update() -> str:
    """What makes a SELECT lock its rows; nothing on SQLite, whose transactions lock all of it."""
    return connection.ops.for_update_sql() if connection.features.has_select_for_update else ""
