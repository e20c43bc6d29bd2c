"""Signed metadata as bytes. Rows are never changed, but for a device's view, which is replaced under a row lock."""

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


class DeviceView(models.Model):
    """What the server last signed for one device. `inputs_digest` names what it was made of."""

    device = models.OneToOneField("devices.Device", on_delete=models.CASCADE, related_name="view")
    version = models.PositiveBigIntegerField(default=0)
    inputs_digest = models.CharField(max_length=64, blank=True)
    director = models.TextField(blank=True)
    snapshot = models.TextField(blank=True)
    timestamp = models.TextField(blank=True)
    expires_at = models.DateTimeField(null=True)
    signed_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"view {self.version} of {self.device_id}"
