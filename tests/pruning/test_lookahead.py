"""Which layers are looked at, what that finds of later attention, and what it costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.models import VLA, DecoderConfig, ModelInputs
from sqap.models.decoder import rotate
from sqap.models.heads import FlowHead
from sqap.models.heads.expert import ExpertCache, Rope
from sqap.models.stream import LayerOutput
from sqap.pruning import Selector, StepPruner
from sqap.pruning.attention import AttentionWatcher, per_camera, query_rows, score_queries
from sqap.pruning.lookahead import affordable, choose_layers, later_attention, layers_to_look_at, recall
from sqap.recipe import Cut, Pruning
from tests.families import EXPERTS, FAMILIES, family_config, random_inputs, random_model

LLAMA = DecoderConfig(
    vocabulary=32, width=4096, depth=32, heads=32, kv_heads=32, head_dim=128, mlp_width=11008
)


def test_a_look_costs_no_more_than_a_share_of_the_pruned_decoder() -> None:
    """Of 7B, a key projection is a twelfth of a layer; a quarter behind the third leaves 10.25 of them."""
    settings = Pruning(0.25, 3)
    layer = (4 * 4096 + 3 * 11008) / 4096
    assert affordable(settings, LLAMA) == int(0.05 * 10.25 * layer) == 6
    assert affordable(Pruning(1.0, 3), LLAMA) == int(0.05 * 32 * layer)
    assert affordable(Pruning(0.25, 3, later=(Cut(10, 0.1),)), LLAMA) == int(0.05 * 6.95 * layer)
    few_keys = dataclasses.replace(LLAMA, kv_heads=4)
    assert affordable(settings, few_keys) > 32
    assert affordable(Pruning(0.01, 1), dataclasses.replace(LLAMA, depth=2, mlp_width=1)) == 1


def test_layers_are_those_named_or_found_or_evenly_spaced() -> None:
    settings = Pruning(0.25, 3)
    assert layers_to_look_at(Pruning(method="random"), LLAMA) == ()
    assert layers_to_look_at(dataclasses.replace(settings, score_layers=(31, 5)), LLAMA, (7,)) == (31, 5)
    assert layers_to_look_at(settings, LLAMA, (7, 9)) == (7, 9)
    assert layers_to_look_at(settings, LLAMA) == (5, 10, 15, 19, 24, 29)
    small = dataclasses.replace(LLAMA, depth=6, kv_heads=4)
    assert layers_to_look_at(settings, small) == (3, 4, 5)
    with pytest.raises(InputError, match="score_layers has layer 32, but the decoder has 32 layers"):
        layers_to_look_at(dataclasses.replace(settings, score_layers=(32,)), LLAMA)


def test_recall_counts_the_best_tokens_that_are_found() -> None:
    attended = torch.tensor([[[4.0, 3, 2, 1], [1, 2, 3, 4]]])
    looked = torch.tensor([[[4.0, 1, 3, 2], [1, 2, 3, 4]], [[4.0, 1, 3, 2], [1, 2, 3, 4]]])
    assert recall(looked, attended, 2) == pytest.approx(0.75)
    assert recall(looked, attended, 1) == recall(attended, attended, 3) == 1


def test_layers_are_chosen_for_what_they_find_together() -> None:
    """Two layers that see a half of what matters each, one that sees nothing of it."""
    first, second, blind = torch.zeros(3, 1, 20)
    first[0, -4:], second[0, -8:-4], blind[0, :8] = 1.0, 1.0, 1.0
    layers = torch.stack([blind, first, blind, second])
    attended = torch.stack([first, second])
    assert choose_layers(layers, attended, 8, 4) == (0, 1, 2, 3)  # all, where they may be had
    assert choose_layers(layers, attended, 8, 3) == (1, 3)  # a third would bring nothing
    assert choose_layers(layers, attended, 8, 2) == (1, 3)
    assert choose_layers(layers, attended, 8, 1) in ((1,), (3,))
    twice = torch.stack([first, second, first, second])
    assert choose_layers(twice, attended, 8, 3) == (0, 1)  # a layer that brings nothing is left out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("queries", ["text", "last"])
@torch.inference_mode()
def test_later_attention_is_what_a_step_sees(family: str, queries: str) -> None:
    """Scores as a pruner gets them, and attention as a watcher of the unpruned pass does; of every family."""
    config = family_config(family)
    model, inputs = random_model(config), [random_inputs(config, 1, seed) for seed in (1, 2)]
    settings = Pruning(0.5, 1, score_queries=queries, top_share=1)  # type: ignore[arg-type]
    looked, attended = later_attention(model, inputs, settings)
    later = (1, 2) if config.decoder.last_layer == "whole" else (1,)
    assert looked.shape == attended.shape == (len(later), 2 * config.cameras, config.grid**2)
    length = model.config.layout(5).blocks[0].stop
    rows = query_rows(settings.score_queries, config.visual, length)
    for i, given in enumerate(inputs):
        frame = slice(i * config.cameras, (i + 1) * config.cameras)
        for j, layer in enumerate(later):
            watcher = AttentionWatcher((layer,), rows, config.visual, config.cameras)
            model(given, watcher)
            assert watcher.scores is not None
            torch.testing.assert_close(per_camera(attended[j, frame], 1), watcher.scores)
        for layers in {(1,), later[-1:], later}:
            selector = Selector(settings, config.grid, layers=layers)
            pruner = StepPruner(selector, length, config.visual, [None] * config.cameras)
            assert model(given, pruner).isfinite().all()
            for camera, selection in enumerate(pruner.selections):
                assert selection.scores is not None
                expected = looked[[layer - 1 for layer in layers], i * config.cameras + camera].mean(0)
                expected = expected / expected.sum()
                torch.testing.assert_close(selection.scores, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(looked[0], attended[0])  # the next layer's is what it will be
    if len(later) > 1:
        assert not torch.allclose(looked[1], attended[1])
    alone = later_attention(model, inputs, settings, layers=later[-1:])
    torch.testing.assert_close(alone[0], looked[-1:])


@pytest.mark.parametrize("family", EXPERTS)
@torch.inference_mode()
def test_an_expert_looks_with_its_own_action_tokens(family: str) -> None:
    """Scores of a step, with the noise it starts from, and the expert's attention in an unpruned pass."""
    config = family_config(family)
    model, inputs = random_model(config), [random_inputs(config, 1, seed) for seed in (1, 2)]
    head = model.head
    assert isinstance(head, FlowHead)
    settings = Pruning(0.5, 1, top_share=1)
    assert score_queries(settings, config) == "actions"
    looked, attended = later_attention(model, inputs, settings)
    torch.testing.assert_close(looked[0], attended[0])  # the next layer's is what it will be
    for i, given in enumerate(inputs):
        assert given.noise is not None
        paid = watched_expert(model, given)
        frame = slice(i * config.cameras, (i + 1) * config.cameras)
        for j, layer in enumerate((1, 2)):
            torch.testing.assert_close(attended[j, frame].flatten(), paid[layer], rtol=1e-4, atol=1e-6)
        resolved = dataclasses.replace(settings, score_queries="actions")
        pruner = StepPruner(
            Selector(resolved, config.grid, layers=(1, 2)),
            model.config.layout(5).blocks[0].stop,
            config.visual,
            [None] * 2,
        )
        model(given, pruner)
        for camera, selection in enumerate(pruner.selections):
            expected = looked[:, i * config.cameras + camera].mean(0)
            torch.testing.assert_close(selection.scores, expected / expected.sum(), rtol=1e-4, atol=1e-6)
        other = dataclasses.replace(given, noise=given.noise + 1)
        assert not torch.allclose(later_attention(model, [other], settings)[0], looked[:, frame])


def watched_expert(model: VLA, inputs: ModelInputs) -> list[Tensor]:
    """Attention of each expert layer's action tokens to the visual tokens in the first denoising step.

    Out of the inputs that the expert's own layers are given, in float64, head by head.
    """
    head, decoder = model.head, model.config.decoder
    assert isinstance(head, FlowHead)
    given: list[tuple[Tensor, ExpertCache, tuple[Rope, Rope], Tensor | None]] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, args: given.append(args))
        for layer in head.experts
    ]
    (stream,) = model.decoder.run(model.streams([inputs]))
    assert inputs.noise is not None
    layout = model.layout(inputs)
    head.velocity(head.inputs(model.decoder, stream, layout, inputs), inputs.noise, 1.0)
    for hook in hooks:
        hook.remove()
    paid, first = [], layout.expert.length - head.config.horizon
    for layer, (x, cache, ropes, _) in zip(head.experts, given, strict=True):
        rope = ropes[int(layer.self_attn.cross)]
        q = rotate(layer.self_attn.q_proj(x).unflatten(-1, (decoder.heads, -1)).transpose(1, 2), rope)[0]
        q, keys = q[:, first:], cache.read()[0][0]
        heads = [
            (q[h].double() @ keys[h * decoder.kv_heads // decoder.heads].double().T / decoder.head_dim**0.5)
            for h in range(decoder.heads)
        ]
        paid.append(
            torch.stack([scores.softmax(-1) for scores in heads]).mean((0, 1))[model.config.visual].float()
        )
    return paid


@pytest.mark.parametrize("family", ["diffusion", "tokens", "regression"])
def test_only_an_expert_has_action_tokens_to_look_from(family: str) -> None:
    config = family_config(family)
    assert score_queries(Pruning(0.5, 1), config) == "text"
    with pytest.raises(InputError, match="score_queries 'actions' needs an action expert"):
        score_queries(Pruning(0.5, 1, score_queries="actions"), config)


@pytest.mark.parametrize("family", EXPERTS)
def test_a_last_layer_without_queries_is_looked_at_by_the_expert_alone(family: str) -> None:
    decoder = family_config(family).decoder
    whole = dataclasses.replace(decoder, last_layer="whole")
    for queries, of, expected in (
        ("actions", decoder, (2,)),  # of both layers the one that is affordable
        ("text", decoder, (1,)),
        ("text", whole, (2,)),
    ):
        settings = Pruning(0.5, 1, score_queries=queries)  # type: ignore[arg-type]
        assert layers_to_look_at(settings, of) == expected
    with pytest.raises(InputError, match="has layer 2, which has keys and no queries of the text"):
        layers_to_look_at(Pruning(0.5, 1, score_queries="last", score_layers=(1, 2)), decoder)
    with pytest.raises(InputError, match="behind layer 2 there is only the last one"):
        layers_to_look_at(Pruning(0.5, 2, score_queries="text"), decoder)


def test_attention_as_it_is_has_no_action_tokens_yet() -> None:
    assert score_queries(Pruning(0.5, 1, method="attention"), family_config("flow")) == "text"
    with pytest.raises(
        InputError, match="score_queries 'actions' needs method 'lookahead'; 'attention' reads"
    ):
        Pruning(0.5, 1, method="attention", score_queries="actions")


def test_the_state_of_now_is_looked_from(model: VLA, pixels: list[Tensor], token_ids: Tensor) -> None:
    """Behind a later layer, looking ahead comes nearer to what is then seen."""
    inputs = [ModelInputs(pixels, token_ids)]
    errors = []
    for after in (1, 2, 3):
        looked, attended = later_attention(model, inputs, Pruning(0.5, after))
        errors.append(float((looked[-1] - attended[-1]).abs().sum()))
    assert errors[0] > errors[2]
    assert errors[2] < 1e-5


def test_nothing_is_looked_at_where_nothing_is_pruned(
    model: VLA, pixels: list[Tensor], token_ids: Tensor
) -> None:
    pruner = StepPruner(Selector(Pruning(1.0, 2), 4, layers=(2, 3)), 22, slice(1, 17))

    def refuse(*_: object) -> Tensor:
        raise AssertionError("looked ahead")

    x = torch.zeros(1, 22, 16)
    assert pruner.keep(1, LayerOutput(x, x, None, refuse)) is None
