"""How long OpenMP's threads spin before they sleep; imported before PyTorch, whose OpenMP reads it.

A step has hundreds of short parallel loops. Where other programs want the cores too, a thread that they have
displaced is waited for at every loop, and with libgomp's own count a step takes twenty times as long. A third
of it outlasts the time between two loops. With still less, the threads of a step share a core after every
pause (`benchmarks/contention.py`). A program that sets the variable itself, or ``OMP_WAIT_POLICY``, or
imports PyTorch first, is left as it is.
"""

from __future__ import annotations

import os

SPIN_COUNT = "100000"  # about 1 ms by libgomp's own estimate; its default is 300000

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
