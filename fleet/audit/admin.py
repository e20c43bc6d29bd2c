"""The trail, to look at and to take along. Nobody edits it."""

from typing import Any, ClassVar

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest, StreamingHttpResponse
from django.utils import timezone
from unfold.contrib.filters.admin import ChoicesDropdownFilter, DropdownFilter, RangeDateFilter
from unfold.decorators import action, display

from fleet import presentation
from fleet.adminkit import ReadOnlyAdmin
from fleet.audit import exports, selectors
from fleet.audit.models import AuditEntry


class ActionFilter(DropdownFilter):  # type: ignore[misc]  # unfold ships no types
    title = "What"
    parameter_name = "action"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        known = AuditEntry.objects.order_by("action").values_list("action", flat=True).distinct()
        return [(name, words(name)) for name in known]

    def queryset(self, request: HttpRequest, queryset: QuerySet[AuditEntry]) -> QuerySet[AuditEntry]:
        return queryset.filter(action=self.value()) if self.value() else queryset


@admin.register(AuditEntry)
class AuditEntryAdmin(ReadOnlyAdmin):
    list_display: ClassVar = ["happened", "what", "target", "who", "address", "comment", "place"]
    list_filter: ClassVar = [
        ActionFilter,
        ("actor_kind", ChoicesDropdownFilter),
        ("at", RangeDateFilter),
        "target_kind",
    ]
    list_filter_submit = True  # for the two dates
    search_fields: ClassVar = ["target", "actor", "comment", "action", "address"]
    list_select_related: ClassVar = ["seal"]
    date_hierarchy = "at"
    ordering: ClassVar = ["-pk"]
    fields = (
        "moment", "what", "target_kind", "target", "who", "address", "source", "comment", "detail_text", "place",
        "sealed",
    )  # fmt: skip
    readonly_fields = fields
    actions_list: ClassVar = ["export"]

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest) -> bool:
        """A page's link names its thing."""
        return lookup in {"target", "target_kind"} or super().lookup_allowed(lookup, value, request)

    def has_export_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(request.user.has_perm("audit.export_auditentry"))

    @action(description="Export", icon="download", url_path="export", permissions=["export"])
    def export(self, request: HttpRequest) -> StreamingHttpResponse:
        """The whole chain: what a filter chose could not be verified. For a span of time: `audit export`."""
        response = StreamingHttpResponse(exports.lines(selectors.links()), content_type="application/jsonl")
        response["Content-Disposition"] = f'attachment; filename="audit-{timezone.localdate():%Y-%m-%d}.jsonl"'
        return response

    @display(description="When", ordering="at")
    def happened(self, entry: AuditEntry) -> str:
        return presentation.ago(entry.at)

    @display(description="When")
    def moment(self, entry: AuditEntry) -> str:
        return f"{timezone.localtime(entry.at):%Y-%m-%d %H:%M:%S %Z}"

    @display(description="What", ordering="action")
    def what(self, entry: AuditEntry) -> str:
        return words(entry.action)

    @display(description="Who", ordering="actor")
    def who(self, entry: AuditEntry) -> str:
        kind = entry.get_actor_kind_display()
        return f"{entry.actor} ({kind})" if entry.actor else kind

    @display(description="Detail")
    def detail_text(self, entry: AuditEntry) -> str:
        return presentation.json_block(entry.detail)

    @display(description="Position")
    def place(self, entry: AuditEntry) -> str:
        seal = _seal(entry)
        return str(seal.position) if seal else "not yet sealed"

    @display(description="Hash")
    def sealed(self, entry: AuditEntry) -> str:
        seal = _seal(entry)
        return seal.hash if seal else "not yet sealed"


def words(action: str) -> str:
    """`enrolment_token.revoked`: Enrolment token revoked."""
    return action.replace(".", " ").replace("_", " ").capitalize()


def _seal(entry: AuditEntry) -> Any:
    return getattr(entry, "seal", None)
