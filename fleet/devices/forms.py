"""Forms that turn what people type (`site=north, tier=gold`) into the mappings that models hold."""

from collections.abc import Mapping
from typing import Any, ClassVar

from django import forms
from django.urls import reverse
from unfold.widgets import (
    UnfoldAdminIntegerFieldWidget,
    UnfoldAdminTextInputWidget,
    UnfoldBooleanSwitchWidget,
)

from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.mirrors import check_mirror
from device_sdk.protocol.names import check_model, check_name
from device_sdk.protocol.polls import check_labels
from fleet.devices import selection
from fleet.devices.models import EnrolmentToken, Group
from fleet.errors import Invalid

_PAIRS = "One per line or separated by commas: site=north, tier=gold."


class PairsField(forms.CharField):
    """`key=value` pairs."""

    widget = UnfoldAdminTextInputWidget

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(required=False, **kwargs)

    def to_python(self, value: Any) -> Any:
        if isinstance(value, dict):
            return value
        pairs = [part.strip() for part in (value or "").replace("\n", ",").split(",") if part.strip()]
        found = {}
        for pair in pairs:
            key, sign, text = pair.partition("=")
            if not sign or not key.strip() or not text.strip():
                raise forms.ValidationError(f"expected key=value; got {pair!r:.60}")
            found[key.strip()] = text.strip()
        try:
            check_labels(found)
        except ProtocolError as error:
            raise forms.ValidationError(str(error)) from error
        return found

    def prepare_value(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return ", ".join(f"{key}={text}" for key, text in sorted(value.items()))


class SelectorField(forms.CharField):
    """A label selector in its one form; what is wrong with it is said with the place."""

    widget = UnfoldAdminTextInputWidget

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(required=False, max_length=selection.TEXT_CHARS, **kwargs)

    def clean(self, value: Any) -> str:
        try:
            return str(selection.parse(super().clean(value)))
        except Invalid as error:
            raise forms.ValidationError(error.message) from error


def counted_live(fields: Mapping[str, forms.Field], url: str) -> None:
    """Let htmx, which unfold brings, show the chosen devices as one types. Without scripts: once it is saved."""
    for field in fields.values():
        typed = isinstance(field, SelectorField)
        field.widget.attrs |= {
            "hx-get": url,
            "hx-trigger": "input changed delay:300ms" if typed else "change",
            "hx-target": "#chosen",
            "hx-sync": "#chosen:replace",
            "hx-include": ", ".join(f"[name={name}]" for name in fields),  # these alone: no token into an address
        }
        if typed:
            field.widget.attrs |= {"autocomplete": "off", "spellcheck": "false"}


class GroupForm(forms.ModelForm):  # type: ignore[type-arg]
    selector = SelectorField(
        label="Chosen by labels",
        help_text="Such as site in (north, south), tier=gold, !lab: all must hold. Also tier!=gold, site notin (lab), "
        "and @name in (cam-1, cam-2) for single devices. Empty: every device.",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "mirror" in self.fields:
            self.fields["mirror"].widget.attrs |= {"placeholder": "http://mirror.oslo.example:8080"}
        if "selector" in self.fields:  # not for those who may only look
            counted_live({"selector": self.fields["selector"]}, reverse("admin:devices_group_preview"))

    class Meta:
        model = Group
        fields = ("name", "description", "selector", "mirror")
        help_texts: ClassVar = {
            "mirror": "Of a site: the address of a cache that these devices ask for files first. It is told to them in "
            "their signed view, and believed in nothing. Where several groups hold a device, the first by name counts."
        }

    def clean_mirror(self) -> str:
        given = self.cleaned_data["mirror"].strip()
        try:
            return check_mirror(given) if given else ""
        except ProtocolError as error:
            raise forms.ValidationError(error.message) from error

    def clean_name(self) -> str:
        try:
            return check_name(self.cleaned_data["name"], "group")
        except ProtocolError as error:
            raise forms.ValidationError(error.message) from error


class NamesField(forms.CharField):
    widget = UnfoldAdminTextInputWidget

    def to_python(self, value: Any) -> Any:
        names = [part.strip() for part in (value or "").split(",") if part.strip()]
        try:
            return [check_model(name) for name in names]
        except ProtocolError as error:
            raise forms.ValidationError(str(error)) from error


class EnrolmentTokenForm(forms.ModelForm):  # type: ignore[type-arg]
    name = forms.CharField(
        max_length=100, widget=UnfoldAdminTextInputWidget, help_text="For people: batch, site, order."
    )
    model_names = NamesField(label="Models", help_text="What its devices run: names, separated by commas.")
    labels = PairsField(help_text=f"Set on every device that uses it. {_PAIRS}")
    max_uses = forms.IntegerField(label="Devices", min_value=1, initial=1, widget=UnfoldAdminIntegerFieldWidget)
    days = forms.IntegerField(
        label="Valid for days", min_value=1, max_value=365, initial=7, widget=UnfoldAdminIntegerFieldWidget
    )
    needs_approval = forms.BooleanField(
        required=False,
        widget=UnfoldBooleanSwitchWidget,
        help_text="Devices wait until someone approves them.",
    )

    class Meta:
        model = EnrolmentToken
        fields = ("name", "model_names", "labels", "max_uses", "needs_approval")
