"""What pages show of the whole fleet. A small one is counted for each page; a large one by a task: the page says when.

Counting is asked for by whoever looks: no look, no scan. A look asks again only when the last count is older than
twenty times what it cost, so that counting takes a twentieth of a core at most. A lost message costs nothing: a later
look asks anew.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from fleet.devices.models import Device
from fleet.rollouts.counting import tallies
from fleet.rollouts.counting.survey import Survey, explain, survey
from fleet.rollouts.models import FleetSummary, Rollout
from fleet.rollouts.selectors import Laggard, Progress

SMALL = 20_000  # active devices, which are counted in about half a second
FIRST = 12  # laggards that a page shows
SHARE, AT_LEAST = 20, 30.0  # how old a count may grow: times what it took, and seconds
PATIENCE = 300.0  # seconds after which nobody is believed to be counting still
MOVING = (Rollout.State.RUNNING, Rollout.State.PAUSED, Rollout.State.HALTED, Rollout.State.AWAITING_APPROVAL)
ROLLOUTS = 100  # whose progress is counted, the newest first


@dataclass(frozen=True, slots=True)
class Summary:
    """`as_of` None: counted for this page. `rows` are as they are now, in either case."""

    progress: Mapping[int, Progress]
    total: int
    reasons: Mapping[str, int]
    rows: Sequence[Laggard]
    as_of: datetime | None = None


NOTHING = Summary({}, 0, {}, ())


def of(rollouts: Sequence[Rollout]) -> Summary:
    """Progress of these and who lags."""
    return _shown(survey(rollouts, first=FIRST)) if is_small() else _kept()


@dataclass(frozen=True, slots=True)
class Counted:
    """Outcomes are of now; `total` and `admitted` of a large fleet `as_of`. `progress` None: not counted yet."""

    progress: Progress | None
    as_of: datetime | None = None


def progress(rollout: Rollout) -> Counted:
    """Of one rollout, and nothing else."""
    if is_small():
        return Counted(tallies.progress(rollout))
    kept = _asked()
    found = kept.content.get("progress", {}).get(str(rollout.pk))
    if found is None:
        return Counted(None)
    said = tallies.outcome_counts([rollout.pk])[rollout.pk]
    admitted = max(found["admitted"], sum(said.values()))
    return Counted(Progress(total=found["total"], admitted=admitted, **said), kept.counted_at)


def _kept() -> Summary:
    kept = _asked()
    return _read(kept) if kept.counted_at else NOTHING


def _asked() -> FleetSummary:
    """The last count. Where it is old, a new one is asked for."""
    kept = FleetSummary.objects.filter(pk=1).first() or FleetSummary(pk=1)
    if _is_old(kept):
        ask()
    return kept


def is_small() -> bool:
    """Counts up to the limit, not to the end."""
    return Device.objects.filter(state=Device.State.ACTIVE).order_by()[: SMALL + 1].count() <= SMALL


def ask() -> None:
    """Have it counted, unless somebody does. Of many who ask at once one gets through."""
    from fleet.rollouts import tasks

    now = timezone.now()
    FleetSummary.objects.get_or_create(pk=1)
    idle = Q(asked_at=None) | Q(asked_at__lt=now - timedelta(seconds=PATIENCE))
    if FleetSummary.objects.filter(idle, pk=1).update(asked_at=now):
        transaction.on_commit(tasks.summarise.delay, robust=True)


def count() -> None:
    """The task. Bounded memory, whatever the number of devices: see `roster`."""
    began, now = time.monotonic(), timezone.now()
    aiming = Q(state=Rollout.State.COMPLETED, objective_percent__isnull=False)
    shown = Rollout.objects.filter(Q(state__in=MOVING) | aiming).select_related("release__model", "group")
    found = survey(list(shown[:ROLLOUTS]), first=FIRST, until=began + PATIENCE / 2)
    content = {
        "progress": {str(pk): asdict(progress) for pk, progress in found.progress.items()},
        "total": found.total,
        "reasons": found.reasons,
        "first": found.first,
    }
    fields = {"content": content, "seconds": time.monotonic() - began, "counted_at": now, "asked_at": None}
    FleetSummary.objects.update_or_create(pk=1, defaults=fields)


def _is_old(kept: FleetSummary) -> bool:
    age = max(AT_LEAST, SHARE * kept.seconds)
    return kept.counted_at is None or kept.counted_at < timezone.now() - timedelta(seconds=age)


def _read(kept: FleetSummary) -> Summary:
    content = kept.content
    progress = {int(pk): Progress(**counts) for pk, counts in content["progress"].items()}
    pairs = [(pk, model) for pk, model in content["first"]]
    found = Survey(progress, content["total"], content["reasons"], pairs)
    return _shown(found, kept.counted_at)


def _shown(found: Survey, as_of: datetime | None = None) -> Summary:
    return Summary(found.progress, found.total, found.reasons, explain(found.first), as_of)
