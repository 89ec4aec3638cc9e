"""The whole model, its four parts in the order the data takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sqap.models.config import ModelConfig
from sqap.models.decoder import Decoder, TokenPruner
from sqap.models.heads import make_head
from sqap.models.projector import Projector
from sqap.models.vision import VisionEncoder


@dataclass(frozen=True)
class ModelInputs:
    """What the model is given for a batch of observations.

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


class VLA(nn.Module):
    """Pixels and token ids to a normalised action chunk."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder.width
        self.vision = nn.ModuleList(VisionEncoder(c, width) for c in config.vision)
        features = sum(c.width for c in config.vision) * config.pixel_shuffle**2
        self.projector = Projector(features, config.projector)
        widths = (width,) * config.proprio_layers
        self.proprio = Projector(config.proprio_dim, widths) if config.proprio_dim else None
        self.decoder = Decoder(config.decoder)
        self.head = make_head(config.head, config.decoder)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: the type of the decoder's norms, which are never quantized."""
        return self.decoder.norm.weight.dtype

    def forward(self, inputs: ModelInputs, pruner: TokenPruner | None = None) -> Tensor:
        """Normalised actions ``(batch, horizon, action_dim)``."""
        out: Tensor = self.head(self.decoder, self.embed(inputs), inputs.noise, pruner)
        return out

    def embed(self, inputs: ModelInputs) -> Tensor:
        """What the decoder reads: ``(batch, tokens, decoder width)``."""
        return self.sequence(self.see(inputs.pixels, self.language(inputs.token_ids)), inputs)

    def language(self, token_ids: Tensor) -> Tensor | None:
        """The mean text embedding ``(batch * cameras, decoder width)`` that FiLM goes by, if there is any."""
        if not any(vision.film for vision in self.config.vision):
            return None
        return self.decoder.embed(token_ids).mean(1).repeat_interleave(self.config.cameras, dim=0)

    def see(self, pixels: Sequence[Tensor], language: Tensor | None = None) -> Tensor:
        """``(batch * cameras, 3, size, size)`` per encoder to visual tokens ``(batch, N, decoder width)``."""
        features = [encoder(p, language) for encoder, p in zip(self.vision, pixels, strict=True)]
        joined = pixel_shuffle(torch.cat(features, dim=-1), self.config.pixel_shuffle)
        visual: Tensor = self.projector(joined)
        return visual.reshape(-1, self.config.visual_tokens, visual.shape[-1])

    def sequence(self, visual: Tensor, inputs: ModelInputs) -> Tensor:
        """BOS, visual tokens, the robot's state, the other text; before its last token, room for actions.

        With ``image_first``: visual tokens, text, the robot's state.
        """
        text, visual = self.decoder.embed(inputs.token_ids), visual.to(self.dtype)
        state = []
        if self.proprio is not None:
            assert inputs.proprio is not None, "the model reads the robot's state"
            state = [self.proprio(inputs.proprio.to(self.dtype))[:, None].to(text)]
        if self.config.image_first:
            return torch.cat([visual, text, *state], dim=1)
        room = text.new_zeros(len(text), self.head.placeholders, text.shape[-1])
        return torch.cat([text[:, :1], visual, *state, text[:, 1:-1], room, text[:, -1:]], dim=1)

    def prefix(self, sequence: Tensor) -> Tensor:
        """``sequence`` without a state that comes last: it sees the others, and none of them sees it."""
        return sequence[:, :-1] if self.config.image_first else sequence

    def length(self, text_tokens: int) -> int:
        """Tokens in the decoder's sequence, of which it is the `prefix`, for that many text tokens."""
        state = self.proprio is not None and not self.config.image_first
        return self.config.visual_tokens + text_tokens + state + self.head.placeholders


class _NothingDrawn(TorchFunctionMode):
    """Leaves out initial weights: on the meta device drawing them does nothing, after seconds of imports."""

    _DRAWS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, Tensor.uniform_, Tensor.normal_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(config: ModelConfig) -> VLA:
    """A float32 model on the meta device: names and shapes, with weights yet to be read."""
    with torch.device("meta"), _NothingDrawn():
        return VLA(config).float()  # whatever the caller's default type is


def pixel_shuffle(x: Tensor, side: int) -> Tensor:
    """Patches ``(batch, grid * grid, width)`` to squares of them ``(batch, tokens, side * side * width)``."""
    if side == 1:
        return x
    batch, patches, width = x.shape
    grid = math.isqrt(patches) // side
    squares = x.view(batch, grid, side, grid, side, width).transpose(2, 3)
    return squares.reshape(batch, grid * grid, side * side * width)
