"""Models and their releases. CI makes releases; people look, and describe models."""

from typing import Any, ClassVar

from django import forms
from django.contrib import admin
from django.db.models import Count, OuterRef, QuerySet, Subquery
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from unfold.admin import ModelAdmin
from unfold.contrib.filters.admin import ChoicesDropdownFilter, RelatedDropdownFilter
from unfold.decorators import action, display
from unfold.enums import ActionVariant

from fleet import adminkit, presentation
from fleet.adminkit import CommentForm, KeptAdmin, ReadOnlyAdmin, dialog, perform
from fleet.errors import FleetError
from fleet.releases import model_signing, provenance, selectors, services
from fleet.releases.models import Model, ProvenanceKey, Release
from fleet.trust import selectors as trust
from fleet.trust.models import PendingRole


@admin.register(Model)
class NamedModelAdmin(KeptAdmin):
    """A model is added where its signing keys are: `manage.py trust_add_model`. Here it is described."""

    list_display: ClassVar = ["name", "description", "newest", "releases_count", "made"]
    search_fields: ClassVar = ["name", "description"]
    fields = ("name", "description", "when_nothing", "newest", "made")
    readonly_fields: ClassVar = ["name", "newest", "made"]
    change_form_outer_after_template = "dashboard/model.html"

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Model]:
        newest = Release.objects.filter(model=OuterRef("pk"), state=Release.State.VALID).order_by("-created_at", "-pk")
        rows: QuerySet[Model] = super().get_queryset(request)
        return rows.annotate(newest_version=Subquery(newest.values("version")[:1]), releases_made=Count("releases"))

    def save_model(self, request: HttpRequest, obj: Model, form: Any, change: bool) -> None:
        services.describe_model(model=obj, description=form.cleaned_data["description"])
        services.set_when_nothing(model=obj, policy=form.cleaned_data["when_nothing"])

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
    fields = ("name", "state_label", "reason", "signed_by_keys", "published_by", "published", "audited")
    readonly_fields = fields
    change_form_outer_before_template = "dashboard/revoked.html"
    change_form_outer_after_template = "dashboard/release.html"
    actions_detail: ClassVar = ["withdraw"]

    def has_withdraw_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(request.user.has_perm("releases.withdraw_release"))

    def get_actions_detail(self, request: HttpRequest, object_id: Any) -> list[Any]:
        release = self.get_object(request, object_id)
        if release is None or release.state == Release.State.REVOKED:
            return []
        return list(super().get_actions_detail(request, object_id))

    @action(
        description="Withdraw here",
        icon="block",
        url_path="withdraw",
        variant=ActionVariant.DANGER,
        permissions=["withdraw"],
        dialog=dialog(
            "Withdraw this release on this server, for good?",
            "Its rollouts end, and devices go to the release that the policy then says. It cannot be undone. It binds "
            "this server only: CI's signature still lists the release. Only fleet-publish revoke takes that away.",
            "Withdraw for good",
        ),
    )
    def withdraw(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        release = self.found(request, object_id)
        reason = f"{adminkit.actor(request)}: {form.cleaned_data['comment']}"
        return adminkit.perform(
            request,
            lambda: services.revoke(release=release, reason=reason),
            done=f"{release} is withdrawn on this server.",
            then=presentation.page_of(release),
        )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Release]:
        rows: QuerySet[Release] = super().get_queryset(request)
        return rows.prefetch_related("variants")

    @display(description="Release", ordering="version")
    def name(self, release: Release) -> str:
        return str(release)

    @display(description="State", ordering="state")
    def state_label(self, release: Release) -> str:
        waits = self._proposal(release)
        return presentation.state(release.state, f"pending: {waits.signatures}" if waits else "")

    def _proposal(self, release: Release) -> trust.Proposal | None:
        """At most one release of a model waits, so that this costs little."""
        return trust.proposal(release.model.name) if release.state == Release.State.PENDING else None

    @display(description="Changed by")
    def audited(self, release: Release) -> str:
        return presentation.audit_link("release", str(release))

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


class ProvenanceKeyForm(forms.ModelForm):  # type: ignore[type-arg]  # subscripted at run time only with an extension
    class Meta:
        model = ProvenanceKey
        fields = ("model", "name", "pem")

    def clean_pem(self) -> str:
        try:
            return model_signing.read_key(self.cleaned_data["pem"].encode()).pem
        except FleetError as error:
            raise forms.ValidationError(error.message) from error

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        if {"model", "pem"} <= cleaned.keys():
            fingerprint = model_signing.read_key(cleaned["pem"].encode()).fingerprint
            if ProvenanceKey.objects.filter(model=cleaned["model"], fingerprint=fingerprint).exists():
                raise forms.ValidationError(f"{cleaned['model']} trusts this key already")
        return cleaned


@admin.register(ProvenanceKey)
class ProvenanceKeyAdmin(ModelAdmin):  # type: ignore[misc]  # unfold ships no types
    """Added and removed, never changed."""

    list_display: ClassVar = ["name", "model", "short_fingerprint", "added_by", "added"]
    list_filter: ClassVar = [("model", RelatedDropdownFilter)]
    list_select_related: ClassVar = ["model"]
    list_filter_submit = False
    compressed_fields = True
    form = ProvenanceKeyForm
    fields = ("model", "name", "pem")

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_actions(self, request: HttpRequest) -> dict[str, Any]:
        """Without the bulk delete, which goes past the service."""
        return {name: each for name, each in super().get_actions(request).items() if name != "delete_selected"}

    def save_model(self, request: HttpRequest, obj: ProvenanceKey, form: Any, change: bool) -> None:
        made = provenance.add_key(model=obj.model, name=obj.name, pem=obj.pem, actor=adminkit.actor(request))
        obj.__dict__.update(made.__dict__)

    def delete_model(self, request: HttpRequest, obj: ProvenanceKey) -> None:
        provenance.remove_key(key=obj)

    @display(description="Fingerprint")
    def short_fingerprint(self, key: ProvenanceKey) -> str:
        return presentation.short(key.fingerprint, 16)

    @display(description="Added", ordering="added_at")
    def added(self, key: ProvenanceKey) -> str:
        return presentation.ago(key.added_at)


@admin.register(PendingRole)
class PendingRoleAdmin(ReadOnlyAdmin):
    """What CI proposes and too few have signed. Here it is looked at and withdrawn; it is signed by keys alone.

    It lives in this room because withdrawing concerns releases, of which trust knows nothing.
    """

    list_display: ClassVar = ["name", "standing", "changes", "proposed_by", "proposed"]
    search_fields: ClassVar = ["role", "proposed_by"]
    fields = ("name", "standing", "changes", "missing", "proposed_by", "proposed", "expires", "signed_text")
    readonly_fields = fields
    change_form_outer_before_template = "dashboard/proposal.html"
    actions_detail: ClassVar = ["withdraw"]

    def has_withdraw_permission(self, request: HttpRequest, obj: object = None) -> bool:
        return bool(request.user.has_perm("trust.delete_pendingrole"))

    @action(
        description="Withdraw",
        icon="delete",
        url_path="withdraw",
        variant=ActionVariant.DANGER,
        permissions=["withdraw"],
        dialog=dialog(
            "Withdraw this proposal?",
            "It binds nobody yet, so no device changes. Its release waits no longer; CI may propose the same again.",
            "Withdraw the proposal",
        ),
    )
    def withdraw(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        row: PendingRole = self.found(request, object_id)
        return perform(
            request,
            lambda: services.withdraw_proposal(
                model=row.role,
                signed_sha256=row.signed_sha256,
                by=adminkit.actor(request).get_username(),
                comment=form.cleaned_data["comment"],
            ),
            done=f"The proposal for {row.role} is withdrawn.",
            then=reverse("admin:trust_pendingrole_changelist"),
        )

    @display(description="Role", ordering="role")
    def name(self, row: PendingRole) -> str:
        return f"{row.role} version {row.version}"

    @display(description="Signed")
    def standing(self, row: PendingRole) -> str:
        found = trust.proposal(row.role)
        state = Release.State.PENDING if found else Release.State.WITHDRAWN
        return presentation.state(state, str(found.signatures) if found else "overtaken by another version")

    @display(description="Would change")
    def changes(self, row: PendingRole) -> str:
        return selectors.said_of(trust.proposal(row.role))

    @display(description="Missing")
    def missing(self, row: PendingRole) -> str:
        found = trust.proposal(row.role)
        return presentation.chips(key[:16] for key in found.signatures.missing) if found else "-"

    @display(description="Proposed", ordering="created_at")
    def proposed(self, row: PendingRole) -> str:
        return presentation.ago(row.created_at)

    @display(description="Would expire", ordering="expires_at")
    def expires(self, row: PendingRole) -> str:
        return presentation.ago(row.expires_at)

    @display(description="Signed text")
    def signed_text(self, row: PendingRole) -> str:
        return presentation.json_block(row.content)
