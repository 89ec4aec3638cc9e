"""The decoder: Llama's and Gemma's architecture, with three seams for the method.

Its linears can be replaced by quantized ones, a `TokenPruner` may shorten the sequence between layers, and
a `KVFormat` says how keys and values are held. All are given from outside; nothing here knows how they work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from sqap.kernels import Function
from sqap.kernels.received import attention_received
from sqap.models.config import DecoderConfig
from sqap.models.edges import Edge
from sqap.models.kv import FloatKV, KVCache, KVFormat
from sqap.models.stream import ExpertQueries, LayerOutput, Stream, TokenPruner
from sqap.models.through import Through, direct
from sqap.models.transformer import Fused, activated, attend


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in 32 bits whatever the input's type."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.causal = config.causal
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.kv_format: KVFormat = FloatKV()

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        layer: int,
        cache: KVCache | None,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed tokens ``(batch, tokens, width)``, and what ``rows`` attend to ``(batch, keys)``."""
        batch, tokens, _ = x.shape
        q, k = split_heads(self.q_proj(x), self.heads), split_heads(self.k_proj(x), self.kv_heads)
        v = split_heads(self.v_proj(x), self.kv_heads)
        q, stored = self.kv_format.store(rotate(q, rope), rotate(k, rope), v)
        if cache is not None:
            stored = cache.extend(layer, stored)
        k, v = self.kv_format.load(stored, q.dtype)
        past, ahead = k.shape[2] - tokens, self.causal and tokens > 1
        mask = causal_mask(tokens, past, x.device) if ahead and past else None
        mixed = attend(q, k, v, causal=ahead and not past, mask=mask)
        received = None
        if rows is not None:
            received = attention_received(q[:, :, rows.to(q.device)], k, rows + past, causal=self.causal)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1)), received

    def look(self, x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        """What ``rows`` of ``x`` ``(batch, tokens, width)`` would attend to: ``(batch, tokens)``."""
        q = split_heads(self.q_proj(x[:, rows]), self.heads)
        q = rotate(q, (rope[0][:, rows], rope[1][:, rows]))
        return attention_received(q, self.keys(x, rope), rows, causal=self.causal)

    def keys(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated keys ``(batch, kv_heads, tokens, head_dim)`` of ``x`` ``(batch, tokens, width)``."""
        return rotate(split_heads(self.k_proj(x), self.kv_heads), rope)

    def empty_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Room for keys and values ``(batch, kv_heads, tokens, head_dim)`` of ``x``."""
        shape = x.shape[0], self.kv_heads, x.shape[1], self.head_dim
        return x.new_empty(shape), x.new_empty(shape)


class KeysValues(nn.Module):
    """The part of `Attention` that makes keys and values."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.kv_heads = config.kv_heads
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, ``(batch, kv_heads, tokens, head_dim)``."""
        return self.keys(x, rope), split_heads(self.v_proj(x), self.kv_heads)

    def keys(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """As `Attention.keys`."""
        return rotate(split_heads(self.k_proj(x), self.kv_heads), rope)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(batch, tokens, heads * head_dim)`` to ``(batch, heads, tokens, head_dim)``."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``: SwiGLU or GeGLU (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, activation: Function) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.down_proj, self.activation, self.gate_proj(x), self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then MLP, each behind an RMSNorm and on a residual branch."""

    fused: Fused | None = None
    edges = (
        Edge("self_attn.q_proj", reads="residual", norm="input_layernorm"),
        Edge("self_attn.k_proj", reads="residual", norm="input_layernorm"),
        Edge("self_attn.v_proj", reads="residual", writes="values", norm="input_layernorm"),
        Edge("self_attn.o_proj", reads="mixed", writes="residual"),
        Edge("mlp.gate_proj", reads="residual", norm="post_attention_layernorm"),
        Edge("mlp.up_proj", reads="residual", writes="inner", norm="post_attention_layernorm"),
        Edge("mlp.down_proj", reads="inner", writes="residual"),
    )

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config.width, config.mlp_width, config.activation)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        layer: int = 0,
        cache: KVCache | None = None,
        rows: Tensor | None = None,
        first: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        if self.fused is not None and isinstance(self.self_attn.kv_format, FloatKV):
            kept = None
            if cache is not None:
                kept = cast(tuple[Tensor, Tensor], cache.reserve(layer, self.self_attn.empty_kv(x)))
            done = self.fused(self, x, rope, rows, kept, first)
            if done is not None:
                if cache is not None:
                    cache.commit(layer, x.shape[1])
                return done
        # PyTorch's products of a few rows depend on where in memory these are, so a step would not repeat bit
        # for bit: the last tokens are cut out of the whole.
        mixed, received = self.self_attn(self.input_layernorm(x), rope, layer, cache, rows)
        x = x + mixed
        return (x + self.mlp(self.post_attention_layernorm(x)))[:, first:], received

    def look(self, x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        """What ``rows`` would attend to in this layer, were ``x`` its input: ``(batch, tokens)``."""
        return self.self_attn.look(self.input_layernorm(x), rope, rows)


class KeysValuesLayer(nn.Module):
    """A last layer whose keys and values are read, and nothing else."""

    edges = (
        Edge("self_attn.k_proj", reads="residual", norm="input_layernorm"),
        Edge("self_attn.v_proj", reads="residual", writes="values", norm="input_layernorm"),
    )

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = KeysValues(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        layer: int = 0,
        cache: KVCache | None = None,
        rows: Tensor | None = None,
        first: int = 0,
    ) -> tuple[Tensor, None]:
        """No hidden states ``(batch, 0, width)``; keys and values go into the cache.

        Raises:
            ValueError: the attention of ``rows`` is wanted, which nothing computes here.
        """
        if rows is not None:
            raise ValueError("the last layer makes keys and values alone: no row of it attends to anything")
        found = self.self_attn(self.input_layernorm(x), rope)
        if cache is not None:
            cache.extend(layer, found)
        return x[:, :0], None


def keys(layer: DecoderLayer | KeysValuesLayer, stream: Stream) -> Tensor:
    """The keys ``(batch, kv_heads, tokens, head_dim)`` of all blocks in ``layer``, were they its input."""
    pairs = zip(stream.blocks, stream.ropes, strict=True)
    return torch.cat([layer.self_attn.keys(layer.input_layernorm(x), rope) for x, rope in pairs], dim=2)


class FusedLook(Protocol):
    """Runs `Decoder.look_ahead` in one native call, or says None where it cannot."""

    def __call__(
        self, layers: Sequence[DecoderLayer], x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor
    ) -> Tensor | None: ...


class Decoder(nn.Module):
    """Embeddings in, hidden states out."""

    fused_look: FusedLook | None = None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        whole = config.depth - int(config.last_layer == "keys_values")
        layers: list[nn.Module] = [DecoderLayer(config) for _ in range(whole)]
        self.layers = nn.ModuleList(
            [*layers, *(KeysValuesLayer(config) for _ in range(config.depth - whole))]
        )
        self.norm = RMSNorm(config.width, config.norm_eps)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids ``(batch, tokens)`` to the inputs ``(batch, tokens, width)`` of the first layer."""
        scale, rows = self.config.embed_scale, self.look_up(ids)
        return rows if scale == 1 else rows * scale

    def look_up(self, ids: Tensor) -> Tensor:
        """The rows of the embedding table for ``ids``, in the type that is computed in."""
        out: Tensor = self.embed_tokens(ids).to(self.norm.weight.dtype)
        return out

    def forward(
        self,
        x: Tensor,
        *,
        cache: KVCache | None = None,
        pruner: TokenPruner | None = None,
    ) -> Tensor:
        """Run ``x`` ``(batch, tokens, width)``; with a pruner, fewer tokens come out than went in.

        Positions continue where ``cache`` ended, and a kept token keeps the position it had.
        """
        stream = self.start(x, pruner=pruner, cache=cache)
        for i, layer in enumerate(self.layers):
            stream = self.advance(i, layer, stream)
        return self.finish(stream)

    def start(
        self,
        x: Tensor,
        blocks: Sequence[slice] = (slice(None),),
        *,
        pruner: TokenPruner | None = None,
        keep: bool = False,
        cache: KVCache | None = None,
        queries: ExpertQueries | None = None,
        last_tokens: int | None = None,
    ) -> Stream:
        """Embedded tokens ``x`` ``(batch, tokens, width)`` before the first layer.

        Args:
            x: the tokens.
            blocks: of their layout; every token sees those of earlier blocks (`sqap.models.layout`).
            pruner: shortens the first block.
            keep: whether the stream keeps keys and values for the head.
            cache: holds what came before, and gets what is new.
            queries: of the action expert, whose attention a pruner may look ahead for.
            last_tokens: how many of the last tokens are read behind the last layer; all by default.
        """
        first = 0
        if cache is not None:
            first = cache.next_position
            cache.next_position += x.shape[1]
        places = torch.arange(first, first + x.shape[1], dtype=torch.int64, device=x.device)
        parts = tuple(x[:, block] for block in blocks)
        ropes = tuple(rope_angles(places[block].expand(len(x), -1), self.config, x.dtype) for block in blocks)
        return Stream(parts, ropes, parts[0], pruner, () if keep else None, cache, queries, last_tokens)

    def run(
        self, streams: Sequence[Stream], through: Through = direct, layers: int | None = None
    ) -> list[Stream]:
        """Take streams through the first ``layers``, all by default, one layer after the other."""
        found = list(streams)
        for i, layer in enumerate(self.layers[:layers]):
            found = through(f"decoder.layers.{i}", layer, found, partial(self.advance, i))
        return found

    def advance(self, i: int, layer: nn.Module, stream: Stream) -> Stream:
        """A stream behind layer ``i``; ``stream`` stays as it is, but for a cache of its own."""
        cache, place = stream.cache, i
        if cache is None and (stream.stored is not None or len(stream.blocks) > 1):
            cache, place = KVCache(1), 0
        rows = stream.pruner.score_rows(i) if stream.pruner is not None else None
        (x, *rest), (rope, *ropes) = stream.blocks, stream.ropes
        last = stream.last_tokens is not None and i == len(self.layers) - 1 and rows is None
        first = x.shape[1] - cast(int, stream.last_tokens) if last else 0
        x, received = layer(x, rope, place, cache, rows, first)
        rest = [
            layer(y, turn, place, cache, None, y.shape[1] if last else 0)[0]
            for y, turn in zip(rest, ropes, strict=True)
        ]
        stored = stream.stored
        if stored is not None and cache is not None:
            stored = (*stored, cache.stored(place))
        after = replace(stream, blocks=(x, *rest), stored=stored)
        return after if stream.pruner is None or last else self._prune(i, after, stream.pruner, received)

    def _prune(self, i: int, stream: Stream, pruner: TokenPruner, received: Tensor | None) -> Stream:
        (x, *rest), (rope, *ropes) = stream.blocks, stream.ropes
        output = LayerOutput(x, stream.embedded, received, partial(self.look_ahead, stream))
        kept = pruner.keep(i, output)
        if kept is None:
            return stream
        kept = kept.to(x.device)
        turned = take_tokens(rope[0], kept), take_tokens(rope[1], kept)
        return replace(stream, blocks=(take_tokens(x, kept), *rest), ropes=(turned, *ropes))

    def finish(self, stream: Stream) -> Tensor:
        """Final hidden states ``(batch, tokens, width)`` of a stream's first block."""
        out: Tensor = self.norm(stream.blocks[0])
        return out

    def look_ahead(self, stream: Stream, layers: Sequence[int], rows: Tensor | None) -> Tensor:
        """As `LayerOutput.look_ahead`, given a stream behind a layer."""
        looked = [cast(DecoderLayer, self.layers[i]) for i in layers]
        if rows is None:
            assert stream.queries is not None, "a decoder alone has no action expert"
            pairs = zip(layers, looked, strict=True)
            found = stream.queries.received(stream, {i: keys(layer, stream) for i, layer in pairs})
            return torch.stack(found).mean(0)
        x, rope = stream.blocks[0], stream.ropes[0]
        done = None if self.fused_look is None else self.fused_look(looked, x, rope, rows)
        if done is not None:
            return done
        return torch.stack([layer.look(x, rope, rows.to(x.device)) for layer in looked]).mean(0)


def take_tokens(x: Tensor, kept: Tensor) -> Tensor:
    """Gather ``kept`` ``(batch, kept)`` from the second dimension of ``x`` ``(batch, tokens, width)``.

    Raises:
        ValueError: the batches differ; a gather would leave out what one has more.
    """
    if len(kept) != len(x):
        raise ValueError(f"tokens are kept for a batch of {len(kept)}, but there is one of {len(x)}")
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))


def rope_angles(positions: Tensor, config: DecoderConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(batch, tokens, head_dim)`` of the rotary embedding (Su et al. 2021)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * config.rope_theta ** -(half / config.head_dim)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn ``(batch, heads, tokens, head_dim)`` by its positions; halves are paired, as in Llama."""
    cos, sin = rope[0][:, None].to(x), rope[1][:, None].to(x)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def causal_mask(tokens: int, past: int, device: torch.device) -> Tensor:
    """``(tokens, past + tokens)``: true where a token may look, at all of the past and up to itself."""
    return torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)
