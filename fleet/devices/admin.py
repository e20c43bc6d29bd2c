"""Devices, groups, enrolment tokens and events. What happened stays; devices are revoked, never deleted."""

from datetime import timedelta
from functools import partial
from typing import Any, ClassVar

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import Model, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.contrib.filters.admin import ChoicesDropdownFilter, DropdownFilter
from unfold.decorators import action, display
from unfold.enums import ActionVariant

from fleet import adminkit, presentation
from fleet.adminkit import CommentForm, KeptAdmin, OptionalCommentForm, ReadOnlyAdmin
from fleet.devices import searching, selection, selectors, services
from fleet.devices.forms import EnrolmentTokenForm, GroupForm
from fleet.devices.models import Device, DeviceEvent, EnrolmentToken, Group, RunningSet
from fleet.errors import Invalid


class RunsFilter(DropdownFilter):  # type: ignore[misc]  # unfold ships no types
    """`model/version`: devices that run it. `model/-`: devices that have the model and run nothing of it."""

    title = "Runs"
    parameter_name = "runs"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        found = {
            f"{model}/{running.split('/')[0]}"
            for runs in RunningSet.objects.values_list("runs", flat=True)
            for model, running in runs.items()
        }
        chosen = request.GET.get(self.parameter_name)
        return [(value, value.replace("/", " ")) for value in sorted(found | ({chosen} if chosen else set()))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Device]) -> QuerySet[Device]:
        model, _, version = (self.value() or "").partition("/")
        if not model:
            return queryset
        sets = dict(RunningSet.objects.values_list("pk", "runs"))
        if version != "-":
            fits = [pk for pk, runs in sets.items() if runs.get(model, "").split("/")[0] == version]
            return queryset.filter(runs__in=fits)
        without = [pk for pk, runs in sets.items() if model not in runs]
        unused = Q(runs__in=without) | Q(runs=None)
        return queryset.filter(unused, selectors.with_model(model), state=Device.State.ACTIVE)


class SeenFilter(DropdownFilter):  # type: ignore[misc]  # unfold ships no types
    title = "Last seen"
    parameter_name = "seen"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [
            ("online", "online"),
            ("day", "within a day"),
            ("silent", "not for a day"),
            ("never", "never"),
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Device]) -> QuerySet[Device]:
        day = timezone.now() - timedelta(days=1)
        choices = {
            "online": Q(last_seen__gte=selectors.offline_before()),
            "day": Q(last_seen__gte=day),
            "silent": Q(last_seen__lt=day),
            "never": Q(last_seen=None),
        }
        return queryset.filter(choices.get(self.value() or "", Q()))


class RefusesFilter(DropdownFilter):  # type: ignore[misc]  # unfold ships no types
    """Devices that refuse what they are sent: an attack, or a server that was tampered with."""

    title = "Refuses"
    parameter_name = "refuses"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("yes", "what it is sent")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Device]) -> QuerySet[Device]:
        return queryset.filter(pk__in=selectors.refusing()) if self.value() == "yes" else queryset


@admin.register(Device)
class DeviceAdmin(ReadOnlyAdmin):
    list_display: ClassVar = ["name", "state_label", "running", "label_list", "sdk_version", "seen"]
    list_filter: ClassVar = [("state", ChoicesDropdownFilter), RunsFilter, SeenFilter, RefusesFilter]
    search_fields: ClassVar = ["name", "labels", "sdk"]
    search_help_text = searching.HELP
    list_select_related: ClassVar = ["runs", "token"]
    fields = (
        "model_list",
        "pin_list",
        "mirror",
        "sdk_version",
        "can_run",
        "enrolled_by",
        "enrolled",
        "lost",
        "audited",
    )
    readonly_fields = fields
    change_form_outer_before_template = "dashboard/device.html"
    actions: ClassVar = ["approve_selected"]
    actions_detail: ClassVar = ["approve", "revoke"]
    always_offered: ClassVar[tuple[str, ...]] = ()  # whatever its state

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Device], search_term: str
    ) -> tuple[QuerySet[Device], bool]:
        found = searching.search(queryset, search_term) if search_term.strip() else None
        return super().get_search_results(request, queryset, search_term) if found is None else (found, False)

    def has_act_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(request.user.has_perm("devices.change_device"))

    def get_actions_detail(self, request: HttpRequest, object_id: Any) -> list[Any]:
        """Only what the device's state allows; the service has the last word."""
        device = self.get_object(request, object_id)
        wanted = {
            Device.State.PENDING: {"approve", "revoke"},
            Device.State.ACTIVE: {"revoke"},
        }.get(Device.State(device.state) if device else Device.State.REVOKED, set())
        wanted |= set(self.always_offered)
        return [item for item in super().get_actions_detail(request, object_id) if item.path in wanted]

    @action(
        description="Approve",
        icon="check",
        url_path="approve",
        variant=ActionVariant.PRIMARY,
        permissions=["act"],
        dialog=adminkit.dialog(
            "Approve this device", "From its next poll it gets its view.", "Approve", OptionalCommentForm
        ),
    )
    def approve(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        device = self.found(request, object_id)
        return adminkit.perform(
            request,
            lambda: services.approve(
                device=device, actor=adminkit.actor(request), comment=form.cleaned_data["comment"]
            ),
            done=f"{device} is approved.",
            then=presentation.page_of(device),
        )

    @action(
        description="Revoke",
        icon="block",
        url_path="revoke",
        variant=ActionVariant.DANGER,
        permissions=["act"],
        dialog=adminkit.dialog(
            "Revoke this device?",
            "Its credential stops working at once. It keeps running what it has; its history stays. "
            "It comes back only by enrolling anew.",
            "Revoke",
        ),
    )
    def revoke(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        device = self.found(request, object_id)
        return adminkit.perform(
            request,
            lambda: services.revoke(device=device, actor=adminkit.actor(request), comment=form.cleaned_data["comment"]),
            done=f"{device} is revoked.",
            then=presentation.page_of(device),
        )

    @admin.action(description="Approve selected devices", permissions=["act"])
    def approve_selected(self, request: HttpRequest, queryset: QuerySet[Device]) -> None:
        for device in queryset.filter(state=Device.State.PENDING):
            approve = partial(services.approve, device=device, actor=adminkit.actor(request))
            adminkit.perform(request, approve, done=f"{device} is approved.", then="")

    @display(description="State", ordering="state", label=presentation.STATE_COLOURS)
    def state_label(self, device: Device) -> str:
        return "refusing" if device.refusal and device.state == Device.State.ACTIVE else device.state

    @display(description="Runs")
    def running(self, device: Device) -> str:
        runs = device.runs.runs if device.runs else {}
        return (
            presentation.chips(f"{model} {running}" for model, running in sorted(runs.items()))
            if runs
            else "nothing yet"
        )

    @display(description="Models")
    def model_list(self, device: Device) -> str:
        return presentation.chips(device.model_names)

    @display(description="Labels")
    def label_list(self, device: Device) -> str:
        return presentation.label_chips(device.labels)

    @display(description="Pinned to")
    def pin_list(self, device: Device) -> str:
        return presentation.label_chips(device.pins)

    @display(description="Mirror")
    def mirror(self, device: Device) -> str:
        """What its views name; the program on the device may have another, or none."""
        found = selectors.mirror_of(device)
        return f"{found.address}, of the group {found.group}" if found else "of no group"

    @display(description="Last seen", ordering="last_seen")
    def seen(self, device: Device) -> str:
        return presentation.presence(device.last_seen, selectors.offline_before())

    @display(description="SDK", ordering="sdk")
    def sdk_version(self, device: Device) -> str:
        return device.sdk or "-"

    @display(description="Can run")
    def can_run(self, device: Device) -> str:
        """What it said of itself; releases and variants are chosen by it."""
        memory = {"memory": presentation.size(device.abilities["memory"])} if "memory" in device.abilities else {}
        providers = {"providers": ", ".join(device.abilities.get("providers", []))}
        said = {**device.abilities, **memory, **providers}
        return presentation.chips(f"{name} {value}" for name, value in sorted(said.items()) if value)

    @display(description="Enrolled with")
    def enrolled_by(self, device: Device) -> str:
        return presentation.link(device.token)

    @display(description="Enrolled")
    def enrolled(self, device: Device) -> str:
        return presentation.ago(device.enrolled_at)

    @display(description="Changed by")
    def audited(self, device: Device) -> str:
        return presentation.audit_link("device", device.name)

    @display(description="Events lost on the device")
    def lost(self, device: Device) -> int:
        return device.dropped_events


@admin.register(Group)
class GroupAdmin(ModelAdmin):  # type: ignore[misc]  # unfold ships no types
    form = GroupForm
    list_display: ClassVar = ["name", "chosen_by", "mirror", "description"]
    search_fields: ClassVar = ["name", "description", "mirror"]
    fields = ("name", "description", "selector", "mirror", "devices")
    readonly_fields = ("devices",)

    def get_urls(self) -> list[Any]:
        preview = self.admin_site.admin_view(self.preview)
        return [path("preview/", preview, name="devices_group_preview"), *super().get_urls()]

    def preview(self, request: HttpRequest) -> HttpResponse:
        """How many devices a selector chooses, and some of them: as it is typed. For who may see devices."""
        if not request.user.has_perm("devices.view_device"):
            raise PermissionDenied
        return HttpResponse(_chosen(request.GET.get("selector", "")))

    @display(description="Devices now")
    def devices(self, group: Group) -> str:
        return format_html('<div id="chosen" aria-live="polite">{}</div>', _chosen(group.selector))

    def save_model(self, request: HttpRequest, obj: Group, form: Any, change: bool) -> None:
        given = form.cleaned_data
        terms = {name: given[name] for name in ("name", "description", "selector", "mirror")}
        services.save_group(group=obj, **terms)

    def delete_model(self, request: HttpRequest, obj: Group) -> None:
        services.delete_group(group=obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Group]) -> None:
        for group in queryset:
            services.delete_group(group=group)

    @display(description="Chosen by")
    def chosen_by(self, group: Group) -> str:
        return presentation.selector(group.selector)


def _chosen(text: str) -> SafeString:
    """What a selector chooses now, or what is wrong with it."""
    try:
        return presentation.chosen(selectors.preview(selection.parse(text)))
    except Invalid as error:
        return presentation.not_chosen(error.message)


@admin.register(EnrolmentToken)
class EnrolmentTokenAdmin(KeptAdmin):
    """The token's text is shown once, with the provisioning file, on the page that makes it."""

    list_display: ClassVar = ["name", "standing", "used", "model_list", "label_list", "expires", "created_by"]
    search_fields: ClassVar = ["name"]
    list_select_related: ClassVar = ["created_by"]
    fields = ("name", "standing", "used", "model_list", "label_list", "needs_approval", "expires", "created_by")
    readonly_fields = fields
    add_fieldsets = ((None, {"fields": ("name", "model_names", "labels", "max_uses", "days", "needs_approval")}),)
    actions_detail: ClassVar = ["revoke"]

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: Model | None = None) -> Any:
        return self.readonly_fields if obj else ()

    def get_form(self, request: HttpRequest, obj: Model | None = None, change: bool = False, **kwargs: Any) -> Any:
        return super().get_form(request, obj, change, **kwargs) if change else EnrolmentTokenForm

    def save_model(self, request: HttpRequest, obj: EnrolmentToken, form: Any, change: bool) -> None:
        given = form.cleaned_data
        made, text = services.create_token(
            name=given["name"],
            model_names=given["model_names"],
            max_uses=given["max_uses"],
            lifetime=timedelta(days=given["days"]),
            labels=given["labels"],
            needs_approval=given["needs_approval"],
            actor=adminkit.actor(request),
        )
        obj.__dict__.update(made.__dict__)
        request.new_token = text  # type: ignore[attr-defined]  # for the page that answers this request

    def response_add(self, request: HttpRequest, obj: Any, post_url_continue: str | None = None) -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": f"Enrolment token {obj.name}",
            "opts": self.opts,
            "token": request.new_token,  # type: ignore[attr-defined]
            "row": obj,
            "list_url": reverse("admin:devices_enrolmenttoken_changelist"),
        }
        return TemplateResponse(request, "dashboard/enrolment_token.html", context)

    def has_act_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(request.user.has_perm("devices.change_enrolmenttoken"))

    def get_actions_detail(self, request: HttpRequest, object_id: Any) -> list[Any]:
        token = self.get_object(request, object_id)
        return super().get_actions_detail(request, object_id) if token and token.revoked_at is None else []

    @action(
        description="Revoke",
        icon="block",
        url_path="revoke",
        variant=ActionVariant.DANGER,
        permissions=["act"],
        dialog=adminkit.dialog(
            "Revoke this token?",
            "No further device can enrol with it. Devices that did keep working.",
            "Revoke",
            OptionalCommentForm,
        ),
    )
    def revoke(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        token = self.found(request, object_id)
        return adminkit.perform(
            request,
            lambda: services.revoke_token(token=token, comment=form.cleaned_data["comment"]),
            done=f"{token} is revoked.",
            then=presentation.page_of(token),
        )

    @display(
        description="State", label={"usable": "success", "used up": "info", "expired": "warning", "revoked": "danger"}
    )
    def standing(self, token: EnrolmentToken) -> str:
        if token.revoked_at:
            return "revoked"
        if token.expires_at <= timezone.now():
            return "expired"
        return "used up" if token.uses >= token.max_uses else "usable"

    @display(description="Used", ordering="uses")
    def used(self, token: EnrolmentToken) -> str:
        return f"{token.uses} of {token.max_uses}"

    @display(description="Models")
    def model_list(self, token: EnrolmentToken) -> str:
        return presentation.chips(token.model_names)

    @display(description="Labels")
    def label_list(self, token: EnrolmentToken) -> str:
        return presentation.label_chips(token.labels)

    @display(description="Expires", ordering="expires_at")
    def expires(self, token: EnrolmentToken) -> str:
        return presentation.ago(token.expires_at)


@admin.register(DeviceEvent)
class DeviceEventAdmin(ReadOnlyAdmin):
    list_display: ClassVar = ["happened", "device_link", "kind_label", "release", "reason"]
    list_filter: ClassVar = ["kind", "model"]
    search_fields: ClassVar = ["device__name", "release", "reason"]
    list_select_related: ClassVar = ["device"]
    fields = (
        "device_link",
        "kind_label",
        "model",
        "release",
        "rollout",
        "reason",
        "detail_text",
        "happened",
        "received",
    )
    readonly_fields = fields

    @display(description="When", ordering="received_at")
    def happened(self, event: DeviceEvent) -> str:
        return presentation.ago(event.at)

    @display(description="Received")
    def received(self, event: DeviceEvent) -> str:
        return presentation.ago(event.received_at)

    @display(description="Device", ordering="device__name")
    def device_link(self, event: DeviceEvent) -> str:
        return presentation.link(event.device)

    @display(description="What", ordering="kind", label=presentation.STATE_COLOURS)
    def kind_label(self, event: DeviceEvent) -> str:
        return event.kind

    @display(description="Detail")
    def detail_text(self, event: DeviceEvent) -> str:
        return presentation.label_chips(event.detail)
