"""How strongly scores speak against "exposed devices are no worse": an e-process. Pure; numpy only.

Scores lie in 0..1, one a device, higher is worse. The hypothesis is about means: exposed <= unexposed + effect,
whatever the distributions and the mean m of the unexposed. For each m there are two gamblers who cannot win on average:

    K_A(m), against "exposed mean <= m + effect":  the product over exposed   x of  1 - c + c x / (m + effect)
    K_B(m), against "unexposed mean >= m":         the product over unexposed y of  1 - c + c (1 - y) / (1 - m)

each the mean over several stakes c fixed beforehand. If the hypothesis holds, then at the true m the product
K_A(m) K_B(m) is a supermartingale that starts at 1, and so is bounded by it the least product over all m. By Ville's
inequality it ever reaches 1/a with probability at most a: at any time of looking, with any number of looks.

Stakes do not depend on what was seen, so only *how many devices have which score* matters: two histograms are all the
evidence. Scores are rounded to the histogram's bins in favour of the exposed, and the least over m is taken over cells
by their worse ends (K_A falls with m, K_B rises), so rounding never adds evidence.

Sources: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 86(1), 2024
(arXiv 2010.09686): the capital process; Turner, Ly and Gruenwald, "Generic E-variables for exact sequential k-sample
tests that allow for optional stopping", JSPI 230, 2024 (arXiv 2106.02693): two samples under optional stopping, which
this is where scores are 0 or 1; Ramdas, Gruenwald, Vovk and Shafer, "Game-theoretic statistics and safe anytime-valid
inference", Statistical Science 38(4), 2023: e-processes, and that their weighted mean is one.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BINS = 100  # scores are kept as 0, 1, .. BINS hundredths
CELLS = 200  # in which the unknown mean of the unexposed is looked for
EXPOSED_STAKES = (
    0.0,
    0.02,
    0.1,
    0.4,
    0.8,
    1.0,
)  # small ones for few bad devices among many, large ones for all a bit worse
UNEXPOSED_STAKES = (0.0, 0.2, 0.6, 1.0)
NOTHING = -1e9  # the logarithm of no capital, finite so that no device with that score costs nothing
LARGEST = 700.0  # natural logarithm: what exp() can still show

Floats = NDArray[np.float64]


def to_bin(score: float, *, exposed: bool) -> int:
    """The bin of a score, rounded in favour of the exposed: theirs down, the others' up."""
    scaled = min(max(score, 0.0), 1.0) * BINS
    return math.floor(scaled + 1e-9) if exposed else math.ceil(scaled - 1e-9)


def log_evidence(exposed: Floats, unexposed: Floats, effect: float) -> Floats:
    """Natural logarithm of the e-process of two samples. Histograms of BINS + 1 counts in the last axis; any others."""
    above, below = _exposed_table(effect), _unexposed_table()
    against_low = _mixture(exposed, above)  # (.., CELLS): at the upper end of each cell
    against_high = _mixture(unexposed, below)  # at the lower end
    return np.asarray(np.min(against_low + against_high, axis=-1))


def log_evidence_of_share(bad: Floats | float, good: Floats | float, tolerated: float) -> Floats:
    """The same for one sample of 0 and 1 against a tolerated share of bad devices."""
    stakes = np.array(EXPOSED_STAKES)
    with np.errstate(divide="ignore"):
        lost, won = np.log(1 - stakes), np.log(1 - stakes + stakes / tolerated)
    bad_, good_ = np.asarray(bad, float)[..., None], np.asarray(good, float)[..., None]
    return _mean_of_logs(bad_ * won + good_ * np.maximum(lost, NOTHING))


def log_mean(logs: list[float], weights: list[float]) -> float:
    """Logarithm of the weighted mean of e-processes, itself one where the weights sum to at most 1."""
    top = max(logs, default=0.0)
    return top + math.log(sum(weight * math.exp(each - top) for each, weight in zip(logs, weights, strict=True)))


def _mixture(histograms: Floats, table: Floats) -> Floats:
    shape = (*histograms.shape[:-1], table.shape[1], table.shape[2])
    return _mean_of_logs(np.moveaxis((histograms @ table.reshape(BINS + 1, -1)).reshape(shape), -2, -1))


def _mean_of_logs(logs: Floats) -> Floats:
    top = logs.max(axis=-1, keepdims=True)
    return np.asarray(top[..., 0] + np.log(np.exp(logs - top).mean(axis=-1)))


@lru_cache(maxsize=64)
def _exposed_table(effect: float) -> Floats:
    """Logarithm of what each score (BINS + 1) makes of each stake at each cell's upper end."""
    mean = (np.arange(CELLS) + 1) / CELLS + effect
    return _logs(EXPOSED_STAKES, np.arange(BINS + 1)[:, None] / BINS / mean)


@lru_cache(maxsize=1)
def _unexposed_table() -> Floats:
    mean = np.arange(CELLS) / CELLS
    return _logs(UNEXPOSED_STAKES, (1 - np.arange(BINS + 1)[:, None] / BINS) / (1 - mean))


def _logs(stakes: tuple[float, ...], gain: Floats) -> Floats:
    stake = np.array(stakes)[None, :, None]
    with np.errstate(divide="ignore"):
        return np.asarray(np.maximum(np.log(1 - stake + stake * gain[:, None, :]), NOTHING))
