"""What the start of a rollout asks of its devices. It writes a row only for a device that runs the release already."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from secrets import token_hex

import numpy as np

from device_sdk.protocol import events
from fleet.devices.bulk import Numbers, columns
from fleet.devices.models import Device, ModelStatus
from fleet.rollouts import policy
from fleet.rollouts.counting import groups
from fleet.rollouts.counting import roster as rosters
from fleet.rollouts.models import Outcome, Rollout
from fleet.rollouts.selectors import sets_with

SALTS_TRIED = 64
SMALL = 1_000  # devices; a larger group has some in every cohort
AT_ONCE = 10_000


@dataclass(frozen=True, slots=True)
class Members:
    """Active devices of the rollout's group that have its model: keys, and running sets or 0."""

    ids: Numbers
    runs: Numbers


def members(rollout: Rollout) -> Members:
    roster = rosters.load()
    places = groups.places_of(rollout, roster)
    return Members(roster.ids[places], roster.runs[places])


def fair_salt(rollout: Rollout, who: Members) -> str:
    """A salt by which every stage gets the reports that it asks for, where the group is large enough for that.

    Ten percent of eight devices is often nobody, and half of them now and then one: such a stage would wait for ever.
    """
    if len(who.ids) >= SMALL:
        return rollout.salt
    names = list(Device.objects.filter(pk__in=who.ids.tolist(), pins={}).values_list("name", flat=True))
    asked = [(stage.percent, min(stage.min_reports, len(names))) for stage in rollout.stages.filter(ring=None)]
    salts = [rollout.salt, *(token_hex(16) for _ in range(SALTS_TRIED))]

    def is_fair(salt: str) -> bool:
        return all(sum(policy.in_cohort(salt, name, percent) for name in names) >= enough for percent, enough in asked)

    return next(filter(is_fair, salts), rollout.salt)


def credit_those_who_run_it(rollout: Rollout, who: Members) -> None:
    """Devices that committed this release before have nothing left to report: they count from the start."""
    model, version = rollout.release.model.name, rollout.release.version
    running = who.ids[np.isin(who.runs, sets_with(policy.ReleaseRef(model, version, {})))]
    if not len(running):
        return
    trials = ModelStatus.objects.filter(model=model, state__in=[events.ACTIVATING, events.PROBATION])
    pinned = Device.objects.filter(state=Device.State.ACTIVE, pins__has_key=model)
    others = np.concatenate([columns(trials, "device_id")[0], columns(pinned, "pk")[0]])
    credited = (
        Outcome(rollout=rollout, device_id=pk, state=Outcome.State.COMMITTED, reason="ran it before the rollout")
        for pk in np.setdiff1d(running, others).tolist()
    )
    for some in _chunks(credited):
        Outcome.objects.bulk_create(some)


def _chunks(rows: Iterator[Outcome]) -> Iterator[list[Outcome]]:
    while some := list(islice(rows, AT_ONCE)):
        yield some
