"""A fleet of virtual devices as columns. What each should run is what `policy.decide` says to a real device like it.

The policy tells devices of equal traits apart by cohort, by what they run and by where they failed. So one device of
each bucket is shown to the policy, and all others of the bucket get its answer: exact, by some ten thousand calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.cohorts import COHORTS, cohort
from fleet.rollouts import policy
from fleet.rollouts.simulation.scenario import Scenario

MODEL, BASE = "model", 0  # the place of the release that everyone runs at first
NOBODY = -1
ANSWERED = 0.95  # of the polls of a device that is there
SILENT, UPDATING, COMMITTED, FAILED, WITHDRAWN = range(5)
TRAITS = policy.Traits.of({}, (MODEL,))

Column = np.ndarray[tuple[int], np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Count:
    committed: int
    failed: int
    undecided: int
    began: int  # whatever came of it


class Devices:
    """`versions`: the base release and those that are rolled out, in order; columns hold places in it."""

    def __init__(self, scenario: Scenario, versions: Sequence[str]) -> None:
        number, self._random = scenario.devices, np.random.default_rng(scenario.seed)
        self._scenario, self._versions = scenario, versions
        self.enrols = self._arrivals(number)
        self.runs = np.full(number, BASE, dtype=np.int8)
        self.seen = np.full(number, NOBODY, dtype=np.int32)
        self._kind = self._random.choice(3, number, p=_shares(scenario)).astype(np.int8)
        self._hour = self._random.integers(0, 24, number, dtype=np.int8)
        self._cohort = np.zeros(number, dtype=np.int16)
        self._first: tuple[list[int], list[int]] = ([], [])
        self.forget()

    def _arrivals(self, number: int) -> Column:
        enrols = np.zeros(number, dtype=np.int32)
        late = self._random.random(number) < self._scenario.arriving
        enrols[late] = self._random.integers(0, self._scenario.steps, int(late.sum()))
        return enrols

    def forget(self) -> None:
        """A rollout begins: nobody has said anything about it."""
        number = len(self.runs)
        self.said = np.full(number, SILENT, dtype=np.int8)
        self._target = np.full(number, NOBODY, dtype=np.int8)
        self._until = np.zeros(number, dtype=np.int32)
        self._tries = np.zeros(number, dtype=np.int8)

    def place(self, salt: str) -> None:
        """Into the cohorts of a rollout."""
        places = (cohort(salt, name(device)) for device in range(len(self.runs)))
        self._cohort = np.fromiter(places, dtype=np.int16, count=len(self.runs))
        cohorts, first = np.unique(self._cohort, return_index=True)
        self._first = (cohorts.tolist(), first.tolist())

    # --- what the policy says ------------------------------------------------------------------------------------

    def show(self, snapshot: policy.Snapshot, rollout: int) -> None:
        """To the policy: one device of each bucket. What it answers holds until the snapshot changes."""
        plan = policy.plan(snapshot, TRAITS)
        self._wanted = np.full((len(self._versions), 2, COHORTS), NOBODY, dtype=np.int8)
        for runs, version in enumerate(self._versions):
            for failed in (0, 1):
                for place, device in zip(*self._first, strict=True):
                    facts = policy.DeviceFacts(
                        name=name(device),
                        traits=TRAITS,
                        runs={MODEL: f"{version}/default"},
                        failed=frozenset({rollout} if failed else ()),
                    )
                    self._wanted[runs, failed, place] = self._answer(policy.decide(plan, facts))

    def _answer(self, decided: dict[str, Assignment]) -> int:
        release = decided[MODEL].release
        return self._versions.index(release.version) if release else NOBODY

    def wanted(self) -> Column:
        found: Column = self._wanted[self.runs, (self.said == FAILED).astype(np.int8), self._cohort]
        return found

    # --- one step ------------------------------------------------------------------------------------------------

    def step(self, number: int, trial: int, failing: Sequence[float]) -> None:
        """Who is there polls: goes on with an update, gives it up if it is recalled, or begins one."""
        there = np.flatnonzero(self._there(number))
        self.seen[there] = number
        wanted = self.wanted()[there]
        busy = self._target[there] != NOBODY
        recalled = there[busy & (self._target[there] != wanted)]
        self._say(recalled, trial, WITHDRAWN)
        self._target[recalled] = NOBODY
        ready = there[busy & (self._target[there] == wanted) & (self._until[there] <= number)]
        self._finish(ready, number, trial, failing)
        begins = there[~busy & (wanted != self.runs[there]) & (wanted != NOBODY)]
        self._begin(begins, number, trial)

    def _there(self, number: int) -> Column:
        """By the clock: some always, some by day, some for an hour."""
        hour = number * self._scenario.step_minutes // 60 % 24
        by_day = 6 <= hour < 20
        here = (self._kind == 0) | (by_day & (self._kind == 1)) | ((self._kind == 2) & (self._hour == hour))
        lucky: Column = self._random.random(len(here), dtype=np.float32) < ANSWERED
        there: Column = (self.enrols <= number) & here & lucky
        return there

    def _begin(self, who: Column, number: int, trial: int) -> None:
        self._target[who] = self.wanted()[who]
        minutes = self._random.lognormal(np.log(20), 0.8, len(who))  # download, tests, probation
        self._until[who] = number + 1 + (minutes // self._scenario.step_minutes).astype(np.int32)
        self._say(who, trial, UPDATING)

    def _finish(self, who: Column, number: int, trial: int, failing: Sequence[float]) -> None:
        again = self._random.random(len(who)) < self._scenario.interrupted
        again &= self._tries[who] < self._scenario.attempts
        self._tries[who[again]] += 1
        self._until[who[again]] = number + 2 ** np.minimum(self._tries[who[again]], 5).astype(np.int32)
        done = who[~again]
        bad = self._random.random(len(done)) < np.take(failing, self._target[done])
        self._say(done[bad], trial, FAILED)
        self.runs[done[~bad]] = self._target[done[~bad]]
        self._say(done[~bad], trial, COMMITTED)
        self._target[done] = NOBODY

    def _say(self, who: Column, trial: int, word: int) -> None:
        """What a device reports on the rollout: only about its release, and nothing after a failure."""
        about = self._target[who] == trial
        self.said[who[about & (self.said[who] != FAILED)]] = word

    # --- what can be counted -------------------------------------------------------------------------------------

    def count(self, trial: int, horizon: int) -> Count:
        """As `counting.tallies` does: who never said a word and is away since before the stage cannot know."""
        decided = (self.said == COMMITTED) | (self.said == FAILED)
        knows = (self.said != SILENT) | (self.seen >= horizon)
        undecided = np.count_nonzero((self.wanted() == trial) & ~decided & knows)
        committed, failed, began = self.said == COMMITTED, self.said == FAILED, self.said != SILENT
        return Count(int(committed.sum()), int(failed.sum()), int(undecided), int(began.sum()))

    def versions(self, number: int) -> dict[str, int]:
        counts = np.bincount(self.runs[self.enrols <= number], minlength=len(self._versions))
        return dict(zip(self._versions, counts.tolist(), strict=True))


def name(device: int) -> str:
    return f"device-{device:07}"


def _shares(scenario: Scenario) -> list[float]:
    return [1 - scenario.rare - scenario.nightly, scenario.nightly, scenario.rare]
