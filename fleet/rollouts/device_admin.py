"""A device's page with what needs the word of rollouts: pins, which name releases. Stands in for the devices' own."""

from typing import Any, ClassVar

from django import forms
from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from unfold.decorators import action
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from fleet import adminkit, presentation
from fleet.adminkit import OptionalCommentForm
from fleet.devices import admin as devices_admin
from fleet.devices import services as devices
from fleet.devices.forms import PairsField
from fleet.devices.models import Device
from fleet.rollouts import services


class PinForm(OptionalCommentForm):
    model = forms.ChoiceField(widget=UnfoldAdminSelectWidget)
    version = forms.CharField(
        required=False,
        max_length=64,
        widget=UnfoldAdminTextInputWidget,
        help_text="Of a valid release. Empty: rollouts decide again.",
    )
    field_order = ("model", "version", "comment")

    def __init__(self, request: HttpRequest, object_id: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(request, object_id, *args, **kwargs)
        names = _device(object_id).model_names
        self.fields["model"].choices = [(name, name) for name in names]


class LabelsForm(OptionalCommentForm):
    labels = PairsField(help_text="All of them: site=north, tier=gold. Groups choose by labels.")
    field_order = ("labels", "comment")

    def __init__(self, request: HttpRequest, object_id: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(request, object_id, *args, **kwargs)
        self.fields["labels"].initial = _device(object_id).labels


def _device(object_id: Any) -> Device:
    """An empty one where the address names none: the page itself says so."""
    found = Device.objects.filter(pk=object_id).first() if str(object_id).isdecimal() else None
    return found or Device()


admin.site.unregister(Device)


@admin.register(Device)
class DeviceAdmin(devices_admin.DeviceAdmin):
    actions_detail: ClassVar = [*devices_admin.DeviceAdmin.actions_detail, "pin", "labels"]
    always_offered: ClassVar = ("pin", "labels")

    @action(
        description="Pin",
        icon="keep",
        url_path="pin",
        permissions=["act"],
        dialog=adminkit.dialog(
            "Pin a model of this device?", "It runs this release, whatever rollouts say, until it is let go.", "Pin",
            PinForm,
        ),
    )  # fmt: skip
    def pin(self, request: HttpRequest, form: PinForm, object_id: str) -> HttpResponse:
        device, given = self.found(request, object_id), form.cleaned_data
        version = given["version"].strip() or None
        who = {"actor": adminkit.actor(request), "comment": given["comment"]}
        return adminkit.perform(
            request,
            lambda: services.pin(device=device, model=given["model"], version=version, **who),
            done=f"{given['model']} of {device} is {f'pinned to {version}' if version else 'let go'}.",
            then=presentation.page_of(device),
        )

    @action(
        description="Labels",
        icon="label",
        url_path="labels",
        permissions=["act"],
        dialog=adminkit.dialog(
            "Replace this device's labels?", "It may join or leave groups, and with them rollouts.", "Replace",
            LabelsForm,
        ),
    )  # fmt: skip
    def labels(self, request: HttpRequest, form: LabelsForm, object_id: str) -> HttpResponse:
        device, given = self.found(request, object_id), form.cleaned_data
        who = {"actor": adminkit.actor(request), "comment": given["comment"]}
        return adminkit.perform(
            request,
            lambda: devices.set_labels(device=device, labels=given["labels"], **who),
            done=f"{device} is labelled.",
            then=presentation.page_of(device),
        )
