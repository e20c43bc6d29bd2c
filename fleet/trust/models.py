"""Signed metadata as bytes. A role's row is never changed; a device's view is replaced under a row lock, and a proposal
grows by compare-and-set until enough keys have signed it.
"""

from typing import ClassVar

from django.db import models


class RoleMetadata(models.Model):
    """One version of root, targets or a model's role, exactly as it was signed."""

    role = models.CharField(max_length=64)
    version = models.PositiveBigIntegerField()
    content = models.TextField()
    sha256 = models.CharField(max_length=64)  # of `content`, as the snapshot lists it
    length = models.PositiveIntegerField()
    expires_at = models.DateTimeField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["role", "-version"]
        verbose_name = "signed role"
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["role", "version"], name="role_version_once"),
        ]

    def __str__(self) -> str:
        return f"{self.role} v{self.version}"


class PendingRole(models.Model):
    """The next version of a model's role, well signed but by too few: it binds nobody until the others sign.

    One for each role. Once the role itself has reached this version, the row means nothing any more.
    """

    role = models.CharField(max_length=64, unique=True)
    version = models.PositiveBigIntegerField()
    content = models.TextField()  # with the valid signatures that came so far
    sha256 = models.CharField(max_length=64)  # of `content`: changes with each signature; what writers compare and set
    signed_sha256 = models.CharField(max_length=64)  # of the signed part alone: names the proposal
    expires_at = models.DateTimeField()
    proposed_by = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField()

    class Meta:
        ordering: ClassVar = ["role"]
        verbose_name = "proposed role"

    def __str__(self) -> str:
        return f"{self.role} v{self.version}, proposed"


class DeviceView(models.Model):
    """What the server last signed for one device. `inputs_digest` names what it was made of."""

    device = models.OneToOneField("devices.Device", on_delete=models.CASCADE, related_name="view")
    version = models.PositiveBigIntegerField(default=0)
    inputs_digest = models.CharField(max_length=64, blank=True)
    director = models.TextField(blank=True)
    snapshot = models.TextField(blank=True)
    timestamp = models.TextField(blank=True)
    expires_at = models.DateTimeField(null=True)
    signed_at = models.DateTimeField(null=True, db_index=True)  # each web process asks what was signed just now

    def __str__(self) -> str:
        return f"view {self.version} of {self.device_id}"
