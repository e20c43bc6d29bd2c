"""The part of the rollout form that is about time, limits and approval. Units are those that people think in."""

from typing import Any

from django import forms
from unfold.widgets import (
    UnfoldAdminDecimalFieldWidget,
    UnfoldAdminIntegerFieldWidget,
    UnfoldAdminSplitDateTimeWidget,
    UnfoldAdminTextInputWidget,
    UnfoldBooleanSwitchWidget,
)

from fleet.rollouts.terms.pace import MOST_RETRIES, USUAL, Pace

DAY, MINUTE = 86_400, 60


def _number(label: str, help_text: str, initial: float | None = None, most: float | None = None) -> forms.FloatField:
    return forms.FloatField(
        label=label,
        required=False,
        min_value=0,
        max_value=most,
        initial=initial,
        help_text=help_text,
        widget=UnfoldAdminDecimalFieldWidget,
    )


def _count(label: str, help_text: str, initial: int | None = None, most: int | None = None) -> forms.IntegerField:
    return forms.IntegerField(
        label=label,
        required=False,
        min_value=0,
        max_value=most,
        initial=initial,
        help_text=help_text,
        widget=UnfoldAdminIntegerFieldWidget,
    )


class _MomentWidget(UnfoldAdminSplitDateTimeWidget):  # type: ignore[misc]  # unfold ships no types
    """Unfold's, whose two inputs have no names of their own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        for part, widget in zip(("date", "time"), self.widgets, strict=True):
            widget.attrs["aria-label"] = f"{name}: {part}"


class PaceForm(forms.Form):
    start_at = forms.SplitDateTimeField(
        label="Begin at",
        required=False,
        widget=_MomentWidget("Begin at"),
        help_text="Begins by itself then, once it was started. In the time zone of your browser. Empty: at once.",
    )
    needs_approval = forms.BooleanField(
        required=False, widget=UnfoldBooleanSwitchWidget, help_text="By somebody else, before it begins."
    )
    approve_stages = forms.BooleanField(
        label="Stages need approval",
        required=False,
        widget=UnfoldBooleanSwitchWidget,
        help_text="By somebody else, before each stage passes.",
    )
    timeout_days = _number(
        "Time for a device (days)",
        "A device that was seen and is not done by then counts as failed. 0: no limit.",
        USUAL.timeout_seconds / DAY,
        most=365,
    )
    retries = _count(
        "Retries",
        "Where a device failed for the network, its disk or its memory. Never after a bad test or poor health.",
        USUAL.retries,
        MOST_RETRIES,
    )
    retry_minutes = _number(
        "First retry after (minutes)", "Then twice as long each time.", USUAL.retry_seconds / MINUTE, most=525_600
    )
    max_in_flight = _count("Updates at a time", "Devices that are admitted and not done. Empty: no limit.")
    starts_per_minute = _number("Starts a minute", "Devices admitted in a minute. Empty: no limit.")
    objective_percent = _number("Aim: percent", "Of the group that shall have it ...", most=100)
    objective_days = _number("Aim: days", "... so long after the start. Nothing is enforced.", most=3650)
    comment = forms.CharField(
        required=False,
        max_length=500,
        widget=UnfoldAdminTextInputWidget,
        help_text="Why it is started; for the history.",
    )

    def clean(self) -> dict[str, Any]:
        given = super().clean() or self.cleaned_data
        if (given.get("objective_percent") is None) != (given.get("objective_days") is None):
            raise forms.ValidationError("give both the percent and the days of the aim, or neither")
        return given

    def pace(self) -> Pace:
        given = self.cleaned_data
        return Pace(
            start_at=given["start_at"],
            needs_approval=given["needs_approval"],
            timeout_seconds=round((given["timeout_days"] or 0) * DAY),
            retries=given["retries"] or 0,
            retry_seconds=round((given["retry_minutes"] or 0) * MINUTE),
            max_in_flight=given["max_in_flight"] or 0,
            starts_per_minute=given["starts_per_minute"] or 0.0,
            objective_percent=given["objective_percent"],
            objective_days=given["objective_days"],
        )
