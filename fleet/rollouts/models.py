"""Rollouts and stages. No row is written per device at the start: outcomes appear as devices report them."""

from typing import ClassVar

from django.db import models
from django.utils import timezone

from device_sdk.protocol.assignment import MAX_HOLD


class Rollout(models.Model):
    """One release to one group, in stages. Its lifecycle is the table in `services`."""

    class State(models.TextChoices):
        DRAFT = "draft"
        AWAITING_APPROVAL = "awaiting_approval", "awaiting approval"
        SCHEDULED = "scheduled"  # approved where that is needed; begins by itself at `start_at`
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
    selector = models.TextField(blank=True)  # narrows the group; in the language of devices.selection, as `exclude`
    exclude = models.TextField(blank=True)  # devices of the group that it is not for; empty: none
    exclude_group = models.ForeignKey(
        "devices.Group", null=True, blank=True, on_delete=models.PROTECT, related_name="excluding_rollouts"
    )
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
    max_hold = models.PositiveIntegerField(default=MAX_HOLD)  # seconds for which a program may put it off
    forgive = models.BooleanField(default=False)  # devices that quarantined the release try it again
    guards = models.JSONField(default=dict, blank=True)  # see guards.Terms; empty: none
    evidence_run = models.PositiveIntegerField(default=0, editable=False)  # begins anew with each resume
    evidence_since = models.DateTimeField(null=True, blank=True, editable=False)  # when this run of evidence began
    # How fast, how long, and who must agree: see terms.pace.
    start_at = models.DateTimeField(null=True, blank=True)
    needs_approval = models.BooleanField(default=False)  # asked for; the setting APPROVAL may ask for it besides
    timeout_seconds = models.PositiveIntegerField(default=0)  # 0: none
    retries = models.PositiveSmallIntegerField(default=0)
    retry_seconds = models.PositiveIntegerField(default=3_600)  # before the first; doubles each time
    max_in_flight = models.PositiveIntegerField(default=0)  # 0: no limit
    starts_per_minute = models.FloatField(default=0)  # 0: no limit
    objective_percent = models.FloatField(null=True, blank=True)
    objective_days = models.FloatField(null=True, blank=True)
    # What the engine keeps of it.
    reach = models.FloatField(null=True, editable=False)  # percent admitted by the limits; null: the stage's
    reach_at = models.DateTimeField(null=True, editable=False)  # when that last grew
    stage_lost = models.FloatField(default=0, editable=False)  # of the engine's clock when the stage began
    walked = models.BigIntegerField(default=0, editable=False)  # the last device that was looked at for silence
    walked_at = models.DateTimeField(null=True, editable=False)
    created_by = models.ForeignKey("auth.User", null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["-created_at", "-id"]
        permissions: ClassVar = [
            ("operate_rollout", "Can start, pause, resume, cancel and roll back rollouts"),
            ("approve_rollout", "Can approve other people's rollouts, and reject them"),
        ]

    def __str__(self) -> str:
        return f"#{self.pk} {self.release}"


class Stage(models.Model):
    """A step: a percentage of the group, or a ring; it passes on `success_threshold` of reports after `soak_seconds`.

    Who was admitted stays: of a ring's stage, `percent` is what the stages before it have reached.
    """

    rollout = models.ForeignKey(Rollout, on_delete=models.CASCADE, related_name="stages")
    index = models.PositiveIntegerField()
    percent = models.FloatField()  # of the group, cumulative, over 0 to 100; from 0 with a ring
    ring = models.ForeignKey(
        "devices.Group", null=True, blank=True, on_delete=models.PROTECT, related_name="ring_of_stages"
    )
    soak_seconds = models.PositiveIntegerField(default=0)
    min_reports = models.PositiveIntegerField(default=1)  # outcomes needed before anything is decided
    success_threshold = models.FloatField(default=0.9)  # fraction of the stage's admitted devices that committed
    failure_budget = models.PositiveIntegerField(default=0)  # failures above this are too many
    needs_approval = models.BooleanField(default=False)  # a person must agree before it passes
    approved_by = models.CharField(max_length=150, blank=True)
    approved_at = models.DateTimeField(null=True, blank=True)
    entered_at = models.DateTimeField(null=True, blank=True)
    passed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["index"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["rollout", "index"], name="stage_once_per_rollout"),
            models.CheckConstraint(
                condition=models.Q(percent__lte=100)
                & (models.Q(percent__gt=0) | models.Q(percent__gte=0, ring__isnull=False)),
                name="stage_percent_within_bounds",
            ),
        ]

    def __str__(self) -> str:
        return f"ring {self.ring}" if self.ring else f"{self.percent:g} %"


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
    tries = models.PositiveSmallIntegerField(default=0)  # how often it was tried again
    tried_at = models.DateTimeField(default=timezone.now)  # when this attempt began: timeouts count from here
    retry_at = models.DateTimeField(null=True, blank=True)  # failed, and gets the assignment again then

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["rollout", "device"], name="one_outcome_per_device"),
        ]
        indexes: ClassVar = [
            models.Index(fields=["rollout", "state"], name="outcomes_by_state"),
            models.Index(fields=["retry_at"], condition=models.Q(retry_at__isnull=False), name="outcomes_to_retry"),
            models.Index(fields=["tried_at"], condition=models.Q(state="updating"), name="outcomes_under_way"),
        ]

    def __str__(self) -> str:
        return f"{self.device_id} {self.state}"


class Watch(models.Model):
    """One device in the comparison of a rollout's guards: its numbers before, and where the present span began.

    An unexposed device is compared anew in each stage, so that both sides are of the same hours.
    """

    rollout = models.ForeignKey(Rollout, on_delete=models.CASCADE, related_name="watches")
    run = models.PositiveIntegerField()
    stage = models.PositiveIntegerField()  # 0 where exposed
    device = models.ForeignKey("devices.Device", on_delete=models.CASCADE, related_name="+")
    exposed = models.BooleanField()
    since = models.DateTimeField()
    age = models.PositiveIntegerField(default=0)  # which of guards.AGES is next
    before = models.JSONField()  # quality.Numbers; empty: nothing to compare with
    base = models.JSONField()  # the counts at which the present span began
    scores = models.JSONField(default=dict)  # the newest scores by guard

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["rollout", "run", "stage", "device", "exposed"], name="one_watch"),
        ]

    def __str__(self) -> str:
        return f"{self.device_id} {'exposed' if self.exposed else 'unexposed'}"


class Finding(models.Model):
    """What one device adds to a comparison: waits here until a tick has folded it in, and is then deleted."""

    rollout = models.ForeignKey(Rollout, on_delete=models.CASCADE, related_name="findings")
    run = models.PositiveIntegerField()
    stage = models.PositiveIntegerField()
    age = models.PositiveIntegerField()
    exposed = models.BooleanField()
    changes = models.JSONField()  # guard to [now, change]

    def __str__(self) -> str:
        return f"{self.rollout_id} stage {self.stage} age {self.age}"


class Sheet(models.Model):
    """All that was folded of one stage and age: histograms by guard and side. Its size does not grow with devices."""

    rollout = models.ForeignKey(Rollout, on_delete=models.CASCADE, related_name="sheets")
    run = models.PositiveIntegerField()
    stage = models.PositiveIntegerField()
    age = models.PositiveIntegerField()
    sides = models.JSONField(default=dict)  # guard to [exposed, unexposed], see guards.Side

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["rollout", "run", "stage", "age"], name="one_sheet"),
        ]

    def __str__(self) -> str:
        return f"{self.rollout_id} stage {self.stage} age {self.age}"


class GuardReading(models.Model):
    """What a guard last saw, for pages, metrics and the API; and the highest evidence, which is what halts."""

    rollout = models.ForeignKey(Rollout, on_delete=models.CASCADE, related_name="readings")
    run = models.PositiveIntegerField()
    guard = models.CharField(max_length=16)
    compared = models.PositiveIntegerField()
    unexposed = models.PositiveIntegerField()
    evidence = models.FloatField()  # natural logarithm
    peak = models.FloatField()
    sentence = models.CharField(max_length=500)
    points = models.JSONField(default=list)  # [unix seconds, evidence], thinned
    at = models.DateTimeField()

    class Meta:
        ordering: ClassVar = ["id"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["rollout", "run", "guard"], name="one_reading"),
        ]

    def __str__(self) -> str:
        return f"{self.rollout_id} {self.guard}"


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


class FleetSummary(models.Model):
    """One row: what was last counted of a fleet too large to be counted for each page, see `counting.summary`."""

    content = models.JSONField(default=dict)
    seconds = models.FloatField(default=0)  # that it took
    counted_at = models.DateTimeField(null=True)
    asked_at = models.DateTimeField(null=True)  # somebody looked: counting was begun

    def __str__(self) -> str:
        return f"as of {self.counted_at}"


class PolicyRevision(models.Model):
    """One row whose key changes with every policy write, in the same transaction: compiled snapshots are kept by it.

    Random, not a counter: after a restored backup or a rolled-back transaction, no key ever means something else.
    """

    key = models.CharField(max_length=32)

    def __str__(self) -> str:
        return self.key


class EngineClock(models.Model):
    """One row: when the engine last looked, and the time that it does not count, see `engine_clock`."""

    at = models.DateTimeField()
    lost = models.FloatField(default=0)  # seconds
    gap_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"{self.at:%F %T}"
