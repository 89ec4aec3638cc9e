"""What an observation gives to a step, and what a step leaves on the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sqap.models import ModelInputs
from sqap.pruning import Draws, StepPruner
from sqap.pruning.memory import Memory

# Actions (1, horizon, action_dim), and the pruner that has chosen the tokens.
Outcome = tuple[Tensor, StepPruner | None]


@dataclass(frozen=True)
class Given:
    """All that a step is given for one observation; what is left to chance is drawn.

    Args:
        inputs: of the model.
        targets: the end effector in each camera's image, if known; empty if nothing is pruned.
        draws: of each cut and camera (`sqap.pruning.step.draw`); empty if nothing is pruned.
        memory: of the step before.
        generator: of selections that are computed on the CPU in the middle of a step.
    """

    inputs: ModelInputs
    targets: Sequence[tuple[float, float] | None]
    draws: Sequence[Sequence[Draws]]
    memory: Memory | None
    generator: torch.Generator

    def to(self, place: Callable[[Tensor], Tensor]) -> Given:
        """The same with its tensors where ``place`` puts them."""
        return replace(
            self,
            inputs=self.inputs.to(place),
            draws=[[draws.to(place) for draws in row] for row in self.draws],
            memory=None if self.memory is None else Memory(place(self.memory.visual)),
        )

    @property
    def key(self) -> Hashable:
        """What decides which kernels a policy's step runs: its prompt's length, and what is known."""
        known = tuple(target is not None for target in self.targets)
        memory = None if self.memory is None else self.memory.visual.shape
        return self.inputs.token_ids.shape[1], known, memory
