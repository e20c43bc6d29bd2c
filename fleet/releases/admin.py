"""Models and their releases. CI makes releases; people look, and describe models."""

from typing import ClassVar

from django.contrib import admin
from django.db.models import Count, OuterRef, QuerySet, Subquery
from django.http import HttpRequest
from unfold.contrib.filters.admin import ChoicesDropdownFilter, RelatedDropdownFilter
from unfold.decorators import display

from fleet import presentation
from fleet.adminkit import KeptAdmin, ReadOnlyAdmin
from fleet.releases.models import Model, Release


@admin.register(Model)
class ModelAdmin(KeptAdmin):
    """A model is added where its signing keys are: `manage.py trust_add_model`. Here it is described."""

    list_display: ClassVar = ["name", "description", "newest", "releases_count", "made"]
    search_fields: ClassVar = ["name", "description"]
    fields = ("name", "description", "newest", "made")
    readonly_fields: ClassVar = ["name", "newest", "made"]
    change_form_outer_after_template = "dashboard/model.html"

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Model]:
        newest = Release.objects.filter(model=OuterRef("pk"), state=Release.State.VALID).order_by("-created_at", "-pk")
        rows: QuerySet[Model] = super().get_queryset(request)
        return rows.annotate(newest_version=Subquery(newest.values("version")[:1]), releases_made=Count("releases"))

    @display(description="Newest valid release")
    def newest(self, model: Model) -> str:
        return model.newest_version or "-"  # type: ignore[attr-defined]  # annotated

    @display(description="Releases", ordering="releases_made")
    def releases_count(self, model: Model) -> int:
        return model.releases_made  # type: ignore[attr-defined, no-any-return]

    @display(description="Added", ordering="created_at")
    def made(self, model: Model) -> str:
        return presentation.ago(model.created_at)


@admin.register(Release)
class ReleaseAdmin(ReadOnlyAdmin):
    list_display: ClassVar = ["name", "state_label", "variant_names", "total_size", "published_by", "published"]
    list_filter: ClassVar = [("model", RelatedDropdownFilter), ("state", ChoicesDropdownFilter)]
    search_fields: ClassVar = ["version", "model__name", "published_by"]
    list_select_related: ClassVar = ["model"]
    fields = ("name", "state_label", "reason", "signed_by_keys", "published_by", "published")
    readonly_fields = fields
    change_form_outer_after_template = "dashboard/release.html"

    def get_queryset(self, request: HttpRequest) -> QuerySet[Release]:
        rows: QuerySet[Release] = super().get_queryset(request)
        return rows.prefetch_related("variants")

    @display(description="Release", ordering="version")
    def name(self, release: Release) -> str:
        return str(release)

    @display(description="State", ordering="state", label=presentation.STATE_COLOURS)
    def state_label(self, release: Release) -> str:
        return release.state

    @display(description="Variants")
    def variant_names(self, release: Release) -> str:
        return presentation.chips(variant.name for variant in release.variants.all())

    @display(description="Size")
    def total_size(self, release: Release) -> str:
        return presentation.size(sum(variant.size for variant in release.variants.all()))

    @display(description="Signed by keys")
    def signed_by_keys(self, release: Release) -> str:
        return presentation.chips(str(key)[:16] for key in release.signed_by)

    @display(description="Published", ordering="created_at")
    def published(self, release: Release) -> str:
        return presentation.ago(release.created_at)
