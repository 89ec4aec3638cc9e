"""Processes that work beside this one."""

from __future__ import annotations

import operator
import platform
import subprocess
import sys
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


REPEATED = """
import resource, sys, threading
import numpy as np
from sqap.process import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        [np.ones(500_000, np.float32) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = []
thread = threading.Thread(target=lambda: (faults(3), found.append(faults(20))))
thread.start()
thread.join()
print(found[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    kept, usual = (
        int(
            subprocess.run(
                [sys.executable, "-c", REPEATED, how], capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("keep", "usual")
    )
    assert kept < 1000 < usual, "2 MB are 488 pages"
