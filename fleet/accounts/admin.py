"""People, their permission groups, and API tokens. A token's text is shown once, on the page that makes it."""

from datetime import timedelta
from typing import Any, ClassVar

from django import forms
from django.contrib import admin
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.db.models import Model
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from unfold.admin import ModelAdmin
from unfold.decorators import display
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
from unfold.widgets import (
    UnfoldAdminCheckboxSelectMultipleWidget,
    UnfoldAdminIntegerFieldWidget,
    UnfoldAdminTextInputWidget,
)

from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import check_model
from fleet import presentation
from fleet.accounts import services
from fleet.accounts.models import MIRROR, OPERATE, PUBLISH, READ, SCOPES, SIGN, ApiToken

_MEANING = {
    PUBLISH: "upload releases, for CI",
    SIGN: "add signatures to what CI proposes, for the second person",
    OPERATE: "plan and operate rollouts, as a member of Operators",
    READ: "look at everything, as a member of Viewers",
    MIRROR: "fetch files of valid releases, for a cache near the devices",
}

admin.site.unregister(User)
admin.site.unregister(Group)


@admin.register(User)
class UserAdmin(DjangoUserAdmin, ModelAdmin):  # type: ignore[misc,type-arg]  # unfold ships no types
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    list_display = ("username", "email", "is_staff", "is_active", "last_login")


@admin.register(Group)
class PermissionGroupAdmin(DjangoGroupAdmin, ModelAdmin):  # type: ignore[misc]  # unfold ships no types
    pass


class NewTokenForm(forms.ModelForm):  # type: ignore[type-arg]
    name = forms.CharField(max_length=100, widget=UnfoldAdminTextInputWidget, help_text="Who or what uses it.")
    scopes = forms.MultipleChoiceField(
        choices=[(scope, f"{scope}: {_MEANING[scope]}") for scope in SCOPES],
        widget=UnfoldAdminCheckboxSelectMultipleWidget,
    )
    models_allowed = forms.CharField(
        label="Models",
        required=False,
        help_text="Names, separated by commas; empty: every model. Limits publishing and signing only.",
        widget=UnfoldAdminTextInputWidget,
    )

    days = forms.IntegerField(
        label="Valid for days", min_value=1, max_value=3650, initial=90, widget=UnfoldAdminIntegerFieldWidget
    )

    class Meta:
        model = ApiToken
        fields = ("name",)

    def clean_models_allowed(self) -> list[str]:
        try:
            return [
                check_model(name.strip()) for name in self.cleaned_data["models_allowed"].split(",") if name.strip()
            ]
        except ProtocolError as error:
            raise forms.ValidationError(error.message) from error


@admin.register(ApiToken)
class ApiTokenAdmin(ModelAdmin):  # type: ignore[misc]  # unfold ships no types
    """Deleting a token is revoking it, so that is allowed; changing one is not."""

    list_display: ClassVar = ["name", "owner", "scope_chips", "model_chips", "starts_with", "made", "expires"]
    search_fields: ClassVar = ["name", "user__username"]
    list_select_related: ClassVar = ["user"]
    fields = ("name", "owner", "scope_chips", "model_chips", "starts_with", "made", "expires")
    readonly_fields: ClassVar = ["owner", "scope_chips", "model_chips", "starts_with", "made", "expires"]
    add_fieldsets = ((None, {"fields": ("name", "scopes", "models_allowed", "days")}),)

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: Model | None = None) -> Any:
        return self.readonly_fields if obj else ()

    def get_form(self, request: HttpRequest, obj: Model | None = None, change: bool = False, **kwargs: Any) -> Any:
        return super().get_form(request, obj, change, **kwargs) if change else NewTokenForm

    def save_model(self, request: HttpRequest, obj: ApiToken, form: Any, change: bool) -> None:
        given = form.cleaned_data
        made, text = services.create_token(
            name=given["name"],
            scopes=given["scopes"],
            models=given["models_allowed"],
            lifetime=timedelta(days=given["days"]),
        )
        obj.__dict__.update(made.__dict__)
        request.new_token = text  # type: ignore[attr-defined]  # for the page that answers this request

    def response_add(self, request: HttpRequest, obj: ApiToken, post_url_continue: str | None = None) -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": f"API token {obj.name}",
            "opts": self.opts,
            "token": request.new_token,  # type: ignore[attr-defined]
            "row": obj,
            "list_url": reverse("admin:accounts_apitoken_changelist"),
        }
        return TemplateResponse(request, "dashboard/api_token.html", context)

    @display(description="Owner")
    def owner(self, token: ApiToken) -> str:
        return str(token.user)

    @display(description="Scopes")
    def scope_chips(self, token: ApiToken) -> str:
        return presentation.chips(token.scopes)

    @display(description="Models")
    def model_chips(self, token: ApiToken) -> str:
        return presentation.chips(token.models_allowed) if token.models_allowed else "every model"

    @display(description="Starts with")
    def starts_with(self, token: ApiToken) -> str:
        return presentation.short(token.token_key)

    @display(description="Created", ordering="created")
    def made(self, token: ApiToken) -> str:
        return presentation.ago(token.created)

    @display(description="Expires", ordering="expiry")
    def expires(self, token: ApiToken) -> str:
        return presentation.ago(token.expiry)
