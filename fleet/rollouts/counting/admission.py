"""Who is assigned a rollout's release, for the whole fleet at once: `policy.decide`, with arrays for devices.

The policy plans for each crowd; what it decides by device (where it failed, what it runs, its cohort) is done here by
the same steps on columns. Devices with pins are few: the policy decides each of them itself. A test compares the two.
"""

from collections.abc import Iterator, Sequence
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


class Admission:
    """One look at the fleet under one snapshot. Places are those of the roster."""

    def __init__(self, snapshot: policy.Snapshot, roster: Roster | None = None, *, until: float = FOR_EVER) -> None:
        self.snapshot, self.until = snapshot, until
        self.roster = roster or rosters.load()

    def assigned(self, rollout: int, model: str) -> Numbers:
        """Places of the devices that should run the release because of this rollout."""
        found = [self._assigned_in(places, plan, rollout) for plan, places in self.plans(model)]
        found.append(self._pinned_to(rollout, model))
        return np.concatenate(found)

    def plans(self, model: str) -> Iterator[tuple[policy.ModelPlan, Numbers]]:
        """What the policy says of a model, to whom: crowds with the same options together, pins left out."""
        same: dict[tuple[object, ...], tuple[policy.ModelPlan, list[Numbers]]] = {}
        for crowd in self.roster.crowds:
            for plan in self._plan(crowd).models:
                if plan.model == model:
                    options = tuple((each.rollout.id, str(each.assignment.release)) for each in plan.options)
                    same.setdefault(options, (plan, []))[1].append(crowd.places)
        for plan, crowds in same.values():
            places = np.concatenate(crowds)
            yield plan, places[~self.pinned[places]]

    def lets_in(self, rule: policy.RolloutRules, places: Numbers) -> Flags:
        """`policy.admits`, of devices for which the rule is meant."""
        if rule.state == policy.PAUSED:
            inside = self.runs_release(rule.release, places)
        elif rule.state == policy.COMPLETED:
            inside = np.ones(len(places), dtype=np.bool_)
        else:
            inside = self._in_cohort(rule, places)
        return inside & ~self.failed_in(rule.id, places)

    def _in_cohort(self, rule: policy.RolloutRules, places: Numbers) -> Flags:
        ids = self.roster.ids[places]
        if len(self.roster.ids) >= KEPT_FROM:
            return _cohorts.inside(rule.salt, rule.percent, ids, until=self.until)
        found = (policy.in_cohort(rule.salt, self._names[pk], rule.percent) for pk in ids.tolist())
        return np.fromiter(found, dtype=np.bool_, count=len(ids))

    def runs_release(self, release: policy.ReleaseRef, places: Numbers) -> Flags:
        start = f"{release.version}/"
        fits = [pk for pk, runs in self._sets.items() if runs.get(release.model, "").startswith(start)]
        return np.isin(self.roster.runs[places], fits)

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

    def _assigned_in(self, places: Numbers, plan: policy.ModelPlan, rollout: int) -> Numbers:
        """Newest first: whom one lets in, no later one gets."""
        for option in plan.options if any(option.rollout.id == rollout for option in plan.options) else ():
            inside = self.lets_in(option.rollout, places)
            if option.rollout.id == rollout:
                return places[inside] if option.assignment.rollout else places[:0]
            places = places[~inside]
        return places[:0]

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
    def _names(self) -> dict[int, str]:
        """Of a small fleet: one query, where there are many groups."""
        return dict(names(np.sort(self.roster.ids)))

    @cached_property
    def _sets(self) -> dict[int, dict[str, str]]:
        return dict(RunningSet.objects.values_list("pk", "runs"))

    @cached_property
    def _failed(self) -> dict[int, Numbers]:
        """Devices by the rollout in force in which they failed."""
        rows = Outcome.objects.filter(state=Outcome.State.FAILED, rollout__state__in=policy.IN_FORCE)
        rollouts, devices = columns(rows, "rollout_id", "device_id")
        return {int(pk): devices[rollouts == pk] for pk in np.unique(rollouts)}


def _with_pins() -> QuerySet[Device]:
    return Device.objects.filter(state=Device.State.ACTIVE).exclude(pins={})
