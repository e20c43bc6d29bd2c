"""The form that makes a subscription."""

from django import forms
from unfold.widgets import (
    UnfoldAdminCheckboxSelectMultipleWidget,
    UnfoldAdminSelectWidget,
    UnfoldAdminTextInputWidget,
)

from fleet.notices import kinds
from fleet.notices.models import Subscription


def _known() -> list[tuple[str, str]]:
    return [(kind, kind.replace("_", " ").replace(".", ": ")) for kind in sorted(kinds.KNOWN)]


class SubscriptionForm(forms.ModelForm):  # type: ignore[type-arg]
    name = forms.CharField(max_length=100, widget=UnfoldAdminTextInputWidget, help_text="Who is told, for people.")
    kind = forms.ChoiceField(choices=Subscription.Kind.choices, widget=UnfoldAdminSelectWidget)
    target = forms.CharField(
        label="Address",
        max_length=500,
        widget=UnfoldAdminTextInputWidget,
        help_text="https://… of a webhook, or e-mail addresses separated by commas.",
    )
    events = forms.MultipleChoiceField(
        label="Of what",
        choices=_known,
        required=False,
        widget=UnfoldAdminCheckboxSelectMultipleWidget,
        help_text="None chosen: of everything.",
    )

    class Meta:
        model = Subscription
        fields = ("name", "kind", "target", "events")
