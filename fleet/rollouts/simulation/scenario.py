"""What is played: the fleet, the releases and how good they are, the stages. And what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from fleet.rollouts.guards import FAILURES, Terms
from fleet.rollouts.stages import ROLL_BACK, StageRules

UNGUARDED = Terms()
BEGIN = datetime(2026, 1, 5, tzinfo=UTC)  # a Monday


@dataclass(frozen=True, slots=True)
class Quality:
    """A release and the fraction of devices on which it does not pass probation."""

    version: str
    failing: float = 0.001


@dataclass(frozen=True, slots=True)
class Stage:
    """As an operator writes it. `budget`: failures allowed in the whole rollout so far."""

    percent: float
    soak_hours: float = 24.0
    min_reports: int = 1
    success: float = 0.9
    budget: int = 0

    def rules(self, *, last: bool, since: datetime, on_failure: str) -> StageRules:
        return StageRules(
            percent=self.percent,
            soak_seconds=self.soak_hours * 3_600,
            min_reports=self.min_reports,
            success_threshold=self.success,
            failure_budget=self.budget,
            last=last,
            on_failure=on_failure,
            since=since,
        )


@dataclass(frozen=True, slots=True)
class Scenario:
    """`releases` are rolled out one after the other, each when the one before has ended. Fractions are 0 to 1."""

    devices: int = 1_000_000
    days: float = 30.0
    seed: int = 1
    releases: Sequence[Quality] = (Quality("1.1.0"),)
    stages: Sequence[Stage] = (Stage(1), Stage(10), Stage(50), Stage(100))
    on_failure: str = ROLL_BACK
    step_minutes: int = 60
    arriving: float = 0.1  # of the devices enrol during the time, evenly
    rare: float = 0.05  # of the devices are there for an hour a day, at a time of their own
    nightly: float = 0.25  # of the devices are switched off from 20 to 6 o'clock
    interrupted: float = 0.05  # of the attempts end half-way and are begun again, up to `attempts`
    attempts: int = 5
    salt: str = "simulated"
    guards: Terms = UNGUARDED  # of update failures alone: virtual devices infer nothing

    @property
    def steps(self) -> int:
        return max(1, round(self.days * 24 * 60 / self.step_minutes))


def playable(terms: Terms) -> Terms:
    """Those that virtual devices can be asked: they update or fail, and infer nothing."""
    return replace(terms, guards={name: each for name, each in terms.guards.items() if name == FAILURES})


@dataclass(frozen=True, slots=True)
class Moment:
    """The fleet at the end of a step: enrolled devices by the version that they run."""

    at: datetime
    versions: dict[str, int]
    updating: int
    failed: int


@dataclass(frozen=True, slots=True)
class Happening:
    """What the engine did, and why."""

    at: datetime
    version: str
    what: str  # started, advanced, completed, halted, paused
    stage: int  # from 1
    reason: str = ""


@dataclass(slots=True)
class Played:
    moments: list[Moment] = field(default_factory=list)
    happenings: list[Happening] = field(default_factory=list)
    holds: dict[str, int] = field(default_factory=dict)  # steps by the reason for which the last rollout held
