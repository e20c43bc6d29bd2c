"""Campaigns ask, batches bring, data-set parts keep. Received twice is one thing: ids and hashes are unique."""

from typing import ClassVar

from django.db import models


class Campaign(models.Model):
    """A request for samples of one model, signed into the views of the devices that run it."""

    name = models.CharField(max_length=64, unique=True)
    model = models.ForeignKey("releases.Model", on_delete=models.PROTECT, related_name="campaigns")
    rate = models.FloatField(default=0.01)  # probability with which an inference is kept
    max_samples = models.PositiveIntegerField(default=1_000)  # that one device keeps between two uploads
    window_start = models.PositiveIntegerField(default=120)  # minute of the device's local day
    window_end = models.PositiveIntegerField(default=300)
    jitter_seconds = models.PositiveIntegerField(default=3_600)
    active = models.BooleanField(default=True)
    expires_at = models.DateTimeField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["-created_at"]
        constraints: ClassVar = [
            models.CheckConstraint(condition=models.Q(rate__gte=0, rate__lte=1), name="campaign_rate_is_probability"),
            models.CheckConstraint(
                condition=models.Q(window_start__lt=1440, window_end__lt=1440), name="campaign_window_within_day"
            ),
        ]

    def __str__(self) -> str:
        return self.name


class Batch(models.Model):
    """One upload of one device, by the id that the device gave it. Its bytes lie under `batches/<sha256>`."""

    class State(models.TextChoices):
        ANNOUNCED = "announced"
        RECEIVED = "received"
        INGESTED = "ingested"
        REJECTED = "rejected"

    batch_id = models.CharField(max_length=32, unique=True)
    device = models.ForeignKey("devices.Device", on_delete=models.CASCADE, related_name="batches")
    model = models.ForeignKey("releases.Model", on_delete=models.PROTECT, related_name="batches")
    campaign = models.ForeignKey(Campaign, null=True, blank=True, on_delete=models.SET_NULL, related_name="batches")
    sha256 = models.CharField(max_length=64)
    length = models.PositiveIntegerField()
    samples = models.PositiveIntegerField()
    dropped = models.PositiveBigIntegerField(default=0)
    state = models.CharField(max_length=10, choices=State.choices, default=State.ANNOUNCED)
    reason = models.TextField(blank=True)
    announced_at = models.DateTimeField(auto_now_add=True)
    received_at = models.DateTimeField(null=True, blank=True)
    ingested_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["-announced_at", "-id"]
        verbose_name_plural = "batches"

    def __str__(self) -> str:
        return self.batch_id[:12]


class DatasetPart(models.Model):
    """One Parquet file: samples of one model, release and day, made of whole batches."""

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
