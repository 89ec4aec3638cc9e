"""CogACT's diffusion head: a DiT that denoises action chunks, guided by the cognition token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sqap.models.config import DiffusionHeadConfig
from sqap.models.decoder import Decoder
from sqap.models.heads.ddim import add_noise, cosine_alpha_bar, ddim_sample, ddim_steps
from sqap.models.inputs import ModelInputs
from sqap.models.layout import Layout
from sqap.models.stream import ExpertQueries, Stream
from sqap.models.through import Through
from sqap.models.transformer import MLP, Fused, SelfAttention, sinusoidal_embedding

TIME_FREQUENCIES = 256
CONDITION_DROPOUT = 0.1


class DiTBlock(nn.Module):
    """A pre-norm block whose norms have no parameters; the condition is a token, not a modulation."""

    fused: Fused | None = None

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width, 4 * width, "gelu_tanh")

    def forward(self, x: Tensor) -> Tensor:
        done = None if self.fused is None else self.fused(self, x)
        if done is not None:
            return done[0]
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class DiffusionHead(nn.Module):
    """Noise prediction, its training loss, and guided DDIM sampling.

    Matches CogACT's ``ActionModel`` (Li et al. 2024): 100 squared-cosine training steps, the condition
    dropped one time in ten during training, classifier-free guidance at sampling. The condition is the last
    token's final hidden state, the cognition token's: all that the head gets to know.
    """

    reads_keys_values = False
    chain: ClassVar[str | None] = "blocks"
    sensitive: ClassVar[tuple[str, ...]] = ("x_embedder", "final_layer")

    def __init__(self, config: DiffusionHeadConfig, condition_width: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = nn.Linear(config.action_dim, width)
        self.t_embedder = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.z_embedder = nn.Linear(condition_width, width)
        self.uncondition = nn.Parameter(nn.init.normal_(torch.empty(1, condition_width), std=0.02))
        positions = nn.init.normal_(torch.empty(config.horizon + 1, width), std=width**-0.5)
        self.positional_embedding = nn.Parameter(positions)
        self.blocks = nn.ModuleList(DiTBlock(width, config.heads) for _ in range(config.depth))
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_layer = nn.Linear(width, config.action_dim)
        # Not a buffer: .to(bfloat16) must not round the schedule.
        self.alpha_bar = cosine_alpha_bar(config.train_steps)

    def predict_noise(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Noise in ``x`` ``(batch, horizon, action_dim)`` at ``t`` ``(batch,)``, given ``(batch, width)``."""
        return self.denoise(x, self.embed_time(t).to(x.dtype) + self.z_embedder(condition))

    def embed_time(self, t: Tensor) -> Tensor:
        """Time steps ``(batch,)`` to ``(batch, width)``."""
        out: Tensor = self.t_embedder(sinusoidal_embedding(t, TIME_FREQUENCIES).to(self.uncondition.dtype))
        return out

    def denoise(self, x: Tensor, token: Tensor) -> Tensor:
        """Noise in ``x`` ``(batch, horizon, action_dim)``, given what time and condition add up to."""
        h = torch.cat([token[:, None], self.x_embedder(x)], dim=1) + self.positional_embedding
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.final_layer(self.norm_final(h))
        return out[:, 1:]

    def loss(self, actions: Tensor, condition: Tensor) -> Tensor:
        """Mean squared error of the predicted noise on normalised ``(batch, horizon, action_dim)``."""
        noise = torch.randn_like(actions)
        batch, device = len(actions), actions.device
        t = torch.randint(0, self.config.train_steps, (batch,), dtype=torch.int64, device=device)
        drop = torch.rand(batch, 1, dtype=torch.float32, device=device) < CONDITION_DROPOUT
        condition = torch.where(drop, self.uncondition.to(condition.dtype), condition)
        noisy = add_noise(actions, noise, t, self.alpha_bar)
        return (self.predict_noise(noisy, t, condition) - noise).square().mean()

    def last_tokens(self, layout: Layout) -> int:
        """The last, which is the cognition token."""
        return 1

    def expert_queries(self, inputs: ModelInputs, layout: Layout) -> ExpertQueries | None:
        return None

    def inputs(
        self, decoder: Decoder, stream: Stream, layout: Layout, inputs: ModelInputs
    ) -> tuple[Tensor, Tensor]:
        """The condition ``(batch, width)`` and the noise, in the head's type."""
        assert inputs.noise is not None, "a diffusion head starts from noise"
        condition = decoder.finish(stream)[:, -1]
        return condition.to(self.uncondition), inputs.noise.to(self.uncondition)

    def act(self, decoder: Decoder, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return self.sample(*inputs)

    def calibrate(self, inputs: Sequence[tuple[Tensor, Tensor]], through: Through) -> None:
        through("head", self, self.denoising_steps(inputs), lambda head, given: head.predict_noise(*given))

    def denoising_steps(self, inputs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The arguments of `predict_noise` in every denoising step, all observations in one batch."""
        if not inputs:
            return []
        condition, noise = (torch.cat(parts) for parts in zip(*inputs, strict=True))
        both, asked = self.conditions(condition), []

        def ask(x: Tensor, t: int) -> Tensor:
            times = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
            asked.append(self.batch(x, times, both))
            return self.guided_noise(x, times, both)

        ddim_sample(ask, noise, self.alpha_bar, self.config.sample_steps)
        return asked

    def sample(self, condition: Tensor, noise: Tensor) -> Tensor:
        """Chunks ``(batch, horizon, action_dim)`` from ``noise`` of that shape, given ``(batch, width)``.

        Both halves of the guidance (with and without the condition) run as one batch. What depends on the
        time alone, or on the condition alone, is computed once.

        Raises:
            ValueError: there is not one condition for each chunk.
        """
        if len(condition) != len(noise):
            raise ValueError(f"there are {len(condition)} conditions for noise of {len(noise)} chunks")
        given = self.z_embedder(self.conditions(condition))
        steps = ddim_steps(len(self.alpha_bar), self.config.sample_steps)
        times = torch.arange(steps.start, steps.stop, steps.step, dtype=torch.int64, device=noise.device)
        tokens = dict(zip(steps, (self.embed_time(times)[:, None] + given).unbind(), strict=True))

        def predict(x: Tensor, t: int) -> Tensor:
            return self.guide(self.denoise(x.repeat(self.halves, 1, 1), tokens[t]))

        return ddim_sample(predict, noise, self.alpha_bar, self.config.sample_steps)

    @property
    def halves(self) -> int:
        """How often each chunk is in a guided pass: with and without its condition, or only with it."""
        return 2 if self.config.guidance > 1 else 1

    def conditions(self, condition: Tensor) -> Tensor:
        """``(batch, width)`` to what a guided pass is given: the condition's half, then the free one's."""
        if self.halves == 1:
            return condition
        return torch.cat([condition, self.uncondition.expand_as(condition)])

    def batch(self, x: Tensor, t: Tensor, both: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `predict_noise` for every half of the guidance."""
        return x.repeat(self.halves, 1, 1), t.repeat(self.halves), both

    def guided_noise(self, x: Tensor, t: Tensor, both: Tensor) -> Tensor:
        """Noise in ``x`` ``(batch, horizon, action_dim)`` by classifier-free guidance."""
        return self.guide(self.predict_noise(*self.batch(x, t, both)))

    def guide(self, predicted: Tensor) -> Tensor:
        """The noise predicted for a pass over all `halves`, as one prediction for each chunk."""
        if self.halves == 1:
            return predicted
        given, free = predicted.chunk(2)
        return free + self.config.guidance * (given - free)
