"""Recorded episodes: drawn when a video is written, so that one is no larger than its camera images."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sqap.environments import ControlUnits, Environment
from sqap.evaluation.rollout import Actor, Episode, run_episode
from sqap.observation import Observation
from sqap.processing import ImageSteps, Window, window
from sqap.pruning.selector import Selection

FPS = 20


class Frame(NamedTuple):
    """One moment of an episode: what is seen, the visual tokens in use, the control steps done so far."""

    observation: Observation
    selection: Selection | None
    step: int


@dataclass(frozen=True, eq=False)
class Clip:
    """One recorded episode.

    Args:
        label: what to call the policy.
        ring: inner and outer radius of its protected ring, as shares of a side of what the policy looks at;
            None draws none.
        hz: control steps per simulated second.
        frames: ascending in time, from the first moment to the last.
        episode: how it went.
        camera: whose images are shown, those that the selections are of; None for the observation's first.
        steps: what the policy does to an image; None of them shows it all.
    """

    label: str
    ring: tuple[float, float] | None
    hz: float
    frames: tuple[Frame, ...]
    episode: Episode
    camera: str | None = None
    steps: ImageSteps = ()

    @property
    def ranked(self) -> bool:
        """Whether there are scores to show beside the kept tokens."""
        return any(
            frame.selection is not None and frame.selection.scores is not None for frame in self.frames
        )

    @property
    def seconds(self) -> float:
        """Simulated time until the end."""
        return self.episode.steps / self.hz

    def image(self, frame: Frame) -> np.ndarray:
        """The camera image ``(H, W, 3)`` that is shown of a frame."""
        images = frame.observation.images
        return next(iter(images.values())) if self.camera is None else images[self.camera]

    def window(self, frame: Frame) -> Window:
        """The part of its camera image that the policy looks at."""
        height, width = self.image(frame).shape[:2]
        return window(self.steps, (height, width))

    def at(self, seconds: float) -> Frame:
        """The latest frame not after ``seconds`` of simulated time."""
        # The tiny addition is for 4.1 s at 30 Hz, which in floating point is less than 123 steps.
        after = bisect_right(self.frames, seconds * self.hz + 1e-6, key=lambda frame: frame.step)
        return self.frames[max(after - 1, 0)]


def record_episode(
    policy: Actor,
    env: Environment,
    seed: int,
    *,
    label: str,
    ring: tuple[float, float] | None,
    units: ControlUnits,
    camera: str | None = None,
    steps: ImageSteps = (),
) -> Clip:
    """Run one episode as `evaluation.run_episode` does, and keep `FPS` frames a simulated second.

    Args:
        policy: what acts.
        env: left open.
        seed: of the episode.
        label: what to call the policy in the picture.
        ring: radii of the policy's protected ring, as shares of a side of what the policy looks at; None if
            it has none.
        units: of the environment's actions; tells how long a control step is.
        camera: whose images are shown, the policy's first; None for the environment's first.
        steps: what the policy does to an image.

    Raises:
        InputError: as `run_episode`.
    """
    stride = max(1, round(units.hz / FPS))
    frames: list[Frame] = []

    def watch(observation: Observation, selection: Selection | None, step: int) -> None:
        if frames and frames[-1].step % stride:
            frames.pop()  # only the last frame of all may be off the beat
        frames.append(Frame(observation, selection, step))

    episode = run_episode(policy, env, seed, units=units, watch=watch)
    return Clip(label, ring, units.hz, tuple(frames), episode, camera, steps)
