"""SmolVLA's action expert: flow matching by a small transformer that reads the decoder's keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqap.models.config import DecoderConfig, FlowHeadConfig
from sqap.models.decoder import Decoder, RMSNorm, SwiGLU, attention_received, causal_mask, rope_angles, rotate
from sqap.models.edges import Edge
from sqap.models.layout import Layout
from sqap.models.stream import Reader, Stream
from sqap.models.transformer import attend

KeysValues = tuple[Tensor, Tensor]  # both (batch, kv_heads, tokens, head_dim)
FlowState = tuple[list[KeysValues], Tensor, int]
Rope = tuple[Tensor, Tensor]


class ExpertAttention(nn.Module):
    """Action tokens attend to the decoder's tokens, and without ``cross`` also to each other.

    With ``causal`` they see those before themselves alone. With ``cross``, keys and values are made out of
    the decoder's alone, and positions begin at 0.
    """

    def __init__(self, width: int, decoder: DecoderConfig, cross: bool, causal: bool = True) -> None:
        super().__init__()
        self.cross, self.heads, self.kv_heads, self.causal = cross, decoder.heads, decoder.kv_heads, causal
        kv_width = decoder.kv_heads * decoder.head_dim
        self.q_proj = nn.Linear(width, decoder.heads * decoder.head_dim, bias=False)
        self.k_proj = nn.Linear(kv_width if cross else width, kv_width, bias=False)
        self.v_proj = nn.Linear(kv_width if cross else width, kv_width, bias=False)
        self.o_proj = nn.Linear(decoder.heads * decoder.head_dim, width, bias=False)

    def read(self, past: KeysValues) -> KeysValues:
        """What there is to look at of the decoder's tokens: the same in every denoising step."""
        if not self.cross:
            return past
        k, v = (x.transpose(1, 2).flatten(2) for x in past)
        return self._split(self.k_proj(k), self.kv_heads), self._split(self.v_proj(v), self.kv_heads)

    def forward(self, x: Tensor, past: KeysValues, rope: Rope) -> Tensor:
        """``x`` ``(batch, horizon, width)`` to the same; ``past`` as `read` gave it."""
        q = rotate(self._split(self.q_proj(x), self.heads), rope)
        k, v = past
        mask = None
        if not self.cross:
            mask = causal_mask(x.shape[1], k.shape[2], x.device) if self.causal else None
            k = torch.cat([k, rotate(self._split(self.k_proj(x), self.kv_heads), rope)], dim=2)
            v = torch.cat([v, self._split(self.v_proj(x), self.kv_heads)], dim=2)
        mixed = attend(q, k, v, mask=mask)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def attention(self, x: Tensor, keys: Tensor, rope: Rope) -> Tensor:
        """Attention ``(batch, tokens)`` that ``x`` pays the decoder's tokens, averaged over heads and rows.

        Args:
            x: ``(batch, horizon, width)``.
            keys: ``(batch, kv_heads, tokens, head_dim)``, the decoder's.
            rope: rotary positions of ``x``.
        """
        if self.cross:
            keys = self._split(self.k_proj(keys.transpose(1, 2).flatten(2)), self.kv_heads)
        q = rotate(self._split(self.q_proj(x), self.heads), rope)
        return attention_received(q, keys, x.new_empty(0), causal=False)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


class ExpertLayer(nn.Module):
    """Attention, then MLP, each behind an RMSNorm and on a residual branch."""

    def __init__(self, config: FlowHeadConfig, decoder: DecoderConfig, cross: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, decoder.norm_eps)
        self.self_attn = ExpertAttention(config.width, decoder, cross, config.causal_actions)
        self.post_attention_layernorm = RMSNorm(config.width, decoder.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_width)
        # Cross-attention makes values of the decoder's; self-attention mixes its own with them.
        own = Edge("self_attn.v_proj", writes="values"), Edge("self_attn.o_proj", reads="mixed")
        self.edges = (Edge("self_attn.v_proj", reads="values"),) if cross else own

    def forward(self, x: Tensor, past: KeysValues, rope: Rope) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), past, rope)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class FlowHead(nn.Module):
    """The expert, a layer for each of the decoder's, and its integration from noise to actions.

    Matches LeRobot's ``VLAFlowMatching`` (Shukor et al. 2025): time goes from 1, noise, to 0 in equal steps.
    The decoder's last token, the robot's state, sees all others and is seen by none of them; whatever of the
    decoder's keys and values does not depend on the noise is computed once for all steps.
    """

    keeps = True
    chain: ClassVar[str | None] = None
    sensitive: ClassVar[tuple[str, ...]] = ("action_in_proj", "action_out_proj")

    def __init__(self, config: FlowHeadConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        self.config, self.decoder_config = config, decoder
        width = config.width
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.layers = nn.ModuleList(
            ExpertLayer(config, decoder, cross=bool(i % config.self_attention_every))
            for i in range(decoder.depth)
        )
        self.norm = RMSNorm(width, decoder.norm_eps)
        self.action_out_proj = nn.Linear(width, config.action_dim)

    def tail(self, layout: Layout) -> int:
        """None: it reads keys and values."""
        return 0

    def reader(self, noise: Tensor | None, layout: Layout) -> Reader | None:
        return None if noise is None else ActionReader(self, noise, layout.decoder.length)

    def state(self, decoder: Decoder, stream: Stream, layout: Layout, noise: Tensor | None) -> FlowState:
        """Keys and values of the decoder's layers, the noise, both in the expert's type, and tokens."""
        assert noise is not None, "flow matching starts from noise"
        return self.seen(stream), noise.to(self.norm.weight), layout.decoder.length

    def act(self, decoder: Decoder, state: FlowState) -> Tensor:
        seen, noise, tokens = state
        past, ropes = self.read(seen), self.ropes(noise, tokens)
        return self.integrate(lambda x, time: self.move(x, time, past, ropes), noise)

    def questions(self, states: Sequence[FlowState]) -> list[tuple[list[KeysValues], Tensor, float, int]]:
        """The arguments of `velocity` in every denoising step."""
        asked = []
        for seen, noise, tokens in states:

            def ask(x: Tensor, time: float, seen: list[KeysValues] = seen, tokens: int = tokens) -> Tensor:
                asked.append((seen, x, time, tokens))
                return self.velocity(seen, x, time, tokens)

            self.integrate(ask, noise)
        return asked

    def answer(self, question: tuple[list[KeysValues], Tensor, float, int]) -> Tensor:
        return self.velocity(*question)

    def seen(self, stream: Stream) -> list[KeysValues]:
        """The keys and values of the decoder's layers so far, in the expert's type."""
        pairs = cast(tuple[KeysValues, ...], stream.stored)
        return [(k.to(self.norm.weight), v.to(self.norm.weight)) for k, v in pairs]

    @property
    def experts(self) -> list[ExpertLayer]:
        """The layers."""
        return [cast(ExpertLayer, layer) for layer in self.layers]

    def read(self, seen: Sequence[KeysValues]) -> list[KeysValues]:
        """The prefix's keys and values as each layer attends to them, constant over the denoising steps."""
        return [layer.self_attn.read(kv) for layer, kv in zip(self.experts, seen, strict=True)]

    def integrate(self, velocity: Callable[[Tensor, float], Tensor], noise: Tensor) -> Tensor:
        """Actions ``(batch, horizon, action_dim)``: from ``noise`` at time 1, by ``velocity``, to time 0."""
        x, change = noise.to(self.norm.weight), -1 / self.config.sample_steps
        for step in range(self.config.sample_steps):
            x = x + change * velocity(x, 1.0 + step * change)
        return x

    def velocity(self, seen: Sequence[KeysValues], x: Tensor, time: float, tokens: int) -> Tensor:
        """The predicted velocity at ``x`` ``(batch, horizon, action_dim)``, behind a prefix of ``tokens``."""
        return self.move(x, time, self.read(seen), self.ropes(x, tokens))

    def move(self, x: Tensor, time: float, past: Sequence[KeysValues], ropes: tuple[Rope, Rope]) -> Tensor:
        """`velocity`, given what `read` and `ropes` return: neither changes between denoising steps."""
        h = self.embed(x, time)
        for layer, kv in zip(self.experts, past, strict=True):
            h = layer(h, kv, ropes[int(layer.self_attn.cross)])
        out: Tensor = self.action_out_proj(self.norm(h))
        return out

    def embed(self, x: Tensor, time: float) -> Tensor:
        """Action tokens ``(batch, horizon, width)`` of ``x`` ``(batch, horizon, action_dim)`` at ``time``."""
        action = self.action_in_proj(x)
        when = time_embedding(time, self.config, action.device).to(action).expand_as(action)
        h = self.action_time_mlp_in(torch.cat([action, when], dim=-1))
        out: Tensor = self.action_time_mlp_out(F.silu(h))
        return out

    def ropes(self, x: Tensor, tokens: int) -> tuple[Rope, Rope]:
        """Rotary positions of action tokens ``x``: behind so many ``tokens``, and alone (cross-attention)."""
        alone = torch.arange(x.shape[1], dtype=torch.int64, device=x.device)[None]
        behind, cross = (rope_angles(p, self.decoder_config, x.dtype) for p in (alone + tokens, alone))
        return behind, cross


class FirstStep:
    """The first denoising step beside the decoder, layer by layer: whom its action tokens attend to.

    Args:
        head: the expert.
        noise: ``(batch, horizon, action_dim)`` that it starts from.
        tokens: in the decoder's sequence, which action tokens are behind.
    """

    def __init__(self, head: FlowHead, noise: Tensor, tokens: int) -> None:
        self.head, noise = head, noise.to(head.norm.weight)
        self.x, self.ropes = head.embed(noise, 1.0), head.ropes(noise, tokens)

    def run(self, i: int, seen: KeysValues) -> None:
        """Go through layer ``i``, given the keys and values of the decoder's."""
        layer = self.head.experts[i]
        self.x = layer(self.x, layer.self_attn.read(seen), self.ropes[int(layer.self_attn.cross)])

    def attention(self, i: int, keys: Tensor) -> Tensor:
        """Attention ``(batch, tokens)`` paid in layer ``i``, were this its input, to the decoder's keys."""
        layer = self.head.experts[i]
        rope = self.ropes[int(layer.self_attn.cross)]
        return layer.self_attn.attention(layer.input_layernorm(self.x), keys.to(self.x), rope)


class ActionReader:
    """A `Reader`: the action tokens of the first denoising step, behind as many layers as the stream."""

    def __init__(self, head: FlowHead, noise: Tensor, tokens: int) -> None:
        self.head, self._noise, self._tokens = head, noise, tokens

    def attention(self, stream: Stream, keys: Mapping[int, Tensor]) -> list[Tensor]:
        """As `Reader.attention`."""
        step, tokens = FirstStep(self.head, self._noise, self._tokens), stream.blocks[0].shape[1]
        for i, seen in enumerate(self.head.seen(stream)):
            step.run(i, seen)
        return [step.attention(i, k)[:, :tokens] for i, k in keys.items()]


def time_embedding(time: float, config: FlowHeadConfig, device: torch.device) -> Tensor:
    """``(width,)``: sines, then cosines, of periods that grow geometrically.

    As in LeRobot, angles are computed in 64 bits, from a time that is rounded to 32 bits.
    """
    rounded = torch.full((1,), time, dtype=torch.float32, device=device).double()
    fraction = torch.linspace(0, 1, config.width // 2, dtype=torch.float64, device=device)
    period = config.min_period * (config.max_period / config.min_period) ** fraction
    angles = 2 * math.pi * rounded / period
    return torch.cat([angles.sin(), angles.cos()]).float()
