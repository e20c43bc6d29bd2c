"""Say what happened, in the transaction in which it happens; send it afterwards, until it arrives or is given up.

1. `publish` writes the notice and one delivery for each subscription that wants it. What is rolled back is not told.
2. A task sends at once; `sweep` finds what a lost task left over. Both claim a delivery by moving its `next_at`.
3. A failed attempt waits longer each time (`BACKOFF`); after the last one the delivery is dead, and stays to be seen.

An attempt that arrived and was not noted (the worker was killed) is made again, with the same id: at least once.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import structlog
from django.contrib.auth.models import User
from django.db import transaction
from django.db.models import F, Q, QuerySet
from django.utils import timezone

from fleet.audit.services import record
from fleet.errors import Conflict, FleetError, Invalid
from fleet.notices import addresses, kinds, mail, sealing, webhooks
from fleet.notices.models import Delivery, Notice, Subscription
from fleet.notices.webhooks import DeliveryError

# Seconds before each further attempt: the schedule that the standard proposes, about three days in all.
BACKOFF = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
LEASE = timedelta(seconds=120)  # a sender that says nothing for so long is dead: longer than any attempt
FARTHEST = timedelta(days=2)
AT_ONCE = 50  # deliveries of one sweep
KEPT = timedelta(days=90)

State = Delivery.State
logger = structlog.get_logger(__name__)


# --- who wants to know -------------------------------------------------------------------------------------------


@transaction.atomic
def subscribe(
    *, name: str, kind: str, target: str, events: Sequence[str] = (), actor: User | str
) -> tuple[Subscription, str]:
    """A new subscription, and a webhook's secret, which is not shown again (empty for e-mail)."""
    secret = _checked(kind, target)
    unknown = sorted(set(events) - kinds.KNOWN)
    if unknown:
        raise Invalid("unknown_kind", f"events: expected some of {sorted(kinds.KNOWN)}; got {', '.join(unknown):.200}")
    if not name.strip() or Subscription.objects.filter(name=name.strip()).exists():
        raise Conflict("subscription_exists", f"there is a subscription {name!r:.100} already, or the name is empty")
    made = Subscription.objects.create(
        name=name.strip()[:100],
        kind=kind,
        target=target.strip(),
        events=sorted(set(events)),
        secret=sealing.seal(secret) if secret else "",
        created_by=actor if isinstance(actor, User) else None,
    )
    record("subscription.created", target=made.name, detail=_detail(made))
    return made, secret


def _checked(kind: str, target: str) -> str:
    """The secret of a good subscription. Addresses are judged again at each attempt: names change."""
    if len(target) > 500:
        raise Invalid("malformed", "target: expected at most 500 characters")
    if kind == Subscription.Kind.WEBHOOK:
        addresses.parse(target.strip())
        return webhooks.new_secret()
    if kind == Subscription.Kind.EMAIL:
        mail.check_addresses(target)
        return ""
    raise Invalid("malformed", f"kind: expected one of {Subscription.Kind.values}; got {kind!r:.40}")


@transaction.atomic
def switch(*, subscription: Subscription, active: bool, why: str = "") -> None:
    """Tell it from now on, or tell it nothing more. What waits for it is kept."""
    Subscription.objects.filter(pk=subscription.pk).update(active=active)
    subscription.active = active
    record("subscription.switched", target=subscription.name, detail={"active": active}, comment=why)


@transaction.atomic
def renew_secret(*, subscription: Subscription) -> str:
    """A new secret, at once: what is signed from now on is signed by it alone."""
    if subscription.kind != Subscription.Kind.WEBHOOK:
        raise Invalid("no_secret", f"{subscription.name} is told by e-mail, which has no secret")
    secret = webhooks.new_secret()
    Subscription.objects.filter(pk=subscription.pk).update(secret=sealing.seal(secret))
    record("subscription.secret_renewed", target=subscription.name)
    return secret


@transaction.atomic
def unsubscribe(*, subscription: Subscription) -> None:
    """Forget it and what was sent to it."""
    record("subscription.deleted", target=subscription.name, detail=_detail(subscription))
    subscription.delete()


def _detail(row: Subscription) -> dict[str, Any]:
    return {"kind": row.kind, "target": row.target, "events": row.events or "all"}


# --- what happened -----------------------------------------------------------------------------------------------


@transaction.atomic
def publish(kind: str, title: str, data: Mapping[str, Any]) -> None:
    """Tell everybody who wants notices of this kind, once the caller's transaction is committed."""
    wanted = [row for row in Subscription.objects.filter(active=True) if not row.events or kind in row.events]
    _write(kind, title, data, wanted)


@transaction.atomic
def send_test(*, subscription: Subscription) -> None:
    """To this one alone, whatever it wants."""
    _write(
        kinds.TEST,
        f"A test of the subscription {subscription.name}",
        {"subscription": subscription.name},
        [subscription],
    )


def _write(kind: str, title: str, data: Mapping[str, Any], wanted: Sequence[Subscription]) -> None:
    if not wanted:
        return
    now = timezone.now()
    body = json.dumps({"type": kind, "timestamp": now.isoformat(), "data": {**data, "title": title}})
    notice = Notice.objects.create(
        key=f"msg_{secrets.token_hex(16)}", kind=kind[:40], title=title[:300], body=body, at=now
    )
    rows = [Delivery(notice=notice, subscription=row, next_at=now) for row in wanted]
    for made in Delivery.objects.bulk_create(rows):
        _wake(made.pk)


def _wake(pk: int) -> None:
    """After the commit. A broker that is away loses nothing: the sweep sends too."""
    from fleet.notices import tasks

    transaction.on_commit(lambda: tasks.deliver.delay(pk), robust=True)


# --- sending -----------------------------------------------------------------------------------------------------


def sweep() -> int:
    """Send what is due, the first attempts first; how many were tried."""
    due = _due(timezone.now()).order_by("tries", "next_at").values_list("pk", flat=True)
    return sum(deliver(pk) for pk in list(due[:AT_ONCE]))


def _due(now: datetime) -> QuerySet[Delivery]:
    """What is farther away than anything is ever put off was put off by a clock that ran ahead."""
    due = Q(next_at__lte=now) | Q(next_at__gt=now + FARTHEST)
    return Delivery.objects.filter(due, state=State.PENDING, subscription__active=True)


def deliver(pk: int) -> bool:
    """One attempt, unless it is not due or somebody else makes it. Not inside a transaction: it talks to the world."""
    now = timezone.now()
    row = _due(now).select_related("notice", "subscription").filter(pk=pk).first()
    if row is None:
        return False
    claimed = Delivery.objects.filter(pk=pk, state=State.PENDING, next_at=row.next_at)
    if not claimed.update(next_at=now + LEASE, tries=F("tries") + 1):
        return False
    try:
        _send(row, now)
    except DeliveryError as error:
        _put_off(row, error)
    else:
        mine = Delivery.objects.filter(pk=pk, state=State.PENDING)
        mine.update(state=State.SENT, sent_at=timezone.now(), error="")
    return True


def _send(row: Delivery, now: datetime) -> None:
    notice, subscription = row.notice, row.subscription
    if subscription.kind == Subscription.Kind.EMAIL:
        to = [part.strip() for part in subscription.target.split(",")]
        mail.send(notice, to=to, text=_letter(notice))
        return
    try:
        secret = sealing.unseal(subscription.secret)
    except FleetError as error:
        raise DeliveryError(error.message) from error
    webhooks.post(subscription.target, webhooks.Message(notice.key, notice.body), secret=secret, now=now)


def _letter(notice: Notice) -> str:
    data = json.loads(notice.body)["data"]
    facts = [f"{name}: {value}" for name, value in data.items() if name != "title" and value not in ("", None)]
    return "\n".join([notice.title, "", *facts])


def _put_off(row: Delivery, error: DeliveryError) -> None:
    tried = row.tries  # before this attempt
    again = not error.gone and tried < len(BACKOFF)
    wait = max(BACKOFF[tried], error.retry_after or 0) if again else 0
    changes: dict[str, Any] = {"error": str(error)[:300], "next_at": timezone.now() + timedelta(seconds=wait)}
    if not again:
        changes["state"] = State.DEAD
    Delivery.objects.filter(pk=row.pk, state=State.PENDING).update(**changes)
    logger.warning("notice_not_delivered", delivery=row.pk, tries=tried + 1, error=str(error), dead=not again)


@transaction.atomic
def send_again(*, delivery: Delivery) -> None:
    """Once more from the beginning, with the same id. Conflict while it is on its way."""
    rows = Delivery.objects.filter(pk=delivery.pk).exclude(state=State.PENDING)
    if not rows.update(state=State.PENDING, tries=0, next_at=timezone.now(), error=""):
        raise Conflict("wrong_state", "it is to be sent anyway")
    record("delivery.sent_again", target=delivery.pk, detail={"notice": delivery.notice.key})
    delivery.refresh_from_db()
    _wake(delivery.pk)


def retire() -> None:
    """Forget notices that are long told, or given up."""
    old = Notice.objects.filter(at__lt=timezone.now() - KEPT)
    old.exclude(deliveries__state=State.PENDING).delete()
