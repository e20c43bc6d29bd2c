"""When a rollout begins, how fast it goes, how long a device may take, and who must agree."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from math import isfinite
from typing import Any

from fleet.errors import Invalid

WEEK = 7 * 86_400
MOST_RETRIES = 20
LONGEST = 365 * 86_400  # seconds


@dataclass(frozen=True, slots=True)
class Pace:
    """Times in seconds, but for `objective_days`; 0 is no limit.

    `timeout_seconds`: a device that was seen and has not finished within it counts as failed. `retries`: how often a
    device that failed for a passing reason gets the assignment again, first after `retry_seconds`, then doubling.
    `objective_percent` of the group within `objective_days` of the start: what is hoped for, nothing is enforced.
    """

    start_at: datetime | None = None
    needs_approval: bool = False
    timeout_seconds: int = WEEK
    retries: int = 2
    retry_seconds: int = 3_600
    max_in_flight: int = 0
    starts_per_minute: float = 0.0
    objective_percent: float | None = None
    objective_days: float | None = None

    def check(self) -> None:
        """Raises Invalid `pace_malformed`."""
        problem = next((text for text, wrong in self._problems() if wrong), "")
        if problem:
            raise Invalid("pace_malformed", f"expected {problem}")

    def _problems(self) -> tuple[tuple[str, bool], ...]:
        share, days = self.objective_percent, self.objective_days
        return (
            ("start_at: a moment with its time zone", self.start_at is not None and self.start_at.utcoffset() is None),
            (f"timeout_seconds: 0 to {LONGEST}", not _within(self.timeout_seconds, LONGEST)),
            (f"retries: 0 to {MOST_RETRIES}", not _within(self.retries, MOST_RETRIES)),
            (f"retry_seconds: 0 to {LONGEST}", not _within(self.retry_seconds, LONGEST)),
            ("max_in_flight: 0 or more", not _within(self.max_in_flight, 2**31 - 1)),
            ("starts_per_minute: 0 or more", not _within(self.starts_per_minute, 10**9)),
            ("an objective's percent and days together", (share is None) != (days is None)),
            ("objective_percent: over 0 to 100", share is not None and not (_within(share, 100) and share)),
            ("objective_days: over 0 to 3650", days is not None and not (_within(days, 3650) and days)),
        )

    def columns(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def told(self) -> dict[str, Any]:
        """What differs from the usual: for the audit trail."""
        usual = asdict(Pace())
        return {name: value for name, value in asdict(self).items() if value != usual[name]}


USUAL = Pace()
NAMES = tuple(field.name for field in fields(Pace))


def pace_of(given: Mapping[str, Any]) -> Pace:
    """Of named values, others passed over; what is not there is as usual."""
    return Pace(**{name: given[name] for name in NAMES if name in given})


def _within(value: float, most: float) -> bool:
    return isfinite(value) and 0 <= value <= most
