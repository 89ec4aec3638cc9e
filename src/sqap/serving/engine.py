"""The policy of a server: one thread computes, on whatever waits when it is free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sqap.errors import panics_raise
from sqap.observation import Camera, Observation
from sqap.policy import Policy, Step
from sqap.serving.sessions import Job, Line

WARMUP_STEPS = 2  # allocate and compile what later steps reuse

Outcome = Step | Exception


@dataclass(frozen=True, eq=False)
class Done:
    """One step of the policy for one or several robots.

    Args:
        jobs: whose observations.
        outcomes: what each came to.
        free: when the policy had ended the step before; like the next, seconds of `time.monotonic`.
        began: when it began this one.
        ended: when it had ended it.
    """

    jobs: Sequence[Job]
    outcomes: Sequence[Outcome]
    free: float
    began: float
    ended: float

    def waited(self, job: Job) -> float:
        """Seconds for which a job waited while the policy computed for others."""
        return max(0.0, self.free - job.queued)


class Engine:
    """Gives the policy what waits in the line, batch after batch, in a thread of its own.

    Args:
        policy: its weights are read by `warm_up`.
        line: where jobs wait.
        late: called with every job that waited beyond its deadline, of which nothing is computed.
        done: called with every step.
    """

    def __init__(
        self, policy: Policy, line: Line[Job], late: Callable[[Job], None], done: Callable[[Done], None]
    ) -> None:
        self._policy, self._line, self._late, self._done = policy, line, late, done
        # PyTorch and the kernels keep threads and buffers for each thread that calls them.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._more = asyncio.Event()
        self.began: float | None = None  # of the step that is computed now
        self._free = time.monotonic()  # when the last one ended

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is computed."""
        return self.began is None and not len(self._line)

    async def warm_up(self) -> None:
        """Read the weights and act on noise, so that no robot waits for what happens once."""
        await asyncio.get_running_loop().run_in_executor(self._thread, warm_up, self._policy)

    def wake(self) -> None:
        """Say that something waits."""
        self._more.set()

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._more.wait()
            # The last step's answers leave, and what has arrived is read, before the next step competes.
            await asyncio.sleep(0)
            batch, late = self._line.take()
            if not len(self._line):
                self._more.clear()
            for job in late:
                self._late(job)
            for job in batch:
                job.session.begin(job.request.reset)
            if batch:
                self.began = time.monotonic()
                done = await loop.run_in_executor(self._thread, self._step, batch)
                self.began, self._free = None, done.ended
                self._done(done)

    def _step(self, batch: Sequence[Job]) -> Done:
        """In the policy's thread, as the way there and back is the server's time."""
        began = time.monotonic()
        outcomes = act(self._policy, batch)
        return Done(batch, outcomes, self._free, began, time.monotonic())

    def close(self) -> None:
        """Let the thread end when its step has."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def act(policy: Policy, jobs: Sequence[Job]) -> list[Outcome]:
    """A step for several robots. What is wrong with one observation is the outcome of that one alone."""
    try:
        with panics_raise():
            return list(
                policy.steps(
                    [job.request.observation for job in jobs],
                    seeds=[job.request.seed for job in jobs],
                    memories=[job.session.memory for job in jobs],
                )
            )
    except Exception as problem:  # also a bug, which must end neither the thread nor the others' steps
        if len(jobs) > 1:
            return [outcome for job in jobs for outcome in act(policy, [job])]
        return [problem]


def warm_up(policy: Policy) -> None:
    """Read the weights, and act on noise `WARMUP_STEPS` times."""
    policy.load_weights()
    for _ in range(WARMUP_STEPS):
        policy.step(noise(policy), seed=0)


def noise(policy: Policy, seed: int = 0) -> Observation:
    """An observation of random pixels with all that one can have; what lacks would be warned of."""
    size, state = policy.config.model.vision[0].image_size, policy.config.state_dim
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    camera = Camera(np.array([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1]]), np.eye(4))
    return Observation(
        dict.fromkeys(policy.config.cameras, pixels),
        "warm up",
        np.zeros(state) if state else None,
        dict.fromkeys(policy.config.cameras, camera),
        np.array([0.0, 0.0, 1.0]),
    )
