"""Which visual tokens go on: three criteria that hold up on a quantized model, and their calibration."""

from sqap.pruning.selector import Selection, Selector, StepPruner

__all__ = ["Selection", "Selector", "StepPruner"]
