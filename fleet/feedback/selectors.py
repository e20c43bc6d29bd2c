"""What is asked of devices, what came, and what the data sets hold. Nothing here writes."""

from dataclasses import dataclass
from datetime import date, datetime, timedelta

from django.conf import settings
from django.db.models import Min, Q, QuerySet
from django.utils import timezone

from device_sdk.protocol.assignment import Sampling, Window
from fleet.devices.changes import Position, newest
from fleet.devices.models import Device
from fleet.feedback.models import Batch, Campaign, DatasetPart
from fleet.releases.models import Model

LEASE = timedelta(hours=1)  # after which the work of a compaction that was killed is taken up again


@dataclass(frozen=True, slots=True)
class _Kept:
    """Active campaigns, oldest first, as they were when the change log had this position."""

    position: Position
    campaigns: tuple[tuple[datetime, str, Sampling], ...]  # until when, and of which model


NOTHING = _Kept(Position(), ())
_kept = NOTHING


def campaigns_in_force(now: datetime | None = None) -> dict[str, Sampling]:
    """What is sampled of each model: the newest campaign that is active and not over. One short query, and another one
    after a change of anything.
    """
    global _kept  # noqa: PLW0603  # one reference, replaced whole: threads see the old or the new
    kept, position, moment = _kept, newest(), now or timezone.now()
    if position == Position() or position != kept.position:
        rows = Campaign.objects.filter(active=True).select_related("model").order_by("created_at", "pk")
        kept = _kept = _Kept(position, tuple((row.expires_at, row.model.name, _sampling(row)) for row in rows))
    return {model: sampling for until, model, sampling in kept.campaigns if until > moment}


def sampling_for(device: Device) -> dict[str, Sampling]:
    """What this device shall sample of its models."""
    return {model: sampling for model, sampling in campaigns_in_force().items() if model in device.model_names}


def _sampling(campaign: Campaign) -> Sampling:
    return Sampling(
        campaign=campaign.name,
        rate=campaign.rate,
        max_samples=campaign.max_samples,
        expires=int(campaign.expires_at.timestamp()),
        window=Window(campaign.window_start, campaign.window_end),
        jitter_seconds=campaign.jitter_seconds,
    )


def compactable(now: datetime) -> QuerySet[Batch]:
    """Received batches on which nobody works."""
    free = Q(claim="") | Q(claimed_at__lt=now - LEASE)
    return Batch.objects.filter(free, state=Batch.State.RECEIVED).order_by("received_at", "pk")


def models_due(now: datetime, *, full: int) -> list[Model]:
    """Models with batches to compact: the oldest has waited long enough, or there are `full` of them."""
    oldest = now - timedelta(seconds=settings.COMPACT_SECONDS)
    waiting = compactable(now).order_by().values("model").annotate(since=Min("received_at"))
    due = [row["model"] for row in waiting if row["since"] <= oldest or _is_full(row["model"], now, full)]
    return list(Model.objects.filter(pk__in=due).order_by("name"))


def _is_full(model: int, now: datetime, full: int) -> bool:
    return sum(compactable(now).filter(model=model).values_list("length", flat=True)) >= full


def dataset_parts(
    *, model: str = "", version: str = "", since: date | None = None, until: date | None = None
) -> QuerySet[DatasetPart]:
    """Parts of a data set, days from `since` up to and including `until`."""
    wanted = {
        "model__name": model or None,
        "version": version or None,
        "day__gte": since,
        "day__lte": until,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    return DatasetPart.objects.filter(**given).select_related("model").order_by("path")
