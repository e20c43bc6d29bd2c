"""Who lags, and why, over the whole fleet: `selectors.laggards` by columns. The rows to show are explained one by one.

The order of reasons is that of `selectors`; a test compares the two.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from django.db.models import Case, IntegerField, Value, When

from device_sdk.protocol import events
from fleet.devices.bulk import Flags, Numbers, columns
from fleet.devices.models import Device, ModelStatus
from fleet.devices.selectors import offline_before, refusing
from fleet.rollouts import explaining, policy, selectors, snapshots
from fleet.rollouts.counting import roster as rosters
from fleet.rollouts.counting.admission import FOR_EVER, Admission
from fleet.rollouts.counting.tallies import progress_of
from fleet.rollouts.models import Rollout
from fleet.rollouts.selectors import Laggard, Progress
from fleet.rollouts.variants import Way, place_on, way_to


@dataclass(frozen=True, slots=True)
class Behind:
    """Some devices that lag with one model, for one reason; longest unseen first is `seen`'s business."""

    model: str
    why: str
    places: Numbers


@dataclass(frozen=True, slots=True)
class Survey:
    """`progress` by the rollout's key, where it could be counted. `first`: devices and models, longest unseen first."""

    progress: Mapping[int, Progress]
    total: int
    reasons: Mapping[str, int]
    first: Sequence[tuple[int, str]]


def survey(rollouts: Sequence[Rollout], *, first: int, until: float = FOR_EVER) -> Survey:
    """By one look at the fleet. `until`: when to leave out the progress that is not counted yet."""
    admission = Admission(snapshots.current())
    found = list(behind(admission))
    reasons = Counter[str]()
    for each in found:
        reasons[each.why] += len(each.places)
    listed = listing(admission, found)[:first]
    admission.until = until
    return Survey(progress_of(rollouts, admission), reasons.total(), dict(reasons.most_common()), listed)


def listing(admission: Admission, found: Sequence[Behind]) -> list[tuple[int, str]]:
    """Devices and models, the longest unseen first, equal ones by key."""
    if not found:
        return []
    places = np.concatenate([each.places for each in found])
    models = np.repeat([each.model for each in found], [len(each.places) for each in found])
    roster = admission.roster
    order = np.lexsort((models, roster.ids[places], roster.seen[places]))
    return list(zip(roster.ids[places[order]].tolist(), models[order].tolist(), strict=True))


def explain(pairs: Sequence[tuple[int, str]]) -> list[Laggard]:
    """Of these devices and models those that lag now, in this order, as `selectors.laggards` tells it."""
    rows = Device.objects.filter(pk__in={pk for pk, _ in pairs}, state=Device.State.ACTIVE).select_related("runs")
    found = {(each.device.pk, each.model): each for each in selectors.laggards(among=rows)}
    return [found[pair] for pair in pairs if pair in found]


class Pages(Sequence[Laggard]):
    """Everyone who lags, the longest unseen first; explained are those of the page that somebody takes."""

    def __init__(self, model: str | None = None) -> None:
        admission = Admission(snapshots.current())
        self._pairs = listing(admission, list(behind(admission, model)))

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, place: int) -> Laggard: ...
    @overload
    def __getitem__(self, place: slice) -> list[Laggard]: ...
    def __getitem__(self, place: int | slice) -> Laggard | list[Laggard]:
        found = explain(self._pairs[place] if isinstance(place, slice) else [self._pairs[place]])
        return found if isinstance(place, slice) else found[0]


# --- by columns --------------------------------------------------------------------------------------------------

Test = Callable[[Numbers], Flags]


def behind(admission: Admission, model: str | None = None) -> Iterator[Behind]:
    """Everyone who lags, with each model or with one."""
    models = {name for crowd in admission.roster.crowds for name in crowd.traits.models}
    look = _Look(admission)
    for name in sorted(models if model is None else models & {model}):
        for traits, places in look.alike(name):
            yield from look.behind(name, traits, places)
    yield from _with_pins(admission, model)


def _with_pins(admission: Admission, model: str | None) -> Iterator[Behind]:
    """The few that the policy decides one by one."""
    rows = [device for device, _ in (admission.exceptions if admission.pinned.any() else ())]
    for each in selectors.laggards(model, among=rows) if rows else ():
        if each.device.pk in admission.place_of:
            yield Behind(each.model, each.why, np.array([admission.place_of[each.device.pk]]))


class _Look:
    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._horizon = rosters.micros(offline_before())
        self._said: dict[str, tuple[Numbers, Numbers]] = {}

    def alike(self, model: str) -> Iterator[tuple[policy.Traits, Numbers]]:
        """Crowds to which every rule of a model says the same, together, devices with pins left out."""
        same: dict[tuple[object, ...], tuple[policy.Traits, list[Numbers]]] = {}
        rules = self._admission.snapshot.rollouts.get(model, ())
        for crowd in self._admission.roster.crowds:
            if model in crowd.traits.models:
                kind = tuple(_said_to(rule, crowd.traits) for rule in rules)
                same.setdefault(kind, (crowd.traits, []))[1].append(crowd.places)
        for traits, crowds in same.values():
            places = np.concatenate(crowds)
            yield traits, places[~self._admission.pinned[places]]

    def behind(self, model: str, traits: policy.Traits, places: Numbers) -> Iterator[Behind]:
        """Behind the newest rollout that is meant for a device; for those of a crowd that may be several, by name."""
        labels = dict(traits.labels)
        for rule in self._admission.snapshot.rollouts.get(model, ()):
            meant = self._meant(rule, labels, places)
            yield from self._behind(rule, traits, places[meant])
            places = places[~meant]

    def _meant(self, rule: policy.RolloutRules, labels: Mapping[str, str], places: Numbers) -> Flags:
        inside, outside = rule.selector.by_labels(labels), [each.by_labels(labels) for each in rule.excludes]
        if inside is False or True in outside:
            return np.zeros(len(places), dtype=np.bool_)
        if inside and None not in outside:
            return np.ones(len(places), dtype=np.bool_)
        return self._admission.by_name(places, lambda name: policy.targets(rule, labels, name))

    def _behind(self, rule: policy.RolloutRules, traits: policy.Traits, places: Numbers) -> Iterator[Behind]:
        """What holds first takes the device away from what comes later."""
        places = places[~self._admission.runs_release(rule.release, places)]
        for why, test in self._tests(rule, traits) if len(places) else ():
            holds = test(places)
            if holds.any():
                yield Behind(rule.release.model, why, places[holds])
            places = places[~holds]

    def _tests(self, rule: policy.RolloutRules, traits: policy.Traits) -> Iterator[tuple[str, Test]]:
        admission, labels, way = self._admission, dict(traits.labels), way_to(rule.release, traits)
        ahead = policy.any_of([ring.by_labels(labels) for ring in rule.rings])
        lacks = bool(rule.release.variants and way.lacks)
        yield selectors.FAILED_THERE, lambda places: admission.failed_in(rule.id, places)
        yield selectors.LACKS, lambda places: np.full(len(places), lacks)
        excluded = explaining.NOT_RUNNING if rule.state == policy.PAUSED else explaining.NOT_REACHED
        yield excluded, lambda places: ~admission.has_reached(rule, ahead, labels, places)
        yield selectors.REFUSES, self._among(self._refusing)
        yield selectors.OFFLINE, lambda places: ~admission.seen_since(self._horizon, places)
        yield selectors.WAITING, lambda places: self._said_of(rule, way, places, waits=True)
        yield selectors.UPDATING_NOW, lambda places: self._said_of(rule, way, places, waits=False)
        yield selectors.UNSEEN, lambda places: np.ones(len(places), dtype=np.bool_)

    def _said_of(self, rule: policy.RolloutRules, way: Way, places: Numbers, *, waits: bool) -> Flags:
        """Whose last word is of the very release that it is given now: by what it runs, one to step through."""
        found = np.zeros(len(places), dtype=np.bool_)
        runs, model = self._admission.roster.runs[places], rule.release.model
        for each in np.unique(runs).tolist() if way.steps else ():
            step = way.steps[place_on(way, self._admission.running(each, model))]
            waiting, said = self._statuses(model, str(step.path))
            mine = runs == each
            found[mine] = np.isin(self._admission.roster.ids[places[mine]], waiting if waits else said)
        return found

    def _among(self, ids: Numbers) -> Test:
        return lambda places: np.isin(self._admission.roster.ids[places], ids)

    def _statuses(self, model: str, path: str) -> tuple[Numbers, Numbers]:
        """Devices whose last word on the model is of this very release: those that wait, and all."""
        if path not in self._said:
            rows = ModelStatus.objects.filter(model=model, release=path).annotate(waits=_WAITS)
            ids, waits = columns(rows, "device_id", "waits")
            self._said[path] = (ids[waits > 0], ids)
        return self._said[path]

    @cached_property
    def _refusing(self) -> Numbers:
        return columns(refusing(), "pk")[0]


def _said_to(rule: policy.RolloutRules, traits: policy.Traits) -> tuple[object, ...]:
    """All that a rule's answer to devices of these traits hangs on; their labels, where names come in."""
    labels = dict(traits.labels)
    told = [each.by_labels(labels) for each in (rule.selector, *rule.excludes, *rule.rings)]
    way = way_to(rule.release, traits)
    return (*told, *(str(step.path) for step in way.steps), traits.labels if None in told else ())


_WAITS = Case(When(state=events.WAITING, then=Value(1)), default=Value(0), output_field=IntegerField())
