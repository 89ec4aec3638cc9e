"""What the page at ``/`` shows: the latest steps, robots and episodes, and what one robot sees."""

from __future__ import annotations

import base64
import io
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sqap.observation import Observation
from sqap.policy import Policy, Step
from sqap.processing import window
from sqap.report.overlay import annotate

PICTURE = 384  # pixels along a side of the camera image as it is shown
LATENCIES, EPISODES = 240, 20


@dataclass
class LiveRobot:
    """What the page knows of a connected robot."""

    name: str
    peer: str
    instruction: str = ""
    episode: int = 1
    steps: int = 0  # of this episode
    began: float = field(default_factory=time.monotonic)
    seen: float = 0.0
    observation: Observation | None = None
    step: Step | None = None


class Live:
    """Collects what happens. What is kept does not grow with time.

    Args:
        policy: whose images and rings are drawn.
    """

    def __init__(self, policy: Policy) -> None:
        self._config, pruning = policy.config, policy.recipe.pruning
        self._ring = pruning.ring if pruning is not None and pruning.method == "sqap" else None
        self._tokens = policy.config.model.visual_tokens
        self.robots: dict[str, LiveRobot] = {}
        self._latencies: deque[dict[str, float]] = deque(maxlen=LATENCIES)
        self._episodes: deque[dict[str, Any]] = deque(maxlen=EPISODES)
        self.changes = 0

    def connect(self, name: str, peer: str) -> None:
        """A robot is there."""
        self.robots[name] = LiveRobot(name, peer)
        self.changes += 1

    def disconnect(self, name: str) -> None:
        """A robot is gone, and its episode over."""
        self._end_episode(self.robots.pop(name))
        self.changes += 1

    def acted(
        self, name: str, reset: bool, observation: Observation, step: Step, timing: dict[str, float]
    ) -> None:
        """A robot got its actions; ``timing`` is that of the reply."""
        robot = self.robots.get(name)
        if robot is None:
            return
        if reset and robot.steps:
            self._end_episode(robot)
            robot.episode, robot.steps, robot.began = robot.episode + 1, 0, time.monotonic()
        robot.steps, robot.seen, robot.instruction = (
            robot.steps + 1,
            time.monotonic(),
            observation.instruction,
        )
        robot.observation, robot.step = observation, step
        self._latencies.append(timing)
        self.changes += 1

    def shown(self, wanted: str | None) -> LiveRobot | None:
        """The robot of that name, or the one that acted last; None if there is none."""
        return self.robots.get(wanted or "") or max(
            self.robots.values(), key=lambda robot: robot.seen, default=None
        )

    def state(self) -> dict[str, Any]:
        """Plain data for the page."""
        now = time.monotonic()
        return {
            "latencies": list(self._latencies),
            "episodes": list(self._episodes)[::-1],
            "robots": [
                {
                    "name": robot.name,
                    "peer": robot.peer,
                    "instruction": robot.instruction,
                    "episode": robot.episode,
                    "steps": robot.steps,
                    "idle_s": round(now - (robot.seen or robot.began), 1),
                }
                for robot in self.robots.values()
            ],
        }

    def picture(self, name: str, observation: Observation, step: Step) -> dict[str, Any]:
        """What a robot's first camera saw, with the tokens that were kept; takes milliseconds."""
        selection, image = step.selection, observation.images[self._config.cameras[0]]
        height, width = image.shape[:2]
        view = window(self._config.images[0], (height, width))
        drawn = annotate(image, selection, PICTURE, self._ring, view)
        kept = self._tokens if selection is None else sum(len(s.kept) for s in step.selections)
        return {"name": name, "kept": kept, "tokens": self._tokens, "image": _jpeg(drawn)}

    def _end_episode(self, robot: LiveRobot) -> None:
        if robot.steps:
            seconds = round(time.monotonic() - robot.began, 1)
            self._episodes.append(
                {
                    "robot": robot.name,
                    "episode": robot.episode,
                    "instruction": robot.instruction,
                    "steps": robot.steps,
                    "seconds": seconds,
                }
            )


def _jpeg(pixels: Any) -> str:
    """A data URL."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
