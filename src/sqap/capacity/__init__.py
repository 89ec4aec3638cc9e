"""How many servers a number of robots needs. Needs the extra: ``pip install "sqap[serve]"``."""

from sqap.capacity.planning import plan
from sqap.capacity.simulation import Load, simulate
from sqap.capacity.steps import StepTimes, measure, read_times

__all__ = ["Load", "StepTimes", "measure", "plan", "read_times", "simulate"]
