"""A control loop at a fixed rate, which computes the next chunk while it executes the last."""

from sqap.control.loop import Fault, Loop, Report, Robot
from sqap.control.plan import Hold, Limits, Plan

__all__ = ["Fault", "Hold", "Limits", "Loop", "Plan", "Report", "Robot"]
