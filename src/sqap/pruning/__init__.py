"""Which visual tokens go on: look-ahead, the paper's criteria, their rivals, and calibration."""

from sqap.pruning.selector import Draws, Selection, Selector
from sqap.pruning.step import StepPruner

__all__ = ["Draws", "Selection", "Selector", "StepPruner"]
