"""The smallest number of replicas that holds a 99th percentile of latency."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from sqap.capacity.simulation import Load, Tally, simulate
from sqap.capacity.steps import StepTimes
from sqap.errors import InputError
from sqap.serving.settings import Limits

REPLICATIONS = 10
STUDENT_T = 2.262  # at 97.5 %, of REPLICATIONS - 1 degrees of freedom
OBSERVATIONS = 5_000  # of all robots in one replication, or more where one of these is longer:
PERIODS, STEPS = 20, 200
WARM_UP = 0.25  # of a replication's length, before it


def plan(
    load: Load,
    times: StepTimes,
    limits: Limits,
    p99_s: float,
    *,
    most: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Simulate more and more replicas until the 99th percentile holds, then look for the fewest that do.

    An observation that is not acted on counts as one that is never answered. The percentile is the mean over
    replications, in each of which the robots' periods begin at other times. It holds if the upper end of its
    95 % interval does.

    Args:
        load: the robots.
        times: of the policy's steps.
        limits: of each replica.
        p99_s: what the 99th percentile may be.
        most: replicas that are tried; as many as robots if None.
        seed: of everything that is drawn.
        progress: gets (replications done, replications known to be needed).

    Returns:
        Plain data: ``rows`` by the number of replicas, and ``replicas``, None where none of them hold.

    Raises:
        InputError: ``p99_s`` or ``most`` is not positive.
    """
    if not 0 < p99_s < math.inf:
        raise InputError(f"the 99th percentile to hold must be a positive number, got {p99_s}")
    most = load.robots if most is None else most
    if most < 1:
        raise InputError(f"at least one replica must be tried, got {most}")
    seconds = max(OBSERVATIONS / (load.robots * load.rate_hz), PERIODS / load.rate_hz, STEPS * times.mean(1))
    rows: dict[int, dict[str, Any]] = {}

    def holds(replicas: int) -> bool:
        if replicas not in rows:
            runs = []
            for replication in range(REPLICATIONS):
                drawn = np.random.SeedSequence([seed, replicas, replication])
                runs.append(simulate(load, times, limits, replicas, seconds, WARM_UP * seconds, drawn))
                if progress is not None:
                    progress(len(rows) * REPLICATIONS + replication + 1, (len(rows) + 1) * REPLICATIONS)
            rows[replicas] = _row(runs, load, replicas, seconds, p99_s)
        return bool(rows[replicas]["holds"])

    found = _fewest(holds, most)
    return {
        "load": asdict(load),
        "limits": {"batch": limits.batch, "waiting": limits.waiting},
        "p99_ms": 1e3 * p99_s,
        "seed": seed,
        "replications": REPLICATIONS,
        "seconds": seconds,
        "warm_up_s": WARM_UP * seconds,
        "step_ms": times.to_json(),
        "rows": [rows[n] for n in sorted(rows)],
        "replicas": found,
    }


def _fewest(holds: Callable[[int], bool], most: int) -> int | None:
    """The smallest number up to ``most`` that holds, where more hold if fewer do: doubled, then bisected."""
    low, high = 0, 1
    while not holds(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _row(runs: list[Tally], load: Load, replicas: int, seconds: float, p99_s: float) -> dict[str, Any]:
    """What the replications say together."""
    sent = sum(run.outcomes.total() for run in runs)
    p50, p99 = ([_percentile(run, q) for run in runs] for q in (50, 99))
    middle, half = float(np.mean(p99)), 0.0
    if math.isfinite(middle):
        half = STUDENT_T * float(np.std(p99, ddof=1)) / math.sqrt(len(runs))
    return {
        "replicas": replicas,
        "p50_ms": _ms(float(np.mean(p50))),
        "p99_ms": _ms(middle),
        "p99_ci95_ms": [_ms(middle - half), _ms(middle + half)],
        "p99_worst_ms": _ms(max(p99)),
        "unanswered": {
            name: sum(run.outcomes[name] for run in runs) / sent for name in ("refused", "superseded", "late")
        },
        "utilisation": sum(run.busy for run in runs) / (seconds * replicas * len(runs)),
        "robots_a_step": float(np.mean([size for run in runs for size in run.batches])),
        "rate_hz": sent / (seconds * load.robots * len(runs)),
        "holds": middle + half <= p99_s,
    }


def _percentile(run: Tally, q: float) -> float:
    """Of the latency of all observations, which is infinite where one is not acted on."""
    lost = run.outcomes.total() - len(run.latencies)
    # One of them, since nothing lies between a number and infinity.
    return float(np.percentile([*run.latencies, *[np.inf] * lost], q, method="higher"))


def _ms(seconds: float) -> float | None:
    return round(1e3 * seconds, 3) if math.isfinite(seconds) else None
