"""An evaluation's numbers as plain data for a JSON file."""

from __future__ import annotations

from typing import Any

from sqap.evaluation.executors import Run
from sqap.evaluation.statistics import latency_percentiles, mcnemar_exact, mean, paired_difference, wilson


def summarize(run: Run, against: Run | None = None) -> dict[str, Any]:
    """The success, smoothness, speed and memory of a policy, and of a rival on the same episodes.

    Keys: ``policy``, ``env``, ``seed``; ``ensemble``, chunks averaged into each action, None if whole chunks
    were executed; ``tasks``, name -> ``successes`` and ``episodes``; ``success``, the share, and
    ``success_ci95``, its Wilson interval; ``completion_steps``, mean control steps of the successful
    episodes, None if there are none; ``jerk``, mean over all episodes; ``step_latency_ms`` with ``p50``,
    ``p95`` and ``p99`` of the policy's calls, without each process's first two; ``peak_rss_bytes`` of the
    process, simulator included; ``from_log``, how many ``episodes`` were not run now but came from the log,
    and when the ``first`` and the ``last`` of them had finished, None if no log says. With a rival,
    ``against`` holds the same keys for it, and ``difference``,
    success of ``run`` minus the rival's, ``difference_ci95`` and ``mcnemar_p``, all paired.
    """
    summary = _one(run)
    if against is not None:
        summary["against"] = _one(against) | _paired(run, against)
    return summary


def _one(run: Run) -> dict[str, Any]:
    episodes = [record.episode for record in run.records]
    latencies = [latency for episode in episodes for latency in episode.latencies_ms]
    tasks: dict[str, dict[str, int]] = {}
    for episode in episodes:
        count = tasks.setdefault(episode.task, {"successes": 0, "episodes": 0})
        count["successes"] += episode.success
        count["episodes"] += 1
    successes = sum(episode.success for episode in episodes)
    return {
        "policy": run.policy,
        "env": run.env,
        "seed": run.seed,
        "ensemble": run.records[0].settings.ensemble,
        "tasks": tasks,
        "success": successes / len(episodes),
        "success_ci95": list(wilson(successes, len(episodes))),
        "completion_steps": mean([episode.steps for episode in episodes if episode.success]),
        "jerk": mean([episode.jerk for episode in episodes if episode.jerk is not None]),
        "step_latency_ms": latency_percentiles(latencies),
        "peak_rss_bytes": max(record.peak_rss_bytes for record in run.records),
        "from_log": _from_log(run),
    }


def _from_log(run: Run) -> dict[str, Any]:
    dates = sorted(record.finished for record in run.from_log if record.finished)
    return {
        "episodes": len(run.from_log),
        "first": dates[0] if dates else None,
        "last": dates[-1] if dates else None,
    }


def from_log_line(*runs: Run) -> str | None:
    """How many episodes of all runs came from the log, and of when; None if none did."""
    reused = [record for run in runs for record in run.from_log]
    if not reused:
        return None
    dates = sorted(record.finished[:16].replace("T", " ") for record in reused)
    period = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    total = sum(len(run.records) for run in runs)
    return f"{len(reused)} of {total} episodes are from the log of {period} UTC and were not run again"


def _paired(run: Run, against: Run) -> dict[str, Any]:
    outcomes = [
        (a.episode.success, b.episode.success) for a, b in zip(run.records, against.records, strict=True)
    ]
    wins = sum(a and not b for a, b in outcomes)
    losses = sum(b and not a for a, b in outcomes)
    difference, low, high = paired_difference([a for a, _ in outcomes], [b for _, b in outcomes])
    return {
        "difference": difference,
        "difference_ci95": [low, high],
        "mcnemar_p": mcnemar_exact(wins, losses),
    }
