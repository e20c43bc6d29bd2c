"""Look at what a call gave: how long it took, whether it is there and finite, and what it says."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from device_sdk.scoring import answers
from device_sdk.slot import Loaded, Slot
from device_sdk.stats import Cell

log = logging.getLogger("device_sdk")

_SMALL = 4_096  # elements up to which one dot product finds NaN and infinity fastest
SHORT = 100_000  # nanoseconds: a call for which it would cost much to have its scores looked at
SCORE_EVERY = 8  # of short calls that are looked at, one in so many
SCORED_ON_TRIAL = 1_000  # answers of each thread in probation before that begins


def look(slot: Slot, loaded: Loaded, cell: Cell, names: Sequence[str], values: Sequence[Any], elapsed: int) -> None:
    """Never raises: what we look for is ours, the call is the application's."""
    cell.took(elapsed)
    cell.checked += 1
    if not (is_valid(values[0]) if len(values) == 1 else all(map(is_valid, values))):
        cell.invalid += 1
        slot.alarm()
    elif loaded.scores is not None and (elapsed >= SHORT or _is_turn(loaded, cell)):
        _look_at_scores(loaded, cell, names, values)


def _is_turn(loaded: Loaded, cell: Cell) -> bool:
    on_trial = not loaded.check_mask
    return (on_trial and cell.scored < SCORED_ON_TRIAL) or not cell.checked % SCORE_EVERY


def _look_at_scores(loaded: Loaded, cell: Cell, names: Sequence[str], values: Sequence[Any]) -> None:
    scores = loaded.scores
    if scores is None or scores.output not in names:
        return
    try:
        for kind, confidence in answers(scores.kind, values[list(names).index(scores.output)]):
            cell.answered(kind, confidence)
    except Exception:  # an array of a kind that nobody foresaw
        log.exception("%s: its scores are looked at no more", loaded.path)
        loaded.scores = None


def is_valid(value: Any) -> bool:
    """Whether an output is there and finite. A dot product is one pass and not finite if any element is not."""
    if not isinstance(value, np.ndarray):
        return value is not None and (not hasattr(value, "__len__") or len(value) > 0)
    if value.size == 0:
        return False
    if value.dtype.kind != "f":
        return True
    if value.size <= _SMALL and math.isfinite(np.vdot(value, value)):
        return True
    return bool(np.isfinite(value).all())
