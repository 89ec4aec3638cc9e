"""The decoder against Llama as transformers computes it, and against itself with a cache and a pruner."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from sqap.kernels.received import attention_received
from sqap.models import DecoderConfig
from sqap.models.decoder import Decoder
from sqap.models.kv import KVCache
from sqap.models.stream import LayerOutput

TOLERANCE = 1e-4

CONFIGS = [
    pytest.param(DecoderConfig(40, 64, 4, 8, 2, 8, 96), id="grouped queries"),
    pytest.param(DecoderConfig(40, 64, 3, 4, 4, 16, 96, norm_eps=1e-5), id="as many keys as queries"),
    pytest.param(DecoderConfig(40, 48, 3, 4, 1, 32, 80, rope_theta=500_000.0), id="wide heads, one key"),
]


def build(config: DecoderConfig) -> tuple[Decoder, LlamaModel]:
    """Both decoders with the same weights, drawn so that every branch and every gain matters."""
    torch.manual_seed(0)
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",
        )
    ).eval()
    for parameter in llama.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    decoder = Decoder(config).eval()
    decoder.load_state_dict(llama.state_dict(), strict=True)  # the names are Llama's own
    return decoder, llama


def random_ids(config: DecoderConfig, batch: int = 2, tokens: int = 17) -> Tensor:
    return torch.randint(0, config.vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(1))


class KeepAfter:
    """A pruner that keeps given positions after one layer and records the scores it was handed."""

    def __init__(self, layer: int, kept: Tensor, rows: Tensor) -> None:
        self.layer, self.kept, self.rows = layer, kept, rows
        self.received: list[Tensor] = []

    def score_rows(self, layer: int) -> Tensor | None:
        return self.rows if layer <= self.layer else None

    def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
        if output.received is not None:
            self.received.append(output.received)
        return self.kept if layer == self.layer else None


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_equals_llama(config: DecoderConfig) -> None:
    decoder, llama = build(config)
    ids = random_ids(config)

    ours = decoder(decoder.embed_tokens(ids))

    theirs = llama(input_ids=ids).last_hidden_state
    assert theirs.std() > 0.1, "a vanishing signal would prove nothing"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("pieces", [[17], [16, 1], [9, 1, 1, 6], [1] * 17], ids=str)
@torch.no_grad()
def test_cache_equals_one_pass(config: DecoderConfig, pieces: list[int]) -> None:
    decoder, llama = build(config)
    ids = random_ids(config)
    cache = KVCache(config.depth)

    parts = [decoder(x, cache=cache) for x in decoder.embed_tokens(ids).split(pieces, dim=1)]

    assert cache.next_position == 17
    theirs = llama(input_ids=ids).last_hidden_state
    torch.testing.assert_close(torch.cat(parts, dim=1), theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_scores_are_llamas_attention(config: DecoderConfig) -> None:
    decoder, llama = build(config)
    ids, rows = random_ids(config), torch.tensor([3, 11, 16])
    pruner = KeepAfter(config.depth - 1, torch.arange(17).expand(2, -1), rows)

    decoder(decoder.embed_tokens(ids), pruner=pruner)

    attentions = llama(input_ids=ids, output_attentions=True).attentions
    assert len(pruner.received) == config.depth
    for ours, theirs in zip(pruner.received, attentions, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, rows].mean((1, 2)), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.sum(1), torch.ones(2))


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_kept_tokens_keep_their_positions(config: DecoderConfig) -> None:
    """Pruning after layer 1 equals Llama's own layers, run on the kept tokens with their old positions."""
    decoder, llama = build(config)
    ids = random_ids(config)
    kept = torch.tensor([[0, 2, 3, 8, 15, 16], [0, 1, 6, 7, 9, 16]])

    ours = decoder(decoder.embed_tokens(ids), pruner=KeepAfter(1, kept, torch.tensor([16])))

    llama.set_attn_implementation("sdpa")  # its layers are causal without a mask, unlike the eager ones
    x, positions = llama.embed_tokens(ids), torch.arange(17).expand(2, -1)
    for i, layer in enumerate(llama.layers):
        x = layer(x, position_embeddings=llama.rotary_emb(x, positions))
        if i == 1:
            x, positions = x.gather(1, kept[..., None].expand(-1, -1, config.width)), kept
    torch.testing.assert_close(ours, llama.norm(x), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_cache_continues_after_pruning() -> None:
    """A token decoded on a pruned cache equals the same token present when the others were pruned."""
    config = DecoderConfig(40, 64, 4, 8, 2, 8, 96)
    decoder, _ = build(config)
    x = decoder.embed_tokens(random_ids(config, batch=1))
    kept, rows = torch.tensor([[0, 4, 5, 13, 15]]), torch.tensor([15])
    cache = KVCache(config.depth)

    decoder(x[:, :16], cache=cache, pruner=KeepAfter(1, kept, rows))
    later = decoder(x[:, 16:], cache=cache)

    at_once = decoder(x, pruner=KeepAfter(1, torch.cat([kept, torch.tensor([[16]])], dim=1), rows))
    torch.testing.assert_close(later[:, -1], at_once[:, -1], atol=TOLERANCE, rtol=0)


def test_received_attention_sees_no_future() -> None:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(1, 4, 3, 8, generator=generator)
    k = torch.randn(1, 2, 10, 8, generator=generator)  # seven keys are from before

    received = attention_received(q[:, :, :2], k, torch.tensor([7, 8]))

    assert (received[:, :8] > 0).all()
    assert received[0, 9] == 0  # neither row may look at the last key
    assert received[0, 8] > 0  # the second row is that key's own
    torch.testing.assert_close(received.sum(1), torch.ones(1))


@torch.no_grad()
def test_runs_in_bfloat16() -> None:
    config = DecoderConfig(40, 64, 4, 8, 2, 8, 96)
    decoder, _ = build(config)
    ids = random_ids(config)
    exact = decoder(decoder.embed_tokens(ids))

    rough = decoder.bfloat16()(decoder.embed_tokens(ids))

    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.1
