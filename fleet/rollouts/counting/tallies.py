"""What the engine and the pages count of rollouts: outcomes by one grouped query, admitted devices where it matters.

A tick asks for outcomes each time and for the admitted devices rarely: only once everything cheaper speaks for passing
a stage, and then what was counted before may still say "not yet". Nothing passes on a count from before.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import ClassVar

import numpy as np
from django.db.models import Case, Count, IntegerField, Value, When

from fleet.devices import selectors as devices
from fleet.devices.bulk import columns, flags
from fleet.rollouts import policy, snapshots
from fleet.rollouts.counting import groups
from fleet.rollouts.counting import roster as rosters
from fleet.rollouts.counting.admission import Admission
from fleet.rollouts.counting.cohorts import OverBudgetError
from fleet.rollouts.models import Outcome, Rollout
from fleet.rollouts.selectors import Progress

UPDATING, COMMITTED = Outcome.State.UPDATING, Outcome.State.COMMITTED
FAILED, WITHDRAWN = Outcome.State.FAILED, Outcome.State.WITHDRAWN
BUDGET = 0.5  # seconds of a tick that go to counting admitted devices; what is left over waits for the next one
SHARE = 20  # in a large fleet an older count serves to hold, for so many times what it cost
LOOKS = 10  # so many times what it cost, a look at a large fleet serves to hash cohorts, and to hold
LARGE = 10_000  # devices; a smaller fleet is counted each tick

Counts = dict[str, int]


def outcome_counts(rollouts: Sequence[int]) -> dict[int, Counts]:
    """Devices by rollout and outcome. One query, of an index alone."""
    found: dict[int, Counts] = defaultdict(lambda: dict.fromkeys(Outcome.State.values, 0))
    rows = Outcome.objects.filter(rollout__in=rollouts).order_by().values_list("rollout_id", "state")
    for rollout, state, number in rows.annotate(number=Count("*")):
        found[rollout][state] = number
    return found


def to_be_retried(rollouts: Sequence[int]) -> dict[int, int]:
    """Failures that are not final, by rollout, see `attempts`. One query, of an index of these alone."""
    rows = Outcome.objects.filter(rollout__in=rollouts, state=FAILED, retry_at__isnull=False).order_by()
    return dict(rows.values_list("rollout_id").annotate(number=Count("*")))


# --- the engine --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kept:
    """A count of before, of a stage."""

    stage: int
    waits: int  # devices that had not decided, or had: all that the share of success is taken of
    until: float  # time.monotonic, up to which it serves to hold
    at: float


@dataclass(frozen=True, slots=True)
class _Look:
    """At the whole fleet. `until`: time.monotonic, before which nobody looks anew."""

    admission: Admission
    until: float


class Tallies:
    """What one tick knows of the running rollouts."""

    _kept: ClassVar[dict[int, _Kept]] = {}  # of this process, over its ticks; by rollout
    _last: ClassVar[_Look | None] = None  # the last look at a large fleet

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        running = [rollout.pk for rollout in rollouts]
        self._counts, self._pending = outcome_counts(running), to_be_retried(running)
        self._spent = self._loading = 0.0  # seconds

    @classmethod
    def turn(cls, rollout: Rollout) -> float:
        """Whose devices were counted longest ago goes first, so that the budget reaches everyone."""
        kept = cls._kept.get(rollout.pk)
        return kept.at if kept else 0.0

    def of(self, rollout: Rollout, rules: policy.StageRules, now: datetime) -> policy.Tally:
        """Counted as far as the stage's decision needs it. Raises what the database does."""
        quick = self.quick(rollout)
        if not policy.enough_reports(rules, quick, now):
            return quick
        kept = self._kept.get(rollout.pk)
        if kept and kept.stage == rollout.stage_index and (time.monotonic() < kept.until or self._spent >= BUDGET):
            estimate = replace(quick, admitted=kept.waits)
            if isinstance(policy.next_step(rules, estimate, now), policy.Hold):
                return estimate
        if self._spent >= BUDGET:
            return quick
        found = self._counted(rollout)
        if self._is_fresh or isinstance(policy.next_step(rules, found, now), policy.Hold):
            return found
        return quick

    def said(self, rollout: Rollout) -> Counts:
        """Devices by outcome, at the beginning of the tick."""
        return self._counts[rollout.pk]

    def roster(self) -> rosters.Roster:
        """The fleet, looked up at most once a tick, of a large one seldom."""
        return self._admission.roster

    def quick(self, rollout: Rollout) -> policy.Tally:
        counts = self._counts[rollout.pk]
        final = counts[FAILED] - self._pending.get(rollout.pk, 0) - rollout.forgiven
        return policy.Tally(committed=counts[COMMITTED], failed=max(final, 0))

    def _counted(self, rollout: Rollout) -> policy.Tally:
        admission = self._admission  # loaded outside of the budget: nothing is counted without
        began = time.monotonic()
        try:
            admission.until = began + BUDGET - self._spent
            tally = counted(rollout, admission)
            self._keep(rollout, tally, began)
        except OverBudgetError:
            return self.quick(rollout)  # without the admitted, which is a reason to hold
        finally:
            self._spent += time.monotonic() - began
        return tally

    def _keep(self, rollout: Rollout, tally: policy.Tally, began: float) -> None:
        now, large = time.monotonic(), len(self._admission.roster.ids) >= LARGE
        until = now + SHARE * (now - began + self._loading) if large else began
        self._kept[rollout.pk] = _Kept(rollout.stage_index, tally.admitted or 0, until, began)

    @cached_property
    def _is_fresh(self) -> bool:
        """Whether this tick looks at the fleet anew. To look at a large one takes a second: seldom, and others wait."""
        return self._last is None or time.monotonic() >= self._last.until

    @cached_property
    def _admission(self) -> Admission:
        if not self._is_fresh and self._last:
            return self._last.admission
        began = time.monotonic()
        admission = Admission(snapshots.current())
        self._loading = time.monotonic() - began
        large = len(admission.roster.ids) >= LARGE
        until = time.monotonic() + LOOKS * self._loading
        self._remember(_Look(admission, until) if large else None)
        return admission

    @classmethod
    def _remember(cls, look: _Look | None) -> None:
        cls._last = look


def counted(rollout: Rollout, admission: Admission) -> policy.Tally:
    """What is known of the stage in force, with the admitted devices.

    Who has not decided yet is waited for, unless it never said a word and is offline since before the stage began:
    it cannot know. Who went silent later is waited for, until it times out: the release may be why. A failure that is
    to be tried again is not decided either.
    """
    places = admission.assigned(rollout.pk, rollout.release.model.name)
    ids, decided = columns(Outcome.objects.filter(rollout=rollout).annotate(decided=_DECIDED), "device_id", "decided")
    size = admission.roster.size
    mine = admission.roster.ids[places]
    horizon = min(rollout.stage_since or devices.offline_before(), devices.offline_before())
    knows = flags(ids, size)[mine] | admission.seen_since(rosters.micros(horizon), places)
    undecided = int(np.count_nonzero(knows & ~flags(ids[decided > 0], size)[mine]))
    committed = int(np.count_nonzero(decided == _AS_COMMITTED))
    failed = max(int(np.count_nonzero(decided == _AS_FAILED)) - rollout.forgiven, 0)
    pending = int(np.count_nonzero(decided == _TO_BE_RETRIED))
    return policy.Tally(committed=committed, failed=failed, admitted=committed + failed + undecided + pending)


_AS_COMMITTED, _AS_FAILED, _TO_BE_RETRIED = 1, 2, 3
_DECIDED = Case(
    When(state=COMMITTED, then=Value(_AS_COMMITTED)),
    When(state=FAILED, retry_at__isnull=False, then=Value(_TO_BE_RETRIED)),
    When(state=FAILED, then=Value(_AS_FAILED)),
    default=Value(0),
    output_field=IntegerField(),
)


# --- pages -------------------------------------------------------------------------------------------------------


def progress(rollout: Rollout) -> Progress:
    return progress_of([rollout], Admission(snapshots.current()))[rollout.pk]


def progress_of(rollouts: Sequence[Rollout], admission: Admission) -> dict[int, Progress]:
    """Of several rollouts, by one look at the fleet; of those for which there was time."""
    counts = outcome_counts([rollout.pk for rollout in rollouts])
    found = {}
    for rollout in rollouts:
        with suppress(OverBudgetError):
            found[rollout.pk] = _progress(rollout, counts[rollout.pk], admission)
    return found


def _progress(rollout: Rollout, counts: Counts, admission: Admission) -> Progress:
    (said,) = columns(Outcome.objects.filter(rollout=rollout), "device_id")
    assigned = admission.roster.ids[admission.assigned(rollout.pk, rollout.release.model.name)]
    unheard = np.count_nonzero(~flags(said, admission.roster.size)[assigned])
    return Progress(
        total=len(groups.places_of(rollout, admission.roster)),
        admitted=len(said) + int(unheard),
        updating=counts[UPDATING],
        committed=counts[COMMITTED],
        failed=counts[FAILED],
        withdrawn=counts[WITHDRAWN],
    )
