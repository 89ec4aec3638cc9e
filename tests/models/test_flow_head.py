"""The action expert: what it computes from cached keys and values is what one joint pass computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sqap.errors import InputError
from sqap.models import VLA, FlowHeadConfig, ModelConfig, ModelInputs
from sqap.models.decoder import DecoderLayer
from sqap.models.heads import FlowHead
from sqap.models.heads.flow import ExpertLayer, time_embedding
from sqap.pruning import Selector, StepPruner
from sqap.recipe import Pruning
from tests.families import family_config, random_inputs, random_model

CONFIG = family_config("flow")
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
    when = time_embedding(time, head.config).expand_as(action)
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
    sequence = model.embed(inputs)
    found = head.velocity(head.look(model.decoder, sequence), inputs.noise, 0.3, sequence.shape[1])
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
    head = model.head
    assert isinstance(head, FlowHead)
    inputs = random_inputs(CONFIG, 1)
    assert inputs.proprio is not None
    other = replace(inputs, proprio=inputs.proprio + 1)
    for (k, v), (k2, v2) in zip(
        *(head.look(model.decoder, model.embed(x)) for x in (inputs, other)), strict=True
    ):
        torch.testing.assert_close(k[:, :, :-1], k2[:, :, :-1])
        torch.testing.assert_close(v[:, :, :-1], v2[:, :, :-1])
        assert not torch.allclose(v[:, :, -1], v2[:, :, -1])
    assert not torch.allclose(model(inputs), model(other))


@torch.inference_mode()
def test_the_expert_sees_what_pruning_leaves(model: VLA) -> None:
    inputs = random_inputs(CONFIG, 1)
    selector = Selector(Pruning(keep_ratio=0.5, after_layer=2, method="attention"), CONFIG.grid)
    length = model.length(inputs.token_ids.shape[1])
    assert length == model.prefix(model.embed(inputs)).shape[1] == 2 * 16 + 5
    pruner = StepPruner(selector, length, CONFIG.visual, (None, None))
    head = model.head
    assert isinstance(head, FlowHead)
    seen = head.look(model.decoder, model.embed(inputs), pruner)
    assert [k.shape[2] for k, _ in seen] == [38, 38, 22]
    assert [len(s.kept) for s in pruner.selections] == [8, 8]
    assert torch.isfinite(model(inputs, StepPruner(selector, length, CONFIG.visual, (None, None)))).all()


def test_time_is_told_by_periods_from_the_shortest_to_the_longest() -> None:
    assert isinstance(CONFIG.head, FlowHeadConfig)
    embedded = time_embedding(0.001, CONFIG.head)
    half = len(embedded) // 2
    assert embedded[0] == pytest.approx(1.0)  # a quarter of 4 ms
    assert embedded[half - 1] == pytest.approx(0.00157, abs=1e-5)  # of 4 s
    torch.testing.assert_close(embedded[:half].square() + embedded[half:].square(), torch.ones(half))


@pytest.mark.parametrize(
    "wrong",
    [{"image_first": False}, {"proprio_dim": None}, {"decoder": replace(CONFIG.decoder, causal=True)}],
)
def test_what_does_not_go_together_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="goes with image_first, a robot's state and a decoder"):
        replace(CONFIG, **wrong)


def test_a_causal_policy_cannot_put_its_images_first() -> None:
    other = family_config("regression")
    with pytest.raises(InputError, match="image_first"):
        ModelConfig(other.vision, other.projector, other.decoder, other.head, image_first=True)
