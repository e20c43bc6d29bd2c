"""Who is assigned a rollout's release, for the whole fleet at once: `policy.decide`, with arrays for devices.

The policy plans for each crowd; what it decides by device (where it failed, what it runs, its cohort) is done here by
the same steps on columns. Devices with pins are few: the policy decides each of them itself. A test compares the two.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from django.db.models import QuerySet

from fleet.devices.bulk import Flags, Numbers, columns, names
from fleet.devices.models import Device, RunningSet
from fleet.rollouts import policy, selectors
from fleet.rollouts.counting import roster as rosters
from fleet.rollouts.counting.cohorts import KEPT_FROM, Cohorts
from fleet.rollouts.counting.roster import Crowd, Roster
from fleet.rollouts.models import Outcome

_cohorts = Cohorts()
FOR_EVER = float("inf")


@dataclass(frozen=True, slots=True)
class Part:
    """Some devices to which the policy says the same of a model. `traits`: of one crowd of them."""

    traits: policy.Traits
    plan: policy.ModelPlan
    places: Numbers


class Admission:
    """One look at the fleet under one snapshot. Places are those of the roster."""

    def __init__(self, snapshot: policy.Snapshot, roster: Roster | None = None, *, until: float = FOR_EVER) -> None:
        self.snapshot, self.until = snapshot, until
        self.roster = roster or rosters.load()

    def assigned(self, rollout: int, model: str) -> Numbers:
        """Places of the devices that should run the release because of this rollout."""
        if model not in self._walks:
            self._walks[model] = [_Walk(self, part) for part in self.parts(model)]
        return np.concatenate([*(walk.upto(rollout) for walk in self._walks[model]), self._pinned_to(rollout, model)])

    def parts(self, model: str) -> Iterator[Part]:
        """What the policy says of a model, to whom: crowds with the same options together, pins left out."""
        same: dict[tuple[object, ...], tuple[Crowd, policy.ModelPlan, list[Numbers]]] = {}
        for crowd in self.roster.crowds:
            for plan in self._plan(crowd).models:
                if plan.model == model:
                    same.setdefault(_kind(plan, crowd), (crowd, plan, []))[2].append(crowd.places)
        for crowd, plan, crowds in same.values():
            places = np.concatenate(crowds)
            yield Part(crowd.traits, plan, places[~self.pinned[places]])

    def lets_in(self, option: policy.Option, labels: Mapping[str, str], places: Numbers) -> Flags:
        """`policy.decide`'s question to one option, of devices with these labels."""
        rule = option.rollout
        inside = ~self.failed_in(rule.id, places)
        if option.targeted is None:
            inside &= self.by_name(places, lambda name: policy.targets(rule, labels, name))
        return inside & self.has_reached(rule, option.ahead, labels, places)

    def has_reached(
        self, rule: policy.RolloutRules, ahead: bool | None, labels: Mapping[str, str], places: Numbers
    ) -> Flags:
        """Whether its state, rings and percentage let devices in for which it is meant. `ahead` as in an option."""
        if rule.state == policy.PAUSED:
            return self.runs_release(rule.release, places)
        if rule.state == policy.COMPLETED or ahead:
            return np.ones(len(places), dtype=np.bool_)
        inside = self._in_cohort(rule, places)
        if ahead is None:
            inside |= self.by_name(places, lambda name: any(ring.matches(labels, name) for ring in rule.rings))
        return inside

    def by_name(self, places: Numbers, test: Callable[[str], bool]) -> Flags:
        """For what hangs on a device's name: it is read, which takes a query for each such group."""
        ids = self.roster.ids[places]
        if not len(ids):
            return np.zeros(0, dtype=np.bool_)
        small = len(self.roster.ids) < KEPT_FROM
        found = self._names if small else dict(names(np.sort(ids)))
        return np.fromiter((pk in found and test(found[pk]) for pk in ids.tolist()), dtype=np.bool_, count=len(ids))

    def _in_cohort(self, rule: policy.RolloutRules, places: Numbers) -> Flags:
        ids = self.roster.ids[places]
        if len(self.roster.ids) >= KEPT_FROM:
            return _cohorts.inside(rule.salt, rule.percent, ids, until=self.until)
        return self.by_name(places, lambda name: policy.in_cohort(rule.salt, name, rule.percent))

    def runs_release(self, release: policy.ReleaseRef, places: Numbers) -> Flags:
        fits = [pk for pk in self.sets if self.running(pk, release.model) == release.version]
        return np.isin(self.roster.runs[places], fits)

    def running(self, runs: int, model: str) -> str:
        """The version that devices of this running set run."""
        return self.sets.get(runs, {}).get(model, "").partition("/")[0]

    def failed_in(self, rollout: int, places: Numbers) -> Flags:
        return np.isin(self.roster.ids[places], self._failed.get(rollout, ()))

    def seen_since(self, micros: int, places: Numbers) -> Flags:
        return self.roster.seen[places] >= max(micros, rosters.NEVER + 1)

    @cached_property
    def pinned(self) -> Flags:
        """By place. A pin to what was revoked binds no more; the policy is asked about that, too."""
        (ids,) = columns(_with_pins(), "pk")
        return np.isin(self.roster.ids, ids)

    @cached_property
    def exceptions(self) -> Sequence[tuple[Device, policy.DeviceFacts]]:
        """Devices with pins, as rows."""
        return list(selectors.all_facts(_with_pins().select_related("runs")))

    @cached_property
    def place_of(self) -> dict[int, int]:
        """Of the devices with pins."""
        places = np.flatnonzero(self.pinned)
        return dict(zip(self.roster.ids[places].tolist(), places.tolist(), strict=True))

    def _pinned_to(self, rollout: int, model: str) -> Numbers:
        assigned = [
            self.place_of[device.pk]
            for device, facts in (self.exceptions if self.pinned.any() else ())
            if device.pk in self.place_of and model in facts.models
            if policy.desired(self.snapshot, facts)[model].rollout == str(rollout)
        ]
        return np.array(assigned, dtype=np.int64)

    def _plan(self, crowd: Crowd) -> policy.Plan:
        if crowd.traits not in self._plans:
            self._plans[crowd.traits] = policy.plan(self.snapshot, crowd.traits)
        return self._plans[crowd.traits]

    @cached_property
    def _plans(self) -> dict[policy.Traits, policy.Plan]:
        return {}

    @cached_property
    def _walks(self) -> dict[str, list["_Walk"]]:
        return {}

    @cached_property
    def _names(self) -> dict[int, str]:
        """Of a small fleet: one query, where there are many groups."""
        return dict(names(np.sort(self.roster.ids)))

    @cached_property
    def sets(self) -> dict[int, dict[str, str]]:
        return dict(RunningSet.objects.values_list("pk", "runs"))

    @cached_property
    def _failed(self) -> dict[int, Numbers]:
        """Devices by the rollout in force in which they failed, also where that is to be tried again."""
        rows = Outcome.objects.filter(state=Outcome.State.FAILED, rollout__state__in=policy.IN_FORCE)
        rollouts, devices = columns(rows, "rollout_id", "device_id")
        return {int(pk): devices[rollouts == pk] for pk in np.unique(rollouts)}


class _Walk:
    """The options of a part, newest first: whom one lets in, no later one gets. Goes as far as it was asked, once."""

    def __init__(self, admission: Admission, part: Part) -> None:
        self._admission, self._labels = admission, dict(part.traits.labels)
        self._ahead, self._left = list(part.plan.options), part.places
        self._found: dict[int, Numbers] = {}

    def upto(self, rollout: int) -> Numbers:
        """Whom it lets in. Raises OverBudgetError, and goes on from there the next time."""
        while rollout not in self._found and any(option.rollout.id == rollout for option in self._ahead):
            option = self._ahead[0]
            inside = self._admission.lets_in(option, self._labels, self._left)
            self._found[option.rollout.id] = self._left[inside] if option.assignment.rollout else self._left[:0]
            self._left = self._left[~inside]
            self._ahead.pop(0)
        return self._found.get(rollout, self._left[:0])


def _kind(plan: policy.ModelPlan, crowd: Crowd) -> tuple[object, ...]:
    """Equal for crowds that the policy treats alike; labels matter where they are looked at together with names."""
    named = any(option.targeted is None or option.ahead is None for option in plan.options)
    told = [
        (each.rollout.id, each.targeted, each.ahead, *(str(step.release) for step in each.assignments))
        for each in plan.options
    ]
    return (*told, crowd.traits.labels if named else ())


def _with_pins() -> QuerySet[Device]:
    return Device.objects.filter(state=Device.State.ACTIVE).exclude(pins={})
