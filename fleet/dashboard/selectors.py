"""What the first page shows, as plain values. Reads only; each function costs a fixed number of queries.

Nothing here decides anything about a device: the target of a model is read from the newest rollout that stands.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from time import monotonic
from typing import TypeVar

from django.conf import settings
from django.core.cache import cache
from django.db.models import Max, Min, QuerySet, Sum
from django.db.models.functions import TruncDay, TruncHour, TruncMinute, TruncSecond

from fleet.devices import selectors as devices
from fleet.devices.models import Device, EnrolmentToken, SpreadSample
from fleet.feedback.models import Batch, DatasetPart
from fleet.releases.models import Model, Release
from fleet.rollouts import selectors as rollouts
from fleet.rollouts.counting import summary, tallies
from fleet.rollouts.models import Rollout, Stage
from fleet.trust.models import RoleMetadata

Value = TypeVar("Value")

NOTHING = ""  # the version of a device that runs no release of a model yet
SERIES = 6  # versions with a colour of their own; older ones are one "other"
SHOWN_ROLLOUTS = 8
COSTLY_SECONDS, GROUPED_SECONDS, KEPT_SECONDS = 1.0, 0.1, 120.0
REASONS = {  # of `rollouts.selectors`, for people
    rollouts.PINNED: "pinned",
    rollouts.OFFLINE: "offline",
    rollouts.FAILED_THERE: "failed",
    rollouts.PAUSED: "rollout paused",
    rollouts.NOT_ADMITTED: "later stage",
    rollouts.LACKS: "lacks what it needs",
    rollouts.WAITING: "waiting",
    rollouts.UPDATING_NOW: "updating",
    rollouts.UNSEEN: "not polled yet",
    rollouts.REFUSES: "refuses what it is sent",
    rollouts.KEPT: "kept by policy",
}
IN_FLIGHT = (Rollout.State.RUNNING, Rollout.State.PAUSED, Rollout.State.HALTED, Rollout.State.AWAITING_APPROVAL)


@dataclass(frozen=True, slots=True)
class Slice:
    """So many devices run this version. `series` numbers its colour."""

    version: str
    devices: int
    percent: float
    series: str
    release: int | None = None

    @property
    def label(self) -> str:
        return self.version or "none yet"


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    series: str
    points: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class History:
    """Counts at evenly spaced moments, one line for each version, oldest moment first."""

    moments: tuple[datetime, ...]
    lines: tuple[Line, ...]
    step: timedelta


@dataclass(frozen=True, slots=True)
class ModelSpread:
    model: Model
    devices: int
    slices: tuple[Slice, ...]
    target: str | None
    history: History

    @property
    def on_target(self) -> int:
        return sum(s.devices for s in self.slices if s.version == self.target)

    @property
    def on_target_percent(self) -> int:
        return round(100 * self.on_target / self.devices) if self.devices else 0


@dataclass(frozen=True, slots=True)
class StageBar:
    """One stage as a bar: shares of its devices in percent."""

    index: int
    name: str  # a percentage, or a ring
    state: str  # passed, current, next
    committed: float
    updating: float
    failed: float

    @property
    def items(self) -> list[dict[str, object]]:
        """The parts of unfold's progress component; an empty part keeps the bar's track on the page."""
        parts = (
            ("committed", self.committed, "good"),
            ("updating", self.updating, "info"),
            ("failed", self.failed, "bad"),
        )
        return [{"title": name, "value": value, "progress_class": f"tone-{tone}"} for name, value, tone in parts]


@dataclass(frozen=True, slots=True)
class RolloutCard:
    rollout: Rollout
    stages: tuple[StageBar, ...]
    admitted: int
    updating: int
    committed: int
    failed: int
    withdrawn: int
    as_of: datetime | None = None  # of `admitted`; None: now

    @property
    def current(self) -> int:
        """The number of the stage it is at, from 1."""
        return min(self.rollout.stage_index + 1, max(len(self.stages), 1))


@dataclass(frozen=True, slots=True)
class Laggards:
    """`total` devices lag; the first of them, and all of them by reason."""

    total: int
    rows: tuple[rollouts.Laggard, ...]
    reasons: tuple[tuple[str, int], ...]
    as_of: datetime | None = None  # of the numbers; None: now


@dataclass(frozen=True, slots=True)
class Seen:
    label: str
    devices: int
    percent: float
    tone: str


@dataclass(frozen=True, slots=True)
class Presence:
    """Active devices by when they were last seen; the first row is who answers now."""

    active: int
    pending: int
    rows: tuple[Seen, ...]

    @property
    def online(self) -> int:
        return self.rows[0].devices

    @property
    def silent(self) -> int:
        """Not seen for a day."""
        return sum(row.devices for row in self.rows[3:])


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do before the first device runs a signed model."""

    title: str
    why: str
    command: str
    done: bool


# --- presence -----------------------------------------------------------------------------------------------------
def presence(now: datetime) -> Presence:
    bounds = (devices.offline_before(), now - timedelta(hours=1), now - timedelta(days=1), now - timedelta(days=7))
    active = sum(number for _, number in running_sets())
    pending = Device.objects.filter(state=Device.State.PENDING).count()
    reached = grouped("dashboard-seen", lambda: devices.seen_since(*bounds))
    parts = [reached[0], *(max(0, b - a) for a, b in pairwise(reached))]
    parts.append(max(0, active - sum(parts)))
    labels = ("Online", "Within the hour", "Within a day", "Within a week", "Longer or never")
    tones = ("good", "calm", "quiet", "warn", "bad")
    return Presence(
        active=active,
        pending=pending,
        rows=tuple(
            Seen(label, number, _percent(number, active), tone)
            for label, number, tone in zip(labels, parts, tones, strict=True)
        ),
    )


# --- spread -------------------------------------------------------------------------------------------------------
def spreads(now: datetime, window: timedelta) -> list[ModelSpread]:
    """Each model that exists: what its devices run now, and over the window."""
    running = _running_now()
    standing = targets()
    releases = _releases_by_name()
    return [
        _model_spread(
            model,
            running.get(model.name, Counter()),
            releases.get(model.name, {}),
            standing.get(model.name),
            now,
            window,
        )
        for model in Model.objects.all()
    ]


def spread_of(model: Model, now: datetime, window: timedelta) -> ModelSpread:
    """The same for one model."""
    running = _running_now().get(model.name, Counter())
    return _model_spread(
        model, running, _releases_by_name().get(model.name, {}), targets().get(model.name), now, window
    )


def _model_spread(
    model: Model,
    counts: Counter[str],
    releases: Mapping[str, int],
    standing: Rollout | None,
    now: datetime,
    window: timedelta,
) -> ModelSpread:
    samples = _samples(model.name, now, window)
    used = {version for _, version, _ in samples} | set(counts)
    colours = _colours(used, releases)
    total = counts.total()
    return ModelSpread(
        model=model,
        devices=total,
        slices=tuple(
            Slice(version, counts[version], _percent(counts[version], total), colours[version], releases.get(version))
            for version in _newest_first(counts, releases)
        ),
        target=standing.release.version if standing else None,
        history=_history(samples, colours, now, window),
    )


def _running_now() -> dict[str, Counter[str]]:
    """Devices by model and version; who has a model and runs nothing of it is what is left over."""
    running: dict[str, Counter[str]] = defaultdict(Counter)
    having = grouped("dashboard-having", devices.having)
    for runs, number in running_sets():
        for model in runs.keys() & having.keys():
            running[model][devices.version_of(runs[model])] += number
    for model, number in having.items():
        if (without := number - running[model].total()) > 0:
            running[model][NOTHING] = without
    return running


def running_sets() -> list[tuple[dict[str, str], int]]:
    return grouped("dashboard-running", devices.running_sets)


def grouped(key: str, look: Callable[[], Value]) -> Value:
    """What the database groups: milliseconds for thousands of devices, and kept for a moment where they are many."""
    return costly(key, look, limit=GROUPED_SECONDS)


def _releases_by_name() -> dict[str, dict[str, int]]:
    """Model name to its versions, newest first, with their keys."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for pk, model, version in Release.objects.values_list("pk", "model__name", "version"):
        found[model][version] = pk
    return found


def _newest_first(versions: Iterable[str], releases: Mapping[str, int]) -> list[str]:
    """By publication, then unknown ones, then "nothing"."""
    order = {version: place for place, version in enumerate(releases)}
    return sorted(versions, key=lambda v: (v == NOTHING, order.get(v, len(order)), v))


def _colours(versions: set[str], releases: Mapping[str, int]) -> dict[str, str]:
    named = [version for version in _newest_first(versions, releases) if version != NOTHING]
    colours = {version: str(place) if place < SERIES else "other" for place, version in enumerate(named)}
    return colours | {NOTHING: "none"}


def _samples(model: str, now: datetime, window: timedelta) -> list[tuple[datetime, str, int]]:
    """The last sample in each step of the window: what the chart can show, and not every row of it."""
    rows = SpreadSample.objects.filter(model=model, at__gt=now - window, at__lte=now)
    first = rows.aggregate(first=Min("at"))["first"]
    if first is None:
        return []
    truncate = _truncation(now - first)
    last = rows.annotate(step=truncate("at")).values("step").annotate(last=Max("at")).values("last").order_by()
    return list(rows.filter(at__in=last).order_by("at").values_list("at", "version", "devices"))


def _truncation(span: timedelta) -> type[TruncSecond] | type[TruncMinute] | type[TruncHour] | type[TruncDay]:
    if span <= timedelta(minutes=10):
        return TruncSecond
    if span <= timedelta(hours=3):
        return TruncMinute
    return TruncHour if span <= timedelta(days=8) else TruncDay


_STEPS = {
    TruncSecond: timedelta(seconds=5),
    TruncMinute: timedelta(minutes=1),
    TruncHour: timedelta(hours=1),
    TruncDay: timedelta(days=1),
}


def _history(
    samples: list[tuple[datetime, str, int]], colours: Mapping[str, str], now: datetime, window: timedelta
) -> History:
    """Evenly spaced, each moment carrying the newest sample before it: a quiet fleet is a flat line, not a gap."""
    if not samples:
        return History(moments=(), lines=(), step=timedelta())
    step = _STEPS[_truncation(now - samples[0][0])]
    by_moment: dict[datetime, dict[str, int]] = defaultdict(dict)
    for at, version, number in samples:
        by_moment[at][version] = number
    moments = _moments(samples[0][0], now, step)
    states = _carried(sorted(by_moment.items()), moments)
    lines: dict[str, list[int]] = {}
    for place, state in enumerate(states):
        for version, number in state.items():
            label = _line_label(version, colours)
            lines.setdefault(label, [0] * len(moments))[place] += number
    series = {_line_label(version, colours): colour for version, colour in colours.items()}
    order = [*map(str, range(SERIES)), "other", "none"]
    return History(
        moments=tuple(moments),
        lines=tuple(
            Line(label, series[label], tuple(points))
            for label, points in sorted(lines.items(), key=lambda item: order.index(series[item[0]]))
        ),
        step=step,
    )


def _line_label(version: str, colours: Mapping[str, str]) -> str:
    colour = colours[version]
    return {"other": "older", "none": "none yet"}.get(colour, version)


def _moments(first: datetime, now: datetime, step: timedelta) -> list[datetime]:
    count = int((now - first) / step)
    return [now - n * step for n in range(count, -1, -1)]


def _carried(samples: list[tuple[datetime, dict[str, int]]], moments: list[datetime]) -> list[dict[str, int]]:
    states, place = [], 0
    for moment in moments:
        while place + 1 < len(samples) and samples[place + 1][0] <= moment:
            place += 1
        states.append(samples[place][1])
    return states


# --- rollouts -----------------------------------------------------------------------------------------------------
def targets() -> dict[str, Rollout]:
    """For each model the newest rollout that stands: running, paused or completed. What laggards lag behind."""
    standing = (Rollout.State.RUNNING, Rollout.State.PAUSED, Rollout.State.COMPLETED)
    newest = Rollout.objects.filter(state__in=standing).values("release__model").annotate(newest=Max("pk"))
    rows = Rollout.objects.filter(pk__in=newest.values("newest")).select_related("release__model")
    return {rollout.release.model.name: rollout for rollout in rows}


@dataclass(frozen=True, slots=True)
class Now:
    """Rollouts in flight, and who lags: both from one look at the fleet."""

    rollouts: tuple[RolloutCard, ...]
    laggards: Laggards


def in_flight() -> Now:
    rows = Rollout.objects.filter(state__in=IN_FLIGHT).select_related("release__model", "group", "created_by")
    shown = list(rows.prefetch_related("stages__ring")[:SHOWN_ROLLOUTS])
    revision = "-".join(f"{row.pk}.{row.state}.{row.stage_index}" for row in shown)
    found = costly(f"dashboard-survey-{revision}", lambda: summary.of(shown))
    reasons = Counter[str]()
    for why, number in found.reasons.items():
        reasons[REASONS.get(why, why)] += number
    laggards = Laggards(found.total, tuple(found.rows), tuple(reasons.most_common()), found.as_of)
    return Now(tuple(_cards(shown, found)), laggards)


def rollout_card(rollout: Rollout) -> RolloutCard:
    key = f"dashboard-rollout-{rollout.pk}.{rollout.state}.{rollout.stage_index}"
    found = costly(key, lambda: summary.progress(rollout))
    counted = {rollout.pk: found.progress} if found.progress else {}
    return next(_cards([rollout], summary.Summary(counted, 0, {}, (), found.as_of)))


def _cards(shown: Sequence[Rollout], found: summary.Summary) -> Iterator[RolloutCard]:
    """Outcomes are as of now; who is admitted, of a large fleet, as of the summary."""
    counts = tallies.outcome_counts([row.pk for row in shown])
    for row in shown:
        said, progress = counts[row.pk], found.progress.get(row.pk)
        admitted = max(sum(said.values()), progress.admitted if progress else 0)
        yield _card(row, rollouts.Progress(total=0, admitted=admitted, **said), found.as_of)


def costly(
    key: str,
    look: Callable[[], Value],
    *,
    limit: float = COSTLY_SECONDS,
    clock: Callable[[], float] = monotonic,
) -> Value:
    """What takes long to find out is kept for ten times as long, so that looking costs a tenth of a core at most.

    A fleet of a thousand devices stays under the limit, and its page is always fresh.
    """
    kept: Value | None = cache.get(key)
    if kept is not None:
        return kept
    began = clock()
    found = look()
    if (cost := clock() - began) > limit:
        cache.set(key, found, min(10 * cost, KEPT_SECONDS))
    return found


def _card(rollout: Rollout, progress: rollouts.Progress, as_of: datetime | None) -> RolloutCard:
    total = max(progress.admitted, 1)
    shares = (progress.committed / total, progress.updating / total, progress.failed / total)
    return RolloutCard(
        rollout=rollout,
        stages=tuple(_stage_bar(rollout, stage, shares) for stage in rollout.stages.all()),
        admitted=progress.admitted,
        updating=progress.updating,
        committed=progress.committed,
        failed=progress.failed,
        withdrawn=progress.withdrawn,
        as_of=as_of,
    )


def _stage_bar(rollout: Rollout, stage: Stage, shares: tuple[float, float, float]) -> StageBar:
    state = _stage_state(rollout, stage.index)
    return StageBar(stage.index, str(stage), state, *_shares(state, shares))


def _stage_state(rollout: Rollout, index: int) -> str:
    if rollout.state == Rollout.State.COMPLETED or (rollout.started_at and index < rollout.stage_index):
        return "passed"
    return "current" if rollout.started_at and index == rollout.stage_index else "next"


def _shares(state: str, current: tuple[float, float, float]) -> tuple[float, float, float]:
    """A stage that passed is full; one to come is empty; the current one shows how its devices fare."""
    if state == "current":
        committed, updating, failed = (min(100.0, round(100 * share, 1)) for share in current)
        return committed, updating, failed
    return (100.0 if state == "passed" else 0.0, 0.0, 0.0)


# --- feedback, first steps ---------------------------------------------------------------------------------
def newest_batches() -> QuerySet[Batch]:
    return Batch.objects.select_related("device", "model", "campaign")[:6]


def samples_since(moment: datetime) -> int:
    return Batch.objects.filter(announced_at__gte=moment).aggregate(n=Sum("samples"))["n"] or 0


def data_set_rows() -> int:
    return DatasetPart.objects.aggregate(n=Sum("rows"))["n"] or 0


def first_steps() -> list[Step]:
    """The way from an empty database to a device that runs a signed model. Empty once it has been walked."""
    steps = [
        Step(
            "Create the signing keys",
            "Root, targets and the online key. Keep root and targets offline afterwards.",
            "python manage.py trust_init",
            RoleMetadata.objects.filter(role="root").exists(),
        ),
        Step(
            "Add a model",
            "Delegates the model's releases to a key that only CI holds.",
            "python manage.py trust_add_model detector --ci-key-out ci.key",
            Model.objects.exists(),
        ),
        Step(
            "Publish a release",
            "From CI, with an API token of the scope publish (Access, API tokens).",
            "fleet-publish push model.onnx --model detector --version 1.0.0 "
            f"--server {settings.PUBLIC_URL} --key ci.key --wait",
            Release.objects.exists(),
        ),
        Step(
            "Let devices in",
            "Add an enrolment token here, take its provision.json to the device, and enrol there.",
            "fleet-device enrol --provision provision.json --name device-001",
            EnrolmentToken.objects.exists() and Device.objects.exists(),
        ),
        Step(
            "Roll the release out",
            "Add a rollout: one release, a group of devices, and stages with guards.",
            "",
            Rollout.objects.exists(),
        ),
    ]
    return [] if all(step.done for step in steps) else steps


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1) if whole else 0.0
