"""The whole model, its four parts in the order the data takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sqap.models.config import ModelConfig
from sqap.models.decoder import Decoder
from sqap.models.heads import make_head
from sqap.models.layout import Layout
from sqap.models.projector import Projector
from sqap.models.stream import Stream, TokenPruner
from sqap.models.through import Through, direct
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

    def to(self, device: torch.device) -> ModelInputs:
        """The same on another device, which is not waited for unless it is the CPU."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=device.type != "cpu")

        noise, proprio = (None if x is None else move(x) for x in (self.noise, self.proprio))
        return ModelInputs([move(x) for x in self.pixels], move(self.token_ids), noise, proprio)


class VLA(nn.Module):
    """Pixels and token ids to a normalised action chunk."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder.width
        self.vision = nn.ModuleList(VisionEncoder(c, width) for c in config.vision)
        features = sum(c.width for c in config.vision) * config.pixel_shuffle**2
        self.projector = Projector(features, config.projector, config.projector_bias)
        widths = (width,) * config.proprio_layers
        self.proprio = Projector(config.proprio_dim, widths) if config.proprio_dim else None
        self.decoder = Decoder(config.decoder)
        self.head = make_head(config.head, config.decoder)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: the type of the decoder's norms, which are never quantized."""
        return self.decoder.norm.weight.dtype

    @property
    def sensitive(self) -> tuple[str, ...]:
        """Paths of the linears that its head calls sensitive."""
        return tuple(f"head.{key}" for key in self.head.sensitive)

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        return self.decoder.norm.weight.device

    def forward(self, inputs: ModelInputs, pruner: TokenPruner | None = None) -> Tensor:
        """Normalised actions ``(batch, horizon, action_dim)``."""
        (out,) = self.run([inputs], pruners=[pruner])
        return out

    def run(
        self,
        inputs: Sequence[ModelInputs],
        through: Through = direct,
        pruners: Sequence[TokenPruner | None] | None = None,
    ) -> list[Tensor]:
        """`forward` of several inputs, stage by stage: what one at a time gives, each with its own pruner.

        Args:
            inputs: each of one observation, or of a batch of the same shape.
            through: how a stage is run.
            pruners: one for each of ``inputs``; none by default.
        """
        layouts = [self.layout(given) for given in inputs]
        streams = self.decoder.run(self.streams(inputs, through, pruners, tails=True), through)
        states = [
            self.head.state(self.decoder, stream, layout, given.noise)
            for stream, layout, given in zip(streams, layouts, inputs, strict=True)
        ]
        return through("head", self.head, states, lambda head, state: head.act(self.decoder, state))

    def streams(
        self,
        inputs: Sequence[ModelInputs],
        through: Through = direct,
        pruners: Sequence[TokenPruner | None] | None = None,
        keeps: bool | None = None,
        tails: bool = False,
    ) -> list[Stream]:
        """The embedded ``inputs`` before the decoder's first layer.

        Args:
            inputs: as `run`'s.
            through: as `run`'s.
            pruners: as `run`'s.
            keeps: whether keys and values are kept; where the head reads them, if not given.
            tails: whether the last layer computes only what the head reads to act.
        """
        keeps = self.head.keeps if keeps is None else keeps
        pruners = [None] * len(inputs) if pruners is None else pruners
        embedded = self.embed_all(inputs, through)
        found = []
        for x, given, pruner in zip(embedded, inputs, pruners, strict=True):
            layout = self.layout(given)
            found.append(
                self.decoder.start(
                    x,
                    layout.decoder.blocks,
                    pruner=pruner,
                    keeps=keeps,
                    reader=self.head.reader(given.noise, layout),
                    tail=self.head.tail(layout) if tails else None,
                )
            )
        return found

    def layout(self, inputs: ModelInputs) -> Layout:
        """The order of the tokens of ``inputs``."""
        return self.config.layout(inputs.token_ids.shape[1])

    def embed(self, inputs: ModelInputs) -> Tensor:
        """What the decoder reads: ``(batch, tokens, decoder width)``."""
        (out,) = self.embed_all([inputs])
        return out

    def embed_all(self, inputs: Sequence[ModelInputs], through: Through = direct) -> list[Tensor]:
        """`embed` of several inputs, stage by stage."""
        language = [self.language(given.token_ids) for given in inputs]
        visual = self.see_all([given.pixels for given in inputs], language, through)
        return [self.sequence(v, given) for v, given in zip(visual, inputs, strict=True)]

    def see(self, pixels: Sequence[Tensor], language: Tensor | None = None) -> Tensor:
        """``(batch * cameras, 3, size, size)`` per encoder to visual tokens ``(batch, N, decoder width)``."""
        (visual,) = self.see_all([pixels], [language])
        return visual.reshape(-1, self.config.visual_tokens, visual.shape[-1])

    def see_all(
        self,
        pixels: Sequence[Sequence[Tensor]],
        language: Sequence[Tensor | None],
        through: Through = direct,
    ) -> list[Tensor]:
        """Projected features ``(batch * cameras, grid * grid, width)`` of each of several inputs."""
        features = []
        for i, encoder in enumerate(self.vision):
            images = [x[i] for x in pixels]
            if isinstance(encoder, VisionEncoder):
                features.append(encoder.run(images, language, through, f"vision.{i}"))
            else:  # another tool's, of one piece
                pairs = list(zip(images, language, strict=True))
                features.append(through(f"vision.{i}", encoder, pairs, lambda stage, pair: stage(*pair)))
        side = self.config.pixel_shuffle
        joined = [pixel_shuffle(torch.cat(parts, -1), side) for parts in zip(*features, strict=True)]
        return through("projector", self.projector, joined, lambda stage, x: stage(x))

    def language(self, token_ids: Tensor) -> Tensor | None:
        """The mean text embedding ``(batch * cameras, decoder width)`` that FiLM goes by, if there is any."""
        if not any(vision.film for vision in self.config.vision):
            return None
        return self.decoder.look_up(token_ids).mean(1).repeat_interleave(self.config.cameras, dim=0)

    def sequence(self, visual: Tensor, inputs: ModelInputs) -> Tensor:
        """The decoder's tokens ``(batch, tokens, width)`` in the order of the layout.

        Args:
            visual: projected features ``(batch * cameras, grid * grid, width)``.
            inputs: the text, and the robot's state if the model reads it.
        """
        text = self.decoder.embed(inputs.token_ids)
        visual = visual.reshape(len(text), -1, visual.shape[-1]).to(self.dtype)
        parts, taken = [], 0
        for segment in self.layout(inputs).decoder.segments:
            if segment.name == "visual":
                parts.append(visual)
            elif segment.name == "state":
                parts.append(self.state(inputs).to(text))
            elif segment.name == "actions":
                parts.append(text.new_zeros(len(text), segment.length, text.shape[-1]))
            else:
                parts.append(text[:, taken : taken + segment.length])
                taken += segment.length
        return torch.cat(parts, dim=1)

    def state(self, inputs: ModelInputs) -> Tensor:
        """The robot's state as a token ``(batch, 1, width)``."""
        assert inputs.proprio is not None, "the model reads the robot's state"
        out: Tensor = cast(Projector, self.proprio)(inputs.proprio.to(self.dtype))[:, None]
        return out


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
