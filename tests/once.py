"""What several processes of pytest-xdist need, made by one of them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A file or directory of this run of pytest, which ``make(path)`` makes in the process that asks first.

    The others wait for it. Where it fails, the next process tries again.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all processes
    place = base / name
    with (base / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            unfinished = base / f".{name}"
            make(unfinished)
            unfinished.rename(place)
    return place
