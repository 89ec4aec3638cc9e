"""One cell's episodes in numbers, alone and in pairs with the baseline's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sqap.evaluation.clusters import bootstrap_interval
from sqap.evaluation.log import Record
from sqap.evaluation.rollout import Episode
from sqap.evaluation.statistics import latency_percentiles, mcnemar_exact, paired_difference, wilson

Records = Mapping[tuple[str, int], Record]  # by task and seed


def summarize_cell(records: Records, tasks: Sequence[str]) -> dict[str, Any] | None:
    """``summary`` of ``docs/ablate.md``; None without records."""
    if not records:
        return None
    episodes = [record.episode for record in records.values()]
    latencies = [latency for episode in episodes for latency in episode.latencies_ms]
    failures = [
        {"task": e.task, "seed": e.seed, "reason": e.failure} for e in episodes if e.failure is not None
    ]
    successes = sum(episode.success for episode in episodes)

    def measure(number: Callable[[Episode], float | None], *, won: bool = False) -> dict[str, Any] | None:
        fit = [e for e in episodes if e.failure is None and (e.success or not won)]
        by_task = [[x for e in fit if e.task == task and (x := number(e)) is not None] for task in tasks]
        return measured([float(np.mean(values)) for values in by_task if values])

    return {
        "episodes": len(episodes),
        "successes": successes,
        "success": successes / len(episodes),
        "success_ci95": list(wilson(successes, len(episodes))),
        "failed": len(failures),
        "failures": failures,
        "tasks": {task: _counts([e for e in episodes if e.task == task]) for task in tasks},
        "completion_steps": measure(lambda e: e.steps, won=True),
        "jerk": measure(lambda e: e.jerk),
        "path_length": measure(lambda e: e.path_length),
        "gripper_flips": measure(lambda e: e.gripper_flips),
        "step_latency_ms": latency_percentiles(latencies),
        "peak_rss_bytes": max(record.peak_rss_bytes for record in records.values()),
        "processors": dict(Counter(record.processor for record in records.values())),
    }


def measured(by_task: Sequence[float]) -> dict[str, Any] | None:
    """The mean of tasks' means with its bootstrap over tasks; None without any."""
    if not by_task:
        return None
    values = np.array([by_task])
    return {"mean": float(values.mean()), "ci95": [float(x) for x in bootstrap_interval(values)[0]]}


def compare_cell(ours: Records, baseline: Records, tasks: Sequence[str]) -> dict[str, Any] | None:
    """``against_baseline`` without Holm's correction, on shared episodes; None without any."""
    shared = [key for key in ours if key in baseline]
    if not shared:
        return None
    a = [ours[key].episode.success for key in shared]
    b = [baseline[key].episode.success for key in shared]
    wins = sum(x and not y for x, y in zip(a, b, strict=True))
    losses = sum(y and not x for x, y in zip(a, b, strict=True))
    difference, low, high = paired_difference(a, b)
    apart = {key: int(x) - int(y) for key, x, y in zip(shared, a, b, strict=True)}
    by_task = [[value for (other, _), value in apart.items() if other == task] for task in tasks]
    clustered = measured([float(np.mean(values)) for values in by_task if values])
    assert clustered is not None
    return {
        "episodes": len(shared),
        "difference": difference,
        "ci95": [low, high],
        "tasks_ci95": clustered["ci95"],
        "wins": wins,
        "losses": losses,
        "mcnemar_p": mcnemar_exact(wins, losses),
    }


def success_by_task(records: Records, tasks: Sequence[str]) -> np.ndarray:
    """``(tasks,)`` shares of success."""
    outcomes = [[r.episode.success for (other, _), r in records.items() if other == task] for task in tasks]
    return np.array([np.mean(each) for each in outcomes])


def _counts(episodes: Sequence[Episode]) -> dict[str, int]:
    return {
        "episodes": len(episodes),
        "successes": sum(e.success for e in episodes),
        "failed": sum(e.failure is not None for e in episodes),
    }
