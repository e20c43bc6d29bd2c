"""Stages, and what goes to the devices as it is: windows, probation, conditions. Each raises Invalid."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import isfinite
from typing import Any

from device_sdk.protocol.assignment import Conditions, Probation, Window
from device_sdk.protocol.errors import ProtocolError
from fleet.errors import Invalid


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage as its author wants it; see `models.Stage`."""

    percent: float
    soak_seconds: int = 0
    min_reports: int = 1
    success_threshold: float = 0.9
    failure_budget: int = 0
    needs_approval: bool = False


def check_stages(stages: Sequence[StagePlan]) -> None:
    percents = [plan.percent for plan in stages]
    rising = all(low < high for low, high in pairwise(percents))
    if not percents or not rising or percents[0] <= 0 or percents[-1] != 100:
        raise Invalid("stages_malformed", f"stages: percentages must rise from over 0 to 100; got {percents}")
    for plan in stages:
        counts = (plan.soak_seconds, plan.min_reports, plan.failure_budget)
        share = plan.success_threshold
        if min(counts) < 0 or not (isfinite(share) and 0 <= share <= 1):
            raise Invalid(
                "stages_malformed", f"stages: expected whole numbers, and a threshold from 0 to 1; got {plan}"
            )


def checked_window(window: Mapping[str, int] | None) -> dict[str, int] | None:
    if window is None:
        return None
    try:
        return asdict(Window.parse(dict(window)))
    except ProtocolError as error:
        raise Invalid(error.code, error.message) from error


def checked_conditions(conditions: Mapping[str, Any] | None) -> dict[str, Any]:
    """Devices pass over conditions that they do not know; here an unknown one is a mistake."""
    unknown = set(conditions or ()) - {field.name for field in fields(Conditions)}
    if unknown:
        raise Invalid("malformed", f"conditions: unknown: {', '.join(sorted(unknown)):.200}")
    try:
        return Conditions.parse(dict(conditions or {})).to_json()
    except ProtocolError as error:
        raise Invalid(error.code, error.message) from error


def checked_probation(probation: Mapping[str, float] | None) -> dict[str, float]:
    try:
        return asdict(Probation.parse({**asdict(Probation()), **probation})) if probation else {}
    except ProtocolError as error:
        raise Invalid(error.code, error.message) from error
