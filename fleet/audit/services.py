"""Add to the audit trail, and seal what was added.

`record` inserts a row inside the changing transaction, without a lock: what is rolled back was not done, and business
transactions wait for nobody. `seal` gives rows their place and hash in a short transaction of its own, under a lock,
right after the commit; a periodic sweep seals what a crash left over. Entries stay for good: there is no retention.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from math import isfinite
from typing import Any

import structlog
from django.db import connection, transaction
from django.utils import timezone

from fleet.audit import chain, comments, context, selectors
from fleet.audit.context import GUARD, Acting
from fleet.audit.models import AuditEntry, AuditSeal

SEAL_AT_ONCE = 500
LOCK = 0x666C656574  # of PostgreSQL's advisory locks: "fleet"

logger = structlog.get_logger(__name__)


def record(
    action: str,
    *,
    target: object,
    kind: str = "",
    detail: Mapping[str, Any] | None = None,
    comment: str = "",
    by: Acting | None = None,
) -> None:
    """Note a change, inside the transaction that makes it. `kind` is the target's; by default the action's noun.

    `by`: who did it, where that is not who is calling, as for guards and enrolling devices; what the caller's context
    knows (address, route, task) is kept. Invalid `comment_needed` where a person gives none and the setting wants one.
    """
    if context.is_silent():
        return
    caller = context.current()
    who = by or caller
    comments.check(action, comment, who)
    AuditEntry.objects.create(
        at=timezone.now(),
        action=action[:64],
        target_kind=(kind or action.partition(".")[0])[:32],
        target=_text(target, 255),
        actor_kind=who.kind,
        actor=_text(who.name, 255),
        address=who.address or caller.address,
        source=_text(who.where or caller.where, 255),
        comment=_text(comment, 2000),
        detail=chain.canonical(_plain(detail or {})),
    )
    transaction.on_commit(seal, robust=True)  # a failure is logged, and the sweep's work


def guard(name: str = "policy") -> Acting:
    return Acting(GUARD, name)


def seal() -> int:
    """Give every committed entry its place. How many there were; safe to repeat, and with two sealers at once."""
    count = 0
    while fresh := _seal_some():
        count += fresh
        if fresh < SEAL_AT_ONCE:
            break
    return count


@transaction.atomic
def _seal_some() -> int:
    if not AuditEntry.objects.filter(seal=None).exists():
        return 0
    _lock()
    head = selectors.head()
    fresh = list(AuditEntry.objects.filter(seal=None).order_by("pk")[:SEAL_AT_ONCE])
    seals = []
    for entry in fresh:
        head = chain.Head(head.position + 1, chain.next_hash(head.hash, selectors.as_value(entry)))
        seals.append(AuditSeal(position=head.position, entry=entry, hash=head.hash))
    AuditSeal.objects.bulk_create(seals)
    return len(seals)


def _lock() -> None:
    """Until the end of the transaction. SQLite has one writer at a time anyway (`transaction_mode: IMMEDIATE`)."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])


def _text(value: object, limit: int) -> str:
    return str(value).replace("\x00", "")[:limit]


def _plain(value: Any) -> Any:
    """What JSON holds, whatever it was: a detail must never be the reason that a change fails."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and isfinite(value)):
        return value
    text = value.astimezone(UTC).isoformat() if isinstance(value, datetime) else str(value)
    return text.replace("\x00", "")
