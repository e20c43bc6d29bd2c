"""Who is told, what was said, and whether it arrived. The outbox is these tables: a lost task loses nothing."""

from typing import ClassVar

from django.db import models
from django.db.models import Q


class Subscription(models.Model):
    """An address that is told. `target`: a URL, or e-mail addresses separated by commas."""

    class Kind(models.TextChoices):
        WEBHOOK = "webhook"
        EMAIL = "email", "e-mail"

    name = models.CharField(max_length=100, unique=True)
    kind = models.CharField(max_length=8, choices=Kind.choices)
    target = models.CharField(max_length=500)
    events = models.JSONField(default=list, blank=True)  # kinds of notices; empty: all
    secret = models.CharField(max_length=400, blank=True, editable=False)  # sealed, see `sealing`; of webhooks only
    active = models.BooleanField(default=True)
    created_by = models.ForeignKey(
        "auth.User", null=True, blank=True, on_delete=models.SET_NULL, related_name="+", editable=False
    )
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name


class Notice(models.Model):
    """Something that happened, in words and as it is sent. `key` is the `webhook-id`, the same at every attempt."""

    key = models.CharField(max_length=40, unique=True)
    kind = models.CharField(max_length=40)
    title = models.CharField(max_length=300)
    body = models.TextField()  # JSON, as it is signed and sent: every attempt sends the same bytes
    at = models.DateTimeField()

    class Meta:
        ordering: ClassVar = ["-pk"]

    def __str__(self) -> str:
        return self.title


class Delivery(models.Model):
    """One notice to one subscription. `next_at` is also the claim: whoever moves it sends."""

    class State(models.TextChoices):
        PENDING = "pending", "to be sent"
        SENT = "sent"
        DEAD = "dead", "given up"

    notice = models.ForeignKey(Notice, on_delete=models.CASCADE, related_name="deliveries")
    subscription = models.ForeignKey(Subscription, on_delete=models.CASCADE, related_name="deliveries")
    state = models.CharField(max_length=8, choices=State.choices, default=State.PENDING)
    tries = models.PositiveSmallIntegerField(default=0)
    next_at = models.DateTimeField()
    error = models.CharField(max_length=300, blank=True)  # of the last attempt
    sent_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["-pk"]
        verbose_name_plural = "deliveries"
        permissions: ClassVar = [("resend_delivery", "Can send notices again")]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["notice", "subscription"], name="one_delivery_per_subscription"),
        ]
        indexes: ClassVar = [
            models.Index(fields=["next_at"], condition=Q(state="pending"), name="deliveries_to_be_sent"),
        ]

    def __str__(self) -> str:
        return f"{self.notice} to {self.subscription}"
