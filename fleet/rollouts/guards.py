"""The guards of a rollout: what its author asked for, what the evidence says, and the verdict. Pure: no IO, no clock.

The unit of evidence is the device: each counts once in a comparison, whether it made fifty calls or a million. A guard
compares *changes* (see `quality`) of exposed devices with those of unexposed ones, by an e-process (see `betting`).

The error rate. `false_alarm` is the chance that a healthy rollout is ever halted by any of its guards, looked at as
often as one likes. It is split evenly over the guards that test, so each halts at evidence of `guards / false_alarm`.
Within a guard the evidence is a weighted mean of comparisons that may depend on each other as they like: one for each
stage (1/stages each: times of day and the devices that are left differ between stages) and age of the release on the
device (at once, after an hour, after a day: some faults take their time). After a resume all begins anew, with the
same rate again. Plain limits promise no error rate.

Any doubt is Hold: terms that cannot be read, a guard without numbers.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from fleet.rollouts import betting
from fleet.rollouts.policy import HOLD, PAUSE, Advance, Complete, Decision, Halt, Hold, Pause
from fleet.rollouts.quality import CLASSES, CONFIDENCE, ERRORS, INVALID, LATENCY, Change

FAILURES = "failures"
AGES = (0, 3_600, 86_400)  # seconds after a device is first heard of on the release
AGE_WEIGHTS = (0.5, 0.25, 0.25)
AGE_TEXTS = ("", " an hour later", " a day later")


@dataclass(frozen=True, slots=True)
class Scale:
    """A change of `low` or less is a score of 0, one of `high` or more a score of 1. `effect`: what is let pass."""

    label: str
    unit: str
    effect: float
    low: float = 0.0
    high: float = 1.0
    logarithmic: bool = False
    falls: bool = False  # less is worse

    def score(self, change: float) -> float:
        return min(max((change - self.low) / (self.high - self.low), 0.0), 1.0)

    def effect_score(self, effect: float) -> float:
        return (math.log1p(effect) if self.logarithmic else effect) / (self.high - self.low)

    def show(self, value: float) -> str:
        return {"%": f"{100 * value:.3g} %", "ms": f"{value:.3g} ms"}.get(self.unit, f"{value:.3g}")


SCALES = {
    FAILURES: Scale("update failures", "%", 0.02),
    ERRORS: Scale("inference errors", "%", 0.005, -0.02, 0.18),
    INVALID: Scale("NaN or empty outputs", "%", 0.005, -0.02, 0.18),
    LATENCY: Scale("latency p95", "ms", 0.1, -math.log(2), math.log(2), logarithmic=True),
    CONFIDENCE: Scale("confidence", "", 0.03, -0.2, 0.2, falls=True),
    CLASSES: Scale("class mix", "", 0.05, -0.1, 0.4),
}
USUAL = "failures, errors, invalid, latency"  # what the forms propose


# --- terms --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GuardTerms:
    """`effect`: the worsening that is let pass, None: the scale's. `limit`: a plain threshold. `test`: compare at all.

    `effect` is in shares for failures, errors and NaN (0.01: one point), a ratio for latency (0.1: a tenth slower), in
    the score's unit for confidence, in total variation distance for classes. Of failures it is the share tolerated.
    """

    effect: float | None = None
    limit: float | None = None
    test: bool = True


@dataclass(frozen=True, slots=True)
class Terms:
    """`devices`: exposed devices that each guard must have compared before any stage passes. `calls`: of a span."""

    guards: Mapping[str, GuardTerms] = field(default_factory=dict)
    false_alarm: float = 0.01
    devices: int = 1
    calls: int = 50
    limit_devices: int = 5  # devices that a plain limit needs

    @classmethod
    def parse(cls, stored: object) -> "Terms":
        """From JSON. ValueError says what was expected; nothing unknown is passed over."""
        if not isinstance(stored, dict):
            raise ValueError(f"guards: expected an object; got {stored!r:.60}")  # noqa: TRY004  # one kind for callers
        settings = {name: value for name, value in stored.items() if name not in SCALES}
        if unknown := set(settings) - {"false_alarm", "devices", "calls", "limit_devices"}:
            raise ValueError(f"guards: unknown: {', '.join(sorted(map(str, unknown))):.100}")
        terms = cls(guards={name: _guard_terms(name, stored[name]) for name in SCALES if name in stored}, **settings)
        _check(terms.false_alarm, "false_alarm", 1e-6, 0.5)
        for name, low in (("devices", 0), ("calls", 1), ("limit_devices", 1)):
            _check(getattr(terms, name), name, low, 1_000_000, whole=True)
        return terms

    def to_json(self) -> dict[str, Any]:
        """Nothing at all where there is no guard."""
        if not self.guards:
            return {}
        named = {name: {k: v for k, v in asdict(each).items() if v is not None} for name, each in self.guards.items()}
        plain = {name: getattr(self, name) for name in ("false_alarm", "devices", "calls", "limit_devices")}
        return {**plain, **named}

    @property
    def tested(self) -> list[str]:
        return [name for name, each in self.guards.items() if each.test]

    @property
    def bound(self) -> float:
        """Natural logarithm of the evidence at which one guard halts."""
        return math.log(max(len(self.tested), 1) / self.false_alarm)

    def effect(self, name: str) -> float:
        asked = self.guards[name].effect if name in self.guards else None
        return SCALES[name].effect if asked is None else asked


def parse_text(text: str) -> dict[str, Any]:
    """Guards as people write them: `failures, errors effect=0.01 limit=0.05, latency test=no`. ValueError otherwise."""
    found: dict[str, Any] = {}
    for part in filter(None, (each.strip() for each in text.replace("\n", ",").split(","))):
        name, *settings = part.split()
        found[name] = dict(_setting(setting) for setting in settings)
        _guard_terms(name, found[name])
    return found


def to_text(terms: Terms) -> list[str]:
    """The same, from terms."""
    return [" ".join([name, *_settings_of(each)]) for name, each in terms.guards.items()]


def _settings_of(each: GuardTerms) -> list[str]:
    shown = {"effect": each.effect, "limit": each.limit}
    texts = [f"{name}={value:g}" for name, value in shown.items() if value is not None]
    return texts if each.test else [*texts, "test=no"]


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name == "test" and value in {"yes", "no"}:
        return name, value == "yes"
    try:
        return name, float(value)
    except ValueError as error:
        raise ValueError(f"guards: expected NAME=NUMBER such as limit=0.05; got {text!r:.60}") from error


def _guard_terms(name: str, stored: object) -> GuardTerms:
    if name not in SCALES:
        raise ValueError(f"guards: expected some of {', '.join(SCALES)}; got {name!r:.40}")
    if not isinstance(stored, dict) or set(stored) - {"effect", "limit", "test"}:
        raise ValueError(f"{name}: expected effect, limit and test alone; got {stored!r:.80}")
    terms = GuardTerms(**stored)
    if terms.effect is not None:
        _check(terms.effect, f"{name}: effect", 1e-4 if name == FAILURES else 0, 1)
    if terms.limit is not None:
        _check(terms.limit, f"{name}: limit", 0, 1e6 if name == LATENCY else 1)
    if not isinstance(terms.test, bool) or (not terms.test and terms.limit is None):
        raise ValueError(f"{name}: a guard needs a test or a limit; got {stored!r:.80}")
    return terms


def _check(value: object, what: str, low: float, high: float, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{what}: expected a {'whole ' if whole else ''}number {low:g} to {high:g}; got {value!r:.40}")


# --- evidence -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Side:
    """Devices of one side of a comparison: how many have which score, and the sums that means are shown from."""

    bins: dict[int, int] = field(default_factory=dict)
    devices: int = 0
    now: float = 0.0
    change: float = 0.0

    def add(self, scale: Scale, change: Change, *, exposed: bool) -> None:
        place = betting.to_bin(scale.score(change.change), exposed=exposed)
        self.bins[place] = self.bins.get(place, 0) + 1
        self.devices += 1
        self.now += change.now
        self.change += change.change

    def histogram(self) -> betting.Floats:
        counts = np.zeros(betting.BINS + 1)
        for place, count in self.bins.items():
            counts[place] = count
        return counts

    @property
    def mean(self) -> float:
        return self.now / self.devices if self.devices else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"bins": {str(place): count for place, count in self.bins.items()}, "devices": self.devices,
                "now": self.now, "change": self.change}  # fmt: skip

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> "Side":
        bins = {int(place): int(count) for place, count in stored["bins"].items()}
        return cls(bins, int(stored["devices"]), float(stored["now"]), float(stored["change"]))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One guard's devices in one stage at one age of the release."""

    stage: int
    age: int
    exposed: Side = field(default_factory=Side)
    unexposed: Side = field(default_factory=Side)

    def log_evidence(self, name: str, effect: float) -> float:
        if not self.exposed.devices:
            return 0.0
        score = SCALES[name].effect_score(effect)
        return float(betting.log_evidence(self.exposed.histogram(), self.unexposed.histogram(), score))


@dataclass(frozen=True, slots=True)
class Reading:
    """What one guard sees now. `evidence` and `peak` are natural logarithms; `strongest` is what speaks loudest."""

    name: str
    compared: int  # exposed devices, each once
    evidence: float
    strongest: Comparison
    limit_broken: str = ""
    peak: float = 0.0

    def sentence(self, terms: Terms) -> str:
        scale, at = SCALES[self.name], self.strongest
        if self.name == FAILURES:
            text = f"{scale.show(at.exposed.mean)} of {at.exposed.devices} devices that began, tolerated "
            text += scale.show(terms.effect(self.name))
        else:
            text = f"{scale.show(at.exposed.mean)} on {_devices(at.exposed.devices, 'exposed')}{AGE_TEXTS[at.age]}"
            text += f" against {scale.show(at.unexposed.mean)} on {at.unexposed.devices:,} unexposed"
            text += f" (change since before: {_change(scale, at.exposed)} against {_change(scale, at.unexposed)})"
        return f"{scale.label}: {text}; evidence {odds(self.peak)}, halts at {odds(terms.bound)}"


def failures_reading(terms: Terms, ever: int, began: int, failed: int) -> Reading:
    """Of updates. A device counts from when it began, as good until it fails, and so in the order of beginning.

    Counted by when they report, failures would come first (they are quick, success takes a probation), and any healthy
    rollout would look bad for its first minutes. Those who did not begin have no updates that could fail: what is
    compared with is the share that the author tolerates.
    """
    side = Side({0: began - failed, betting.BINS: failed}, began, float(failed), float(failed))
    log = float(betting.log_evidence_of_share(failed, began - failed, terms.effect(FAILURES))) if began else 0.0
    found = Reading(FAILURES, ever, log, Comparison(0, 0, side))
    return _with_limit(found, terms, [side])


def reading(name: str, terms: Terms, comparisons: Sequence[Comparison], stages: int) -> Reading:
    """Of one guard, from all of its comparisons."""
    effect = terms.effect(name)
    logs = [each.log_evidence(name, effect) for each in comparisons]
    weights = [AGE_WEIGHTS[each.age] / max(stages, 1) for each in comparisons]
    rest = max(1 - sum(weights), 0.0)  # what is not compared yet has bet nothing
    total = betting.log_mean([*logs, 0.0], [*weights, rest])
    loudest = max(range(len(logs)), key=lambda at: (max(logs[at], 0.0), comparisons[at].exposed.devices), default=None)
    strongest = Comparison(0, 0) if loudest is None else comparisons[loudest]
    compared = sum(each.exposed.devices for each in comparisons if each.age == 0)
    ages = [[each.exposed for each in comparisons if each.age == age] for age in range(len(AGES))]
    return _with_limit(Reading(name, compared, total, strongest), terms, [_together(sides) for sides in ages])


def _together(sides: Sequence[Side]) -> Side:
    total = Side()
    for side in sides:
        total.devices, total.now = total.devices + side.devices, total.now + side.now
    return total


def _with_limit(found: Reading, terms: Terms, sides: Sequence[Side]) -> Reading:
    limit, scale = terms.guards[found.name].limit, SCALES[found.name]
    broken = ""
    for side in sides:
        over = limit is not None and (side.mean < limit if scale.falls else side.mean > limit)
        if limit is not None and over and side.devices >= terms.limit_devices:
            word = "below" if scale.falls else "above"
            broken = f"{scale.label}: {scale.show(side.mean)} on {_devices(side.devices, 'exposed')}, "
            broken += f"{word} the limit of {scale.show(limit)}"
    return Reading(found.name, found.compared, found.evidence, found.strongest, broken, found.evidence)


# --- the verdict --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trip:
    reason: str


def verdict(terms: Terms, readings: Sequence[Reading]) -> Trip | Hold | None:
    """The first limit broken, the strongest evidence beyond its bound; a guard with too few devices; or no objection.

    What is judged is the peak: evidence that was once beyond the bound has halted, whatever came after.
    """
    if broken := next((each.limit_broken for each in readings if each.limit_broken), ""):
        return Trip(broken)
    tripped = [each for each in readings if terms.guards[each.name].test and each.peak >= terms.bound]
    if tripped:
        return Trip(max(tripped, key=lambda each: each.peak).sentence(terms))
    for each in readings:
        if each.compared < terms.devices:
            label = SCALES[each.name].label
            return Hold(f"guard waits for evidence: {label} compared on {each.compared} of {terms.devices} devices")
    return None


def before_success(asked: Trip | Hold | None, on_failure: str, decision: Decision) -> Decision:
    """What the engine does: a spent budget and a tripped guard come before success, a guard's doubt holds success."""
    if isinstance(decision, (Halt, Pause)):
        return decision
    if isinstance(asked, Trip):
        if on_failure == HOLD:
            return Hold(asked.reason)
        return Pause(asked.reason) if on_failure == PAUSE else Halt(asked.reason)
    return asked if isinstance(asked, Hold) and isinstance(decision, (Advance, Complete)) else decision


# --- what it can see ----------------------------------------------------------------------------------------------


def fewest(name: str, terms: Terms, exposed: int, unexposed: int, stages: int) -> int | None:
    """How many of so many exposed devices would have to be as bad as can be for this guard to halt; None: not even all.

    All others are taken to be unchanged. For a small fleet None is the honest answer: no test at this rate can tell.
    """
    halts = partial(_halts, name, terms, exposed, unexposed, stages)
    found = bisect_left(range(1, exposed + 1), 1, key=halts) + 1
    return found if found <= exposed else None


def _halts(name: str, terms: Terms, exposed: int, unexposed: int, stages: int, bad: int) -> bool:
    if name == FAILURES:
        return failures_reading(terms, exposed, exposed, bad).evidence >= terms.bound
    scale, sides = SCALES[name], (Side(), Side())
    same = (betting.to_bin(scale.score(0.0), exposed=True), betting.to_bin(scale.score(0.0), exposed=False))
    sides[0].bins, sides[0].devices = {same[0]: exposed - bad, betting.BINS: bad}, exposed
    sides[1].bins, sides[1].devices = {same[1]: unexposed}, unexposed
    return reading(name, terms, [Comparison(0, 0, *sides)], stages).evidence >= terms.bound


def odds(log: float) -> str:
    """Evidence as people read it: `1 in 20,000`."""
    value = math.exp(min(log, betting.LARGEST / 10))
    if value < 1.05:
        return "none"
    digits = max(math.floor(math.log10(value)) - 1, 0)
    return f"1 in {round(value, -digits):,.0f}" if value >= 10 else f"1 in {value:.2g}"


def _devices(number: int, kind: str) -> str:
    return f"{number:,} {kind} device{'' if number == 1 else 's'}"


def worst(name: str) -> str:
    """What counts as as bad as can be, for people."""
    scale = SCALES[name]
    if scale.logarithmic:
        return f"{math.exp(scale.high):.3g} times as slow"
    return "failed" if name == FAILURES else f"worse by {scale.show(scale.high)}"


def change_text(name: str, side: Side) -> str:
    """The mean change of a side's devices, for people."""
    return _change(SCALES[name], side) if side.devices else "-"


def _change(scale: Scale, side: Side) -> str:
    change = side.change / side.devices if side.devices else 0.0
    if scale.logarithmic:
        return f"{math.exp(change):.2f} times"
    change = -change if scale.falls else change
    return f"{100 * change:+.2g} points" if scale.unit == "%" else f"{change:+.2g}"
