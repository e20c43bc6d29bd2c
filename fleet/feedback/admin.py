"""Campaigns ask, batches bring, data sets keep. Batches and data sets are looked at; campaigns are planned here."""

from typing import Any, ClassVar

from django.contrib import admin
from django.db.models import QuerySet, Sum
from django.http import HttpRequest, StreamingHttpResponse
from django.utils import timezone
from unfold.contrib.filters.admin import ChoicesDropdownFilter, RelatedDropdownFilter
from unfold.decorators import display

from fleet import presentation
from fleet.adminkit import KeptAdmin, ReadOnlyAdmin
from fleet.feedback import exports, services
from fleet.feedback.forms import CampaignForm
from fleet.feedback.models import Batch, Campaign, DatasetPart


@admin.register(Campaign)
class CampaignAdmin(KeptAdmin):
    form = CampaignForm
    list_display: ClassVar = ["name", "model", "standing", "share", "window_text", "samples", "expires"]
    list_filter: ClassVar = [("model", RelatedDropdownFilter), "active"]
    search_fields: ClassVar = ["name", "model__name"]
    list_select_related: ClassVar = ["model"]
    fieldsets = (
        (None, {"fields": ("name", "model", "active", "expires_at")}),
        ("Sampling", {"fields": ("percent", "max_samples")}),
        ("Upload", {"fields": ("opens", "closes", "jitter_seconds")}),
    )

    def get_readonly_fields(self, request: HttpRequest, obj: Campaign | None = None) -> Any:
        """Another name or model is another campaign."""
        return ("name", "model") if obj else ()

    def save_model(self, request: HttpRequest, obj: Campaign, form: Any, change: bool) -> None:
        if change:
            services.change_campaign(campaign=obj, **form.terms())
            return
        given = form.cleaned_data
        made = services.create_campaign(name=given["name"], model=given["model"], **form.terms())
        obj.__dict__.update(made.__dict__)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Campaign]:
        rows: QuerySet[Campaign] = super().get_queryset(request)
        return rows.annotate(brought=Sum("batches__samples"))

    @display(description="State", label={"sampling": "success", "expired": "warning"})
    def standing(self, campaign: Campaign) -> str:
        if campaign.expires_at <= timezone.now():
            return "expired"
        return "sampling" if campaign.active else "off"

    @display(description="Of inferences", ordering="rate")
    def share(self, campaign: Campaign) -> str:
        return f"{100 * campaign.rate:g} %"

    @display(description="Uploads")
    def window_text(self, campaign: Campaign) -> str:
        if campaign.window_start == campaign.window_end:
            return "any time"
        return f"{presentation.clock(campaign.window_start)} to {presentation.clock(campaign.window_end)}"

    @display(description="Samples", ordering="brought")
    def samples(self, campaign: Campaign) -> int:
        return campaign.brought or 0  # type: ignore[attr-defined]  # annotated

    @display(description="Expires", ordering="expires_at")
    def expires(self, campaign: Campaign) -> str:
        return presentation.ago(campaign.expires_at)


@admin.register(Batch)
class BatchAdmin(ReadOnlyAdmin):
    list_display: ClassVar = [
        "name",
        "model",
        "device_link",
        "samples",
        "dropped",
        "weight",
        "state_label",
        "announced",
    ]
    list_filter: ClassVar = [("model", RelatedDropdownFilter), ("state", ChoicesDropdownFilter)]
    search_fields: ClassVar = ["batch_id", "device__name"]
    list_select_related: ClassVar = ["model", "device", "campaign"]
    fields = (
        "batch_id", "model", "campaign", "device_link", "state_label", "reason", "samples", "dropped", "weight",
        "sha256", "announced", "received", "ingested",
    )  # fmt: skip
    readonly_fields = fields

    @display(description="Batch")
    def name(self, batch: Batch) -> str:
        return presentation.short(batch.batch_id)

    @display(description="Device", ordering="device__name")
    def device_link(self, batch: Batch) -> str:
        return presentation.link(batch.device)

    @display(description="Size", ordering="length")
    def weight(self, batch: Batch) -> str:
        return presentation.size(batch.length)

    @display(description="State", ordering="state", label=presentation.STATE_COLOURS)
    def state_label(self, batch: Batch) -> str:
        return batch.state

    @display(description="Announced", ordering="announced_at")
    def announced(self, batch: Batch) -> str:
        return presentation.ago(batch.announced_at)

    @display(description="Received")
    def received(self, batch: Batch) -> str:
        return presentation.ago(batch.received_at, never="not yet")

    @display(description="In the data set")
    def ingested(self, batch: Batch) -> str:
        return presentation.ago(batch.ingested_at, never="not yet")


@admin.register(DatasetPart)
class DatasetPartAdmin(ReadOnlyAdmin):
    list_display: ClassVar = ["part", "version", "day", "rows", "weight", "made"]
    list_filter: ClassVar = [("model", RelatedDropdownFilter), "version"]
    list_select_related: ClassVar = ["model"]
    search_fields: ClassVar = ["model__name", "version"]
    date_hierarchy = "day"
    fields = ("model", "version", "day", "rows", "weight", "path", "made")
    readonly_fields = fields
    actions: ClassVar = ["download"]

    @admin.action(description="Download data set", permissions=["view"])
    def download(self, request: HttpRequest, queryset: QuerySet[DatasetPart]) -> StreamingHttpResponse:
        response = StreamingHttpResponse(
            exports.export_zip(queryset.select_related("model")), content_type="application/zip"
        )
        response["Content-Disposition"] = f'attachment; filename="data-set-{timezone.localdate():%Y-%m-%d}.zip"'
        return response

    @display(description="Data set", ordering="model")
    def part(self, part: DatasetPart) -> str:
        return part.model.name

    @display(description="Size", ordering="length")
    def weight(self, part: DatasetPart) -> str:
        return presentation.size(part.length)

    @display(description="Written", ordering="created_at")
    def made(self, part: DatasetPart) -> str:
        return presentation.ago(part.created_at)
