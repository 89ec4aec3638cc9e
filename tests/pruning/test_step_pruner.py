"""The pruner inside the decoder, against a decoder written out by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sqap.models import VLA, ModelInputs
from sqap.models.decoder import Decoder, rope_angles, rotate
from sqap.models.kv import KVCache
from sqap.models.stream import LayerOutput
from sqap.pruning import Selector, StepPruner, rivals
from sqap.quantization import quantize_model
from sqap.recipe import Cut, Pruning, PruningMethod, Quantization, Scheme

VISUAL = 16
LENGTH = 22  # BOS, 16 visual tokens, 5 text tokens
METHODS = get_args(PruningMethod)


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
    layers = tuple(range(settings.last_layer, 4)) or (3,)
    selector = Selector(settings, 4, layers=layers)
    return StepPruner(selector, LENGTH, slice(1, 1 + VISUAL), [(0.4, 0.6)], generator)


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


@pytest.mark.parametrize("method", ["lookahead", "random", "uniform", "divprune"])
def test_a_method_that_does_not_watch_attention_asks_for_none(method: str) -> None:
    pruner = make(Pruning(keep_ratio=0.4, method=method))  # type: ignore[arg-type]
    assert [pruner.score_rows(layer) for layer in range(4)] == [None] * 4


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


@pytest.mark.parametrize("method", [m for m in METHODS if m != "uniform"])
def test_cuts_follow_each_other(model: VLA, x: Tensor, method: str) -> None:
    """Against the layers run by hand: each cut keeps its budget, and a token keeps its position."""
    settings = Pruning(0.75, 1, method=method, later=(Cut(3, 0.25),))  # type: ignore[arg-type]
    pruner, kept = make(settings), {}

    class Recorder:
        score_rows = staticmethod(pruner.score_rows)

        def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
            places = pruner.keep(layer, output)
            if places is not None:
                kept[layer] = positions_kept(pruner)
            return places

    pruned = model.decoder(x, pruner=Recorder())
    assert {layer: len(positions) for layer, positions in kept.items()} == {0: 12 + 6, 2: 4 + 6}
    assert torch.isin(kept[2], kept[0]).all()
    by_hand, _ = explicit(model.decoder, x, kept)
    torch.testing.assert_close(pruned, by_hand)


@pytest.mark.parametrize("method", rivals.BY_FEATURES)
def test_rivals_compare_tokens_as_they_were_published_to(model: VLA, x: Tensor, method: str) -> None:
    """DART compares the hidden states behind the layer, the others what the decoder reads."""
    pruner, behind = make(Pruning(0.25, 2, method=method)), []  # type: ignore[arg-type]

    class Recorder:
        score_rows = staticmethod(pruner.score_rows)

        def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
            behind.append(output.hidden[0])
            return pruner.keep(layer, output)

    model.decoder(x, pruner=Recorder())
    visual = slice(1, 1 + VISUAL)
    features = behind[1][visual] if method == "dart" else x[0, visual]
    left = torch.ones(VISUAL, dtype=torch.bool)
    chosen = rivals.choose(method, VISUAL // 4, left, features, rivals.relevance(x[0], visual))
    assert pruner.selections[0].kept.tolist() == sorted(chosen.tolist())


def later_maps(decoder: Decoder, x: Tensor, positions: Tensor, layers: Iterable[int]) -> Tensor:
    """Attention (heads, tokens, tokens) in layers that read ``x`` (1, tokens, width), their mean."""
    maps = []
    for i in layers:
        layer: Any = decoder.layers[i]
        attn, rope = layer.self_attn, rope_angles(positions[None], decoder.config, x.dtype)
        h = layer.input_layernorm(x)
        q, k = (
            rotate(proj(h).view(1, len(positions), -1, attn.head_dim).transpose(1, 2), rope)[0]
            for proj in (attn.q_proj, attn.k_proj)
        )
        logits = q @ k.repeat_interleave(attn.heads // attn.kv_heads, 0).mT / attn.head_dim**0.5
        maps.append(logits.masked_fill(positions[None] > positions[:, None], -torch.inf).softmax(-1))
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("queries", ["text", "last"])
@pytest.mark.parametrize(("after", "layers"), [(1, (1, 2, 3)), (2, (3,)), (3, (3,))])
def test_look_ahead_ranks_by_what_later_layers_would_see(
    model: VLA, x: Tensor, queries: str, after: int, layers: tuple[int, ...]
) -> None:
    settings = Pruning(0.5, after, score_queries=queries, top_share=1, ring_share=0)  # type: ignore[arg-type]
    pruner = StepPruner(Selector(settings, 4, layers=layers), LENGTH, slice(1, 1 + VISUAL))
    model.decoder(x, pruner=pruner)

    states, positions = x, torch.arange(LENGTH)
    rope = rope_angles(positions[None], model.decoder.config, x.dtype)
    for layer in model.decoder.layers[:after]:
        states, _ = layer(states, rope)
    rows = slice(1 + VISUAL, None) if queries == "text" else slice(LENGTH - 1, None)
    received = later_maps(model.decoder, states, positions, layers)[:, rows].mean((0, 1))[1 : 1 + VISUAL]
    (selection,) = pruner.selections
    assert selection.scores is not None
    torch.testing.assert_close(selection.scores.double(), received / received.sum(), rtol=1e-5, atol=1e-6)
    assert selection.kept.tolist() == sorted(received.topk(8).indices.tolist())


def test_what_a_cut_has_dropped_has_no_say_in_the_next(model: VLA, x: Tensor) -> None:
    """The second look is at the tokens that are left, at their own positions."""
    settings = Pruning(0.75, 1, later=(Cut(3, 0.25),), top_share=1)
    pruner = StepPruner(Selector(settings, 4, layers=(3,)), LENGTH, slice(1, 1 + VISUAL))
    seen: list[tuple[Tensor, Tensor]] = []

    class Recorder:
        score_rows = staticmethod(pruner.score_rows)

        def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
            if layer == 2:
                seen.append((output.hidden, positions_kept(pruner)))
            return pruner.keep(layer, output)

    model.decoder(x, pruner=Recorder())
    ((states, positions),) = seen
    maps = later_maps(model.decoder, states, positions, (3,))
    received = torch.zeros(LENGTH, dtype=x.dtype)
    received[positions] = maps[:, positions > VISUAL].mean((0, 1))
    (selection,) = pruner.selections
    assert selection.kept.tolist() == sorted(received[1 : 1 + VISUAL].topk(4).indices.tolist())


def test_a_quantized_decoder_looks_with_its_own_projections(
    model: VLA, pixels: list[Tensor], token_ids: Tensor
) -> None:
    """Scores of packed weights are near those of full precision, and are not the same."""
    settings = Pruning(0.5, 2)

    def scores(model: VLA) -> Tensor:
        pruner = StepPruner(Selector(settings, 4, layers=(2, 3)), LENGTH, slice(1, 1 + VISUAL))
        model.decoder(model.embed(ModelInputs(pixels, token_ids)), pruner=pruner)
        found = pruner.selections[0].scores
        assert found is not None
        return found.double()

    exact = scores(model)
    for bits, near in ((8, 0.05), (4, 0.6)):
        found = scores(quantize_model(model, Quantization(Scheme(bits, 8)), []).float())
        assert 0 < float((found - exact).norm() / exact.norm()) < near
