"""Read the trail: the head, links in order, what waits for its seal."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from django.db.models import QuerySet

from fleet.audit.chain import START, Head, Link
from fleet.audit.models import AuditEntry, AuditSeal

CHUNK = 1000


def head() -> Head:
    newest = AuditSeal.objects.order_by("-position").first()
    return Head(newest.position, newest.hash) if newest else START


def unsealed() -> int:
    return AuditEntry.objects.filter(seal=None).count()


def links(*, since: datetime | None = None, until: datetime | None = None) -> Iterator[Link]:
    """In the order of the chain. Of a span of time: from the first entry in it to the last, without gaps."""
    rows = AuditSeal.objects.order_by("position").select_related("entry")
    for seal in _span(rows, since, until).iterator(chunk_size=CHUNK):
        yield Link(seal.position, seal.hash, as_value(seal.entry))


def before(position: int) -> Head:
    """The link that stands before a position: what an export begins with."""
    seal = AuditSeal.objects.filter(position=position - 1).first()
    return Head(seal.position, seal.hash) if seal else START


def _span(rows: QuerySet[AuditSeal], since: datetime | None, until: datetime | None) -> QuerySet[AuditSeal]:
    """Times rise with positions but for entries that were committed late, so the ends are positions."""
    if since:
        first = rows.filter(entry__at__gte=since).values_list("position", flat=True).first()
        rows = rows.filter(position__gte=first) if first else rows.none()
    if until:
        last = rows.filter(entry__at__lt=until).values_list("position", flat=True).last()
        rows = rows.filter(position__lte=last) if last else rows.none()
    return rows


def as_value(entry: AuditEntry) -> dict[str, Any]:
    """An entry as it is hashed and exported."""
    return {
        "id": entry.pk,
        "at": entry.at.astimezone(UTC).isoformat(timespec="microseconds"),
        "action": entry.action,
        "target_kind": entry.target_kind,
        "target": entry.target,
        "actor_kind": entry.actor_kind,
        "actor": entry.actor,
        "address": entry.address,
        "source": entry.source,
        "comment": entry.comment,
        "detail": _detail(entry.detail),
    }


def _detail(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # somebody has been at it: the hash will tell
        return text
