"""Rows that are only ever added. The database's triggers refuse the rest too, see `protection`."""

from typing import Any, ClassVar, NoReturn

from django.db import models

from fleet.errors import Conflict

ZERO = "0" * 64  # the hash before the first


def _refused() -> Conflict:
    return Conflict("append_only", "the audit trail is append-only: rows are neither changed nor deleted")


class AppendOnlyQuerySet(models.QuerySet[Any]):
    def update(self, **kwargs: Any) -> NoReturn:
        raise _refused()

    def delete(self) -> NoReturn:
        raise _refused()

    def bulk_update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refused()

    def update_or_create(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refused()


class AppendOnly(models.Model):
    objects = AppendOnlyQuerySet.as_manager()

    class Meta:
        abstract = True

    def save(self, *args: Any, **kwargs: Any) -> None:
        if not self._state.adding:
            raise _refused()
        super().save(*args, **{**kwargs, "force_insert": True})

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refused()


class AuditEntry(AppendOnly):
    """One change. Names are copied, not referred to: what they name may be gone one day. No secrets in `detail`."""

    class Kind(models.TextChoices):
        USER = "user", "person"
        TOKEN = "token", "API token"  # a word
        DEVICE = "device"
        COMMAND = "command", "command line"
        TASK = "task", "background task"
        GUARD = "guard"
        NOBODY = "nobody", "nobody known"

    at = models.DateTimeField()
    action = models.CharField(max_length=64, db_index=True)  # `<noun>.<what was done>`
    target_kind = models.CharField(max_length=32)
    target = models.CharField(max_length=255)
    actor_kind = models.CharField(max_length=16, choices=Kind.choices)
    actor = models.CharField(max_length=255, blank=True)
    address = models.CharField(max_length=64, blank=True)
    source = models.CharField(max_length=255, blank=True)  # route, command or task
    comment = models.TextField(blank=True)
    detail = models.TextField(default="{}")  # canonical JSON, as text: every database gives the same bytes back

    class Meta:
        ordering: ClassVar = ["-pk"]
        verbose_name = "audit entry"
        verbose_name_plural = "audit entries"
        permissions: ClassVar = [("export_auditentry", "Can export the audit trail")]
        indexes: ClassVar = [
            models.Index(fields=["target_kind", "target"]),
            models.Index(fields=["actor"]),
            models.Index(fields=["at"]),
        ]

    def __str__(self) -> str:
        return f"{self.action} {self.target}"


class AuditSeal(AppendOnly):
    """An entry's place in the chain: `hash` is sha256 of the hash before and the canonical entry."""

    position = models.PositiveBigIntegerField(primary_key=True)
    entry = models.OneToOneField(AuditEntry, on_delete=models.PROTECT, related_name="seal")
    hash = models.CharField(max_length=64)

    class Meta:
        ordering: ClassVar = ["position"]
        default_permissions = ()

    def __str__(self) -> str:
        return f"{self.position}:{self.hash}"
