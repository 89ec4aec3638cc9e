"""What one step of a robot passes to its next step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sqap.errors import InputError


@dataclass(frozen=True, eq=False)
class Memory:
    """What `Policy.step` returns for the next step. The policy itself keeps none of it.

    Args:
        visual: projected visual features ``(cameras, N, width)`` as the decoder read them.
    """

    visual: Tensor

    def change(self, visual: Tensor) -> Tensor:
        """Euclidean distance ``(cameras, N)`` of each token's features to those in memory.

        Raises:
            InputError: the memory is of another policy.
        """
        if visual.shape != self.visual.shape:
            raise InputError(
                f"the memory holds visual features {tuple(self.visual.shape)}, but this policy's are "
                f"{tuple(visual.shape)}: it is of another policy"
            )
        change: Tensor = (visual.float() - self.visual.to(visual.device).float()).norm(dim=-1)
        return change
