"""Closed-loop evaluation: `evaluate` runs the episodes, `summarize` says what they show."""

from sqap.evaluation.ensemble import AdaptiveEnsemble
from sqap.evaluation.executors import Run, evaluate
from sqap.evaluation.rollout import Episode, run_episode
from sqap.evaluation.summary import summarize

__all__ = ["AdaptiveEnsemble", "Episode", "Run", "evaluate", "run_episode", "summarize"]
