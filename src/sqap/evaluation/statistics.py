"""Intervals and tests for success counts, and how smooth a motion is. Closed forms, no dependencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from sqap.errors import InputError

TRANSLATION = 3  # an action's leading entries: the gripper's displacement in x, y, z


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of one proportion (Wilson, 1927). It never leaves [0, 1] and holds for small ``n``.

    Raises:
        InputError: there are no trials, or more successes than trials.
    """
    if not 0 <= successes <= n or n == 0:
        raise InputError(f"an interval needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = _quantile(confidence)
    p = successes / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # At the ends the bound is 0 or 1 by algebra, but not in floating point.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return low, high


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided p-value that two paired policies succeed equally often.

    Only the discordant pairs count: under the null hypothesis ``wins`` is binomial with probability 1/2.
    """
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / (1 << n))


def paired_difference(
    a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Difference of two paired proportions, mean(a) - mean(b), and its interval ``(diff, low, high)``.

    The interval is Bonett and Price's adjusted Wald interval (2012, "Adjusted Wald confidence interval for
    a difference of binomial proportions based on paired data", Journal of Educational and Behavioral
    Statistics 37), one of two that Fagerland, Lydersen and Laake (2014) recommend for small samples. Its
    center is drawn towards zero, so it is not symmetric around the difference.

    Raises:
        InputError: the lists are empty or differ in length.
    """
    n = len(a)
    if n == 0 or n != len(b):
        raise InputError(f"a paired difference needs equally many outcomes of both, got {n} and {len(b)}")
    wins = sum(x and not y for x, y in zip(a, b, strict=True))
    losses = sum(y and not x for x, y in zip(a, b, strict=True))
    p_win, p_loss = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    center = p_win - p_loss
    half = _quantile(confidence) * math.sqrt((p_win + p_loss - center**2) / (n + 2))
    return (wins - losses) / n, max(-1.0, center - half), min(1.0, center + half)


def percentile(values: Sequence[float], q: float) -> float | None:
    """The ``q``-th percentile, 0 to 100, interpolated linearly; None of no values."""
    return float(np.percentile(values, q)) if values else None


def latency_percentiles(milliseconds: Sequence[float]) -> dict[str, float | None]:
    """``p50``, ``p95`` and ``p99`` of latencies, as reports name them; None of no latencies."""
    return {f"p{q}": percentile(milliseconds, q) for q in (50, 95, 99)}


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of no values."""
    return math.fsum(values) / len(values) if values else None


def jerk(actions: np.ndarray, metres: float = 1.0, hz: float = 1.0) -> float:
    """Mean length of the third derivative of the commanded gripper position: less is smoother.

    An action is a displacement, so the position's third difference is the action's second.

    Args:
        actions: ``(steps, action_dim)`` as executed; the first three entries are the displacement.
        metres: what one unit of an action moves the gripper's target by in a control step.
        hz: control steps per second.

    Returns:
        m/s^3, or action units per step^3 if ``metres`` and ``hz`` are left at 1. Zero for fewer than three
        actions, which have no third derivative.
    """
    if len(actions) < 3:
        return 0.0
    third = np.diff(np.asarray(actions, dtype=np.float64)[:, :TRANSLATION], n=2, axis=0)
    return float(np.linalg.norm(third, axis=1).mean() * metres * hz**3)


def path_length(actions: np.ndarray, metres: float = 1.0) -> float:
    """How far the gripper was told to move, in metres, or in action units if ``metres`` is left at 1.

    Args:
        actions: as of `jerk`.
        metres: likewise.
    """
    moved = np.asarray(actions, dtype=np.float64)[:, :TRANSLATION]
    return float(np.linalg.norm(moved, axis=1).sum() * metres)


def flips(commands: np.ndarray) -> int:
    """How often the sign of ``commands`` ``(steps,)`` changes; zero is of no sign and changes none."""
    signs = np.sign(commands)[np.sign(commands) != 0]
    return int((signs[1:] != signs[:-1]).sum())


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def pairs_needed(change: float, discordance: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Pairs that show a ``change`` of success with this ``power``, by McNemar's test at level ``alpha``.

    Connor's formula (1987, "Sample size for testing differences in proportions for the paired-sample design",
    Biometrics 43).

    Args:
        change: difference of the two proportions, not zero.
        discordance: share of pairs of which one alone succeeds; at least the change.
        alpha: two-sided.
        power: chance to see it.

    Raises:
        InputError: a share is out of range.
    """
    size = abs(change)
    if not 0 < size <= discordance <= 1:
        raise InputError(
            f"a change of {change} needs a discordance from its size to 1, and not to be 0; got {discordance}"
        )
    z, beta = _quantile(1 - alpha), NormalDist().inv_cdf(power)
    root = z * math.sqrt(discordance) + beta * math.sqrt(discordance - size**2)
    return math.ceil((root / size) ** 2)


def detectable(pairs: int, discordance: float, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest change that so many pairs show, by `pairs_needed`; None if they show none at all."""
    if discordance == 0 or pairs_needed(discordance, discordance, alpha, power) > pairs:
        return None
    low, high = 0.0, discordance
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (
            (low, middle) if pairs_needed(middle, discordance, alpha, power) <= pairs else (middle, high)
        )
    return high
