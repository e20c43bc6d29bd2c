"""Devices and what they said. Running sets keep the version spread one small count per device."""

from typing import ClassVar

from django.db import models
from django.db.models import F, Q

from device_sdk.protocol.mirrors import MIRROR_CHARS


class Group(models.Model):
    """Devices chosen by labels: see `selection` for the language. Empty: every device.

    `mirror`: of a site, the cache that its devices ask for files first; see `mirrors`.
    """

    name = models.CharField(max_length=64, unique=True)
    description = models.TextField(blank=True)
    selector = models.TextField(blank=True)
    mirror = models.CharField(max_length=MIRROR_CHARS, blank=True)

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name


class RunningSet(models.Model):
    """A distinct combination of releases that devices run: `runs` maps a model to `<version>/<variant>`."""

    digest = models.CharField(max_length=16, unique=True)
    runs = models.JSONField(default=dict)

    def __str__(self) -> str:
        return ", ".join(f"{model} {running}" for model, running in sorted(self.runs.items())) or "nothing"


class EnrolmentToken(models.Model):
    """Lets a limited number of devices in, for a limited time. Only its hash is stored."""

    name = models.CharField(max_length=100)
    digest = models.CharField(max_length=64, unique=True, editable=False)
    model_names = models.JSONField(default=list)  # names of the models that its devices run
    labels = models.JSONField(default=dict, blank=True)  # set on every device that uses it
    max_uses = models.PositiveIntegerField(default=1)
    uses = models.PositiveIntegerField(default=0, editable=False)
    expires_at = models.DateTimeField()
    needs_approval = models.BooleanField(default=False)
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)
    created_by = models.ForeignKey("auth.User", null=True, blank=True, on_delete=models.SET_NULL, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["-created_at"]
        constraints: ClassVar = [
            models.CheckConstraint(condition=Q(uses__lte=F("max_uses")), name="enrolment_uses_within_limit"),
        ]

    def __str__(self) -> str:
        return self.name


class Device(models.Model):
    """One installation. `name` is its identity in signed views; rows are kept when it is revoked."""

    class State(models.TextChoices):
        PENDING = "pending", "waiting for approval"
        ACTIVE = "active"
        REVOKED = "revoked"

    name = models.CharField(max_length=64, unique=True)
    state = models.CharField(max_length=10, choices=State.choices, default=State.ACTIVE)
    labels = models.JSONField(default=dict, blank=True)
    model_names = models.JSONField(default=list)  # names of the models that it runs
    epoch = models.PositiveIntegerField(default=1)  # of its credential; a new one voids the old
    nonce_digest = models.CharField(max_length=64, editable=False)
    token = models.ForeignKey(EnrolmentToken, null=True, blank=True, on_delete=models.SET_NULL)
    sdk = models.CharField(max_length=32, blank=True)
    abilities = models.JSONField(default=dict, blank=True)  # see protocol.abilities; as it said last
    runs = models.ForeignKey(RunningSet, null=True, blank=True, on_delete=models.SET_NULL, db_index=False)  # see Meta
    pins = models.JSONField(default=dict, blank=True)  # model to `<version>`: overrides every rollout
    dropped_events = models.PositiveBigIntegerField(default=0)
    refusal = models.JSONField(default=dict, blank=True)  # {code, message, model, at} while it refuses what it is sent
    enrolled_at = models.DateTimeField(auto_now_add=True)
    last_seen = models.DateTimeField(null=True, blank=True, db_index=True)

    class Meta:
        ordering: ClassVar = ["name"]
        # What pages and the engine ask of the whole fleet, each answered from an index alone.
        indexes: ClassVar = [
            models.Index(fields=["runs"], condition=Q(state="active"), name="active_by_runs"),
            models.Index(fields=["id"], condition=Q(state="active") & ~Q(pins={}), name="active_with_pins"),
            models.Index(fields=["id"], condition=Q(state="active") & ~Q(refusal={}), name="active_refusing"),
            models.Index(fields=["state"], condition=~Q(state="active"), name="not_active_by_state"),
        ]

    def __str__(self) -> str:
        return self.name


class DeviceEvent(models.Model):
    """What a device said happened: history, append-only. `release` is `model/version/variant` or empty."""

    device = models.ForeignKey(Device, on_delete=models.CASCADE, related_name="events")
    event_id = models.CharField(max_length=32)
    kind = models.CharField(max_length=16)
    model = models.CharField(max_length=64, blank=True)
    release = models.CharField(max_length=200, blank=True)
    rollout = models.CharField(max_length=64, blank=True)
    reason = models.CharField(max_length=500, blank=True)
    detail = models.JSONField(default=dict, blank=True)
    at = models.DateTimeField()  # by the device's clock
    received_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["-received_at", "-id"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["device", "event_id"], name="event_once_per_device"),
        ]
        indexes: ClassVar = [models.Index(fields=["device", "-received_at"])]

    def __str__(self) -> str:
        return f"{self.device_id} {self.kind} {self.release}"


class ModelStatus(models.Model):
    """The last thing a device said about one model: what it does, since when, and why it waits or failed."""

    device = models.ForeignKey(Device, on_delete=models.CASCADE, related_name="statuses")
    model = models.CharField(max_length=64)
    state = models.CharField(max_length=16)
    release = models.CharField(max_length=200, blank=True)
    reason = models.CharField(max_length=500, blank=True)
    health = models.JSONField(default=dict, blank=True)
    since = models.DateTimeField()

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["device", "model"], name="one_status_per_model"),
        ]
        indexes: ClassVar = [models.Index(fields=["release", "state"], name="statuses_by_release")]

    def __str__(self) -> str:
        return f"{self.model}: {self.state}"


class SpreadSample(models.Model):
    """How many devices ran a version at a time: the history behind the spread chart."""

    at = models.DateTimeField(db_index=True)
    model = models.CharField(max_length=64)
    version = models.CharField(max_length=64)
    devices = models.PositiveIntegerField()

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["at", "model", "version"], name="one_spread_sample"),
        ]

    def __str__(self) -> str:
        return f"{self.at:%F %T} {self.model} {self.version}: {self.devices}"


class Revision(models.Model):
    """One row, whose number grows with each change that may alter the answer to a poll. See `changes`."""

    number = models.PositiveBigIntegerField(default=0)

    def __str__(self) -> str:
        return str(self.number)


class Change(models.Model):
    """What a revision changed: a device, or (null) what holds for all: policy, groups, campaigns, signed roles.

    `key` is random: after a restored backup the same number means something else, and is seen to.
    """

    revision = models.PositiveBigIntegerField(db_index=True)
    key = models.CharField(max_length=16)
    device = models.PositiveBigIntegerField(null=True)  # its key; no foreign key, which would be one more look-up

    class Meta:
        ordering: ClassVar = ["revision"]

    def __str__(self) -> str:
        return f"{self.revision}: {self.device or 'everybody'}"
