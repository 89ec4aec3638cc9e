"""The action expert of a flow head: a transformer that attends to the decoder's keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqap.kernels.received import attention_received
from sqap.models.config import DecoderConfig, FlowHeadConfig
from sqap.models.decoder import GatedMLP, RMSNorm, rotate, split_heads
from sqap.models.edges import Edge
from sqap.models.transformer import attend

KeysValues = tuple[Tensor, Tensor]  # both (batch, kv_heads, tokens, head_dim)
Rope = tuple[Tensor, Tensor]


class ExpertCache:
    """The keys and values that one expert layer attends to: a prefix, and its own tokens' behind it.

    The prefix is the same in all denoising steps. The tokens of a step overwrite those of the step before.

    Args:
        prefix: keys and values ``(batch, kv_heads, tokens, head_dim)``.
        room: how many tokens may stand behind the prefix.
    """

    def __init__(self, prefix: KeysValues, room: int = 0) -> None:
        self.length = prefix[0].shape[2]
        self._keys, self._values = prefix
        self._end = self.length + room
        self._packed: tuple[object, object] | None = None

    def read(self, behind: int = 0) -> KeysValues:
        """Keys and values of the prefix, and of so many tokens ``behind`` it."""
        end = self.length + behind
        return self._keys[:, :, :end], self._values[:, :, :end]

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put keys and values ``(batch, kv_heads, tokens, head_dim)`` behind the prefix."""
        missing = self._end - self._keys.shape[2]
        if missing > 0:  # what takes the packed prefix never writes
            self._keys, self._values = _with_room(self._keys, missing), _with_room(self._values, missing)
        place = slice(self.length, self.length + k.shape[2])
        self._keys[:, :, place], self._values[:, :, place] = k, v

    def extend(self, tokens: int) -> None:
        """Make so many of the tokens behind the prefix a part of it."""
        self.length += tokens
        self._packed = None

    def packed(self, owner: object, pack: Callable[[Tensor, Tensor, int], object]) -> object:
        """What ``pack`` makes of the prefix's keys, its values and the room behind it; once for an owner."""
        if self._packed is None or self._packed[0] is not owner:
            self._packed = owner, pack(*self.read(), self._end - self.length)
        return self._packed[1]


def _with_room(x: Tensor, room: int) -> Tensor:
    batch, heads, tokens, width = x.shape
    larger = x.new_empty(batch, heads, tokens + room, width)
    larger[:, :, :tokens] = x
    return larger


class AdaptiveNorm(nn.Module):
    """RMSNorm whose scale, shift and gate depend on the denoising time (pi0.5; Peebles & Xie 2023).

    ``dense`` computes the three out of the time's embedding. With ``steps``, they are stored for so many
    steps instead, in the buffer ``modulation`` ``(steps, 3 * width)``.
    """

    modulation: Tensor

    def __init__(self, width: int, eps: float, steps: int | None = None) -> None:
        super().__init__()
        self.eps = eps
        if steps is None:
            self.dense = nn.Linear(width, 3 * width)
        else:
            self.register_buffer("modulation", torch.zeros(steps, 3 * width))

    def modulations(self, condition: Tensor) -> Tensor:
        """Scale, shift and gate ``(times, 3 * width)`` for embedded times ``(times, width)``."""
        out: Tensor = self.dense(condition)
        return out

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``x`` ``(batch, tokens, width)`` normalised, times 1 + scale, plus shift."""
        scale, shift, _ = modulation.chunk(3)
        normalized = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (normalized * (1 + scale) + shift).to(x.dtype)


def normalized(norm: nn.Module, x: Tensor, modulation: Tensor | None) -> Tensor:
    """``norm(x)``, by an adaptive norm if there is a ``modulation``."""
    out: Tensor = norm(x) if modulation is None else norm(x, modulation)
    return out


def gated(branch: Tensor, modulation: Tensor | None) -> Tensor:
    """What a residual branch adds: all of it, or as much as an adaptive norm's gate lets through."""
    return branch if modulation is None else branch * modulation.chunk(3)[2]


class ExpertAttention(nn.Module):
    """Attention of the expert's tokens to the decoder's and, without ``cross``, to each other.

    With ``cross``, keys and values are projections of the decoder's, and positions begin at 0.
    """

    def __init__(self, width: int, decoder: DecoderConfig, cross: bool, causal: bool) -> None:
        super().__init__()
        self.cross, self.causal = cross, causal and not cross
        self.heads, self.kv_heads, self.head_dim = decoder.heads, decoder.kv_heads, decoder.head_dim
        kv_width = decoder.kv_heads * decoder.head_dim
        self.q_proj = nn.Linear(width, decoder.heads * decoder.head_dim, bias=False)
        self.k_proj = nn.Linear(kv_width if cross else width, kv_width, bias=False)
        self.v_proj = nn.Linear(kv_width if cross else width, kv_width, bias=False)
        self.o_proj = nn.Linear(decoder.heads * decoder.head_dim, width, bias=False)

    def cache(self, prefix: KeysValues, room: int) -> ExpertCache:
        """The cache to attend to, given the decoder's keys and values, with ``room`` for own tokens."""
        if not self.cross:
            return ExpertCache(prefix, room)
        k, v = (x.transpose(1, 2).flatten(2) for x in prefix)
        return ExpertCache(
            (split_heads(self.k_proj(k), self.kv_heads), split_heads(self.v_proj(v), self.kv_heads))
        )

    def forward(self, x: Tensor, cache: ExpertCache, ropes: tuple[Rope, Rope], mask: Tensor | None) -> Tensor:
        """``x`` ``(batch, tokens, width)`` to the same.

        Args:
            x: the expert's tokens.
            cache: what they attend to; without ``cross`` their own keys and values are written to it.
            ropes: as in `Surroundings`.
            mask: of self-attention, as in `Surroundings`.
        """
        rope = ropes[int(self.cross)]
        q = rotate(split_heads(self.q_proj(x), self.heads), rope)
        if self.cross:
            mixed = attend(q, *cache.read())
        else:
            k, v = (split_heads(linear(x), self.kv_heads) for linear in (self.k_proj, self.v_proj))
            cache.write(rotate(k, rope), v)
            mixed = attend(q, *cache.read(x.shape[1]), mask=mask)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def received(self, x: Tensor, keys: Tensor, rope: Rope) -> Tensor:
        """Attention ``(batch, tokens)`` that the decoder's tokens get from ``x``, mean over heads and rows.

        Args:
            x: ``(batch, rows, width)``.
            keys: ``(batch, kv_heads, tokens, head_dim)``, the decoder's.
            rope: rotary positions of ``x``.
        """
        if self.cross:
            keys = split_heads(self.k_proj(keys.transpose(1, 2).flatten(2)), self.kv_heads)
        q = rotate(split_heads(self.q_proj(x), self.heads), rope)
        return attention_received(q, keys, x.new_empty(0), causal=False)


class FusedExpert(Protocol):
    """Runs an expert layer's action tokens in one call of a backend, or says None where it cannot."""

    def __call__(
        self, layer: nn.Module, x: Tensor, cache: ExpertCache, rope: Rope, step: int
    ) -> Tensor | None: ...


class ExpertLayer(nn.Module):
    """Attention, then MLP, each behind an RMSNorm and on a residual branch, which adaptive norms gate."""

    fused: FusedExpert | None = None

    def __init__(self, config: FlowHeadConfig, decoder: DecoderConfig, cross: bool) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, decoder)
        self.self_attn = ExpertAttention(config.width, decoder, cross, config.causal_actions)
        self.post_attention_layernorm = make_norm(config, decoder)
        self.mlp = GatedMLP(config.width, config.mlp_width, decoder.activation)
        # Cross-attention makes values of the decoder's; self-attention mixes its own with them.
        own = Edge("self_attn.v_proj", writes="values"), Edge("self_attn.o_proj", reads="mixed")
        self.edges = (Edge("self_attn.v_proj", reads="values"),) if cross else own

    def forward(
        self,
        x: Tensor,
        cache: ExpertCache,
        ropes: tuple[Rope, Rope],
        mask: Tensor | None,
        modulations: tuple[Tensor | None, Tensor | None] = (None, None),
        step: int | None = None,
    ) -> Tensor:
        """As `ExpertAttention.forward`.

        Args:
            x: the expert's tokens.
            cache: as in `ExpertAttention.forward`.
            ropes: as in `Surroundings`.
            mask: as in `Surroundings`.
            modulations: ``(3 * width,)`` of the two adaptive norms.
            step: the denoising step, if these are its action tokens alone. Nothing reads their keys and
                values afterwards.
        """
        if self.fused is not None and step is not None:
            done = self.fused(self, x, cache, ropes[int(self.self_attn.cross)], step)
            if done is not None:
                return done
        first, second = modulations
        mixed = self.self_attn(normalized(self.input_layernorm, x, first), cache, ropes, mask)
        x = x + gated(mixed, first)
        return x + gated(self.mlp(normalized(self.post_attention_layernorm, x, second)), second)


def make_norm(config: FlowHeadConfig, decoder: DecoderConfig) -> RMSNorm | AdaptiveNorm:
    """A norm of the expert."""
    if not config.adaptive_norms:
        return RMSNorm(config.width, decoder.norm_eps)
    return AdaptiveNorm(config.width, decoder.norm_eps, config.sample_steps if config.fixed_steps else None)
