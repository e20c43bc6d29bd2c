"""How often a rollout's guards halt what is healthy, and how soon they see what is not: simulated device by device.

Vectorised over rollouts. The devices differ: three kinds of hardware with error rates ten times apart, one in a hundred
broken for good, spans of different lengths, and the world changes for everybody while a rollout runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.bench.measure import Row, Scale, Section
from fleet.rollouts import betting, guards
from fleet.rollouts.betting import Floats
from fleet.rollouts.quality import CLASSES, CONFIDENCE, ERRORS, INVALID, LATENCY

Generator = np.random.Generator
BASES = np.array([0.001, 0.005, 0.02])  # error rates by hardware
BROKEN = 0.01  # of all devices: half of their calls fail, on any release
DRIFT = 1.3  # the world's change while the rollout runs, for both sides
FALSE_ALARM = 0.01
Z_ONE_PERCENT, Z_SHARED, Z_NINE_OF_TEN = 2.326, 2.935, 1.282  # one-sided: 1 %, a sixth of 1 %, 10 %
SIX = tuple(guards.SCALES)


@dataclass(frozen=True, slots=True)
class Side:
    """Changes of devices in the order in which they report; `shift` is the regression."""

    rollouts: int
    devices: int
    calls: int = 100
    shift: float = 0.0


def errors(rng: Generator, side: Side) -> Floats:
    shape = (side.rollouts, side.devices)
    base = BASES[rng.integers(0, 3, shape)]
    base = np.where(rng.random(shape) < BROKEN, 0.5, base)
    before = rng.binomial(1_000, base) / 1_000
    return rng.binomial(side.calls, np.minimum(base * DRIFT + side.shift, 1)) / side.calls - before


def latency(rng: Generator, side: Side) -> Floats:
    return rng.normal(math.log(DRIFT) / 4 + math.log1p(side.shift), 0.15, (side.rollouts, side.devices))


def confidence(rng: Generator, side: Side) -> Floats:
    return rng.normal(0.02 + side.shift, 0.05, (side.rollouts, side.devices))


def classes(rng: Generator, side: Side) -> Floats:
    """Of five classes; `shift` is how much of the mix goes over to one class."""
    shape = (side.rollouts, side.devices)
    mix = rng.dirichlet(np.full(5, 2.0), shape)
    now = (1 - side.shift) * mix + side.shift * np.eye(5)[0]
    many, few = 1_000, side.calls
    p, q = rng.multinomial(many, mix) / many, rng.multinomial(few, now) / few
    pooled = (p * many + q * few) / (many + few)
    chance = np.sqrt(2 / np.pi * pooled * (1 - pooled) * (1 / many + 1 / few)).sum(-1) / 2
    return np.asarray(np.abs(p - q).sum(-1) / 2 - chance)


WORLDS: dict[str, Callable[[Generator, Side], Floats]] = {
    ERRORS: errors, INVALID: errors, LATENCY: latency, CONFIDENCE: confidence, CLASSES: classes,
}  # fmt: skip


def bound(tested: int, streams: int = 1) -> float:
    """At which a guard halts: `tested` guards share the error rate, `streams` the stages and ages."""
    return math.log(tested * streams / FALSE_ALARM)


def histograms(name: str, changes: Floats, looks: int, *, exposed: bool) -> Floats:
    """What is known of each rollout at each look: counts by bin, of the devices that reported by then."""
    scale = guards.SCALES[name]
    scores = np.clip((changes - scale.low) / (scale.high - scale.low), 0, 1) * betting.BINS
    bins = (np.floor(scores + 1e-9) if exposed else np.ceil(scores - 1e-9)).astype(int)
    found = np.zeros((changes.shape[0], looks, betting.BINS + 1))
    edges = np.linspace(0, changes.shape[1], looks + 1).astype(int)
    rows = np.arange(changes.shape[0])[:, None]
    for look in range(looks):
        np.add.at(found[:, look], (rows, bins[:, edges[look] : edges[look + 1]]), 1)
    return found.cumsum(axis=1)


def halted(name: str, rng: Generator, exposed: Side, unexposed: Side, *, looks: int, limit: float) -> Floats:
    """At which share of the exposed each rollout was halted, 0 to 1; nan: never."""
    world, effect = WORLDS[name], guards.SCALES[name].effect_score(guards.SCALES[name].effect)
    logs = betting.log_evidence(
        histograms(name, world(rng, exposed), looks, exposed=True),
        histograms(name, world(rng, unexposed), looks, exposed=False),
        effect,
    )
    return _first(logs >= limit)


def failures_halted(rng: Generator, rollouts: int, devices: int, rate: float, limit: float) -> Floats:
    """The same of updates, looked at after each device. A device counts as good until its failure is told, later."""
    fails = rng.random((rollouts, devices)) < rate
    told = np.arange(devices) + np.where(fails, rng.integers(0, 5, fails.shape), devices)
    rows = np.broadcast_to(np.arange(rollouts)[:, None], fails.shape)
    failed = np.zeros((rollouts, devices + 8))
    np.add.at(failed, (rows[fails], told[fails]), 1)
    bad = failed.cumsum(axis=1)[:, :devices]
    began = np.arange(1, devices + 1)
    logs = betting.log_evidence_of_share(bad, began - bad, guards.SCALES[guards.FAILURES].effect)
    return _first(logs >= limit)


def _first(crossed: Floats) -> Floats:
    at = (crossed.argmax(axis=1) + 1) / crossed.shape[1]
    return np.where(crossed.any(axis=1), at, np.nan)


def naive_halted(name: str, rng: Generator, rollouts: int, devices: int, *, looks: int) -> Floats:
    """The baseline: at each look a two-sample z-test at the same rate, as if that look were the only one."""
    exposed = WORLDS[name](rng, Side(rollouts, devices))
    unexposed = WORLDS[name](rng, Side(rollouts, devices))
    crossed = np.zeros(rollouts, dtype=bool)
    for look in np.linspace(devices // 10, devices, looks).astype(int):
        a, b = exposed[:, :look], unexposed[:, :look]
        spread = np.sqrt((a.var(axis=1) + b.var(axis=1)) / look)
        crossed |= (a.mean(axis=1) - b.mean(axis=1)) / spread > Z_ONE_PERCENT
    return crossed.astype(float)


# --- the table ----------------------------------------------------------------------------------------------------

# Regression in the guard's unit, and devices of each side to look among.
REGRESSIONS = [
    (ERRORS, 0.01, 6_000), (ERRORS, 0.05, 400), (ERRORS, 0.2, 60), (LATENCY, 0.2, 600), (LATENCY, 0.5, 200),
    (CONFIDENCE, 0.1, 200), (CLASSES, 0.3, 200),
]  # fmt: skip
FAILING = [(0.05, 2_000), (0.2, 400), (1.0, 50)]
NOTES = (
    "All six guards on, three stages, a false-alarm rate of 1 % in all; five unexposed devices for each exposed one.",
    "Devices within which nine of ten bad rollouts are halted, beside what a single look would need.",
    "Healthy: as bad as healthy can be, looked at throughout, beside a z-test made anew at each look.",
)


def measure(_: Path, scale: Scale) -> Section:
    rng = np.random.default_rng(2026)
    rollouts = 10 * scale.rounds
    rows = [_healthy(rng, name, rollouts) for name in WORLDS]
    rows += [_seen(rng, name, shift, devices, max(rollouts // 8, 10)) for name, shift, devices in REGRESSIONS]
    rows += [_failing(rng, rate, devices, rollouts) for rate, devices in FAILING]
    return Section("Guards of a rollout: false halts, and devices until a regression halts", rows, NOTES)


def _healthy(rng: Generator, name: str, rollouts: int) -> Row:
    shift = guards.SCALES[name].effect
    exposed, unexposed = Side(rollouts, 100, calls=60, shift=shift), Side(rollouts, 300, calls=200)
    found = 100 * np.isfinite(halted(name, rng, exposed, unexposed, looks=25, limit=bound(1))).mean()
    naive = 100 * naive_halted(name, rng, max(rollouts, 200), 200, looks=50).mean()
    stated = 100 * FALSE_ALARM
    what = f"{guards.SCALES[name].label}: healthy rollouts halted"
    return Row(
        what, float(found), "%", float(naive), "a z-test at each look", f"<= {stated:g} %", bool(found <= stated)
    )


def _seen(rng: Generator, name: str, shift: float, devices: int, rollouts: int) -> Row:
    exposed, unexposed = Side(rollouts, devices, shift=shift), Side(rollouts, min(5 * devices, 5_000))
    found = halted(name, rng, exposed, unexposed, looks=60, limit=bound(len(SIX), streams=6)) * devices
    return _row(guards.SCALES[name].label, shift, found, _fixed(rng, name, shift))


def _failing(rng: Generator, rate: float, devices: int, rollouts: int) -> Row:
    found = failures_halted(rng, rollouts, devices, rate, bound(len(SIX))) * devices
    tolerated = guards.SCALES[guards.FAILURES].effect
    spread = Z_SHARED * math.sqrt(tolerated * (1 - tolerated)) + Z_NINE_OF_TEN * math.sqrt(rate * (1 - rate))
    return _row("update failures", rate, found, max((spread / (rate - tolerated)) ** 2, 1.0))


def _row(label: str, shift: float, found: Floats, fixed: float) -> Row:
    within = float(np.quantile(np.nan_to_num(found, nan=np.inf), 0.9, method="higher"))
    what = f"{label}: a regression of {100 * shift:g} %, exposed devices"
    return Row(what, within, "devices", math.ceil(fixed), "one look at a fixed number")


def _fixed(rng: Generator, name: str, shift: float) -> float:
    """Exposed devices, with five times as many unexposed, of a test with one look."""
    world = WORLDS[name]
    a, b = world(rng, Side(1, 20_000, shift=shift)), world(rng, Side(1, 20_000))
    return float((Z_SHARED + Z_NINE_OF_TEN) ** 2 * (a.var() + b.var() / 5) / (a.mean() - b.mean()) ** 2)
