"""All that changes a device: enrolment, approval, revocation, and what it reports."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import structlog
from django.contrib.auth.models import User
from django.db import IntegrityError, transaction
from django.db.models import Exists, F, OuterRef, Q
from django.db.models.functions import TruncHour
from django.utils import timezone

from device_sdk.protocol import events
from device_sdk.protocol.abilities import UNSAID
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.events import HEALTH, Event
from device_sdk.protocol.mirrors import check_mirror
from device_sdk.protocol.names import check_model, check_name
from device_sdk.protocol.polls import EnrolRequest, check_labels, running_digest
from device_sdk.protocol.posts import EventPost
from fleet.audit.context import DEVICE, Acting
from fleet.audit.services import record
from fleet.devices import changes, credentials, selection, selectors
from fleet.devices.models import Device, DeviceEvent, EnrolmentToken, Group, ModelStatus, RunningSet, SpreadSample
from fleet.devices.seen import flush_seen, mark_seen
from fleet.errors import Conflict, Denied, Invalid, Unauthorized

__all__ = ["flush_seen", "mark_seen"]

TOKEN_PREFIX = "fle_"  # noqa: S105  # not a secret: tells people and secret scanners what they have found
UNKNOWN_TOKEN = "enrolment_unknown"  # noqa: S105  # the code of a refusal
BELIEVABLE = timedelta(days=30)  # how far back a device's clock is taken at its word
FULL_DETAIL = timedelta(days=2)  # of the spread; older samples are thinned to one an hour
SPREAD_KEPT = timedelta(days=400)
EVENTS_KEPT = timedelta(days=180)
HEALTH_KEPT = timedelta(days=2)

logger = structlog.get_logger(__name__)


# --- who may come in ---------------------------------------------------------------------------------------------


def authenticate(header: str | None) -> Device:
    """The active device behind an `Authorization` header. Unauthorized (401), or Denied `device_pending`."""
    claim = credentials.verify(header)
    device = selectors.claimed(claim.device, claim.epoch)
    if device is None or device.state == Device.State.REVOKED:
        raise credentials.refused()
    if device.state == Device.State.PENDING:
        raise Denied("device_pending", "this device waits for an operator's approval")
    return device


@transaction.atomic
def create_token(
    *,
    name: str,
    model_names: Sequence[str],
    max_uses: int,
    lifetime: timedelta,
    labels: Mapping[str, str] | None = None,
    needs_approval: bool = False,
    actor: User | None = None,
) -> tuple[EnrolmentToken, str]:
    """A new enrolment token and its secret, which is shown this once: only its hash is stored."""
    if max_uses < 1 or lifetime <= timedelta(0) or not model_names:
        raise Invalid("token_malformed", "an enrolment token needs a model, at least one use and a lifetime")
    try:
        models, labels = [check_model(model) for model in model_names], check_labels(dict(labels or {}))
    except ProtocolError as error:
        raise Invalid(error.code, error.message) from error
    secret = TOKEN_PREFIX + secrets.token_urlsafe(24)
    token = EnrolmentToken.objects.create(
        name=name,
        digest=_digest(secret),
        model_names=models,
        labels=labels,
        max_uses=max_uses,
        expires_at=timezone.now() + lifetime,
        needs_approval=needs_approval,
        created_by=actor,
    )
    detail = {
        "id": token.pk,
        "models": models,
        "labels": labels,
        "max_uses": max_uses,
        "expires": token.expires_at,
        "needs_approval": needs_approval,
    }
    record("enrolment_token.created", target=name, detail=detail)
    return token, secret


@transaction.atomic
def revoke_token(*, token: EnrolmentToken, comment: str = "") -> None:
    """Nobody comes in by it any more; devices that did stay."""
    if EnrolmentToken.objects.filter(pk=token.pk, revoked_at=None).update(revoked_at=timezone.now()):
        record("enrolment_token.revoked", target=token.name, detail={"id": token.pk}, comment=comment)


@dataclass(frozen=True, slots=True)
class Enrolment:
    """`created` is False where the same device asked again."""

    device: Device
    credential: str
    created: bool


def enrol(*, token: str, request: EnrolRequest) -> Enrolment:
    """Let a device in.

    1. The token must be known; a device that asks again with its nonce gets its answer, however old the token.
    2. The name must be free.
    3. One use of the token is claimed by compare-and-set, in the transaction that creates the device.
    """
    entry = EnrolmentToken.objects.filter(digest=_digest(token), revoked_at=None).first()
    if entry is None:
        raise Unauthorized(UNKNOWN_TOKEN, "this enrolment token is not known here, or was revoked")
    device = Device.objects.filter(name=request.device).first()
    if device is None:
        try:
            device = _admit(entry, request)
            return Enrolment(device, credentials.credential_for(device), created=True)
        except IntegrityError:  # the name was taken just now, maybe by this very device asking twice
            device = Device.objects.get(name=request.device)
    return _same_again(device, request)


@transaction.atomic
def _admit(entry: EnrolmentToken, request: EnrolRequest) -> Device:
    now = timezone.now()
    if entry.expires_at <= now:
        raise Unauthorized("enrolment_expired", f"this enrolment token expired at {entry.expires_at:%F %T} UTC")
    unspent = EnrolmentToken.objects.filter(pk=entry.pk, uses__lt=F("max_uses"), revoked_at=None)
    if not unspent.update(uses=F("uses") + 1):
        raise Unauthorized("enrolment_used_up", f"this enrolment token was good for {entry.max_uses} devices")
    device = Device.objects.create(
        name=request.device,
        state=Device.State.PENDING if entry.needs_approval else Device.State.ACTIVE,
        labels={**request.labels, **entry.labels},  # what the operator said wins
        model_names=entry.model_names,
        nonce_digest=_digest(request.nonce),
        token=entry,
        sdk=request.sdk,
        abilities=request.abilities.to_json(),
        last_seen=now,
    )
    detail = {"token": entry.name, "state": device.state, "labels": device.labels, "models": device.model_names}
    record("device.enrolled", target=device.name, detail=detail, by=Acting(DEVICE, device.name))
    return device


def _same_again(device: Device, request: EnrolRequest) -> Enrolment:
    if not secrets.compare_digest(device.nonce_digest, _digest(request.nonce)):
        raise Conflict("device_exists", f"another device is enrolled as {device.name!r}")
    if device.state == Device.State.REVOKED:
        raise Denied("device_revoked", "this device was revoked")
    return Enrolment(device, credentials.credential_for(device), created=False)


# --- what operators do -------------------------------------------------------------------------------------------


@transaction.atomic
def approve(*, device: Device, actor: User | str, comment: str = "") -> None:
    """A pending device may work from now on."""
    _move(device, Device.State.PENDING, Device.State.ACTIVE)
    record("device.approved", target=device.name, comment=comment)
    changes.device_changed(device.pk)
    logger.info("device_approved", device=device.name, actor=str(actor))


@transaction.atomic
def revoke(*, device: Device, actor: User | str, comment: str = "") -> None:
    """Its credential is worth nothing from now on, not even if the device comes back. The row stays."""
    if (
        not Device.objects.filter(pk=device.pk)
        .exclude(state=Device.State.REVOKED)
        .update(state=Device.State.REVOKED, epoch=F("epoch") + 1)
    ):
        raise Conflict("wrong_state", f"{device.name} is revoked already")
    before = device.state
    device.refresh_from_db(fields=["state", "epoch"])
    record("device.revoked", target=device.name, detail={"was": before}, comment=comment)
    changes.device_changed(device.pk)
    logger.info("device_revoked", device=device.name, actor=str(actor))


@transaction.atomic
def reissue(*, device: Device, actor: User | str, comment: str = "") -> str:
    """A new credential, to be handed to the device out of band. It voids the old one and the enrolment's nonce."""
    updated = Device.objects.filter(pk=device.pk, epoch=device.epoch).update(
        state=Device.State.ACTIVE, epoch=F("epoch") + 1, nonce_digest=""
    )
    if not updated:
        raise Conflict("wrong_state", f"{device.name} was changed meanwhile")
    before = device.state
    device.refresh_from_db(fields=["state", "epoch", "nonce_digest"])
    record("device.reissued", target=device.name, detail={"was": before, "epoch": device.epoch}, comment=comment)
    changes.device_changed(device.pk)
    logger.info("device_reissued", device=device.name, actor=str(actor))
    return credentials.credential_for(device)


def set_pin(*, device: Device, model: str, version: str | None, actor: User | str, comment: str = "") -> None:
    """Fix a model of a device to a version, or let it go (None). `rollouts.services.pin` checks the release first."""
    if model not in device.model_names:
        raise Invalid("wrong_model", f"{device.name} does not run {model!r}")
    with transaction.atomic():
        locked = Device.objects.select_for_update().get(pk=device.pk)
        pins = {name: pinned for name, pinned in locked.pins.items() if name != model}
        Device.objects.filter(pk=device.pk).update(pins=pins | ({model: version} if version else {}))
        detail = {"model": model, "version": version, "was": locked.pins.get(model)}
        action = "device.pinned" if version else "device.unpinned"
        record(action, target=device.name, detail=detail, comment=comment)
        changes.device_changed(device.pk)
    device.refresh_from_db(fields=["pins"])
    logger.info("device_pinned", device=device.name, model=model, version=version, actor=str(actor))


def set_labels(*, device: Device, labels: Mapping[str, str], actor: User | str, comment: str = "") -> None:
    """Replace a device's labels; groups are chosen by them, so this may change what it runs."""
    try:
        checked = check_labels(dict(labels))
    except ProtocolError as error:
        raise Invalid(error.code, error.message) from error
    with transaction.atomic():
        before = Device.objects.select_for_update().get(pk=device.pk).labels
        Device.objects.filter(pk=device.pk).update(labels=checked)
        record("device.labelled", target=device.name, detail={"labels": checked, "was": before}, comment=comment)
        changes.device_changed(device.pk)
    device.labels = checked
    logger.info("device_labelled", device=device.name, labels=checked, actor=str(actor))


@transaction.atomic
def save_group(
    *, group: Group | None = None, name: str, description: str = "", selector: str, mirror: str = ""
) -> Group:
    """Create or change a group. `selector` as in `selection`; empty chooses every device. `mirror` empty: none."""
    group = group or Group()
    try:
        chosen = str(selection.parse(selector))
        group.name, group.description, group.selector = check_name(name, "group"), description, chosen
        group.mirror = check_mirror(mirror.strip()) if mirror.strip() else ""
    except ProtocolError as error:
        raise Invalid(error.code, error.message) from error
    if Group.objects.filter(name=group.name).exclude(pk=group.pk).exists():
        raise Conflict("group_exists", f"there is a group {group.name!r} already")
    created = group.pk is None
    group.save()
    detail = {"selector": group.selector, "description": group.description, "mirror": group.mirror}
    record("group.created" if created else "group.changed", target=group.name, detail=detail)
    changes.policy_changed()
    return group


@transaction.atomic
def delete_group(*, group: Group) -> None:
    """Refused by the database where a rollout is for it. Its devices are told of its mirror no more."""
    group.delete()
    record("group.deleted", target=group.name, detail={"selector": group.selector, "mirror": group.mirror})
    changes.policy_changed()


def _move(device: Device, before: Device.State, after: Device.State) -> None:
    if not Device.objects.filter(pk=device.pk, state=before).update(state=after):
        raise Conflict("wrong_state", f"{device.name} is not {before.label}")
    device.state = after


# --- what devices report -----------------------------------------------------------------------------------------


@transaction.atomic
def record_events(device: Device, post: EventPost, *, exists: Callable[[Mapping[str, str]], bool]) -> list[Event]:
    """Keep what a device said; return the events that are new. Posting something twice is posting it once.

    `exists` tells whether all releases of a running set are known: what a device runs is its own text, and only
    sets of real releases are kept.
    """
    locked = Device.objects.select_for_update().get(pk=device.pk)  # its posts one after another
    new = _new_events(locked, post.events)
    now = timezone.now()
    DeviceEvent.objects.bulk_create([_row(locked, event, now) for event in new])
    _note_statuses(locked, new, now)
    _note_device(locked, post, new, now=now, repeated=bool(post.events) and not new, exists=exists)
    return new


def _new_events(device: Device, events: Sequence[Event]) -> list[Event]:
    by_id = {event.id: event for event in reversed(events)}  # of twins in one post, the first
    stored = DeviceEvent.objects.filter(device=device, event_id__in=by_id).values_list("event_id", flat=True)
    for event_id in stored:
        del by_id[event_id]
    return list(reversed(by_id.values()))


def _row(device: Device, event: Event, now: datetime) -> DeviceEvent:
    return DeviceEvent(
        device=device,
        event_id=event.id,
        kind=event.kind,
        model=event.model,
        release=str(event.release or ""),
        rollout=event.rollout,
        reason=event.reason,
        detail=dict(event.detail),
        at=_device_time(event.at),
        received_at=now,
    )


def _note_statuses(device: Device, events: Sequence[Event], now: datetime) -> None:
    """The last word on each of the device's models wins; health changes no state."""
    statuses = {status.model: status for status in ModelStatus.objects.filter(device=device)}
    touched = {}
    for event in events:
        if event.model in device.model_names:
            before = statuses.get(event.model) or ModelStatus(device=device, model=event.model, since=now)
            statuses[event.model] = touched[event.model] = _next_status(before, event, now)
    ModelStatus.objects.bulk_create(
        touched.values(),
        update_conflicts=True,
        unique_fields=["device", "model"],
        update_fields=["state", "release", "reason", "health", "since"],
    )


def _next_status(status: ModelStatus, event: Event, now: datetime) -> ModelStatus:
    if event.kind == HEALTH:
        status.health = dict(event.detail)
        return status
    release = str(event.release or "")
    if (status.state, status.release) != (event.kind, release):
        status.since = _believed(event.at, now)
    status.state, status.release, status.reason = event.kind, release, event.reason
    return status


# What shows that a model's file came as it was signed, or that nobody wants it any more.
_BROUGHT = frozenset(
    {events.TESTING, events.ACTIVATING, events.PROBATION, events.COMMITTED, events.WITHDRAWN, events.ACCEPTED}
)


def refusal_after(refusal: Mapping[str, Any], said: Sequence[Event], now: datetime) -> dict[str, Any]:
    """What the device refuses after these events; empty: nothing. A poll ends no refusal, it may be a recorded one."""
    current = dict(refusal)
    for event in said:
        if event.kind == events.REFUSED:
            message, at = str(event.detail.get("message", "")), _believed(event.at, now).isoformat()
            current = {"code": event.reason, "message": message, "model": event.model, "at": at}
        elif current and _ends_refusal(event, str(current["model"])):
            current = {}
    return current


def _ends_refusal(event: Event, model: str) -> bool:
    return event.kind in _BROUGHT and event.model == model if model else event.kind == events.ACCEPTED


def _note_device(
    device: Device,
    post: EventPost,
    new: Sequence[Event],
    *,
    now: datetime,
    repeated: bool,
    exists: Callable[[Mapping[str, str]], bool],
) -> None:
    values: dict[str, Any] = {"last_seen": now, "sdk": post.sdk or device.sdk}
    if post.abilities != UNSAID:  # older SDKs say nothing
        values["abilities"] = post.abilities.to_json()
    if not repeated:
        values["dropped_events"] = F("dropped_events") + post.dropped
    known = _known_set(device, post.runs, exists)
    if known is not None:
        values["runs"] = known
    refusal = refusal_after(device.refusal, new, now)
    if refusal != device.refusal:
        values["refusal"] = refusal
    Device.objects.filter(pk=device.pk).update(**values)
    able = values.get("abilities", device.abilities)
    if (values["sdk"], able) != (device.sdk, device.abilities):  # what it can run depends on them
        changes.device_changed(device.pk)


def _known_set(
    device: Device, runs: Mapping[str, str], exists: Callable[[Mapping[str, str]], bool]
) -> RunningSet | None:
    digest = running_digest(runs)
    known = selectors.running_set(device, digest)
    if known is not None:
        return known
    if not set(runs) <= set(device.model_names) or not exists(runs):
        return None
    return RunningSet.objects.get_or_create(digest=digest, defaults={"runs": dict(runs)})[0]


def _device_time(seconds: float) -> datetime:
    """A device's clock as it is, within what a database can hold."""
    return datetime.fromtimestamp(min(seconds, 253_370_764_800.0), UTC)  # year 9999


def _believed(seconds: float, now: datetime) -> datetime:
    """A device's clock where it is plausible, else ours: clocks start at 1970, and run ahead."""
    at = _device_time(seconds)
    return at if now - BELIEVABLE <= at <= now else now


# --- history -----------------------------------------------------------------------------------------------------


def record_spread() -> None:
    """Add the present spread to its history."""
    now = timezone.now().replace(microsecond=0)
    samples = [
        SpreadSample(at=now, model=model, version=version, devices=devices)
        for model, versions in selectors.spread().items()
        for version, devices in versions.items()
    ]
    SpreadSample.objects.bulk_create(samples, ignore_conflicts=True)


def thin_history() -> None:
    """Keep history bounded: old spread samples by the hour, events and health reports for a while."""
    now = timezone.now()
    SpreadSample.objects.filter(at__lt=now - SPREAD_KEPT).delete()
    by_hour = SpreadSample.objects.annotate(hour=TruncHour("at")).filter(at__lt=now - FULL_DETAIL)
    earlier = SpreadSample.objects.filter(at__gte=OuterRef("hour"), at__lt=OuterRef("at"))
    by_hour.filter(Exists(earlier)).delete()
    stale = Q(received_at__lt=now - EVENTS_KEPT) | Q(kind=HEALTH, received_at__lt=now - HEALTH_KEPT)
    DeviceEvent.objects.filter(stale).delete()
    changes.thin()


def _digest(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()
