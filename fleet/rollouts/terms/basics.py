"""Stages, and what goes to the devices as it is: windows, conditions. Each raises Invalid."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from device_sdk.protocol.assignment import Conditions, Window
from device_sdk.protocol.errors import ProtocolError
from fleet.devices.models import Group
from fleet.errors import Invalid


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage as its author wants it; see `models.Stage`. With a ring, the percentage is not asked for."""

    percent: float = 0.0
    ring: Group | None = None
    soak_seconds: int = 0
    min_reports: int = 1
    success_threshold: float = 0.9
    failure_budget: int = 0
    needs_approval: bool = False


def columns(plan: StagePlan) -> dict[str, Any]:
    return {item.name: getattr(plan, item.name) for item in fields(plan)}


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
