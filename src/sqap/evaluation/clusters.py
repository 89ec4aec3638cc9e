"""Intervals and tests for means over tasks: episodes of one task are alike, so tasks are drawn anew."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
EXACT = 14  # tasks, up to which all patterns of signs are tried: 2^14
SEED = 0


def bootstrap_interval(
    values: np.ndarray, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = SEED
) -> np.ndarray:
    """Percentile intervals ``(rows, 2)`` of the means of ``values`` ``(rows, tasks)``.

    Tasks are drawn with replacement, the same ones for all rows. The mean weighs tasks equally, however many
    episodes each has; with few tasks the interval is coarse and somewhat too narrow.
    """
    tasks = values.shape[1]
    drawn = np.random.default_rng(seed).integers(tasks, size=(resamples, tasks))
    weights = np.apply_along_axis(np.bincount, 1, drawn, minlength=tasks) / tasks
    tail = (1 - confidence) / 2
    intervals: np.ndarray = np.quantile(values @ weights.T, (tail, 1 - tail), axis=1).T
    return intervals


def sign_flip(values: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Two-sided p-values ``(rows,)`` that the means of ``values`` ``(rows, tasks)`` are zero.

    Under that hypothesis each task's value is as likely to have the other sign (Fisher's randomisation test).
    All patterns of signs are tried for up to `EXACT` tasks, random ones, and the one observed, for more.
    """
    tasks = values.shape[1]
    if tasks <= EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=tasks)))
    else:
        drawn = np.random.default_rng(seed).choice((1.0, -1.0), size=(resamples, tasks))
        signs = np.concatenate([np.ones((1, tasks)), drawn])
    observed = np.abs(values.sum(1))
    # In blocks, since a study may have hundreds of rows. Sums that are equal by algebra count as equal.
    found = [
        (np.abs(row @ signs.T) >= seen - 1e-9 * max(1.0, seen)).mean()
        for row, seen in zip(values, observed, strict=True)
    ]
    return np.array(found)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction: adjusted p-values, in the order of those given."""
    count = len(p_values)
    order = sorted(range(count), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * count, 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
