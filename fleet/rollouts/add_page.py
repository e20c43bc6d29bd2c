"""How the form that proposes a rollout is laid out: what everybody fills in first, the rest folded under its name."""

from collections.abc import Mapping
from typing import Any

from django.utils.safestring import SafeString

from device_sdk.protocol.assignment import CONDITION_FLAGS, CONDITION_SIZES
from fleet import presentation
from fleet.errors import Invalid
from fleet.rollouts.forms import ReachForm


def _set(name: str | None, description: str, *fields: str | tuple[str, ...], folded: bool = False) -> Any:
    return name, {"fields": fields, "description": description, "classes": ("collapse",) if folded else ()}


FIELDSETS = (
    _set(None, "", "release", "group", "selector", "exclude_group", "exclude", "reaches"),
    _set(
        "Stages",
        "Each stage passes by itself, once it has soaked long enough, with reports and successes enough, and no guard "
        "objects.",
        "percents",
        ("soak_minutes", "success_percent"),
        ("min_reports", "failure_budget"),
        "on_failure",
    ),
    _set(
        "Guards",
        "Devices that run the release because of this rollout are compared with those that do not, each with its own "
        "past. A guard that has no numbers holds the stage.",
        "guards",
        "false_alarm_percent",
        ("guard_devices", "guard_calls"),
    ),
    _set("Start", "", ("needs_approval", "approve_stages"), "start_at", "comment", "start_now"),
    _set(
        "When devices install",
        "What each device waits for, and what it may use. Usually nothing: they install at their next poll.",
        "urgent",
        ("window_start", "window_end"),
        *CONDITION_FLAGS,
        *zip(CONDITION_SIZES[::2], CONDITION_SIZES[1::2], strict=True),
        folded=True,
    ),
    _set(
        "Time, retries and limits",
        "How long a device may take, how often it tries again, how many go at once, and what you hope for.",
        "timeout_days",
        ("retries", "retry_minutes"),
        ("max_in_flight", "starts_per_minute"),
        ("objective_percent", "objective_days"),
        folded=True,
    ),
    _set(
        "Probation",
        "What each device watches after it activated the release, before it commits; else it rolls back by itself.",
        ("calls", "seconds"),
        ("max_error_rate", "max_invalid_rate"),
        ("max_slowdown", "max_confidence_drop"),
        ("max_class_shift", "max_hold_hours"),
        "forgive",
        folded=True,
    ),
)


def reached(given: Mapping[str, Any]) -> SafeString:
    """The live count: as much of the form as is filled in."""
    try:
        return presentation.chosen(ReachForm(given).reached())
    except Invalid as error:
        return presentation.not_chosen(error.message)
