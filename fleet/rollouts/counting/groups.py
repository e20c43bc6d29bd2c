"""The devices that a rollout is for, as places in a roster. Raises Invalid where a stored selector does not parse."""

from collections.abc import Mapping, Sequence

import numpy as np

from fleet.devices.bulk import Numbers, names
from fleet.devices.selection import Selector
from fleet.rollouts import targeting
from fleet.rollouts.counting.roster import Roster
from fleet.rollouts.models import Rollout


def places_of(rollout: Rollout, roster: Roster) -> Numbers:
    """Of those in its group that have its model, and are not excluded."""
    selector, excludes = targeting.selector(rollout), targeting.excludes(rollout)
    found = [
        _chosen(selector, excludes, dict(crowd.traits.labels), crowd.places, roster)
        for crowd in roster.crowds
        if rollout.release.model.name in crowd.traits.models
    ]
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])


def _chosen(
    selector: Selector, excludes: Sequence[Selector], labels: Mapping[str, str], places: Numbers, roster: Roster
) -> Numbers:
    inside, outside = selector.by_labels(labels), [each.by_labels(labels) for each in excludes]
    if inside is False or True in outside:
        return places[:0]
    if inside and None not in outside:
        return places
    named = dict(names(np.sort(roster.ids[places])))

    def is_for(pk: int) -> bool:
        name = named.get(pk, "")
        return selector.matches(labels, name) and not any(each.matches(labels, name) for each in excludes)

    return places[np.fromiter(map(is_for, roster.ids[places].tolist()), dtype=np.bool_, count=len(places))]
