"""Models, releases, variants, artifacts. A release is immutable once it is published; only its state moves."""

from typing import ClassVar

from django.db import models


class Model(models.Model):
    """A named line of releases."""

    name = models.CharField(max_length=64, unique=True)
    description = models.TextField(blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name


class Release(models.Model):
    """One version of a model, as CI signed it."""

    class State(models.TextChoices):
        VALIDATING = "validating"
        VALID = "valid"
        INVALID = "invalid"
        REVOKED = "revoked"

    model = models.ForeignKey(Model, on_delete=models.PROTECT, related_name="releases")
    version = models.CharField(max_length=64)
    state = models.CharField(max_length=10, choices=State.choices, default=State.VALIDATING)
    reason = models.TextField(blank=True)  # why it is invalid or revoked
    signed_by = models.JSONField(default=list)  # key ids that signed the role when it came
    published_by = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["-created_at", "-id"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["model", "version"], name="version_once_per_model"),
        ]

    def __str__(self) -> str:
        return f"{self.model.name} {self.version}"


class Artifact(models.Model):
    """One file's bytes, by sha256, whole and verified in object storage under `blobs/<sha256>`."""

    sha256 = models.CharField(max_length=64, primary_key=True)
    length = models.PositiveBigIntegerField()
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.sha256[:12]


class Variant(models.Model):
    """A release for some hardware or precision: the signed manifest, and what validation found."""

    class State(models.TextChoices):
        PENDING = "pending"
        VALID = "valid"
        INVALID = "invalid"

    release = models.ForeignKey(Release, on_delete=models.PROTECT, related_name="variants")
    name = models.CharField(max_length=64)
    manifest = models.TextField()  # the exact signed bytes
    manifest_sha256 = models.CharField(max_length=64, db_index=True)
    manifest_length = models.PositiveIntegerField()
    artifacts = models.ManyToManyField(Artifact, related_name="variants")
    state = models.CharField(max_length=10, choices=State.choices, default=State.PENDING)
    reason = models.TextField(blank=True)
    inputs = models.JSONField(default=list, blank=True)  # [{name, dtype, shape}] as validation read them
    outputs = models.JSONField(default=list, blank=True)
    opset = models.PositiveIntegerField(null=True, blank=True)
    size = models.PositiveBigIntegerField(default=0)  # bytes of all files
    validated_at = models.DateTimeField(null=True, blank=True)
    claimed_at = models.DateTimeField(null=True, blank=True, editable=False)  # a worker validates it since then
    attempts = models.PositiveIntegerField(default=0, editable=False)  # claims that came to no end

    class Meta:
        ordering: ClassVar = ["name"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["release", "name"], name="variant_once_per_release"),
        ]

    def __str__(self) -> str:
        return f"{self.release} {self.name}"

    @property
    def path(self) -> str:
        """The TUF target path."""
        return f"{self.release.model.name}/{self.release.version}/{self.name}"
