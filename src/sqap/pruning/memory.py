"""What a step leaves to the next one of the same robot."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sqap.errors import InputError


@dataclass(frozen=True, eq=False)
class Memory:
    """What `Policy.step` returns for the next step. It is a value: the policy keeps none of it.

    Args:
        visual: projected visual features ``(cameras, N, width)`` as the decoder read them.
    """

    visual: Tensor

    def change(self, visual: Tensor) -> Tensor:
        """How far each token has moved since, ``(cameras, N)``: the Euclidean distance of its features.

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
