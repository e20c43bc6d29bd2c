"""The operator API's shapes. Writing ones only check form: what may be done is for the services to say."""

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from device_sdk.protocol.assignment import LONGEST_HOLD, MAX_BYTES, MAX_HOLD
from fleet.devices import selection
from fleet.devices.models import Device, DeviceEvent, Group, ModelStatus
from fleet.feedback.models import Batch, Campaign
from fleet.releases import selectors as release_selectors
from fleet.releases.models import Model, Release, Variant
from fleet.rollouts import evidence, objective, selectors
from fleet.rollouts.counting import summary
from fleet.rollouts.explaining import Explanation
from fleet.rollouts.forecast import VERDICTS, Forecast
from fleet.rollouts.models import GuardReading, Rollout, RolloutAction, Stage
from fleet.rollouts.services import StagePlan
from fleet.rollouts.terms.pace import LONGEST, MOST_RETRIES
from fleet.rollouts.terms.pace import NAMES as PACE


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
            "acceptance", "metadata", "attachments",
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
    abilities = serializers.DictField(read_only=True, help_text="what it said that it can run")

    class Meta:
        model = Device
        fields = (
            "id", "name", "state", "labels", "models", "pins", "runs", "statuses", "sdk", "abilities", "dropped_events",
            "refusal", "enrolled_at", "last_seen",
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


class SelectorSerializerField(serializers.CharField):
    """A label selector; the service checks it, and answers with a code."""

    def __init__(self, **options: Any) -> None:
        super().__init__(default="", allow_blank=True, max_length=selection.TEXT_CHARS, **options)


class GroupSerializer(serializers.ModelSerializer[Group]):
    selector = SelectorSerializerField(
        help_text="such as `site in (berlin, hamburg), hw=jetson, !lab`; empty: every device"
    )

    class Meta:
        model = Group
        fields = ("id", "name", "description", "selector", "mirror")
        extra_kwargs: dict[str, dict[str, Any]] = {
            "name": {"validators": []},  # the service answers with a code
            "mirror": {"help_text": "http(s)://host[:port] of a cache that these devices ask for files first"},
        }


class StageSerializer(serializers.ModelSerializer[Stage]):
    class Meta:
        model = Stage
        fields = (
            "percent", "ring", "soak_seconds", "min_reports", "success_threshold", "failure_budget", "needs_approval",
            "approved_by", "approved_at", "entered_at", "passed_at",
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


class ForecastSerializer(serializers.Serializer[Forecast]):
    verdict = serializers.ChoiceField(VERDICTS)
    why = serializers.CharField()
    reached = serializers.FloatField(help_text="percent of the group that committed")
    deadline = serializers.DateTimeField()
    earliest = serializers.DateTimeField(allow_null=True, help_text="with latest: when it is reached, at 90 %")
    latest = serializers.DateTimeField(allow_null=True)


class ActionSerializer(serializers.ModelSerializer[RolloutAction]):
    class Meta:
        model = RolloutAction
        fields = ("action", "actor", "comment", "at")


class GuardReadingSerializer(serializers.ModelSerializer[GuardReading]):
    evidence = serializers.FloatField(help_text="natural logarithm of the evidence now; the guard halts by the peak")

    class Meta:
        model = GuardReading
        fields = ("guard", "compared", "unexposed", "evidence", "peak", "sentence", "at")


class RolloutSerializer(serializers.ModelSerializer[Rollout]):
    model = serializers.CharField(source="release.model.name", read_only=True)
    version = serializers.CharField(source="release.version", read_only=True)
    stages = StageSerializer(many=True, read_only=True)
    created_by = serializers.SlugRelatedField[Any](slug_field="username", read_only=True)

    class Meta:
        model = Rollout
        fields: tuple[str, ...] = (
            "id", "release", "model", "version", "group", "selector", "exclude", "exclude_group", "state", "reason",
            "stage_index", "stage_since", "stages", "on_failure", "urgent", "window", "probation", "conditions",
            "guards", "max_hold", "forgive", *PACE, "reach", "created_by", "created_at", "started_at", "finished_at",
        )  # fmt: skip


class RolloutDetailSerializer(RolloutSerializer):
    """With what takes a look at the devices."""

    progress = serializers.SerializerMethodField()
    readings = serializers.SerializerMethodField()
    forecast = serializers.SerializerMethodField(help_text="null: nothing is aimed at, or it has not begun")
    actions = ActionSerializer(many=True, read_only=True)

    class Meta(RolloutSerializer.Meta):
        fields = (*RolloutSerializer.Meta.fields, "progress", "readings", "forecast", "actions")

    @extend_schema_field(GuardReadingSerializer(many=True))
    def get_readings(self, rollout: Rollout) -> Any:
        return GuardReadingSerializer(evidence.readings(rollout), many=True).data

    @extend_schema_field(ProgressSerializer(allow_null=True))
    def get_progress(self, rollout: Rollout) -> Any:
        """Of a large fleet null until it was counted, which takes a minute."""
        found = summary.progress(rollout)
        return ProgressSerializer(found.progress).data if found.progress else None

    @extend_schema_field(ForecastSerializer(allow_null=True))
    def get_forecast(self, rollout: Rollout) -> Any:
        found = objective.of(rollout)
        return ForecastSerializer(found).data if found else None


class StagePlanSerializer(serializers.Serializer[StagePlan]):
    percent = serializers.FloatField(
        default=0.0, help_text="of the group, cumulative; the last one is 100. Not asked for with a ring"
    )
    ring = serializers.PrimaryKeyRelatedField(
        queryset=Group.objects.all(), allow_null=True, default=None, help_text="a group whose devices go first"
    )
    soak_seconds = serializers.IntegerField(default=0, min_value=0, max_value=2**31 - 1)
    min_reports = serializers.IntegerField(default=1, min_value=0, max_value=2**31 - 1)
    success_threshold = serializers.FloatField(default=0.9, min_value=0, max_value=1)
    failure_budget = serializers.IntegerField(default=0, min_value=0, max_value=2**31 - 1)
    needs_approval = serializers.BooleanField(default=False, help_text="a person must agree before it passes")


class WindowSerializer(serializers.Serializer[Any]):
    start = serializers.IntegerField(min_value=0, max_value=1439, help_text="minute of the device's day")
    end = serializers.IntegerField(min_value=0, max_value=1439)


class ProbationSerializer(serializers.Serializer[Any]):
    calls = serializers.IntegerField(required=False, min_value=0)
    seconds = serializers.FloatField(required=False, min_value=0)
    max_error_rate = serializers.FloatField(required=False, min_value=0, max_value=1)
    max_invalid_rate = serializers.FloatField(required=False, min_value=0, max_value=1)
    max_slowdown = serializers.FloatField(
        required=False, min_value=1, max_value=1000, help_text="median latency, as a multiple of the release's before"
    )
    max_confidence_drop = serializers.FloatField(
        required=False, min_value=0, max_value=1, help_text="of the mean top score; the manifest names the scores"
    )
    max_class_shift = serializers.FloatField(
        required=False, min_value=0, max_value=1, help_text="total variation distance of the class mix"
    )


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


class GuardTermsSerializer(serializers.Serializer[Any]):
    effect = serializers.FloatField(required=False, help_text="worsening that is let pass; left out: the usual")
    limit = serializers.FloatField(required=False, help_text="plain threshold of the exposed devices' mean")
    test = serializers.BooleanField(required=False, help_text="compare exposed with unexposed (default)")


class GuardsSerializer(serializers.Serializer[Any]):
    """Each named guard is on. The service refuses what is out of bounds."""

    failures = GuardTermsSerializer(required=False)
    errors = GuardTermsSerializer(required=False)  # type: ignore[assignment]  # shadows a property that nobody reads
    invalid = GuardTermsSerializer(required=False)
    latency = GuardTermsSerializer(required=False, help_text="limit in milliseconds, effect as a ratio")
    confidence = GuardTermsSerializer(required=False)
    classes = GuardTermsSerializer(required=False)
    false_alarm = serializers.FloatField(required=False, help_text="chance that a healthy rollout is ever halted")
    devices = serializers.IntegerField(
        required=False, help_text="exposed devices each guard compares before a stage passes"
    )
    calls = serializers.IntegerField(required=False, help_text="calls that make a device comparable")
    limit_devices = serializers.IntegerField(required=False, help_text="devices that a plain limit needs")


class PaceSerializer(serializers.Serializer[Any]):
    """When it begins, how fast it goes, how long a device may take, and who must agree. 0: no limit."""

    start_at = serializers.DateTimeField(required=False, allow_null=True, help_text="begins by itself then")
    needs_approval = serializers.BooleanField(default=False, help_text="of somebody else, before it begins")
    timeout_seconds = serializers.IntegerField(
        required=False, min_value=0, max_value=LONGEST, help_text="then a device that was seen counts as failed"
    )
    retries = serializers.IntegerField(
        required=False, min_value=0, max_value=MOST_RETRIES, help_text="for devices that failed for a passing reason"
    )
    retry_seconds = serializers.IntegerField(
        required=False, min_value=0, max_value=LONGEST, help_text="before the first; doubles each time"
    )
    max_in_flight = serializers.IntegerField(required=False, min_value=0, max_value=2**31 - 1)
    starts_per_minute = serializers.FloatField(required=False, min_value=0, max_value=1e9)
    objective_percent = serializers.FloatField(required=False, allow_null=True, min_value=0, max_value=100)
    objective_days = serializers.FloatField(required=False, allow_null=True, min_value=0, max_value=3650)


class RolloutCreateSerializer(PaceSerializer):
    release = serializers.PrimaryKeyRelatedField(queryset=Release.objects.select_related("model"))
    group = serializers.PrimaryKeyRelatedField(queryset=Group.objects.all(), allow_null=True, default=None)
    selector = SelectorSerializerField(help_text="narrows the group")
    exclude = SelectorSerializerField(help_text="devices of the group to leave out; empty: none")
    exclude_group = serializers.PrimaryKeyRelatedField(queryset=Group.objects.all(), allow_null=True, default=None)
    stages = StagePlanSerializer(many=True)
    on_failure = serializers.ChoiceField(Rollout.OnFailure.choices, default=Rollout.OnFailure.ROLL_BACK)
    urgent = serializers.BooleanField(default=False)
    window = WindowSerializer(allow_null=True, default=None)
    probation = ProbationSerializer(allow_null=True, default=None)
    conditions = ConditionsSerializer(allow_null=True, default=None)
    max_hold = serializers.IntegerField(
        default=MAX_HOLD, min_value=0, max_value=LONGEST_HOLD, help_text="seconds for which a program may put it off"
    )
    forgive = serializers.BooleanField(default=False, help_text="devices that quarantined the release try it again")
    guards = GuardsSerializer(allow_null=True, default=None)


class CommentSerializer(serializers.Serializer[Any]):
    comment = serializers.CharField(default="", allow_blank=True, max_length=500, help_text="why; kept for ever")


class PinSerializer(serializers.Serializer[Any]):
    model = serializers.CharField(max_length=64)
    version = serializers.CharField(max_length=64, allow_null=True, help_text="null lets it go")
    comment = serializers.CharField(default="", allow_blank=True, max_length=500, help_text="why; kept for ever")


class LabelsSerializer(serializers.Serializer[Any]):
    labels = serializers.DictField(child=serializers.CharField(), help_text="replaces all labels")
    comment = serializers.CharField(default="", allow_blank=True, max_length=500, help_text="why; kept for ever")


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


class ConsideredSerializer(serializers.Serializer[Any]):
    rollout = serializers.IntegerField()
    gives = serializers.CharField(help_text="a version")
    state = serializers.CharField()
    why = serializers.CharField(help_text="`admits`, or the first rule by which it does not admit the device")
    detail = serializers.CharField()
    decides = serializers.BooleanField()


class ExplanationSerializer(serializers.Serializer[Any]):
    model = serializers.CharField()
    runs = serializers.CharField(help_text="version/variant, or empty")
    wants = serializers.SerializerMethodField(help_text="version/variant that it should run; empty: what it runs")
    by = serializers.ChoiceField(["pin", "rollout", "nobody"])
    verdict = serializers.CharField()
    considered = ConsideredSerializer(many=True, help_text="in the order in which they are asked")

    def get_wants(self, told: Explanation) -> str:
        return told.assignment.release.running if told.assignment.release else ""


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
