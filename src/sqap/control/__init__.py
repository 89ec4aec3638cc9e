"""A control loop at a fixed rate, which computes the next chunk while it executes the last."""

from sqap.control.loop import Fault, Loop, Report, Robot
from sqap.control.plan import ActionLimits, Hold, Plan

__all__ = ["ActionLimits", "Fault", "Hold", "Loop", "Plan", "Report", "Robot"]
