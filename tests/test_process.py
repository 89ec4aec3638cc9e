"""Processes that work beside this one."""

from __future__ import annotations

import operator
import time
from typing import Any

import pytest

from sqap.process import Worker


def make(spec: Any) -> Any:
    return operator.neg if spec == "negate" else time.sleep


@pytest.mark.parametrize("busy", [False, True])
def test_a_process_that_is_closed_leaves_in_good_order(busy: bool) -> None:
    """Killed, it would leave behind what its libraries hold: semaphores, of which Python warns at the end."""
    worker = Worker("a", make, "sleep" if busy else "negate")
    worker.request(0 if busy else 3)
    assert worker.receive() == (None if busy else -3)
    if busy:
        worker.request(3600)
    worker.close()
    assert worker._process is not None
    assert worker._process.exitcode == 0
    worker.close()
