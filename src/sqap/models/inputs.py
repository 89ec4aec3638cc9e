"""What a model is given for a batch of observations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ModelInputs:
    """Tensors for a batch of observations.

    Args:
        pixels: one ``(batch * cameras, 3, size, size)`` per vision encoder, an observation's images adjacent.
        token_ids: ``(batch, text tokens)``.
        noise: ``(batch, horizon, action_dim)``, of policies that sample their actions.
        proprio: normalised ``(batch, proprio_dim)``, of policies that know the robot's state.

    Their floats may be of any type: the model computes in its own.
    """

    pixels: Sequence[Tensor]
    token_ids: Tensor
    noise: Tensor | None = None
    proprio: Tensor | None = None

    def to(self, place: Callable[[Tensor], Tensor]) -> ModelInputs:
        """The same with its tensors where ``place`` puts them."""
        noise, proprio = (None if x is None else place(x) for x in (self.noise, self.proprio))
        return ModelInputs([place(x) for x in self.pixels], place(self.token_ids), noise, proprio)
