"""What can be asked about devices. Reads only."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from django.conf import settings
from django.db.models import Count, Q, QuerySet
from django.utils import timezone

from fleet import sql
from fleet.devices.matching import chosen, selector_of
from fleet.devices.mirrors import Mirror, Mirrors
from fleet.devices.mirrors import chosen as chosen_mirror
from fleet.devices.models import Device, Group, RunningSet, SpreadSample
from fleet.devices.selection import Selector
from fleet.errors import Invalid

Spread = dict[str, dict[str, int]]  # model to version to devices
logger = structlog.get_logger(__name__)
PREVIEWED = 8  # devices shown of a selector's
MISSED_POLLS = 3  # a device that missed so many is offline


def running_set(device: Device, digest: str) -> RunningSet | None:
    """The set that `digest` names, or None if nobody has described it. No query while the device runs the same."""
    if device.runs is not None and device.runs.digest == digest:
        return device.runs
    return RunningSet.objects.filter(digest=digest).first()


def claimed(device: int, epoch: int) -> Device | None:
    """A device by what its credential says, with its running set."""
    found = sql.one(Device.objects.raw("SELECT * FROM devices_device WHERE id = %s AND epoch = %s", [device, epoch]))
    if found is not None and found.runs_id is not None:
        known = RunningSet.objects.raw("SELECT * FROM devices_runningset WHERE id = %s", [found.runs_id])
        found.runs = sql.one(known)
    return found


def members(group: Group | None) -> Iterator[Device]:
    """Active devices of a group; None is every device."""
    return chosen(selector_of(group)).select_related("runs").iterator(chunk_size=2_000)


def mirrors() -> Mirrors:
    """Of every group that has one. A group whose selector cannot be read has none; the log says so."""
    found = []
    for group in Group.objects.exclude(mirror=""):
        try:
            found.append(Mirror(group.name, selector_of(group), group.mirror))
        except Invalid as error:
            logger.error("group_malformed", group=group.name, error=error.message)  # noqa: TRY400  no traceback each poll
    return Mirrors(tuple(sorted(found, key=lambda mirror: mirror.group)))


def mirror_of(device: Device) -> Mirror | None:
    """The mirror that the device is told of."""
    return chosen_mirror(mirrors().possible(device.labels), device.labels, device.name)


@dataclass(frozen=True, slots=True)
class Preview:
    """How many active devices a selector chooses, and the first of them by name."""

    total: int
    first: Sequence[Device]


def preview(selector: Selector) -> Preview:
    return previewed(chosen(selector))


def previewed(found: QuerySet[Device]) -> Preview:
    return Preview(found.count(), list(found.order_by("name")[:PREVIEWED]))


def with_model(model: str) -> Q:
    """Devices that run the model, by the few sets of names that there are. No database's own JSON is needed."""
    names = Device.objects.order_by().values_list("model_names", flat=True).distinct()
    return Q(model_names__in=[each for each in names if model in each])


def refusing() -> QuerySet[Device]:
    """Active devices that refuse what they are sent, by their own last word."""
    return Device.objects.filter(state=Device.State.ACTIVE).exclude(refusal={})


def offline_before() -> datetime:
    """A device that was last seen before this moment is offline."""
    return timezone.now() - timedelta(seconds=MISSED_POLLS * settings.POLL_INTERVAL)


def running_sets() -> list[tuple[dict[str, str], int]]:
    """What active devices run, and how many: a count per running set, of an index alone, whatever the fleet."""
    active = Device.objects.filter(state=Device.State.ACTIVE).order_by()
    counts = dict(active.values_list("runs_id").annotate(number=Count("*")))
    described = dict(RunningSet.objects.filter(pk__in=[pk for pk in counts if pk]).values_list("pk", "runs"))
    return [(described.get(pk, {}), number) for pk, number in counts.items()]


def spread() -> Spread:
    """How many active devices run which version of which model."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for runs, number in running_sets():
        for model, running in runs.items():
            counts[model][version_of(running)] += number
    return {model: dict(versions) for model, versions in counts.items()}


def running(model: str) -> Counter[str]:
    """How many active devices run which `<version>/<variant>` of a model."""
    counts: Counter[str] = Counter()
    for runs, number in running_sets():
        if model in runs:
            counts[runs[model]] += number
    return counts


def having() -> Counter[str]:
    """How many active devices have which model, whether they run something of it or not. Looks at every device."""
    counts: Counter[str] = Counter()
    active = Device.objects.filter(state=Device.State.ACTIVE).order_by()
    for names, number in active.values_list("model_names").annotate(number=Count("*")):
        counts.update(dict.fromkeys(names, number))
    return counts


def seen_since(*moments: datetime) -> list[int]:
    """How many active devices were seen since each of these, by the index of `last_seen`."""
    later = [Count("pk", filter=Q(last_seen__gte=moment)) for moment in moments]
    named = {f"after{place}": count for place, count in enumerate(later)}
    all_, others = (
        rows.filter(last_seen__gte=min(moments)).aggregate(**named)
        for rows in (Device.objects.order_by(), Device.objects.exclude(state=Device.State.ACTIVE).order_by())
    )
    return [all_[name] - others[name] for name in named]


def spread_history(model: str, since: datetime) -> list[tuple[datetime, dict[str, int]]]:
    """The spread of a model over time, oldest first: (moment, version to devices)."""
    history: dict[datetime, dict[str, int]] = defaultdict(dict)
    samples = SpreadSample.objects.filter(model=model, at__gte=since).order_by("at", "version")
    for at, version, devices in samples.values_list("at", "version", "devices"):
        history[at][version] = devices
    return list(history.items())


def version_of(running: str) -> str:
    """`<version>` of `<version>/<variant>`."""
    return running.partition("/")[0]
