"""The action expert: what it computes from cached keys and values is what one joint pass computes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sqap.errors import InputError
from sqap.models import VLA, FlowHeadConfig, ModelInputs
from sqap.models.decoder import DecoderLayer
from sqap.models.heads import FlowHead
from sqap.models.heads.flow import ExpertLayer, time_embedding
from sqap.pruning import Selector, StepPruner
from sqap.recipe import Pruning
from tests.families import family_config, random_inputs, random_model

CONFIG = family_config("flow")
CPU = torch.device("cpu")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model() -> VLA:
    return random_model(CONFIG)


def turn(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions of ``x`` ``(heads, tokens, width)``, written out pair by pair."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = positions.float() * 10_000 ** (-i / half)
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * angle.cos() - b * angle.sin()
        out[..., i + half] = b * angle.cos() + a * angle.sin()
    return out


def look(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention with every query head's keys written out; heads side by side."""
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def seen(model: VLA, inputs: ModelInputs, pruner: StepPruner | None = None) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of the decoder's layers, as the expert is given them."""
    assert isinstance(model.head, FlowHead)
    (stream,) = model.decoder.run(model.streams([inputs], pruners=[pruner]))
    return model.head.seen(stream)


def heads(x: Tensor, width: int) -> Tensor:
    return x.view(len(x), -1, width).transpose(0, 1)


def joint(model: VLA, inputs: ModelInputs, x: Tensor, time: float) -> Tensor:
    """The velocity of one chunk ``x`` by a single pass over all tokens, as LeRobot trains it: no cache.

    Images and text see each other, the state sees them too, and an action all of these and those before it.
    """
    config, head = model.config.decoder, model.head
    assert isinstance(head, FlowHead)
    prefix = model.embed(inputs)[0]
    n, m = len(prefix), len(x)
    action = head.action_in_proj(x)
    when = time_embedding(time, head.config, CPU).expand_as(action)
    suffix = head.action_time_mlp_out(F.silu(head.action_time_mlp_in(torch.cat([action, when], dim=-1))))
    block = torch.cat([torch.zeros(n - 1), torch.arange(1, m + 2)])
    mask = block[None, :] <= block[:, None]
    width = config.head_dim
    for i, (layer, expert) in enumerate(zip(model.decoder.layers, head.layers, strict=True)):
        assert isinstance(layer, DecoderLayer)
        assert isinstance(expert, ExpertLayer)
        h = layer.input_layernorm(prefix)
        q, k, v = (
            heads(p(h), width)
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        q, k = turn(q, torch.arange(n)), turn(k, torch.arange(n))
        g = expert.input_layernorm(suffix)
        query = heads(expert.self_attn.q_proj(g), width)
        if i % 2:
            keys = heads(expert.self_attn.k_proj(k.transpose(0, 1).flatten(1)), width)
            values = heads(expert.self_attn.v_proj(v.transpose(0, 1).flatten(1)), width)
            mixed = look(turn(query, torch.arange(m)), keys, values, mask[n:, :n])
        else:
            behind = torch.arange(n, n + m)
            keys = torch.cat([k, turn(heads(expert.self_attn.k_proj(g), width), behind)], dim=1)
            values = torch.cat([v, heads(expert.self_attn.v_proj(g), width)], dim=1)
            mixed = look(turn(query, behind), keys, values, mask[n:])
        prefix = prefix + layer.self_attn.o_proj(look(q, k, v, mask[:n, :n]))
        prefix = prefix + layer.mlp(layer.post_attention_layernorm(prefix))
        suffix = suffix + expert.self_attn.o_proj(mixed)
        suffix = suffix + expert.mlp(expert.post_attention_layernorm(suffix))
    out: Tensor = head.action_out_proj(head.norm(suffix))
    return out


@torch.inference_mode()
def test_actions_are_the_joint_pass_integrated_from_noise(model: VLA) -> None:
    inputs = random_inputs(CONFIG, 1)
    assert inputs.noise is not None
    x = inputs.noise[0]
    for step in range(10):
        x = x - joint(model, inputs, x, 1 - step / 10) / 10
    torch.testing.assert_close(model(inputs)[0], x, **TOLERANCE)


@torch.inference_mode()
def test_the_velocity_at_any_time_is_the_joint_passes(model: VLA) -> None:
    inputs, head = random_inputs(CONFIG, 1), model.head
    assert isinstance(head, FlowHead)
    assert inputs.noise is not None
    found = head.velocity(seen(model, inputs), inputs.noise, 0.3, model.layout(inputs).decoder.length)
    torch.testing.assert_close(found[0], joint(model, inputs, inputs.noise[0], 0.3), **TOLERANCE)


@torch.inference_mode()
def test_observations_of_a_batch_do_not_meet(model: VLA) -> None:
    inputs = random_inputs(CONFIG, 3)
    together = model(inputs)
    for i in range(3):
        cameras = slice(i * CONFIG.cameras, (i + 1) * CONFIG.cameras)
        alone = ModelInputs(
            [p[cameras] for p in inputs.pixels],
            *(x[i : i + 1] for x in (inputs.token_ids, inputs.noise, inputs.proprio) if x is not None),
        )
        torch.testing.assert_close(model(alone)[0], together[i], **TOLERANCE)


@torch.inference_mode()
def test_only_actions_depend_on_the_state(model: VLA) -> None:
    inputs = random_inputs(CONFIG, 1)
    assert inputs.proprio is not None
    other = replace(inputs, proprio=inputs.proprio + 1)
    for (k, v), (k2, v2) in zip(*(seen(model, x) for x in (inputs, other)), strict=True):
        torch.testing.assert_close(k[:, :, :-1], k2[:, :, :-1])
        torch.testing.assert_close(v[:, :, :-1], v2[:, :, :-1])
        assert not torch.allclose(v[:, :, -1], v2[:, :, -1])
    assert not torch.allclose(model(inputs), model(other))


@torch.inference_mode()
def test_the_expert_sees_what_pruning_leaves(model: VLA) -> None:
    inputs = random_inputs(CONFIG, 1)
    selector = Selector(Pruning(keep_ratio=0.5, after_layer=2, method="attention"), CONFIG.grid)
    length = model.layout(inputs).blocks[0].stop
    assert length == 2 * 16 + 5
    pruner = StepPruner(selector, length, CONFIG.visual, (None, None))
    assert [k.shape[2] for k, _ in seen(model, inputs, pruner)] == [38, 38, 22]
    assert [len(s.kept) for s in pruner.selections] == [8, 8]
    assert torch.isfinite(model(inputs, StepPruner(selector, length, CONFIG.visual, (None, None)))).all()


def test_time_is_told_by_periods_from_the_shortest_to_the_longest() -> None:
    assert isinstance(CONFIG.head, FlowHeadConfig)
    embedded = time_embedding(0.001, CONFIG.head, CPU)
    half = len(embedded) // 2
    assert embedded[0] == pytest.approx(1.0)  # a quarter of 4 ms
    assert embedded[half - 1] == pytest.approx(0.00157, abs=1e-5)  # of 4 s
    torch.testing.assert_close(embedded[:half].square() + embedded[half:].square(), torch.ones(half))


def test_time_is_rounded_to_32_bits_before_its_angles_are_computed() -> None:
    assert isinstance(CONFIG.head, FlowHeadConfig)
    found = time_embedding(0.3, CONFIG.head, CPU)[0]
    assert float(found) == pytest.approx(math.sin(2 * math.pi * float(np.float32(0.3)) / 0.004), abs=1e-6)
    assert float(found) != pytest.approx(math.sin(2 * math.pi * 0.3 / 0.004), abs=1e-6)


@torch.inference_mode()
def test_actions_see_each_other_where_the_model_says_so(model: VLA) -> None:
    """The first action depends on the last one's noise only if attention among actions is not causal."""
    assert isinstance(CONFIG.head, FlowHeadConfig)
    inputs = random_inputs(CONFIG, 1)
    assert inputs.noise is not None
    noise = inputs.noise.clone()
    noise[:, -1] += 1
    both = random_model(replace(CONFIG, head=replace(CONFIG.head, causal_actions=False)))
    for policy, depends in ((model, False), (both, True)):
        before, after = policy(inputs)[:, 0], policy(replace(inputs, noise=noise))[:, 0]
        assert torch.allclose(before, after) is not depends


@pytest.mark.parametrize(
    "other",
    [
        {"image_first": False},
        {"proprio_dim": None},
        {"decoder": replace(CONFIG.decoder, causal=True)},
        {"state_in": "text"},
    ],
)
@torch.inference_mode()
def test_an_expert_goes_with_any_order_of_tokens(other: dict[str, Any]) -> None:
    config = replace(CONFIG, **other)
    policy, inputs = random_model(config), random_inputs(config, 2)
    assert policy(inputs).isfinite().all()
    settings = Pruning(0.5, 1, score_queries="actions")
    pruner = StepPruner(
        Selector(settings, config.grid, layers=(1, 2)),
        config.layout(5).blocks[0].stop,
        config.visual,
        (None, None),
    )
    assert policy(random_inputs(config, 1), pruner).isfinite().all()
    assert [len(s.kept) for s in pruner.selections] == [8, 8]


def test_only_an_expert_can_read_the_state_itself() -> None:
    with pytest.raises(InputError, match="state_in 'expert' needs an action expert"):
        replace(family_config("diffusion"), state_in="expert")


def test_placeholders_cannot_stand_behind_images() -> None:
    with pytest.raises(InputError, match="a head that reads placeholders stands behind BOS"):
        replace(family_config("regression"), image_first=True)
