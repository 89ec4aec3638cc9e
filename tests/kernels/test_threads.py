"""Idle teams of OpenMP's threads, which would slow down whichever thread acts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")

COUNT = """
import os
import numpy as np, torch
import sqap
from sqap.control import ActionLimits, Loop
from sqap.kernels.cpu import release_threads

def threads():
    return len(os.listdir("/proc/self/task"))

def team():  # of the calling thread, all of which then exists
    before = threads()
    torch.ones(2**20).mul_(2)
    return threads() - before

torch.set_num_threads(2)
"""


def in_a_process(code: str) -> list[int]:
    """Numbers that a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT + code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_threads_that_were_released_are_gone_and_come_back() -> None:
    first, left, second = in_a_process(
        """
alone = threads()
print(team())
release_threads()
print(threads() - alone)
print(team())
"""
    )
    assert (first, left, second) == (1, 0, 1)


def test_loading_a_policy_leaves_the_thread_without_a_team() -> None:
    opened, read = in_a_process(
        """
alone = threads()
policy = sqap.load("reference")
print(threads() - alone)
policy.load_weights()
print(threads() - alone)
"""
    )
    assert (opened, read) == (0, 0)


def test_a_control_loop_releases_the_threads_of_its_own_thread() -> None:
    before, during = in_a_process(
        """
class Still:
    def observe(self): return None
    def apply(self, action): pass
    def stop(self): pass

class Counting:
    def step(self, observation, *, seed=None, memory=None):
        print(threads() - alone - 1)  # but for the thread that acts
        return sqap.policy.Step(np.zeros((8, 4), np.float32))

alone = threads()
print(team())
Loop(Counting(), Still(), rate_hz=1000, limits=ActionLimits(-np.ones(4), np.ones(4)), hold=None).run(ticks=4)
"""
    )[:2]
    assert (before, during) == (1, 0)


def test_a_server_releases_the_threads_of_its_event_loop() -> None:
    before, after = in_a_process(
        """
import asyncio
from sqap.serving import ServerSettings
from sqap.serving.engine import warm_up
from sqap.serving.service import Service

policy = sqap.load("reference")
alone = threads()
warm_up(policy)
print(threads() - alone)

async def start():
    await Service(policy, ServerSettings()).start()
    print(threads() - alone)  # the thread that acts, and its team

asyncio.run(start())
"""
    )
    assert (before, after) == (1, 2)


SPIN_WHEN_PYTORCH_LOADS = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))

sys.meta_path.insert(0, Watch())
import sqap
"""


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "100000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, "None"),
    ],
)
def test_threads_spin_briefly_unless_the_environment_says_how_long(given: dict[str, str], found: str) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", SPIN_WHEN_PYTORCH_LOADS],
        env=clean | given,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.split() == [found]
