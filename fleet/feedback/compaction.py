"""Look into received batches and turn them into data-set parts. For workers: the only way to pyarrow in the server.

Every step can be cut off at any point and done again. What is not a batch is rejected with the reason, alone.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from uuid import uuid4

import structlog
from django.db import transaction
from django.utils import timezone

from device_sdk.protocol.fields import plain
from fleet.errors import Conflict, Invalid
from fleet.feedback import datasets, parsing, selectors
from fleet.feedback.models import Batch, DatasetPart
from fleet.feedback.services import check_hash, storing
from fleet.releases import storage
from fleet.releases.models import Model

logger = structlog.get_logger(__name__)

COMPACT_BYTES = 128 * 1024 * 1024  # of batches that one run holds in memory; about the size of the parts it makes
COMPACT_BATCHES = 2_000

State = Batch.State


def ingest(*, pk: int) -> None:
    """Look at a batch soon after it came, so that a broken device is seen at once. Compaction looks again."""
    batch = Batch.objects.filter(pk=pk, state=State.RECEIVED).select_related("device", "model").first()
    if batch:
        _read_or_reject(batch)


def compact_due() -> list[DatasetPart]:
    """Compact every model that has batches due. What fails for one model is tried again by the next sweep."""
    parts: list[DatasetPart] = []
    for model in selectors.models_due(timezone.now(), full=COMPACT_BYTES):
        try:
            parts += compact(model=model)
        except Exception:
            logger.exception("compaction_failed", model=model.name)
    return parts


def compact(*, model: Model) -> list[DatasetPart]:
    """Put all received batches of a model into data-set parts, as many at a time as memory allows."""
    parts: list[DatasetPart] = []
    skipped: set[int] = set()  # could not be read now; a later run tries again
    while batches := _claim(model, skipped):
        with _lease(batches):
            parts += _compact(batches, skipped)
    return parts


def _compact(batches: list[Batch], skipped: set[int]) -> list[DatasetPart]:
    """1. read and check each batch; 2. write the parts; 3. in one transaction: note them, and the batches as ingested.

    Cut off before 3, nothing has happened but objects that nobody refers to: the next run replaces them or, if it has
    other batches to work with, leaves them alone.
    """
    cells: dict[Batch, Mapping[datasets.Cell, list[datasets.Row]]] = {}
    for batch in batches:
        try:
            if (read := _read_or_reject(batch)) is not None:
                cells[batch] = read
        except Exception:  # object storage is away, or a fault of ours: the others must not wait for this one
            logger.exception("batch_unreadable", batch=batch.batch_id)
            skipped.add(batch.pk)
    written = [(part, *_write(part)) for part in datasets.merge(cells.values())]
    return _record(list(cells), written)


def _claim(model: Model, skipped: set[int]) -> list[Batch]:
    now, claim, total = timezone.now(), uuid4().hex, 0
    pks: list[int] = []
    waiting = selectors.compactable(now).filter(model=model).exclude(pk__in=skipped).values_list("pk", "length")
    for pk, length in waiting[:COMPACT_BATCHES]:
        total += length
        if pks and total > COMPACT_BYTES:
            break
        pks.append(pk)
    selectors.compactable(now).order_by().filter(pk__in=pks).update(claim=claim, claimed_at=now)
    return list(Batch.objects.filter(claim=claim).select_related("device", "model").order_by("received_at", "pk"))


@contextmanager
def _lease(batches: list[Batch]) -> Iterator[None]:
    """Give back, whatever happens, what was claimed. A process that is killed gives back when the lease runs out."""
    try:
        yield
    finally:
        Batch.objects.filter(claim=batches[0].claim).update(claim="", claimed_at=None)


def _read_or_reject(batch: Batch) -> Mapping[datasets.Cell, list[datasets.Row]] | None:
    try:
        return _read(batch)
    except Invalid as error:
        reason = plain(f"{error.code}: {error.message}"[:1000])
        if Batch.objects.filter(pk=batch.pk, state=State.RECEIVED).update(state=State.REJECTED, reason=reason):
            logger.warning("batch_rejected", batch=batch.batch_id, device=batch.device.name, reason=reason)
        return None


def _read(batch: Batch) -> Mapping[datasets.Cell, list[datasets.Row]]:
    """Fetch, hash again (a presigned URL can still be written to after `received`), parse."""
    try:
        with storage.open_object(storage.batch_name(batch.sha256)) as file:
            data = file.read(batch.length + 1)
    except FileNotFoundError as error:
        raise Invalid("missing", "its bytes are gone from object storage") from error
    check_hash(batch, hashlib.sha256(data).hexdigest(), len(data))
    expected = parsing.Expected(batch.batch_id, batch.device.name, batch.model.name, batch.samples)
    cells = datasets.split(batch.batch_id, batch.device.name, parsing.parse(data, expected))
    versions = {cell.version for cell in cells}
    known = set(batch.model.releases.filter(version__in=versions).values_list("version", flat=True))
    if versions != known:
        raise Invalid("unknown_release", f"{batch.model.name} has no releases {sorted(versions - known)!r:.200}")
    return cells


def _write(part: datasets.Part) -> tuple[int, int]:
    """Store a part; return its rows and bytes."""
    with storing(part.path) as file:
        return part.write(file), file.tell()


def _record(batches: list[Batch], written: list[tuple[datasets.Part, int, int]]) -> list[DatasetPart]:
    if not batches:
        return []
    by_id = {batch.batch_id: batch for batch in batches}
    mine = Batch.objects.filter(pk__in=[batch.pk for batch in batches], state=State.RECEIVED, claim=batches[0].claim)
    parts = []
    with transaction.atomic():
        if mine.update(state=State.INGESTED, ingested_at=timezone.now()) != len(batches):
            raise Conflict("lost_claim", "another worker took these batches over")
        for part, rows, length in written:
            cell = part.cell
            row = DatasetPart.objects.create(
                model=batches[0].model, version=cell.version, day=cell.day, path=part.path, rows=rows, length=length
            )
            row.batches.set([by_id[batch] for batch in part.batches])
            parts.append(row)
    return parts
