"""The flow-matching head of SmolVLA, pi0 and pi0.5: an action expert, integrated from noise to actions."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqap.models.config import DecoderConfig, FlowHeadConfig
from sqap.models.decoder import Decoder, RMSNorm, rope_angles
from sqap.models.heads.expert import (
    AdaptiveNorm,
    ExpertCache,
    ExpertLayer,
    KeysValues,
    make_norm,
    normalized,
)
from sqap.models.heads.velocity import Condition, ExpertPass, FlowInputs, Suffix, Surroundings
from sqap.models.inputs import ModelInputs
from sqap.models.layout import Layout
from sqap.models.stream import ExpertQueries, Stream
from sqap.models.through import Through

TIME_MLP, ACTION_TIME_MLP = ("time_mlp_in", "time_mlp_out"), ("action_time_mlp_in", "action_time_mlp_out")


class FlowHead(nn.Module):
    """Flow matching (Lipman et al. 2023) by an expert with a layer for each of the decoder's.

    Time goes from 1, noise, to 0 in equal steps, as in LeRobot's SmolVLA (Shukor et al. 2025), pi0 and pi0.5
    (Black et al. 2024, 2025). What does not depend on the noise is computed once for all steps: the decoder's
    keys and values, those of the state's token, masks, rotary angles, and the conditions of the times.

    Args:
        config: sizes.
        decoder: the decoder's.
        state_dim: numbers of the robot's state, if it is a token of the expert's; else 0.
    """

    action_time_bias: Tensor
    reads_keys_values = True
    chain: ClassVar[str | None] = None

    def __init__(self, config: FlowHeadConfig, decoder: DecoderConfig, state_dim: int = 0) -> None:
        super().__init__()
        self.config, self.decoder_config, self.state_dim = config, decoder, state_dim
        width, fixed = config.width, config.fixed_steps
        self.action_in_proj = nn.Linear(config.action_dim, width)
        if state_dim:
            self.state_proj = nn.Linear(state_dim, width)
        if not config.adaptive_norms:
            self.action_time_mlp_in = nn.Linear(width if fixed else 2 * width, width, bias=not fixed)
            self.action_time_mlp_out = nn.Linear(width, width)
            if fixed:
                self.register_buffer("action_time_bias", torch.zeros(config.sample_steps, width))
        elif not fixed:
            self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(
            ExpertLayer(config, decoder, cross=bool(i % config.self_attention_every))
            for i in range(decoder.depth)
        )
        self._suffixes: dict[Hashable, Suffix] = {}
        self.norm = make_norm(config, decoder)
        self.action_out_proj = nn.Linear(width, config.action_dim)

    @property
    def sensitive(self) -> tuple[str, ...]:
        """Paths of its linears that read or write actions, the state or the time."""
        found = ["action_in_proj", "action_out_proj", *(["state_proj"] if self.state_dim else [])]
        if self.config.adaptive_norms and not self.config.fixed_steps:
            found += [*TIME_MLP, *(f"{name}.dense" for name in self.adaptive_norms())]
        elif self.config.fixed_steps and not self.config.adaptive_norms:
            found += ACTION_TIME_MLP
        return tuple(found)

    @property
    def experts(self) -> list[ExpertLayer]:
        """The expert's layers."""
        return [cast(ExpertLayer, layer) for layer in self.layers]

    @property
    def times(self) -> list[float]:
        """The times of the denoising steps, from 1 down, in 64 bits as LeRobot computes them."""
        return [1.0 + step * self.change for step in range(self.config.sample_steps)]

    @property
    def change(self) -> float:
        """How much the time changes from one denoising step to the next."""
        return -1.0 / self.config.sample_steps

    @property
    def like(self) -> Tensor:
        """A tensor of the type that the expert computes in, on its device."""
        if isinstance(self.norm, RMSNorm):
            return self.norm.weight
        return self.norm.modulation if self.config.fixed_steps else self.norm.dense.bias

    def last_tokens(self, layout: Layout) -> int:
        """None: the head reads keys and values."""
        return 0

    def expert_queries(self, inputs: ModelInputs, layout: Layout) -> ExpertQueries | None:
        return None if inputs.noise is None else ActionQueries(self, inputs, layout)

    def inputs(self, decoder: Decoder, stream: Stream, layout: Layout, inputs: ModelInputs) -> FlowInputs:
        """The keys and values of the stream behind the last layer, and what else the expert is given."""
        noise, state = self.own_inputs(inputs)
        return FlowInputs(self.prefix(stream), noise, layout, state)

    def first_step(self, inputs: ModelInputs, layout: Layout) -> ExpertPass:
        """The first denoising step before the first layer; `ExpertPass.advance` is to be given the prefix."""
        noise, state = self.own_inputs(inputs)
        return self.start(FlowInputs([], noise, layout, state), noise, self.times[0])

    def own_inputs(self, inputs: ModelInputs) -> tuple[Tensor, Tensor | None]:
        """The noise and, if it is a token of the expert's, the state, in the expert's type."""
        assert inputs.noise is not None, "flow matching starts from noise"
        state = inputs.proprio if self.state_dim else None
        assert state is not None or not self.state_dim, "the expert reads the robot's state"
        return inputs.noise.to(self.like), None if state is None else state.to(self.like)

    def prefix(self, stream: Stream) -> list[KeysValues]:
        """The keys and values of the decoder's layers so far, in the expert's type."""
        pairs = cast(tuple[KeysValues, ...], stream.stored)
        return [(k.to(self.like), v.to(self.like)) for k, v in pairs]

    def caches(self, prefix: Sequence[KeysValues], layout: Layout) -> list[ExpertCache]:
        """What each layer attends to: the decoder's keys and values, and room for the expert's tokens."""
        room = layout.expert.length
        return [layer.self_attn.cache(kv, room) for layer, kv in zip(self.experts, prefix, strict=True)]

    def suffix(self, layout: Layout, tokens: slice = slice(None)) -> Suffix:
        """All of the expert's tokens, or some of them; made once, and kept for CUDA graphs that read it."""
        like = self.like
        key = layout, tokens.start, tokens.stop, like.dtype, like.device
        if key not in self._suffixes:
            self._suffixes[key] = self._make_suffix(layout, tokens)
        return self._suffixes[key]

    @torch.inference_mode(False)  # a tensor made inside inference mode could never be used outside it
    def _make_suffix(self, layout: Layout, tokens: slice) -> Suffix:
        like, mask = self.like, layout.expert.mask()[tokens, tokens]
        places = torch.arange(layout.expert.length, dtype=torch.int64, device=like.device)[None, tokens]
        ropes = [
            rope_angles(first + places, self.decoder_config, like.dtype)
            for first in (layout.decoder.length, 0)
        ]
        return Suffix(None if mask.all() else mask.to(like.device), (ropes[0], ropes[1]))

    def act(self, decoder: Decoder, inputs: FlowInputs) -> Tensor:
        caches, states = self.caches(inputs.prefix, inputs.layout), 0
        if inputs.state is not None:  # it sees no action: its keys and values are the same in all steps
            states = 1
            alone = self.suffix(inputs.layout, slice(states)).behind(caches)
            self.run(self.embed_state(inputs.state), alone, Condition())
            for layer, cache in zip(self.experts, caches, strict=True):
                if not layer.self_attn.cross:
                    cache.extend(states)
        around = self.suffix(inputs.layout, slice(states, None)).behind(caches)
        conditions = dict(zip(self.times, enumerate(self.conditions(self.times)), strict=True))

        def velocity(x: Tensor, time: float) -> Tensor:
            step, condition = conditions[time]
            out: Tensor = self.action_out_proj(self.run(self.embed(x, condition), around, condition, step))
            return out

        return self.integrate(velocity, inputs.noise)

    def calibrate(self, inputs: Sequence[FlowInputs], through: Through) -> None:
        """The layers one by one, and then the projections around them."""
        passes = [self.start(*asked) for asked in self.denoising_steps(inputs)]
        for i, layer in enumerate(self.layers):
            passes = through(f"head.layers.{i}", layer, passes, lambda layer, given: given.advance(layer))
        through("head", self, passes, lambda head, given: head.around_layers(given))

    def denoising_steps(self, inputs: Sequence[FlowInputs]) -> list[tuple[FlowInputs, Tensor, float]]:
        """The arguments of `velocity` in every denoising step."""
        asked = []
        for given in inputs:

            def ask(x: Tensor, time: float, given: FlowInputs = given) -> Tensor:
                asked.append((given, x, time))
                return self.velocity(given, x, time)

            self.integrate(ask, given.noise)
        return asked

    def start(self, inputs: FlowInputs, x: Tensor, time: float) -> ExpertPass:
        """An evaluation of `velocity`, before the first layer."""
        (condition,) = self.conditions([time])
        hidden = self.tokens(x, inputs.state, condition)
        return ExpertPass(hidden, inputs, x, condition, self.suffix(inputs.layout))

    def around_layers(self, given: ExpertPass) -> tuple[Tensor, Tensor]:
        """The expert's tokens, and the velocity from the hidden states behind the last layer."""
        return self.tokens(given.x, given.inputs.state, given.condition), self.finish(given)

    def finish(self, given: ExpertPass) -> Tensor:
        """The velocity ``(batch, horizon, action_dim)`` from the hidden states behind the last layer."""
        hidden = normalized(self.norm, given.hidden[:, given.actions], given.condition.of_final_norm)
        out: Tensor = self.action_out_proj(hidden)
        return out

    def integrate(self, velocity: Callable[[Tensor, float], Tensor], noise: Tensor) -> Tensor:
        """Actions ``(batch, horizon, action_dim)``: from ``noise`` at time 1, by ``velocity``, to time 0."""
        x = noise
        for time in self.times:
            x = x + self.change * velocity(x, time)
        return x

    def velocity(self, inputs: FlowInputs, x: Tensor, time: float) -> Tensor:
        """The predicted velocity at ``x`` ``(batch, horizon, action_dim)``.

        All of the expert's tokens run in one pass; `act` runs the state's once for all steps.
        """
        given = self.start(inputs, x, time)
        for layer in self.experts:
            given = given.advance(layer)
        return self.finish(given)

    def tokens(self, x: Tensor, state: Tensor | None, condition: Condition) -> Tensor:
        """The expert's tokens ``(batch, tokens, width)``: the state, if it is one, and actions ``x``."""
        actions = self.embed(x, condition)
        return actions if state is None else torch.cat([self.embed_state(state), actions], dim=1)

    def embed_state(self, state: Tensor) -> Tensor:
        """The state's token ``(batch, 1, width)``."""
        out: Tensor = self.state_proj(state)[:, None]
        return out

    def embed(self, x: Tensor, condition: Condition) -> Tensor:
        """Action tokens ``(batch, horizon, width)`` of ``x`` ``(batch, horizon, action_dim)``."""
        actions: Tensor = self.action_in_proj(x)
        if condition.time is None:
            return actions
        if self.config.fixed_steps:
            h = self.action_time_mlp_in(actions) + condition.time
        else:
            h = self.action_time_mlp_in(torch.cat([actions, condition.time.expand_as(actions)], dim=-1))
        out: Tensor = self.action_time_mlp_out(F.silu(h))
        return out

    def run(self, x: Tensor, around: Surroundings, condition: Condition, step: int | None = None) -> Tensor:
        """Final hidden states of ``x`` ``(batch, tokens, width)``; ``step`` as in `ExpertLayer.forward`."""
        for i, layer in enumerate(self.experts):
            x = layer(x, around.caches[i], around.ropes, around.masks[i], condition.of_layer(i), step)
        return normalized(self.norm, x, condition.of_final_norm)

    def conditions(self, times: Sequence[float]) -> list[Condition]:
        """What the expert is conditioned on at each of ``times``.

        Raises:
            ValueError: it is stored for the denoising steps, and a time is none of theirs.
        """
        if self.config.fixed_steps:
            rows = [self.times.index(time) for time in times]
            if not self.config.adaptive_norms:
                return [Condition(self.action_time_bias[i]) for i in rows]
            norms = self.adaptive_norms().values()
            return [Condition(modulations=[norm.modulation[i] for norm in norms]) for i in rows]
        embedded = self.embedded_times(times, self.like.device).to(self.like)
        if not self.config.adaptive_norms:
            return [Condition(row) for row in embedded]
        when = self.embed_time(embedded)
        found = [norm.modulations(when) for norm in self.adaptive_norms().values()]
        return [Condition(modulations=rows) for rows in zip(*found, strict=True)]

    def embedded_times(self, times: Sequence[float], device: torch.device) -> Tensor:
        """Sines and cosines ``(times, width)`` in 32 bits."""
        return torch.stack([time_embedding(time, self.config, device) for time in times])

    def embed_time(self, time: Tensor) -> Tensor:
        """The condition of adaptive norms ``(times, width)``, for sines and cosines of that shape."""
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time))))

    def adaptive_norms(self) -> dict[str, AdaptiveNorm]:
        """The adaptive norms by their paths: two of each layer, and the last one."""
        return {name: norm for name, norm in self.named_modules() if isinstance(norm, AdaptiveNorm)}


class ActionQueries:
    """`ExpertQueries` of the action tokens in the first denoising step, as many layers deep as the stream."""

    def __init__(self, head: FlowHead, inputs: ModelInputs, layout: Layout) -> None:
        self.head, self._inputs, self._layout = head, inputs, layout

    def received(self, stream: Stream, keys: Mapping[int, Tensor]) -> list[Tensor]:
        """As `ExpertQueries.received`."""
        first, tokens = self.head.first_step(self._inputs, self._layout), stream.blocks[0].shape[1]
        layers = self.head.experts
        for layer, prefix in zip(layers, self.head.prefix(stream), strict=False):
            first = first.advance(layer, prefix)
        return [first.received(i, layers[i], k)[:, :tokens] for i, k in keys.items()]


def time_embedding(time: float, config: FlowHeadConfig, device: torch.device) -> Tensor:
    """`embedded_times` ``(width,)`` of one time."""
    return embedded_times(torch.full((1,), time, dtype=torch.float32, device=device), config)[0]


def embedded_times(times: Tensor, config: FlowHeadConfig) -> Tensor:
    """Sines, then cosines, ``(..., width)`` of float32 ``times`` ``(...)``; periods grow geometrically.

    As in LeRobot, angles are computed in 64 bits, from times that were rounded to 32 bits.
    """
    fraction = torch.linspace(0, 1, config.width // 2, dtype=torch.float64, device=times.device)
    period = config.min_period * (config.max_period / config.min_period) ** fraction
    angles = 2 * math.pi * times[..., None].double() / period
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()
