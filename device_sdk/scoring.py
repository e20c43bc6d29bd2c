"""Read the class on top, and its score, off a model's answer. Pure: arrays in, numbers out."""

from typing import Any

import numpy as np

from device_sdk.protocol.scores import LABELS, LOGITS

ROWS = 16  # answers looked at in one call; of a larger batch evenly spread ones
_MOST_CLASSES = 65_536  # along the last axis; more are no classes, and would cost the caller

Array = np.ndarray[Any, Any]


def answers(kind: str, value: Any) -> list[tuple[int, float]]:
    """Class and confidence (0 to 1; 0 for labels) of each answer in an output. Empty where it is of no such kind."""
    if not isinstance(value, np.ndarray) or value.size == 0:
        return []
    if kind == LABELS:
        return _labels(value)
    if value.dtype.kind != "f" or value.shape[-1:] > (_MOST_CLASSES,):
        return []
    rows = value.reshape(-1, value.shape[-1] if value.ndim else 1)
    return [_top(kind, row) for row in _spread(rows)]


def _labels(value: Array) -> list[tuple[int, float]]:
    if value.dtype.kind not in "iub":
        return []
    return [(max(int(label), 0), 0.0) for label in _spread(value.reshape(-1))]


def _spread(rows: Array) -> Array:
    return rows if len(rows) <= ROWS else rows[:: -(-len(rows) // ROWS)]


def _top(kind: str, row: Array) -> tuple[int, float]:
    if len(row) == 1:  # of the class 1, against 0
        chance = _sigmoid(float(row[0])) if kind == LOGITS else float(row[0])
        return (1, _within(chance)) if chance >= 0.5 else (0, _within(1 - chance))
    best = int(row.argmax())
    if kind == LOGITS:
        return best, _within(1 / float(np.exp(row - row[best]).sum()))
    return best, _within(float(row[best]))


def _sigmoid(value: float) -> float:
    return 1 / (1 + float(np.exp(-abs(value)))) if value >= 0 else 1 - 1 / (1 + float(np.exp(-abs(value))))


def _within(chance: float) -> float:
    """What is no probability, NaN included, must not spoil a mean."""
    return min(max(chance, 0.0), 1.0) if chance == chance else 0.0  # noqa: PLR0124  NaN
