"""The database itself refuses to change or delete the trail, whoever asks: triggers, for PostgreSQL and SQLite.

They are installed after every migration, which may make a table anew. Whoever owns the tables can lift them, as for a
restore; that is what the chain and a head written down elsewhere are for. `manage.py flush` is refused, too: the tests,
which flush, lift them first (`tests/conftest.py`).
"""

from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

TABLES = ("audit_auditentry", "audit_auditseal")
REFUSAL = "the audit trail is append-only"
_SQLITE = """CREATE TRIGGER IF NOT EXISTS {table}_no_{verb} BEFORE {verb} ON {table}
BEGIN SELECT RAISE(ABORT, '{refusal}'); END"""
_POSTGRESQL_FUNCTION = f"""CREATE OR REPLACE FUNCTION fleet_audit_refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION '{REFUSAL}' USING ERRCODE = 'restrict_violation'; END $$"""
_POSTGRESQL = """CREATE OR REPLACE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table}
FOR EACH STATEMENT EXECUTE FUNCTION fleet_audit_refuse()"""


def install_after_migrate(*, using: str, **_: object) -> None:
    install(connections[using])


def install(connection: BaseDatabaseWrapper) -> None:
    """Safe to repeat."""
    present = set(connection.introspection.table_names())
    tables = [table for table in TABLES if table in present]
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql" and tables:
            cursor.execute(_POSTGRESQL_FUNCTION)
        for table, verb in _pairs(connection, tables):
            text = _POSTGRESQL if connection.vendor == "postgresql" else _SQLITE
            cursor.execute(text.format(table=table, verb=verb, refusal=REFUSAL))


def lift(connection: BaseDatabaseWrapper) -> None:
    """For tests and for restores by hand."""
    on = " ON {table}" if connection.vendor == "postgresql" else ""
    with connection.cursor() as cursor:
        for table, verb in _pairs(connection, TABLES):
            cursor.execute(("DROP TRIGGER IF EXISTS {table}_no_{verb}" + on).format(table=table, verb=verb))


def _pairs(connection: BaseDatabaseWrapper, tables: Any) -> list[tuple[str, str]]:
    verbs = ("UPDATE", "DELETE", "TRUNCATE") if connection.vendor == "postgresql" else ("UPDATE", "DELETE")
    return [(table, verb) for table in tables for verb in verbs]
