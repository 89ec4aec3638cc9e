"""From LeRobot's batches to actions. Nothing here imports LeRobot.

A batch is a dictionary of tensors whose first dimension is the environment: images
``observation.images.<camera>`` or ``observation.image``, float ``(batch, 3, height, width)`` in [0, 1] or
uint8; ``observation.state`` ``(batch, state_dim)`` in the robot's units; ``task``, a list of instructions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sqap import Observation, Policy
from sqap.errors import InputError
from sqap.observation import feature_name
from sqap.pruning.memory import Memory

STATE, TASK = "observation.state", "task"


class Runner:
    """A policy, and what it remembers between the calls of LeRobot's control loop.

    Args:
        policy: original or compressed.
        n_action_steps: how many actions of a chunk are executed before the next.

    Raises:
        InputError: a chunk has fewer actions.
    """

    def __init__(self, policy: Policy, n_action_steps: int) -> None:
        horizon = policy.config.model.head.horizon
        if not 1 <= n_action_steps <= horizon:
            raise InputError(
                f"n_action_steps must be from 1 to {horizon}, the actions of a chunk, got {n_action_steps}"
            )
        self.policy, self.n_action_steps = policy, n_action_steps
        self.reset()

    def reset(self) -> None:
        """Forget the actions that are left, and what the policy remembers of each environment."""
        self._actions: deque[Tensor] = deque()
        self._memories: list[Memory | None] = []

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """A chunk for each environment, ``(batch, horizon, action_dim)`` float32 in robot units.

        The seeds of the policy's noise are drawn from torch's generator: after ``torch.manual_seed`` a run
        repeats.

        Raises:
            InputError: the batch lacks what the policy reads, or holds what no robot gives.
            NonFiniteActionError: the actions would not be finite.
        """
        seen = observations(batch, self.policy)
        if len(self._memories) not in (0, len(seen)):
            raise InputError(
                f"there are {len(seen)} environments now and were {len(self._memories)} before: call reset() "
                "when other episodes begin"
            )
        seeds = torch.randint(0, 2**63 - 1, (len(seen),)).tolist()
        steps = self.policy.steps(seen, seeds=seeds, memories=self._memories or None)
        self._memories = [step.memory for step in steps]
        return torch.from_numpy(np.stack([step.chunk for step in steps]))

    def select(self, batch: Mapping[str, Any]) -> Tensor:
        """The next action of each environment, ``(batch, action_dim)``.

        The policy looks again when ``n_action_steps`` actions of its last chunk were executed.

        Raises:
            SqapError: as `predict`.
        """
        if not self._actions:
            chunk = self.predict(batch)
            self._actions.extend(chunk[:, : self.n_action_steps].unbind(1))
        return self._actions.popleft()


def observations(batch: Mapping[str, Any], policy: Policy) -> list[Observation]:
    """What each environment sees.

    Raises:
        InputError: an image, the state or the instruction is missing or malformed.
    """
    config = policy.config
    images = {camera: _images(batch, feature_name(camera)) for camera in config.cameras}
    count = len(next(iter(images.values())))
    states: Sequence[np.ndarray | None] = [None] * count
    if config.state is not None:
        states = _states(batch, config.state_dim)
    tasks = _tasks(batch, count)
    for what, found in ((STATE, states), *((feature_name(c), found) for c, found in images.items())):
        if len(found) != count:
            raise InputError(f"{what} is of {len(found)} environments, and the first image of {count}")
    return [
        Observation({camera: found[i] for camera, found in images.items()}, tasks[i], states[i])
        for i in range(count)
    ]


def _images(batch: Mapping[str, Any], name: str) -> np.ndarray:
    """Images ``(batch, 3, height, width)`` as the bytes they were, ``(batch, height, width, 3)``."""
    image = batch.get(name)
    if not isinstance(image, Tensor):
        given = ", ".join(
            key for key, value in batch.items() if isinstance(value, Tensor) and value.ndim == 4
        )
        raise InputError(
            f"the policy reads the image {name}, and the batch has {given or 'none'}: name the camera so, or "
            f'map it with --rename_map=\'{{"observation.images.YOURS": "{name}"}}\''
        )
    if image.ndim != 4 or image.shape[1] != 3:
        raise InputError(f"{name} must be of shape (batch, 3, height, width), got {tuple(image.shape)}")
    if image.dtype != torch.uint8:
        low, high = (float(extreme) for extreme in image.aminmax())
        if not (low >= 0 and high <= 1):
            raise InputError(f"{name} must be in [0, 1], got values from {low:g} to {high:g}")
        image = (image * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.permute(0, 2, 3, 1).cpu().numpy())


def _states(batch: Mapping[str, Any], state_dim: int) -> list[np.ndarray]:
    state = batch.get(STATE)
    if not isinstance(state, Tensor):
        raise InputError(
            f"the policy reads the robot's state, {STATE} of {state_dim} numbers, and the batch has none"
        )
    if state.ndim != 2 or state.shape[1] != state_dim:
        raise InputError(f"{STATE} must be of shape (batch, {state_dim}), got {tuple(state.shape)}")
    return list(state.double().cpu().numpy())


def _tasks(batch: Mapping[str, Any], count: int) -> list[str]:
    task = batch.get(TASK)
    tasks = [task] * count if isinstance(task, str) else task
    if not isinstance(tasks, Sequence) or len(tasks) != count or not all(isinstance(t, str) for t in tasks):
        raise InputError(
            f"the policy reads an instruction for each of {count} environments, a list of strings called "
            f"{TASK!r} in the batch, and got {task!r}"
        )
    return list(tasks)
