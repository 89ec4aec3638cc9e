"""How long OpenMP's threads spin before they sleep; imported before PyTorch, whose OpenMP reads it.

A step has hundreds of short parallel loops. By default, libgomp's threads spin for milliseconds while they
wait for the next loop or for each other. Where other programs want the cores too, a thread that they have
displaced is then waited for at every loop, and a step takes ten times as long. Shorter spinning still
outlasts the time between two loops. A program that sets the variable itself, or ``OMP_WAIT_POLICY``, or
imports PyTorch first, is left as it is.
"""

from __future__ import annotations

import os

SPIN_COUNT = "10000"  # 0.1 to 0.5 ms, by the processor; 300000 is libgomp's own

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
