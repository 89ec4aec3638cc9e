"""The pruner inside the decoder, against a decoder written out by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from sqap.models import VLA, ModelInputs
from sqap.models.decoder import Decoder, KVCache, rope_angles, rotate
from sqap.pruning import Selector, StepPruner
from sqap.recipe import Pruning

VISUAL = 16
LENGTH = 22  # BOS, 16 visual tokens, 5 text tokens
METHODS = ("sqap", "attention", "random", "uniform")


def explicit(decoder: Decoder, x: Tensor, keep_after: dict[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The decoder on ``x`` (1, tokens, width) with an explicit softmax, and every layer's attention.

    After layer i only the positions ``keep_after[i]`` go on, each as the position it was.
    """
    positions = torch.arange(x.shape[1])
    maps = []
    layers: Iterable[Any] = decoder.layers
    for i, layer in enumerate(layers):
        attn = layer.self_attn
        rope = rope_angles(positions[None], decoder.config, x.dtype)
        h = layer.input_layernorm(x)
        q, k, v = (
            proj(h).view(1, len(positions), -1, attn.head_dim).transpose(1, 2)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = rotate(q, rope), rotate(k, rope)
        k, v = (t.repeat_interleave(attn.heads // attn.kv_heads, dim=1) for t in (k, v))
        logits = q @ k.transpose(-1, -2) / attn.head_dim**0.5
        future = positions[None, :] > positions[:, None]
        weights = logits.masked_fill(future, -torch.inf).softmax(-1)
        maps.append(weights)
        x = x + attn.o_proj((weights @ v).transpose(1, 2).reshape(1, len(positions), -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        if i in keep_after:
            stays = torch.isin(positions, keep_after[i])
            x, positions = x[:, stays], positions[stays]
    out: Tensor = decoder.norm(x)
    return out, maps


def positions_kept(pruner: StepPruner) -> Tensor:
    (selection,) = pruner.selections
    return torch.cat([torch.tensor([0]), 1 + selection.kept, torch.arange(1 + VISUAL, LENGTH)])


@pytest.fixture(scope="module")
def x(model: VLA, pixels: list[Tensor], token_ids: Tensor) -> Tensor:
    return model.embed(ModelInputs(pixels, token_ids))


def make(settings: Pruning) -> StepPruner:
    generator = torch.Generator().manual_seed(0)
    return StepPruner(Selector(settings, 4), LENGTH, slice(1, 1 + VISUAL), [(0.4, 0.6)], generator)


def test_keeping_everything_changes_nothing(model: VLA, pixels: list[Tensor], token_ids: Tensor) -> None:
    noise = torch.ones(1, 2, 2, dtype=torch.float64)
    pruner = make(Pruning(keep_ratio=1.0))
    inputs = ModelInputs(pixels, token_ids, noise)
    assert torch.equal(model(inputs), model(inputs, pruner))
    assert pruner.selections == ()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [1, 2, 4])
def test_pruned_decoder_equals_the_layers_run_by_hand(model: VLA, x: Tensor, method: str, after: int) -> None:
    pruner = make(Pruning(keep_ratio=0.4, method=method, after_layer=after))  # type: ignore[arg-type]
    pruned = model.decoder(x, pruner=pruner)
    kept = positions_kept(pruner)
    by_hand, _ = explicit(model.decoder, x, {after - 1: kept})
    assert pruned.shape[1] == LENGTH - VISUAL + round(0.4 * VISUAL)
    torch.testing.assert_close(pruned, by_hand)
    if after < 4:  # what is pruned after the last layer is not missed by the last token
        assert not torch.allclose(pruned[:, -1], model.decoder(x)[:, -1])


def test_a_method_without_scores_asks_for_the_attention_of_one_row() -> None:
    pruner = make(Pruning(keep_ratio=0.4, method="random", after_layer=2))
    rows = [pruner.score_rows(layer) for layer in range(4)]
    assert [None if row is None else row.tolist() for row in rows] == [None, [LENGTH - 1], None, None]


def test_the_pruners_chance_is_its_generators(model: VLA, x: Tensor) -> None:
    def kept() -> list[int]:
        pruner = make(Pruning(keep_ratio=0.4, method="random", after_layer=2))
        model.decoder(x, pruner=pruner)
        return pruner.selections[0].kept.tolist()

    assert kept() == kept()


@pytest.mark.parametrize("queries", ["text", "last"])
@pytest.mark.parametrize("layers", [None, (0,), (0, 2)])
def test_tokens_are_ranked_by_the_attention_the_whole_softmax_shows(
    model: VLA, x: Tensor, queries: str, layers: tuple[int, ...] | None
) -> None:
    settings = Pruning(
        keep_ratio=0.25,
        after_layer=3,
        method="attention",
        score_queries=queries,  # type: ignore[arg-type]
        score_layers=layers,
    )
    pruner = make(settings)
    model.decoder(x, pruner=pruner)
    _, maps = explicit(model.decoder, x, {})
    rows = slice(1 + VISUAL, None) if queries == "text" else slice(LENGTH - 1, None)
    received = torch.stack([maps[i][0, :, rows].mean((0, 1)) for i in layers or (2,)]).mean(0)
    expected = received[1 : 1 + VISUAL].topk(4).indices
    (selection,) = pruner.selections
    assert selection.kept.tolist() == sorted(expected.tolist())


def test_a_pruned_cache_continues_as_if_the_rest_had_never_been(model: VLA, x: Tensor) -> None:
    new = model.decoder.embed_tokens(torch.tensor([[11]]))
    pruner = make(Pruning(keep_ratio=0.4, after_layer=2))
    cache = KVCache(4)
    model.decoder(x, cache=cache, pruner=pruner)
    continued = model.decoder(new, cache=cache)

    kept = torch.cat([positions_kept(pruner), torch.tensor([LENGTH])])
    by_hand, _ = explicit(model.decoder, torch.cat([x, new], dim=1), {1: kept})
    torch.testing.assert_close(continued[:, -1], by_hand[:, -1])
