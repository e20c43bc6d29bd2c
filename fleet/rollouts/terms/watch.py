"""What devices do with a release of a rollout once they have it: the probation, how long they may put it off, and
whether those that quarantined it try again. Checked here; asked for by the form, the API and the command alike.
"""

from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from django import forms
from unfold.widgets import UnfoldAdminDecimalFieldWidget, UnfoldAdminIntegerFieldWidget, UnfoldBooleanSwitchWidget

from device_sdk.protocol.assignment import COMPARED, LONGEST_HOLD, MAX_HOLD, Probation
from device_sdk.protocol.errors import ProtocolError
from fleet.errors import Invalid

PROBATION = {
    "calls": "calls that a device watches a new release for",
    "seconds": "and seconds, whichever takes longer",
    "max_error_rate": "share of calls that may fail, 0 to 1",
    "max_invalid_rate": "share of outputs that may be NaN, infinite or empty, 0 to 1",
    "max_slowdown": "median latency, as a multiple of the release's before on that device",
    "max_confidence_drop": "of the mean top score, 0 to 1; the manifest must name its scores",
    "max_class_shift": "total variation distance of the class mix, 0 to 1; likewise",
}
HOURS = 3_600
FIELDS = (*PROBATION, "max_hold_hours", "forgive")


def checked_probation(probation: Mapping[str, Any] | None) -> dict[str, float]:
    """As it is kept: whole, and of the comparisons those that are asked for. Raises Invalid."""
    given = {name: value for name, value in (probation or {}).items() if value is not None}
    if unknown := given.keys() - PROBATION.keys():
        raise Invalid("malformed", f"probation: unknown: {', '.join(sorted(unknown)):.200}")
    if not given:
        return {}
    try:
        whole = asdict(Probation.parse(Probation().to_json() | given))
    except ProtocolError as error:
        raise Invalid(error.code, error.message) from error
    return {name: value for name, value in whole.items() if value is not None}


def checked_max_hold(seconds: int) -> int:
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not 0 <= seconds <= LONGEST_HOLD:
        raise Invalid("malformed", f"max_hold: expected seconds from 0 to {LONGEST_HOLD}; got {seconds!r:.40}")
    return seconds


def texts(probation: Mapping[str, Any], max_hold: int, *, forgive: bool) -> list[str]:
    """For people: what differs from the standard."""
    said = [f"{name.replace('_', ' ')} {value:g}" for name, value in probation.items()]
    if max_hold != MAX_HOLD:
        said.append(f"put off for {max_hold / HOURS:g} h at most" if max_hold else "never put off")
    return [*said, "tried again where it was quarantined"] if forgive else said


def add_arguments(command: ArgumentParser) -> None:
    for name, what in PROBATION.items():
        kind = int if name == "calls" else float
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"probation: {what}")
    command.add_argument("--max-hold", type=int, default=MAX_HOLD, metavar="SECONDS", help="a program may put it off")
    command.add_argument("--forgive", action="store_true", help="devices that quarantined the release try it again")


def from_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Terms for `services.create`, from the command line."""
    probation = {name: options[name] for name in PROBATION if options[name] is not None}
    return {"probation": probation, "max_hold": options["max_hold"], "forgive": options["forgive"]}


def _number(label: str, help_text: str, *, low: float = 0, high: float = 1) -> forms.FloatField:
    return forms.FloatField(
        label=label, required=False, min_value=low, max_value=high, widget=UnfoldAdminDecimalFieldWidget,
        help_text=help_text,
    )  # fmt: skip


def _whole(label: str, help_text: str, *, high: int) -> forms.IntegerField:
    return forms.IntegerField(
        label=label, required=False, min_value=0, max_value=high, widget=UnfoldAdminIntegerFieldWidget,
        help_text=help_text,
    )  # fmt: skip


class WatchFields(forms.Form):
    """Every field may stay empty: then it is as usual, or not looked at."""

    calls = _whole("Watched for calls", "Empty: 20.", high=10**9)
    seconds = _number("and for seconds", "Empty: 10. Whichever takes longer.", high=30 * 86_400)
    max_error_rate = _number("Calls that may fail", "From 0 to 1. Empty: none.")
    max_invalid_rate = _number("Outputs that may be invalid", "NaN, infinite or empty; from 0 to 1. Empty: none.")
    max_slowdown = _number(
        "Slower at most (times)", "Median latency beside the release before, on the same device. Empty: not looked at.",
        low=COMPARED["max_slowdown"][0], high=COMPARED["max_slowdown"][1],
    )  # fmt: skip
    max_confidence_drop = _number(
        "Confidence may drop by", "Mean top score beside the release before, from 0 to 1. Empty: not looked at."
    )
    max_class_shift = _number(
        "Class mix may shift by", "Share of answers that are of another class than before. Empty: not looked at."
    )
    max_hold_hours = _number("May be put off for (hours)", "By the program on the device. Empty: 24.", high=8_760)
    forgive = forms.BooleanField(
        label="Try again where quarantined", required=False, widget=UnfoldBooleanSwitchWidget,
        help_text="Devices that rolled this release back, or could not load it, try it once more.",
    )  # fmt: skip

    def watch_terms(self) -> dict[str, Any]:
        given = self.cleaned_data
        hours = given["max_hold_hours"]
        return {
            "probation": {name: given[name] for name in PROBATION if given[name] is not None},
            "max_hold": MAX_HOLD if hours is None else round(hours * HOURS),
            "forgive": given["forgive"],
        }
