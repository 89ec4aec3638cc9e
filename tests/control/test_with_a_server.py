"""A control loop whose policy is in another process, which dies and comes back."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np

from sqap.control import ActionLimits, Hold, Loop
from sqap.serving import PolicyClient
from tests.serving.tools import free_port, serving


class Arm:
    """A robot that only counts what it is sent."""

    def __init__(self, observation) -> None:
        self.observe = lambda: observation
        self.sent: list[np.ndarray] = []
        self.stops = 0

    def apply(self, action: np.ndarray) -> None:
        self.sent.append(action)

    def stop(self) -> None:
        self.stops += 1


def test_a_server_killed_and_started_again_is_held_for_and_found_again(saved: Path, observe):
    port, over = free_port(), threading.Event()
    arm = Arm(observe())
    limits = ActionLimits(np.full(4, -5.0), np.full(4, 5.0))

    def wait(condition) -> None:
        until = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.01)

    with PolicyClient(port=port, timeout=1.0) as client:
        loop = Loop(client, arm, 20, limits=limits, hold=Hold(np.zeros(4)))
        running = threading.Thread(target=lambda: loop.run(until=over.is_set))
        try:
            with serving(saved, "--port", port) as (process, _):
                running.start()
                wait(lambda: loop.report.chunks >= 3)
                process.kill()
                process.wait()
                wait(lambda: loop.report.counts["failed"] >= 1 and not arm.sent[-1].any())
            chunks, held = loop.report.chunks, loop.report.held
            assert held > 1
            with serving(saved, "--port", port):
                wait(lambda: loop.report.chunks >= chunks + 3)
                over.set()
                running.join(20)
        finally:
            over.set()
    assert loop.report.stopped is None
    assert arm.stops == 0
    assert any("Unreachable" in fault.what for fault in loop.report.faults)
    assert len(arm.sent) == loop.report.executed + loop.report.held
