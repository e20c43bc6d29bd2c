"""Bring batches in, delete what is kept elsewhere, and ask for samples by campaigns. See `compaction` for data sets.

A batch is safe from the moment the device hears `received`: its bytes are hashed where they lie, and from then on every
step here can be cut off at any point and done again. What is not a batch is rejected with the reason, alone.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any

import structlog
from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.db.models import Q
from django.utils import timezone

from device_sdk.protocol.batches import BatchHead
from fleet.audit.services import record
from fleet.devices.changes import policy_changed
from fleet.devices.models import Device
from fleet.errors import Conflict, Invalid, NotFound, TooLarge
from fleet.feedback.models import Batch, Campaign
from fleet.releases import storage
from fleet.releases.models import Model

logger = structlog.get_logger(__name__)

CHUNK = 1024 * 1024
ANNOUNCED_FOR = timedelta(days=2)  # then an upload that never came is forgotten; the device may announce it again
_PREFIX = "batch-"  # of partial uploads on this machine's disk

State = Batch.State


# --- upload ----------------------------------------------------------------------------------------------------------
def announce(*, device: Device, head: BatchHead) -> tuple[Batch, bool]:
    """Note that a batch will come; return it, and whether it is new. Another batch under its id is refused."""
    model = _model_of(device, head.model)
    campaign = Campaign.objects.filter(name=head.campaign, model=model).first() if head.campaign else None
    fields = {"device": device, "model": model, "sha256": head.sha256, "length": head.length, "samples": head.samples}
    try:
        with transaction.atomic():
            batch, created = Batch.objects.get_or_create(
                batch_id=head.id, defaults={**fields, "dropped": head.dropped, "campaign": campaign}
            )
    except IntegrityError as error:
        raise Conflict("batch_exists", "these bytes were announced under another batch id") from error
    if any(getattr(batch, name) != value for name, value in fields.items()):
        raise Conflict("batch_exists", f"batch {head.id} exists with other content or from another device")
    Batch.objects.filter(pk=batch.pk, state=State.ANNOUNCED).update(announced_at=timezone.now())
    return batch, created


def find(*, device: Device, batch_id: str) -> Batch:
    """A batch of this device. Another device's is as unknown as one that does not exist."""
    rows = Batch.objects.filter(device=device, batch_id=batch_id).select_related("device", "model")
    batch = rows.first() if batch_id.isascii() and batch_id.isalnum() else None  # the address may hold anything
    if batch is None:
        raise NotFound("unknown_batch", f"device {device.name} announced no batch {batch_id!r:.40}")
    return batch


def receive_content(*, batch: Batch, content: IO[bytes]) -> None:
    """Store what was uploaded through the server, if it is what was announced. `content` is read to its end or cap."""
    if batch.state != State.ANNOUNCED:
        return  # it has come before
    with storing(storage.batch_name(batch.sha256)) as file:
        _copy_exactly(batch, content, file)


def complete(*, batch: Batch) -> Batch:
    """Say `received`, after hashing the bytes where they lie. What is not what was announced is deleted."""
    if batch.state != State.ANNOUNCED:
        return batch
    _check_stored(batch)
    with transaction.atomic():
        now = timezone.now()
        claimed = Batch.objects.filter(pk=batch.pk, state=State.ANNOUNCED).update(state=State.RECEIVED, received_at=now)
        if claimed:  # else another request got there first
            transaction.on_commit(lambda: _wake(batch.pk), robust=True)  # the sweep finds it without the broker
    batch.refresh_from_db()
    return batch


def _model_of(device: Device, name: str) -> Model:
    model = Model.objects.filter(name=name).first() if name in device.model_names else None
    if model is None:
        raise Invalid("wrong_model", f"device {device.name} runs {device.model_names}; the batch is of {name!r}")
    return model


def _copy_exactly(batch: Batch, content: IO[bytes], file: IO[bytes]) -> None:
    digest, length = hashlib.sha256(), 0
    while chunk := content.read(CHUNK):
        length += len(chunk)
        if length > batch.length:
            raise TooLarge("too_large", f"expected {batch.length} bytes as announced; more came")
        digest.update(chunk)
        file.write(chunk)
    check_hash(batch, digest.hexdigest(), length)


@contextmanager
def storing(name: str) -> Iterator[IO[bytes]]:
    """A file of this machine that becomes the object `name` when the block ends well, and nothing when it does not."""
    settings.INCOMING.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=_PREFIX, dir=settings.INCOMING)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        storage.put_file(name, Path(partial))
    finally:
        Path(partial).unlink(missing_ok=True)


def _check_stored(batch: Batch) -> None:
    name = storage.batch_name(batch.sha256)
    if not storage.exists(name):
        raise Conflict("not_uploaded", f"nothing was uploaded for batch {batch.batch_id}")
    try:
        if (length := storage.size(name)) != batch.length:
            check_hash(batch, "", length)
        digest = hashlib.sha256()
        with storage.open_object(name) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        check_hash(batch, digest.hexdigest(), length)
    except Invalid:
        storage.delete(name)
        raise


def check_hash(batch: Batch, sha256: str, length: int) -> None:
    if (sha256, length) != (batch.sha256, batch.length):
        got = f"{length} bytes of sha256 {sha256}" if sha256 else f"{length} bytes"
        raise Invalid("hash_mismatch", f"expected {batch.length} bytes of sha256 {batch.sha256}; got {got}")


def _wake(pk: int) -> None:
    from fleet.feedback import tasks

    tasks.ingest.delay(pk)


# --- housekeeping ----------------------------------------------------------------------------------------------------
def expire() -> int:
    """Forget uploads that never came, and partial files that a killed process left on this disk."""
    before = timezone.now() - ANNOUNCED_FOR
    stale = Batch.objects.filter(state=State.ANNOUNCED, announced_at__lt=before)
    count = 0
    for pk, sha256 in list(stale.values_list("pk", "sha256")[:1000]):
        gone, _ = stale.filter(pk=pk).delete()
        if gone:  # else it has just been completed or announced again
            storage.delete(storage.batch_name(sha256))
            count += 1
    _sweep_incoming(before)
    if count:
        logger.info("announced_batches_expired", count=count)
    return count


def _sweep_incoming(before: datetime) -> None:
    for path in settings.INCOMING.glob(f"{_PREFIX}*"):
        try:
            if path.stat().st_mtime < before.timestamp():
                path.unlink()
        except FileNotFoundError:
            continue  # done with in the meantime


def retire() -> int:
    """Delete the bytes of old batches whose samples are in a data set, and of old rejected ones. Rows stay."""
    before = timezone.now() - timedelta(days=settings.BATCH_RETENTION_DAYS)
    kept = Q(state=State.INGESTED, parts__isnull=False) | Q(state=State.REJECTED)
    old = Batch.objects.filter(kept, received_at__lt=before, raw_deleted_at=None).distinct()
    count = 0
    for pk, sha256 in list(old.values_list("pk", "sha256")):
        storage.delete(storage.batch_name(sha256))
        count += Batch.objects.filter(pk=pk).update(raw_deleted_at=timezone.now())
    return count


# --- campaigns -------------------------------------------------------------------------------------------------------
def create_campaign(*, name: str, model: Model, expires_at: datetime, **options: Any) -> Campaign:
    """Ask every device that runs `model` for samples. `options`: rate, max_samples, window_start and _end, jitter."""
    return _save(Campaign(name=name, model=model, expires_at=expires_at, **options), "campaign.created")


def change_campaign(*, campaign: Campaign, **changes: Any) -> Campaign:
    """Change what is asked, for instance the window. Devices learn it with their next view."""
    for name, value in changes.items():
        if name not in CHANGEABLE:
            raise Invalid("invalid", f"expected one of {sorted(CHANGEABLE)}; got {name!r:.40}")
        setattr(campaign, name, value)
    return _save(campaign, "campaign.changed", fields=changes)


def end_campaign(*, campaign: Campaign) -> Campaign:
    return change_campaign(campaign=campaign, active=False)


CHANGEABLE = frozenset(
    {"rate", "max_samples", "window_start", "window_end", "jitter_seconds", "active", "expires_at"}
)  # another name or model is another campaign


@transaction.atomic
def _save(campaign: Campaign, action: str, fields: Mapping[str, Any] | None = None) -> Campaign:
    try:
        campaign.full_clean()
    except ValidationError as error:
        raise Invalid("invalid_campaign", "; ".join(error.messages), error.message_dict) from error
    campaign.save(update_fields=None if fields is None else list(fields))
    terms = {name: getattr(campaign, name) for name in sorted(fields if fields is not None else CHANGEABLE)}
    record(action, target=campaign.name, detail={"model": campaign.model.name, **terms})
    policy_changed()
    return campaign
