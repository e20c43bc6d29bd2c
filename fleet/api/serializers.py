"""The operator API's shapes. Writing ones only check form: what may be done is for the services to say."""

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from device_sdk.protocol.assignment import MAX_BYTES
from fleet.devices.models import Device, DeviceEvent, Group, ModelStatus
from fleet.feedback.models import Batch, Campaign
from fleet.releases import selectors as release_selectors
from fleet.releases.models import Model, Release, Variant
from fleet.rollouts import selectors
from fleet.rollouts.models import Rollout, RolloutAction, Stage
from fleet.rollouts.services import StagePlan


class ErrorSerializer(serializers.Serializer[Any]):
    """Every refusal. `code` is stable."""

    code = serializers.CharField()
    message = serializers.CharField()
    detail = serializers.DictField()


class ModelSerializer(serializers.ModelSerializer[Model]):
    class Meta:
        model = Model
        fields = ("id", "name", "description", "when_nothing", "created_at")


class TensorSerializer(serializers.Serializer[Any]):
    name = serializers.CharField()
    dtype = serializers.CharField()
    shape = serializers.ListField(help_text="sizes, symbolic names, or null where unknown")


class AttachmentSerializer(serializers.Serializer[Any]):
    kind = serializers.CharField()
    name = serializers.CharField()
    length = serializers.IntegerField(help_text="bytes")
    sha256 = serializers.CharField()
    verdict = serializers.CharField(help_text="of a model signature, by the keys that are trusted now; else empty")
    summary = serializers.DictField(help_text="what it says, in short; all of it as its author wrote it")


class VariantSerializer(serializers.ModelSerializer[Variant]):
    metadata = serializers.SerializerMethodField(help_text="what CI signed besides, by key")
    attachments = serializers.SerializerMethodField()
    inputs = TensorSerializer(many=True, read_only=True)
    outputs = TensorSerializer(many=True, read_only=True)

    class Meta:
        model = Variant
        fields = (
            "name", "manifest_sha256", "state", "reason", "inputs", "outputs", "opset", "size", "validated_at",
            "metadata", "attachments",
        )  # fmt: skip

    @extend_schema_field(serializers.DictField(child=serializers.CharField()))
    def get_metadata(self, variant: Variant) -> dict[str, str]:
        return release_selectors.metadata(variant)

    @extend_schema_field(AttachmentSerializer(many=True))
    def get_attachments(self, variant: Variant) -> list[dict[str, Any]]:
        return [release_selectors.describe_attachment(item) for item in variant.attachments.all()]


class ReleaseSerializer(serializers.ModelSerializer[Release]):
    model = serializers.SlugRelatedField[Model](slug_field="name", read_only=True)
    signed_by = serializers.ListField(child=serializers.CharField(), read_only=True, help_text="key ids")
    variants = VariantSerializer(many=True, read_only=True)

    class Meta:
        model = Release
        fields = (
            "id", "model", "version", "state", "reason", "revoked_by", "revoked_at", "signed_by", "published_by",
            "created_at", "variants",
        )  # fmt: skip


class StatusSerializer(serializers.ModelSerializer[ModelStatus]):
    health = serializers.DictField(read_only=True)

    class Meta:
        model = ModelStatus
        fields = ("model", "state", "release", "reason", "health", "since")


class DeviceSerializer(serializers.ModelSerializer[Device]):
    labels = serializers.DictField(child=serializers.CharField(), read_only=True)
    models = serializers.ListField(child=serializers.CharField(), source="model_names", read_only=True)
    pins = serializers.DictField(child=serializers.CharField(), read_only=True, help_text="model to version")
    runs = serializers.SerializerMethodField(help_text="model to version/variant")
    statuses = StatusSerializer(many=True, read_only=True)

    class Meta:
        model = Device
        fields = (
            "id", "name", "state", "labels", "models", "pins", "runs", "statuses", "sdk", "dropped_events", "refusal",
            "enrolled_at", "last_seen",
        )  # fmt: skip

    def get_runs(self, device: Device) -> dict[str, str]:
        return dict(device.runs.runs) if device.runs else {}


class EventSerializer(serializers.ModelSerializer[DeviceEvent]):
    device = serializers.SlugRelatedField[Device](slug_field="name", read_only=True)
    detail = serializers.DictField(read_only=True)

    class Meta:
        model = DeviceEvent
        fields = (
            "id", "device", "event_id", "kind", "model", "release", "rollout", "reason", "detail", "at", "received_at",
        )  # fmt: skip


class GroupSerializer(serializers.ModelSerializer[Group]):
    selector = serializers.DictField(
        child=serializers.ListField(child=serializers.CharField()),
        default=dict,
        help_text="label to its allowed values; empty: every device",
    )

    class Meta:
        model = Group
        fields = ("id", "name", "description", "selector")
        extra_kwargs: dict[str, dict[str, Any]] = {"name": {"validators": []}}  # the service answers with a code


class StageSerializer(serializers.ModelSerializer[Stage]):
    class Meta:
        model = Stage
        fields = (
            "percent", "soak_seconds", "min_reports", "success_threshold", "failure_budget", "entered_at", "passed_at",
        )  # fmt: skip


class ProgressSerializer(serializers.Serializer[selectors.Progress]):
    total = serializers.IntegerField(help_text="devices of the group that run the model")
    admitted = serializers.IntegerField()
    waiting = serializers.IntegerField()
    updating = serializers.IntegerField()
    committed = serializers.IntegerField()
    failed = serializers.IntegerField()
    withdrawn = serializers.IntegerField(help_text="recalled before they had committed")
    percent = serializers.FloatField(help_text="share of the group that committed")


class ActionSerializer(serializers.ModelSerializer[RolloutAction]):
    class Meta:
        model = RolloutAction
        fields = ("action", "actor", "comment", "at")


class RolloutSerializer(serializers.ModelSerializer[Rollout]):
    model = serializers.CharField(source="release.model.name", read_only=True)
    version = serializers.CharField(source="release.version", read_only=True)
    stages = StageSerializer(many=True, read_only=True)
    created_by = serializers.SlugRelatedField[Any](slug_field="username", read_only=True)

    class Meta:
        model = Rollout
        fields: tuple[str, ...] = (
            "id", "release", "model", "version", "group", "state", "reason", "stage_index", "stage_since", "stages",
            "on_failure", "urgent", "window", "conditions", "created_by", "created_at", "started_at", "finished_at",
        )  # fmt: skip


class RolloutDetailSerializer(RolloutSerializer):
    """With what takes a look at the devices."""

    progress = serializers.SerializerMethodField()
    actions = ActionSerializer(many=True, read_only=True)

    class Meta(RolloutSerializer.Meta):
        fields = (*RolloutSerializer.Meta.fields, "progress", "actions")

    def get_progress(self, rollout: Rollout) -> ProgressSerializer:
        return ProgressSerializer(selectors.progress(rollout)).data  # type: ignore[return-value]  # for the schema


class StagePlanSerializer(serializers.Serializer[StagePlan]):
    percent = serializers.FloatField(help_text="of the group, cumulative; the last one is 100")
    soak_seconds = serializers.IntegerField(default=0, min_value=0, max_value=2**31 - 1)
    min_reports = serializers.IntegerField(default=1, min_value=0, max_value=2**31 - 1)
    success_threshold = serializers.FloatField(default=0.9, min_value=0, max_value=1)
    failure_budget = serializers.IntegerField(default=0, min_value=0, max_value=2**31 - 1)


class WindowSerializer(serializers.Serializer[Any]):
    start = serializers.IntegerField(min_value=0, max_value=1439, help_text="minute of the device's day")
    end = serializers.IntegerField(min_value=0, max_value=1439)


class ProbationSerializer(serializers.Serializer[Any]):
    calls = serializers.IntegerField(required=False, min_value=0)
    seconds = serializers.FloatField(required=False, min_value=0)
    max_error_rate = serializers.FloatField(required=False, min_value=0, max_value=1)
    max_invalid_rate = serializers.FloatField(required=False, min_value=0, max_value=1)


class ConditionsSerializer(serializers.Serializer[Any]):
    """What a device waits for beside the window, and what it may use. Left out: nothing is asked."""

    unmetered = serializers.BooleanField(required=False, help_text="not on a network that is paid for by the byte")
    charging = serializers.BooleanField(required=False, help_text="charging, or on mains")
    idle = serializers.BooleanField(required=False, help_text="the host has little else to do")
    free_disk = serializers.IntegerField(
        required=False, min_value=0, max_value=MAX_BYTES, help_text="bytes that must be free when the release is there"
    )
    free_memory = serializers.IntegerField(
        required=False, min_value=0, max_value=MAX_BYTES, help_text="bytes that must be free when it begins"
    )
    rate = serializers.IntegerField(
        required=False, min_value=0, max_value=MAX_BYTES, help_text="bytes a second of downloads; 0: no limit"
    )
    daily = serializers.IntegerField(
        required=False, min_value=0, max_value=MAX_BYTES, help_text="bytes a day of downloads; 0: no limit"
    )


class RolloutCreateSerializer(serializers.Serializer[Rollout]):
    release = serializers.PrimaryKeyRelatedField(queryset=Release.objects.select_related("model"))
    group = serializers.PrimaryKeyRelatedField(queryset=Group.objects.all(), allow_null=True, default=None)
    stages = StagePlanSerializer(many=True)
    on_failure = serializers.ChoiceField(Rollout.OnFailure.choices, default=Rollout.OnFailure.ROLL_BACK)
    urgent = serializers.BooleanField(default=False)
    window = WindowSerializer(allow_null=True, default=None)
    probation = ProbationSerializer(allow_null=True, default=None)
    conditions = ConditionsSerializer(allow_null=True, default=None)


class CommentSerializer(serializers.Serializer[Any]):
    comment = serializers.CharField(default="", allow_blank=True, max_length=500, help_text="why; kept for ever")


class PinSerializer(serializers.Serializer[Any]):
    model = serializers.CharField(max_length=64)
    version = serializers.CharField(max_length=64, allow_null=True, help_text="null lets it go")


class LabelsSerializer(serializers.Serializer[Any]):
    labels = serializers.DictField(child=serializers.CharField(), help_text="replaces all labels")


class CampaignSerializer(serializers.ModelSerializer[Campaign]):
    model = serializers.SlugRelatedField(slug_field="name", queryset=Model.objects.all())

    class Meta:
        model = Campaign
        fields: tuple[str, ...] = (
            "id", "name", "model", "rate", "max_samples", "window_start", "window_end", "jitter_seconds", "active",
            "expires_at", "created_at",
        )  # fmt: skip


class CampaignCreateSerializer(CampaignSerializer):
    days = serializers.FloatField(write_only=True, default=7, min_value=0.01, max_value=3650, help_text="that it lasts")

    class Meta(CampaignSerializer.Meta):
        fields = (*(name for name in CampaignSerializer.Meta.fields if name != "active"), "days")
        read_only_fields = ("expires_at",)


class CampaignChangeSerializer(CampaignSerializer):
    class Meta(CampaignSerializer.Meta):
        read_only_fields = ("name", "model")

    model = serializers.SlugRelatedField[Model](slug_field="name", read_only=True)


class BatchSerializer(serializers.ModelSerializer[Batch]):
    device = serializers.SlugRelatedField[Device](slug_field="name", read_only=True)
    model = serializers.SlugRelatedField[Model](slug_field="name", read_only=True)
    campaign = serializers.SlugRelatedField[Campaign](slug_field="name", read_only=True)

    class Meta:
        model = Batch
        fields = (
            "id", "batch_id", "device", "model", "campaign", "sha256", "length", "samples", "dropped", "state",
            "reason", "announced_at", "received_at", "ingested_at",
        )  # fmt: skip


class LaggardSerializer(serializers.Serializer[selectors.Laggard]):
    device = serializers.CharField(source="device.name")
    model = serializers.CharField()
    runs = serializers.CharField(help_text="a version, or empty")
    target = serializers.CharField(help_text="the version meant for it; empty: nothing is")
    why = serializers.CharField()
    detail = serializers.CharField()
    since = serializers.DateTimeField(allow_null=True)


class StillRunningSerializer(LaggardSerializer):
    last_seen = serializers.DateTimeField(source="device.last_seen", allow_null=True)
