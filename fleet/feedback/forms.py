"""The campaign form: percent and clock times for people, fractions and minutes in the database."""

from datetime import time
from typing import Any

from django import forms
from unfold.widgets import UnfoldAdminDecimalFieldWidget, UnfoldAdminTimeWidget

from fleet.feedback.models import Campaign


class CampaignForm(forms.ModelForm):  # type: ignore[type-arg]
    percent = forms.FloatField(
        label="Percent of inferences",
        min_value=0,
        max_value=100,
        initial=1,
        widget=UnfoldAdminDecimalFieldWidget,
        help_text="Each sample carries its probability, so that statistics stay right.",
    )
    opens = forms.TimeField(
        label="Upload from",
        initial=time(2),
        widget=UnfoldAdminTimeWidget,
        help_text="In each device's own local time. The same as the end: any time.",
    )
    closes = forms.TimeField(label="Upload until", initial=time(5), widget=UnfoldAdminTimeWidget)

    class Meta:
        model = Campaign
        fields = ("name", "model", "active", "expires_at", "max_samples", "jitter_seconds")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk:
            self.initial = {
                **self.initial,
                "percent": 100 * self.instance.rate,
                "opens": time(*divmod(self.instance.window_start, 60)),
                "closes": time(*divmod(self.instance.window_end, 60)),
            }

    def terms(self) -> dict[str, Any]:
        """What the services take, beside name and model."""
        given = self.cleaned_data
        return {
            "active": given["active"],
            "expires_at": given["expires_at"],
            "rate": given["percent"] / 100,
            "max_samples": given["max_samples"],
            "window_start": given["opens"].hour * 60 + given["opens"].minute,
            "window_end": given["closes"].hour * 60 + given["closes"].minute,
            "jitter_seconds": given["jitter_seconds"],
        }
