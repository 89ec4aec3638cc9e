"""Closed-loop evaluation: `evaluate` runs the episodes, `summarize` says what they show."""

from sqap.evaluation.executors import Run, evaluate
from sqap.evaluation.rollout import Episode, run_episode
from sqap.evaluation.summary import summarize

__all__ = ["Episode", "Run", "evaluate", "run_episode", "summarize"]
