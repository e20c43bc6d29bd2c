"""Campaigns ask, batches bring, data-set parts keep. Received twice is one thing: ids and hashes are unique."""

from typing import ClassVar

from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator
from django.db import models
from django.utils import timezone

from device_sdk.protocol.assignment import DAY_MINUTES, MAX_JITTER_SECONDS, MAX_SAMPLES

DATASETS = "datasets"  # the folder of object storage where parts lie


def validate_probability(value: float) -> None:
    if not 0 <= value <= 1:  # said this way round, so that NaN is none
        raise ValidationError("expected a number from 0 to 1")


class Campaign(models.Model):
    """A request for samples of one model, signed into the views of the devices that run it."""

    name = models.CharField(max_length=64, unique=True)
    model = models.ForeignKey("releases.Model", on_delete=models.PROTECT, related_name="campaigns")
    rate = models.FloatField(
        default=0.01,
        validators=[validate_probability],
        help_text="probability with which a device keeps an inference",
    )
    max_samples = models.PositiveIntegerField(
        default=1_000,
        validators=[MaxValueValidator(MAX_SAMPLES)],
        help_text="that one device keeps between two uploads",
    )
    window_start = models.PositiveIntegerField(
        default=120,
        validators=[MaxValueValidator(DAY_MINUTES - 1)],
        help_text="minute of the device's local day from which it may upload",
    )
    window_end = models.PositiveIntegerField(
        default=300,
        validators=[MaxValueValidator(DAY_MINUTES - 1)],
        help_text="minute at which uploads end; equal to the start: all day; less: past midnight",
    )
    jitter_seconds = models.PositiveIntegerField(
        default=3_600,
        validators=[MaxValueValidator(MAX_JITTER_SECONDS)],
        help_text="devices spread their uploads over this time after the window opens",
    )
    active = models.BooleanField(default=True)
    expires_at = models.DateTimeField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["-created_at"]
        constraints: ClassVar = [
            models.CheckConstraint(condition=models.Q(rate__gte=0, rate__lte=1), name="campaign_rate_is_probability"),
            models.CheckConstraint(
                condition=models.Q(window_start__lt=DAY_MINUTES, window_end__lt=DAY_MINUTES),
                name="campaign_window_within_day",
            ),
            # A device refuses its whole view when one number in it is out of bounds: keep them out of the database.
            models.CheckConstraint(
                condition=models.Q(max_samples__lte=MAX_SAMPLES, jitter_seconds__lte=MAX_JITTER_SECONDS),
                name="campaign_within_protocol",
            ),
        ]

    def __str__(self) -> str:
        return self.name


class Batch(models.Model):
    """One upload of one device, by the id that the device gave it. Its bytes lie under `batches/<sha256>`.

    `announced -> received -> ingested`, or `rejected` when what was received is not a batch. Rows outlive their bytes,
    so that a batch that comes again after a year is still the same batch.
    """

    class State(models.TextChoices):
        ANNOUNCED = "announced"
        RECEIVED = "received"
        INGESTED = "ingested"
        REJECTED = "rejected"

    batch_id = models.CharField(max_length=32, unique=True)
    device = models.ForeignKey("devices.Device", on_delete=models.CASCADE, related_name="batches")
    model = models.ForeignKey("releases.Model", on_delete=models.PROTECT, related_name="batches")
    campaign = models.ForeignKey(Campaign, null=True, blank=True, on_delete=models.SET_NULL, related_name="batches")
    # Unique, because the object is named by it: nobody may announce, overwrite or void the bytes of another batch.
    sha256 = models.CharField(max_length=64, unique=True)
    length = models.PositiveIntegerField()
    samples = models.PositiveIntegerField()
    dropped = models.PositiveBigIntegerField(default=0)
    state = models.CharField(max_length=10, choices=State.choices, default=State.ANNOUNCED)
    reason = models.TextField(blank=True)
    announced_at = models.DateTimeField(default=timezone.now)
    received_at = models.DateTimeField(null=True, blank=True)
    ingested_at = models.DateTimeField(null=True, blank=True)
    raw_deleted_at = models.DateTimeField(null=True, blank=True)  # by retention
    # Which compaction run works on it, and since when: a lease, so that two workers do not do the same work.
    claim = models.CharField(max_length=32, blank=True, editable=False)
    claimed_at = models.DateTimeField(null=True, blank=True, editable=False)

    class Meta:
        ordering: ClassVar = ["-announced_at", "-id"]
        indexes: ClassVar = [
            models.Index(fields=["state", "model", "received_at"]),
            models.Index(fields=["claim"], condition=~models.Q(claim=""), name="batch_claimed"),
        ]
        verbose_name_plural = "batches"

    def __str__(self) -> str:
        return self.batch_id[:12]


class DatasetPart(models.Model):
    """One Parquet file: samples of one model, version and day (UTC). Each of its batches is in it exactly once."""

    model = models.ForeignKey("releases.Model", on_delete=models.PROTECT, related_name="dataset_parts")
    version = models.CharField(max_length=64)
    day = models.DateField()
    path = models.CharField(max_length=255, unique=True)  # in object storage
    rows = models.PositiveIntegerField()
    length = models.PositiveBigIntegerField()
    batches = models.ManyToManyField(Batch, related_name="parts")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["model", "version", "day", "id"]

    def __str__(self) -> str:
        return self.path
