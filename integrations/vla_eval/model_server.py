# /// script
# requires-python = ">=3.10"
# dependencies = ["vla-eval>=0.8,<0.9", "sqap[serve]"]
#
# [tool.uv.sources]
# sqap = { path = "../.." }
# ///
"""A model server of vla-eval for any policy that sqap loads: python model_server.py --args.policy=DIR

README.md beside this file says how it is used, and what was verified.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import run_server
from vla_eval.specs import (
    GRIPPER_CLOSE_POS,
    GRIPPER_RAW,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    RAW,
    ROTATION_AA,
    DimSpec,
)

import sqap
from sqap import Observation, Policy
from sqap.checkpoints import locate, native
from sqap.environments.vla_eval_conversion import WIDTH, Conversion
from sqap.errors import InputError, SqapError
from sqap.evaluation.ensemble import AdaptiveEnsemble
from sqap.evaluation.rollout import noise_seed, own_execute
from sqap.observation import find_camera
from sqap.policy import Step
from sqap.pruning.memory import Memory
from sqap.serving.engine import warm_up
from sqap.serving.metadata import action_dim

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class EpisodeState:
    """What is kept of an episode from one step of the policy to the next."""

    seed: int
    ensemble: AdaptiveEnsemble | None
    memory: Memory | None = None
    calls: int = 0


class SqapModelServer(PredictModelServer):
    """Serves one policy to any number of shards, whose observations are batched.

    Args:
        policy: a directory, a repository of the Hugging Face hub, or the name of a bundled policy.
        choices: arguments of `sqap.load`, for a published policy; one of sqap's own has its own.
        device: where it acts: ``"cpu"`` or ``"cuda"``.
        execute: actions of a chunk that are executed before the next; None for as many as the policy says,
            or all.
        ensemble: chunks whose predictions are averaged by CogACT's adaptive ensemble, a step for every
            action; None executes chunks.
        cameras: image of the harness by camera of the policy. None takes those of the same names, or else
            the harness's in their order.
        state_format: what vla-eval calls the state that the policy was trained on, for its check.
        rotation: whether actions' rotations are Euler angles (``"euler"``), which are turned into the
            rotation vectors that controllers take, or such vectors already (``"axis_angle"``).
        gripper: ``"as_is"``, or ``"close_positive"`` to turn 0, closed, and 1, open, into 1 and -1.
        observation_params: parameters of the benchmark that belong to the policy.
        seed: of the diffusion noise, with the task's name and the number of the episode.
        options: as of vla-eval's `PredictModelServer`, ``max_batch_size`` and ``max_wait_time`` for instance.

    Raises:
        InputError: ``execute`` or ``ensemble`` do not suit the policy's chunks, the actions have no rotation
            or gripper to convert, or ``cameras`` are not the policy's.
    """

    def __init__(
        self,
        policy: str,
        *,
        choices: dict[str, Any] | None = None,
        device: str = "cpu",
        execute: int | None = None,
        ensemble: int | None = None,
        cameras: dict[str, str] | None = None,
        state_format: str | None = None,
        rotation: Literal["axis_angle", "euler"] = "axis_angle",
        gripper: Literal["as_is", "close_positive"] = "as_is",
        observation_params: dict[str, Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.policy = load(policy, choices or {}).to(device)
        horizon = self.policy.config.model.head.horizon
        for name, value in (("execute", execute), ("ensemble", ensemble)):
            if value is not None and not 1 <= value <= horizon:
                raise InputError(f"{name} must be from 1 to {horizon}, the actions of a chunk, got {value}")
        if execute is not None and ensemble is not None:
            raise InputError("an ensemble executes one action of each chunk; leave execute out")
        if cameras is not None and set(cameras) != set(self.policy.config.cameras):
            raise InputError(
                f"cameras must be of the policy's {self.policy.config.cameras}, got {sorted(cameras)}"
            )
        self._width, self._conversion = (
            action_dim(self.policy),
            Conversion(rotation=rotation, gripper=gripper),
        )
        self._conversion.action(np.zeros(self._width))  # refused now rather than in an episode
        chunk = None if ensemble is not None else execute or own_execute(self.policy) or horizon
        super().__init__(chunk_size=chunk, **options)
        self._ensemble, self._cameras, self._state_format = ensemble, cameras, state_format
        self._seed = seed
        self._params = observation_params or {}
        self._episodes: dict[str, EpisodeState] = {}
        self._order_said = False
        warm_up(self.policy)  # vla-eval accepts connections as soon as this returns

    def get_observation_params(self) -> dict[str, Any]:
        params: dict[str, Any] = {}
        if self.policy.config.state is not None:
            params["send_state"] = True
        if len(self.policy.config.cameras) > 1:
            params["send_wrist_image"] = True
        return params | self._params

    def get_observation_spec(self) -> dict[str, DimSpec]:
        config = self.policy.config
        names = [(self._cameras or {}).get(camera, camera) for camera in config.cameras]
        spec = dict.fromkeys(names, IMAGE_RGB) | {"language": LANGUAGE}
        if config.state is not None:
            spec["state"] = DimSpec("state", config.state_dim or 0, self._state_format or "unstated")
        return spec

    def get_action_spec(self) -> dict[str, DimSpec]:
        if self._width != WIDTH:
            return {"actions": RAW}
        gripper = GRIPPER_RAW if self._conversion.gripper == "as_is" else GRIPPER_CLOSE_POS
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": gripper}

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        task = config.get("task", {})
        name, index = str(task.get("name", "")), int(task.get("episode_idx", 0))
        ensemble = None if self._ensemble is None else AdaptiveEnsemble(self._ensemble)
        self._episodes[ctx.session_id] = EpisodeState(episode_seed(self._seed, name, index), ensemble)
        await super().on_episode_start(config, ctx)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        self._episodes.pop(ctx.session_id, None)
        await super().on_episode_end(result, ctx)

    def predict_batch(
        self, obs_batch: list[dict[str, Any]], ctx_batch: list[SessionContext]
    ) -> list[dict[str, Any]]:
        episodes = [self._episode(ctx) for ctx in ctx_batch]
        steps = self.policy.steps(
            [self._observation(seen) for seen in obs_batch],
            seeds=[noise_seed(episode.seed, episode.calls) for episode in episodes],
            memories=[episode.memory for episode in episodes],
        )
        return [
            {"actions": self._actions(episode, step)} for episode, step in zip(episodes, steps, strict=True)
        ]

    def _episode(self, ctx: SessionContext) -> EpisodeState:
        if ctx.session_id not in self._episodes:
            raise InputError("an observation came before the start of its episode")
        return self._episodes[ctx.session_id]

    def _observation(self, seen: Mapping[str, Any]) -> Observation:
        state = seen.get("states", seen.get("state")) if self.policy.config.state is not None else None
        images = self._images(seen.get("images", {}))
        return Observation(images, str(seen.get("task_description", "")), state)

    def _images(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        cameras = self.policy.config.cameras
        names: Sequence[str | None]
        if self._cameras is not None:
            names = [self._cameras[camera] for camera in cameras]
        else:
            names = [find_camera(camera, found) for camera in cameras]
            if None in names and len(found) >= len(cameras):
                names = list(found)[: len(cameras)]
                if not self._order_said:
                    logger.warning("cameras %s are %s of the benchmark, by order", cameras, names)
                    self._order_said = True
        lacking = [c for c, name in zip(cameras, names, strict=True) if name is None or name not in found]
        if lacking:
            sent = ", ".join(found) or "no image"
            raise InputError(
                f"the policy reads {', '.join(lacking)}, and the benchmark sends {sent}; say which is which "
                "by cameras, and what the benchmark is to send by observation_params"
            )
        return {camera: found[str(name)] for camera, name in zip(cameras, names, strict=True)}

    def _actions(self, episode: EpisodeState, step: Step) -> np.ndarray:
        """A chunk, or one action of an ensemble, as the benchmark takes it."""
        episode.memory, episode.calls = step.memory, episode.calls + 1
        actions = step.chunk if episode.ensemble is None else episode.ensemble.add(step.chunk)
        return self._conversion.action(actions)


def load(source: str, choices: Mapping[str, Any]) -> Policy:
    """A policy. What is chosen of a published one is part of sqap's own, where it is left out."""
    if choices and native.is_policy(locate(source)):
        logger.info("%s is sqap's own, whose choices were made with it: %s are left out", source, choices)
        choices = {}
    return sqap.load(source, **choices)


def episode_seed(seed: int, task: str, index: int) -> int:
    """Seed of an episode's noise, the same for every policy."""
    return int(np.random.SeedSequence((seed, zlib.crc32(task.encode()), index)).generate_state(1)[0])


if __name__ == "__main__":
    try:
        run_server(SqapModelServer)
    except SqapError as error:
        sys.exit(f"error: {error}")
