"""Rollouts and stages. No row is written per device at the start: outcomes appear as devices report them."""

from typing import ClassVar

from django.db import models


class Rollout(models.Model):
    """One release to one group, in stages. Its lifecycle is the table in `services`."""

    class State(models.TextChoices):
        DRAFT = "draft"
        AWAITING_APPROVAL = "awaiting_approval", "awaiting approval"
        RUNNING = "running"
        PAUSED = "paused"
        HALTED = "halted"
        CANCELLED = "cancelled"
        COMPLETED = "completed"

    class OnFailure(models.TextChoices):
        HOLD = "hold", "hold: stop growing"
        PAUSE = "pause", "pause: also recall whoever has not activated"
        ROLL_BACK = "roll_back", "roll back: admit nobody"

    release = models.ForeignKey("releases.Release", on_delete=models.PROTECT, related_name="rollouts")
    group = models.ForeignKey("devices.Group", null=True, blank=True, on_delete=models.PROTECT)  # null: every device
    state = models.CharField(max_length=20, choices=State.choices, default=State.DRAFT)
    reason = models.CharField(max_length=500, blank=True)  # why it is in this state
    salt = models.CharField(max_length=32, editable=False)
    stage_index = models.PositiveIntegerField(default=0)
    stage_since = models.DateTimeField(null=True, blank=True)
    forgiven = models.PositiveIntegerField(default=0, editable=False)  # failures that a person accepted by resuming
    on_failure = models.CharField(max_length=10, choices=OnFailure.choices, default=OnFailure.ROLL_BACK)
    urgent = models.BooleanField(default=False)
    window = models.JSONField(null=True, blank=True)  # {"start": minute, "end": minute} of the device's day
    probation = models.JSONField(default=dict, blank=True)  # see protocol.assignment.Probation
    conditions = models.JSONField(default=dict, blank=True)  # see protocol.assignment.Conditions
    created_by = models.ForeignKey("auth.User", null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["-created_at", "-id"]
        permissions: ClassVar = [("operate_rollout", "Can start, pause, resume, cancel and roll back rollouts")]

    def __str__(self) -> str:
        return f"#{self.pk} {self.release}"


class Stage(models.Model):
    """A step. `percent` of the group; it passes on `success_threshold` of reports after `soak_seconds`."""

    rollout = models.ForeignKey(Rollout, on_delete=models.CASCADE, related_name="stages")
    index = models.PositiveIntegerField()
    percent = models.FloatField()  # of the group, cumulative, over 0 to 100
    soak_seconds = models.PositiveIntegerField(default=0)
    min_reports = models.PositiveIntegerField(default=1)  # outcomes needed before anything is decided
    success_threshold = models.FloatField(default=0.9)  # fraction of the stage's admitted devices that committed
    failure_budget = models.PositiveIntegerField(default=0)  # failures above this are too many
    entered_at = models.DateTimeField(null=True, blank=True)
    passed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["index"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["rollout", "index"], name="stage_once_per_rollout"),
            models.CheckConstraint(
                condition=models.Q(percent__gt=0, percent__lte=100), name="stage_percent_within_bounds"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.percent:g} %"


class Outcome(models.Model):
    """How one device fares in one rollout. It counts as updated when it committed, after probation."""

    class State(models.TextChoices):
        UPDATING = "updating"
        COMMITTED = "committed"
        FAILED = "failed"
        WITHDRAWN = "withdrawn"  # recalled before it had committed: neither success nor failure

    rollout = models.ForeignKey(Rollout, on_delete=models.CASCADE, related_name="outcomes")
    device = models.ForeignKey("devices.Device", on_delete=models.CASCADE, related_name="outcomes")
    state = models.CharField(max_length=10, choices=State.choices)
    step = models.CharField(max_length=16, blank=True)  # the last event kind, such as downloading
    reason = models.CharField(max_length=500, blank=True)
    first_at = models.DateTimeField(auto_now_add=True)
    changed_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["rollout", "device"], name="one_outcome_per_device"),
        ]

    def __str__(self) -> str:
        return f"{self.device_id} {self.state}"


class RolloutAction(models.Model):
    """What people and guards did to a rollout, and why: append-only."""

    rollout = models.ForeignKey(Rollout, on_delete=models.CASCADE, related_name="actions")
    action = models.CharField(max_length=20)
    actor = models.CharField(max_length=150)  # a user name, or "guard"
    comment = models.TextField(blank=True)
    at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["at", "id"]

    def __str__(self) -> str:
        return f"{self.action} by {self.actor}"


class PolicyRevision(models.Model):
    """One row whose key changes with every policy write, in the same transaction: compiled snapshots are kept by it.

    Random, not a counter: after a restored backup or a rolled-back transaction, no key ever means something else.
    """

    key = models.CharField(max_length=32)

    def __str__(self) -> str:
        return self.key
