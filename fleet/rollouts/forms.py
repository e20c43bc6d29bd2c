"""The form that proposes a rollout. Stages share their guards; the API takes each stage with its own."""

from datetime import time
from typing import Any

from django import forms
from django.urls import reverse
from unfold.widgets import (
    UnfoldAdminDecimalFieldWidget,
    UnfoldAdminIntegerFieldWidget,
    UnfoldAdminSelectWidget,
    UnfoldAdminTextInputWidget,
    UnfoldAdminTimeWidget,
    UnfoldBooleanSwitchWidget,
)

from device_sdk.protocol.assignment import CONDITION_FLAGS, MAX_BYTES
from fleet.devices.forms import SelectorField, counted_live
from fleet.devices.models import Group
from fleet.devices.selectors import Preview
from fleet.errors import Invalid
from fleet.releases.models import Release
from fleet.rollouts import guards, services, targeting
from fleet.rollouts.models import Rollout
from fleet.rollouts.pace_form import PaceForm
from fleet.rollouts.terms.watch import WatchFields


def _megabytes(label: str, help_text: str) -> forms.IntegerField:
    return forms.IntegerField(
        label=label,
        required=False,
        min_value=0,
        max_value=MAX_BYTES // 10**6,
        widget=UnfoldAdminIntegerFieldWidget,
        help_text=help_text,
    )


class TargetFields(forms.Form):
    """Whom it is for."""

    release = forms.ModelChoiceField(
        Release.objects.filter(state=Release.State.VALID).select_related("model"), widget=UnfoldAdminSelectWidget
    )
    group = forms.ModelChoiceField(
        Group.objects.all(), required=False, empty_label="Every device", widget=UnfoldAdminSelectWidget
    )
    selector = SelectorField(label="Only", help_text="Narrows the group: site in (graz, linz), !lab. Empty: all of it.")
    exclude_group = forms.ModelChoiceField(
        Group.objects.all(),
        label="Without the group",
        required=False,
        empty_label="Nobody is left out",
        widget=UnfoldAdminSelectWidget,
    )
    exclude = SelectorField(
        label="Without", help_text="Devices that are left out: tier=gold, or @name in (cam-1, cam-2)."
    )


class ReachForm(TargetFields):
    """As far as it is filled in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["release"].required = False

    def reached(self) -> Preview:
        """The devices that a rollout of these terms would be for, once it reaches 100 %. Raises Invalid."""
        if not self.is_valid():
            name, errors = next(iter(self.errors.items()))
            raise Invalid("malformed", f"{self.fields[name].label or name}: {errors[0]}")
        release = self.cleaned_data.pop("release")
        return targeting.preview(Rollout(**self.cleaned_data), release.model.name if release else "")


class RolloutForm(TargetFields, WatchFields, PaceForm, forms.ModelForm):  # type: ignore[type-arg]
    percents = forms.CharField(
        label="Stages",
        initial="5, 25, 100",
        widget=UnfoldAdminTextInputWidget,
        help_text="Percent of the group that each stage reaches, rising to 100. The name of a group is a ring: its "
        "devices go first, as in canary, 5, 25, 100.",
    )
    soak_minutes = forms.IntegerField(
        initial=60, min_value=0, widget=UnfoldAdminIntegerFieldWidget, help_text="Shortest time in each stage."
    )
    success_percent = forms.IntegerField(
        initial=90,
        min_value=1,
        max_value=100,
        widget=UnfoldAdminIntegerFieldWidget,
        help_text="Of its devices that must have committed.",
    )
    min_reports = forms.IntegerField(
        label="Reports needed",
        initial=1,
        min_value=1,
        widget=UnfoldAdminIntegerFieldWidget,
        help_text="Outcomes before a stage may pass.",
    )
    failure_budget = forms.IntegerField(
        initial=0, min_value=0, widget=UnfoldAdminIntegerFieldWidget, help_text="One failure more than this halts it."
    )
    on_failure = forms.ChoiceField(
        choices=Rollout.OnFailure.choices, initial=Rollout.OnFailure.ROLL_BACK, widget=UnfoldAdminSelectWidget
    )
    urgent = forms.BooleanField(
        required=False, widget=UnfoldBooleanSwitchWidget, help_text="Devices wait for free disk and memory only."
    )
    window_start = forms.TimeField(
        label="Install from",
        required=False,
        widget=UnfoldAdminTimeWidget,
        help_text="In each device's own local time. Empty: any time.",
    )
    window_end = forms.TimeField(
        label="Install until", required=False, widget=UnfoldAdminTimeWidget, help_text="May be on the day after."
    )
    unmetered = forms.BooleanField(
        required=False, widget=UnfoldBooleanSwitchWidget, help_text="Wait for a network not paid for by the byte."
    )
    charging = forms.BooleanField(
        required=False, widget=UnfoldBooleanSwitchWidget, help_text="Wait until it charges, or is on mains."
    )
    idle = forms.BooleanField(
        required=False, widget=UnfoldBooleanSwitchWidget, help_text="Wait until the host has little else to do."
    )
    free_disk = _megabytes("Free disk (MB)", "Must be free when the release is there; urgent or not.")
    free_memory = _megabytes("Free memory (MB)", "Must be free when it begins; urgent or not.")
    rate = forms.IntegerField(
        label="Download rate (kB/s)",
        required=False,
        min_value=0,
        max_value=MAX_BYTES // 1000,
        widget=UnfoldAdminIntegerFieldWidget,
        help_text="Of each device, urgent or not. Empty: no limit.",
    )
    daily = _megabytes("Download a day (MB)", "Of each device. Empty: no limit.")
    guards = forms.CharField(
        required=False,
        initial=guards.USUAL,
        widget=UnfoldAdminTextInputWidget,
        help_text=f"Of {', '.join(guards.SCALES)}; each may have effect=, limit= and test=no: "
        "errors effect=0.01 limit=0.05, latency. Empty: none.",
    )
    false_alarm_percent = forms.FloatField(
        label="False alarms (%)",
        required=False,
        initial=1,
        min_value=0.0001,
        max_value=50,
        widget=UnfoldAdminDecimalFieldWidget,
        help_text="Chance that a healthy rollout is ever halted by its guards, looked at all the time.",
    )
    guard_devices = forms.IntegerField(
        label="Devices compared",
        required=False,
        initial=1,
        min_value=0,
        widget=UnfoldAdminIntegerFieldWidget,
        help_text="Exposed ones that each guard needs.",
    )
    guard_calls = forms.IntegerField(
        label="Calls compared",
        required=False,
        initial=50,
        min_value=1,
        widget=UnfoldAdminIntegerFieldWidget,
        help_text="Calls after which a device can be compared.",
    )
    start_now = forms.BooleanField(
        label="Start at once", required=False, widget=UnfoldBooleanSwitchWidget, help_text="Else it waits as a draft."
    )

    class Meta:
        model = Rollout
        fields = ("release", "group", "selector", "exclude", "exclude_group", "on_failure", "urgent")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        target = {name: self.fields[name] for name in TargetFields.base_fields}
        counted_live(target, reverse("admin:rollouts_rollout_reach"))

    def clean_percents(self) -> list[dict[str, Any]]:
        try:
            stages = [targeting.read_stage(part) for part in self.cleaned_data["percents"].split(",")]
            targeting.percents([services.StagePlan(**stage) for stage in stages])
        except Invalid as error:
            raise forms.ValidationError(error.message) from error
        return stages

    def clean_guards(self) -> dict[str, Any]:
        try:
            return guards.parse_text(self.cleaned_data["guards"])
        except ValueError as error:
            raise forms.ValidationError(str(error)) from error

    def clean(self) -> dict[str, Any]:
        given = super().clean() or self.cleaned_data
        if (given.get("window_start") is None) != (given.get("window_end") is None):
            raise forms.ValidationError("give both ends of the install window, or neither")
        return given

    def terms(self) -> dict[str, Any]:
        """What `services.create` takes."""
        given = self.cleaned_data
        plan = {
            "soak_seconds": given["soak_minutes"] * 60,
            "success_threshold": given["success_percent"] / 100,
            "min_reports": given["min_reports"],
            "failure_budget": given["failure_budget"],
            "needs_approval": given["approve_stages"],
        }
        window = None
        if given["window_start"] is not None:
            window = {"start": _minute(given["window_start"]), "end": _minute(given["window_end"])}
        return {
            "release": given["release"],
            "group": given["group"],
            **{name: given[name] for name in ("selector", "exclude", "exclude_group")},
            "stages": [services.StagePlan(**stage, **plan) for stage in given["percents"]],
            "on_failure": given["on_failure"],
            "urgent": given["urgent"],
            "window": window,
            "guards": self._guards() if given["guards"] else {},
            "pace": self.pace(),
            "conditions": {name: (given[name] or 0) * unit for name, unit in _UNITS.items() if given[name]}
            | {name: True for name in CONDITION_FLAGS if given[name]},
            **self.watch_terms(),
        }

    def _guards(self) -> dict[str, Any]:
        """What is left empty is as usual."""
        given, percent = self.cleaned_data, self.cleaned_data["false_alarm_percent"]
        plain = {"devices": given["guard_devices"], "calls": given["guard_calls"]}
        plain["false_alarm"] = percent and percent / 100
        return {**given["guards"], **{name: value for name, value in plain.items() if value is not None}}


_UNITS = {"free_disk": 10**6, "free_memory": 10**6, "daily": 10**6, "rate": 1000}


def _minute(moment: time) -> int:
    return moment.hour * 60 + moment.minute
