"""How fast a policy steps and what memory it takes, beside the same policy in other forms."""

from sqap.benchmark.candidates import CANDIDATES, Subject
from sqap.benchmark.latency import bench
from sqap.benchmark.shapes import SHAPES

__all__ = ["CANDIDATES", "SHAPES", "Subject", "bench"]
