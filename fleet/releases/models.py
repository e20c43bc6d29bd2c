"""Models, releases, variants, artifacts. A release is immutable once it is published; only its state moves."""

from typing import ClassVar

from django.db import models


class Model(models.Model):
    """A named line of releases."""

    class WhenNothing(models.TextChoices):
        KEEP = "keep", "keep serving the last release"
        STOP = "stop", "stop the model"

    name = models.CharField(max_length=64, unique=True)
    description = models.TextField(blank=True)
    when_nothing = models.CharField(
        "when nothing may run",
        max_length=4,
        choices=WhenNothing.choices,
        default=WhenNothing.KEEP,
        help_text="What a device does that no rollout gives a release, such as after a revocation. Outages and expired "
        "signatures never stop a model.",
    )
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name


class Release(models.Model):
    """One version of a model, as CI signed it."""

    class State(models.TextChoices):
        PENDING = "pending"  # too few have signed the role that lists it; it is validated meanwhile
        VALIDATING = "validating"
        VALID = "valid"
        INVALID = "invalid"
        REVOKED = "revoked"
        WITHDRAWN = "withdrawn"  # another proposal took the place of its own, or a person withdrew it; may come again

    class RevokedBy(models.TextChoices):
        CI = "ci", "CI"  # its signature lists it no more: no device installs it, whatever a server says
        KEYS = "keys", "a key ceremony"  # nobody may sign its model any more
        SERVER = "server", "this server"  # withdrawn here by a person; devices are only told so by us

    model = models.ForeignKey(Model, on_delete=models.PROTECT, related_name="releases")
    version = models.CharField(max_length=64)
    state = models.CharField(max_length=10, choices=State.choices, default=State.VALIDATING)
    reason = models.TextField(blank=True)  # why it is invalid or revoked
    signed_by = models.JSONField(default=list)  # key ids that signed the role when it came
    published_by = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    revoked_by = models.CharField(max_length=6, choices=RevokedBy.choices, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["-created_at", "-id"]
        permissions: ClassVar = [("withdraw_release", "Can withdraw releases on this server")]
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
    requires = models.JSONField(default=dict, blank=True)  # the manifest's floors: the policy reads no manifests
    size = models.PositiveBigIntegerField(default=0)  # bytes of all files
    acceptance = models.JSONField(default=dict, blank=True)  # what its bundle asks, and what came of it here; {}: none
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


class ProvenanceKey(models.Model):
    """A public key whose model signatures are shown as verified. It lets nothing be installed."""

    model = models.ForeignKey(Model, on_delete=models.CASCADE, related_name="provenance_keys")
    name = models.CharField(max_length=100, help_text="Whose key it is, such as “research team 2026”.")
    pem = models.TextField(
        "public key", help_text="PEM, on P-256, P-384 or P-521: as `model_signing verify key` takes it."
    )
    fingerprint = models.CharField(max_length=64, editable=False)
    added_by = models.CharField(max_length=150, blank=True, editable=False)
    added_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["model", "name"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["model", "fingerprint"], name="provenance_key_once_per_model"),
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint[:12]})"


class Attachment(models.Model):
    """What is said about a variant, named by its signed manifest. No device ever gets it."""

    variant = models.ForeignKey(Variant, on_delete=models.CASCADE, related_name="attachments")
    kind = models.CharField(max_length=64)
    name = models.CharField(max_length=128)
    artifact = models.ForeignKey(Artifact, on_delete=models.PROTECT, related_name="attachments")
    summary = models.JSONField(default=dict, blank=True)  # what a page shows of it
    signature = models.TextField(blank=True)  # of a model signature: the file itself, judged by the keys of the day

    class Meta:
        ordering: ClassVar = ["kind", "name"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["variant", "name"], name="attachment_once_per_variant"),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class Patch(models.Model):
    """How one file becomes another with less on the wire. It carries no trust: the device checks what comes out."""

    class State(models.TextChoices):
        PENDING = "pending"
        READY = "ready"
        USELESS = "useless", "not worth it"
        FAILED = "failed"

    target = models.ForeignKey(Artifact, on_delete=models.CASCADE, related_name="patches")
    base_sha256 = models.CharField(max_length=64)  # of nothing: every device can use it
    variant = models.ForeignKey(Variant, on_delete=models.CASCADE, related_name="patches")
    file = models.CharField(max_length=128)  # the target's name in `variant`
    base_variant = models.ForeignKey(Variant, null=True, on_delete=models.CASCADE, related_name="+")
    base_file = models.CharField(max_length=128, blank=True)
    state = models.CharField(max_length=10, choices=State.choices, default=State.PENDING)
    reason = models.CharField(max_length=500, blank=True)
    artifact = models.ForeignKey(Artifact, null=True, blank=True, on_delete=models.PROTECT, related_name="patch_of")
    encode_seconds = models.FloatField(null=True, blank=True)  # of processor time; so is the next
    decode_seconds = models.FloatField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    claimed_at = models.DateTimeField(null=True, blank=True, editable=False)  # a worker makes it since then
    attempts = models.PositiveIntegerField(default=0, editable=False)  # claims that came to no end

    class Meta:
        ordering: ClassVar = ["pk"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["target", "base_sha256"], name="patch_once_per_pair"),
        ]

    def __str__(self) -> str:
        return f"{self.base_sha256[:12]} to {self.target_id[:12]}"
