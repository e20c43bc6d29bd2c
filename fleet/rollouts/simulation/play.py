"""The engine's side of the play: `policy.next_step` and the guard of failures on what virtual devices reported."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import sha256

from fleet.rollouts import guards, policy
from fleet.rollouts.simulation.devices import BASE, FAILED, MODEL, UPDATING, Count, Devices
from fleet.rollouts.simulation.scenario import BEGIN, Happening, Moment, Played, Scenario

BASE_VERSION = "1.0.0"


@dataclass(slots=True)
class Running:
    """The rollout in play. `trial` is the place of its release; `since` the step in which its stage began."""

    trial: int
    stage: int
    since: int
    state: str = policy.RUNNING
    peak: float = 0.0  # the highest evidence that the guard has seen


def play(scenario: Scenario, on_step: Callable[[Played], None] = lambda _: None) -> Played:
    """From the first step to the last. The same scenario gives the same play."""
    return _Play(scenario).run(on_step)


class _Play:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._versions = [BASE_VERSION, *(release.version for release in scenario.releases)]
        self._failing = [0.0, *(release.failing for release in scenario.releases)]
        self._devices = Devices(scenario, self._versions)
        self._ended: list[tuple[int, str]] = [(BASE, policy.COMPLETED)]  # what came before, and how it ended
        self._played = Played()

    def run(self, on_step: Callable[[Played], None]) -> Played:
        running: Running | None = None
        for number in range(self._scenario.steps):
            if running is None and len(self._ended) < len(self._versions):
                running = self._start(number)
            self._devices.step(number, self._trial(running), self._failing)
            if running is not None and not self._decide(running, number):
                running = None
            self._played.moments.append(self._moment(number))
            on_step(self._played)
        return self._played

    def _trial(self, running: Running | None) -> int:
        return running.trial if running else self._ended[-1][0]

    def _start(self, number: int) -> Running:
        running = Running(trial=len(self._ended), stage=0, since=number)
        self._devices.forget()
        self._devices.place(self._salt(running.trial))
        self._show(running)
        self._note(running, number, "started")
        return running

    def _decide(self, running: Running, number: int) -> bool:
        """Let the policy decide; False: the rollout has ended, or waits for a person who is not there."""
        since = self._at(running.since)
        stages = self._scenario.stages
        last = running.stage == len(stages) - 1
        rules = stages[running.stage].rules(last=last, since=since, on_failure=self._scenario.on_failure)
        counted = self._devices.count(running.trial, running.since)
        admitted = counted.committed + counted.failed + counted.undecided
        tally = policy.Tally(counted.committed, counted.failed, admitted)
        decision = policy.next_step(rules, tally, self._at(number))
        match guards.before_success(self._asked(running, counted), self._scenario.on_failure, decision):
            case policy.Hold(reason):
                kind = reason.split(":")[0]
                self._played.holds[kind] = self._played.holds.get(kind, 0) + 1
                return True
            case policy.Advance():
                running.stage, running.since = running.stage + 1, number
                self._note(running, number, "advanced")
            case policy.Complete():
                self._end(running, number, policy.COMPLETED, "")
            case policy.Halt(reason):
                self._end(running, number, policy.HALTED, reason)
            case policy.Pause(reason):
                self._end(running, number, policy.PAUSED, reason)
        self._show(running)
        return running.state == policy.RUNNING

    def _asked(self, running: Running, counted: Count) -> guards.Trip | policy.Hold | None:
        """The guard of update failures, looked at in each step as the engine does."""
        terms = self._scenario.guards
        if guards.FAILURES not in terms.guards:
            return None
        reading = guards.failures_reading(terms, counted.began, counted.began, counted.failed)
        running.peak = max(running.peak, reading.evidence)
        return guards.verdict(terms, [replace(reading, peak=running.peak)])

    def _end(self, running: Running, number: int, state: str, reason: str) -> None:
        running.state = state
        self._ended.append((running.trial, state))
        self._note(running, number, state, reason)

    def _show(self, running: Running) -> None:
        self._devices.show(self._snapshot(running), running.trial)

    def _snapshot(self, running: Running) -> policy.Snapshot:
        """The newest first, as the server compiles it; who is halted admits nobody."""
        rules = [self._rules(trial, state, 100) for trial, state in self._ended if trial != running.trial]
        rules.append(self._rules(running.trial, running.state, self._scenario.stages[running.stage].percent))
        return policy.Snapshot(rollouts={MODEL: [each for each in reversed(rules) if each.state in policy.IN_FORCE]})

    def _rules(self, trial: int, state: str, percent: float) -> policy.RolloutRules:
        variants = {"default": policy.ManifestRef(1, "0" * 64)}
        release = policy.ReleaseRef(MODEL, self._versions[trial], variants)
        return policy.RolloutRules(id=trial, state=state, release=release, salt=self._salt(trial), percent=percent)

    def _salt(self, trial: int) -> str:
        if trial == 1:
            return self._scenario.salt
        return sha256(f"{self._scenario.salt} {trial}".encode()).hexdigest()[:32]

    def _moment(self, number: int) -> Moment:
        said = self._devices.said
        updating, failed = (int((said == word).sum()) for word in (UPDATING, FAILED))
        return Moment(self._at(number), self._devices.versions(number), updating, failed)

    def _note(self, running: Running, number: int, what: str, reason: str = "") -> None:
        version = self._versions[running.trial]
        self._played.happenings.append(Happening(self._at(number), version, what, running.stage + 1, reason))

    def _at(self, number: int) -> datetime:
        return BEGIN + timedelta(minutes=number * self._scenario.step_minutes)
