"""Benchmarks are scripts that import their neighbours, so their folder goes on the path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
