"""Signed roles, to look at: whoever may sign does it with a key, not with a page."""

import json
from typing import ClassVar

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import OuterRef, QuerySet, Subquery
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils import timezone
from django.utils.html import format_html
from unfold.decorators import display

from fleet import presentation
from fleet.adminkit import ReadOnlyAdmin
from fleet.trust import selectors, standing
from fleet.trust.models import RoleMetadata


@admin.register(RoleMetadata)
class RoleMetadataAdmin(ReadOnlyAdmin):
    list_display: ClassVar = ["role", "version", "standing", "key_ids", "signed", "expires"]
    list_filter: ClassVar = ["role"]
    search_fields: ClassVar = ["role"]
    ordering: ClassVar = ["role", "-version"]
    fields = ("role", "version", "standing", "key_ids", "signed", "expires", "signed_text")
    readonly_fields: ClassVar = ["standing", "key_ids", "signed", "expires", "signed_text"]

    def get_urls(self) -> list[URLPattern]:
        page = path("overview/", self.admin_site.admin_view(self.overview), name="trust_overview")
        return [page, *super().get_urls()]

    def overview(self, request: HttpRequest) -> HttpResponse:
        """Each role: who holds it, until when, who must act. Nobody signs here."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        now = timezone.now()
        context = {
            **self.admin_site.each_context(request),
            "title": "Trust",
            "now": now,
            "zone": timezone.get_current_timezone_name(),
            "roles": standing.roles(now),
            "views": standing.views(now),
            "online_keys": standing.online_keys(),
        }
        return TemplateResponse(request, "dashboard/trust.html", context)

    def get_queryset(self, request: HttpRequest) -> QuerySet[RoleMetadata]:
        newest = RoleMetadata.objects.filter(role=OuterRef("role")).order_by("-version").values("version")[:1]
        rows: QuerySet[RoleMetadata] = super().get_queryset(request)
        return rows.annotate(newest=Subquery(newest))

    @display(description="Standing", label={"in force": "success", "expires soon": "warning", "expired": "danger"})
    def standing(self, role: RoleMetadata) -> str:
        now = timezone.now()
        if role.version != role.newest:  # type: ignore[attr-defined]
            return "replaced"
        if role.expires_at <= now:
            return "expired"
        return "expires soon" if role.expires_at - now <= selectors.warn_before(role.role) else "in force"

    @display(description="Signed by keys")
    def key_ids(self, role: RoleMetadata) -> str:
        try:
            signatures = json.loads(role.content)["signatures"]
        except (ValueError, KeyError):
            return "-"
        return format_html(
            " ".join(["{}"] * len(signatures)), *(presentation.short(item["keyid"]) for item in signatures)
        )

    @display(description="Signed", ordering="created_at")
    def signed(self, role: RoleMetadata) -> str:
        return presentation.ago(role.created_at)

    @display(description="Expires", ordering="expires_at")
    def expires(self, role: RoleMetadata) -> str:
        return presentation.ago(role.expires_at)

    @display(description="Signed text")
    def signed_text(self, role: RoleMetadata) -> str:
        return presentation.json_block(role.content)
