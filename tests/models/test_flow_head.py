"""The flow head: from cached keys and values it computes what one joint pass over all tokens does.

The joint pass is written out here from the formulas of SmolVLA (Shukor et al. 2025), pi0 and pi0.5 (Black et
al. 2024, 2025), weight by weight.
"""

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
from sqap.models import VLA, FlowHeadConfig, ModelInputs, empty_model
from sqap.models.heads import FlowHead
from sqap.models.heads.expert import ExpertCache
from sqap.models.heads.flow import time_embedding
from sqap.models.heads.velocity import FlowInputs
from sqap.models.storage import fill
from sqap.pruning import Selector, StepPruner
from sqap.recipe import Pruning
from tests.families import EXPERTS, Stored, family_config, random_inputs, random_model

CONFIG = family_config("flow")
CPU = torch.device("cpu")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model() -> VLA:
    return random_model(CONFIG)


class Joint:
    """The velocity of one chunk by a single pass over all tokens, without a cache.

    Args:
        model: whose weights are read by name.
        inputs: one observation.
    """

    def __init__(self, model: VLA, inputs: ModelInputs) -> None:
        self.config, self.weights = model.config, model.state_dict()
        self.decoder = model.config.decoder
        head = model.config.head
        assert isinstance(head, FlowHeadConfig)
        self.head = head
        self.prefix = model.embed(inputs)[0]
        self.state = inputs.proprio[0] if inputs.proprio is not None and model.config.expert_state else None

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        y = x @ self.weights[f"{name}.weight"].T
        return y if bias is None else y + bias

    def norm(self, name: str, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | float]:
        """Normalised rows, and the gate of the branch behind the norm."""
        x = x / (x.square().mean(-1, keepdim=True) + self.decoder.norm_eps).sqrt()
        if condition is None:
            return x * self.weights[f"{name}.weight"], 1.0
        scale, shift, gate = self.linear(f"{name}.dense", condition).chunk(3)
        return x * (1 + scale) + shift, gate

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        if self.decoder.activation == "silu":
            activated = gate / (1 + (-gate).exp())
        else:
            activated = gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
        return self.linear(f"{name}.down_proj", activated * up)

    def heads(self, name: str, x: Tensor) -> Tensor:
        return self.linear(name, x).view(len(x), -1, self.decoder.head_dim).transpose(0, 1)

    def actions(self, x: Tensor, time: float) -> tuple[Tensor, Tensor | None]:
        """Tokens of the actions, and what adaptive norms go by."""
        t = float(np.float32(time))
        half, ratio = self.head.width // 2, self.head.max_period / self.head.min_period
        periods = [self.head.min_period * ratio ** (i / (half - 1)) for i in range(half)]
        angles = torch.tensor([2 * math.pi * t / period for period in periods], dtype=torch.float64)
        when, a = torch.cat([angles.sin(), angles.cos()]).float(), self.linear("head.action_in_proj", x)
        if self.head.adaptive_norms:
            c = F.silu(self.linear("head.time_mlp_in", when))
            return a, F.silu(self.linear("head.time_mlp_out", c))
        both = torch.cat([a, when.expand_as(a)], dim=-1)
        h = self.linear("head.action_time_mlp_in", both)
        return self.linear("head.action_time_mlp_out", F.silu(h)), None

    def velocity(self, x: Tensor, time: float) -> Tensor:
        """Of ``x`` ``(horizon, action_dim)`` at ``time``.

        SmolVLA: images and text see each other, the state them, an action all of these and those before it.
        pi0, pi0.5: images and text see each other, pi0's state them, and actions everything.
        """
        prefix, (suffix, condition) = self.prefix, self.actions(x, time)
        if self.state is not None:
            suffix = torch.cat([self.linear("head.state_proj", self.state)[None], suffix])
        n, m = len(prefix), len(suffix)
        block = torch.zeros(n + m)
        if self.config.decoder_state:
            block[n - 1 :] = torch.arange(1, m + 2)
        else:
            block[n:] = 1
            block[n + m - len(x) :] = 2
        mask, places = block[None, :] <= block[:, None], torch.arange(n + m)
        for i in range(self.decoder.depth):
            name, mixed = f"head.layers.{i}", torch.empty(0)
            g, gate = self.norm(f"{name}.input_layernorm", suffix, condition)
            of = f"decoder.layers.{i}"
            h, _ = self.norm(f"{of}.input_layernorm", prefix)
            k = turn(self.heads(f"{of}.self_attn.k_proj", h), places[:n])
            v = self.heads(f"{of}.self_attn.v_proj", h)
            query = self.heads(f"{name}.self_attn.q_proj", g)
            if i % self.head.self_attention_every:
                keys, values = (
                    self.heads(f"{name}.self_attn.{part}_proj", x.transpose(0, 1).flatten(1))
                    for part, x in (("k", k), ("v", v))
                )
                mixed = look(turn(query, places[:m]), keys, values, mask[n:, :n])
            else:
                own = turn(self.heads(f"{name}.self_attn.k_proj", g), places[n:])
                values = torch.cat([v, self.heads(f"{name}.self_attn.v_proj", g)], dim=1)
                mixed = look(turn(query, places[n:]), torch.cat([k, own], dim=1), values, mask[n:])
            suffix = suffix + self.linear(f"{name}.self_attn.o_proj", mixed) * gate
            g, gate = self.norm(f"{name}.post_attention_layernorm", suffix, condition)
            suffix = suffix + self.mlp(f"{name}.mlp", g) * gate
            if i < self.decoder.depth - 1:  # the decoder's last hidden states are read by nothing
                q = turn(self.heads(f"{of}.self_attn.q_proj", h), places[:n])
                prefix = prefix + self.linear(f"{of}.self_attn.o_proj", look(q, k, v, mask[:n, :n]))
                prefix = prefix + self.mlp(
                    f"{of}.mlp", self.norm(f"{of}.post_attention_layernorm", prefix)[0]
                )
        final, _ = self.norm("head.norm", suffix[m - len(x) :], condition)
        return self.linear("head.action_out_proj", final)


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


def head_inputs(model: VLA, inputs: ModelInputs, pruner: StepPruner | None = None) -> FlowInputs:
    """What the expert is given."""
    assert isinstance(model.head, FlowHead)
    (stream,) = model.decoder.run(model.streams([inputs], pruners=[pruner], last_tokens=True))
    return model.head.inputs(model.decoder, stream, model.layout(inputs), inputs)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("family", EXPERTS)
@torch.inference_mode()
def test_actions_are_the_joint_pass_integrated_from_noise(family: str, fixed: bool) -> None:
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 1)
    assert inputs.noise is not None
    joint, x = Joint(model, inputs), inputs.noise[0]
    for step in range(10):
        x = x - joint.velocity(x, 1 - step / 10) / 10
    if fixed:
        model.fix_steps()
    torch.testing.assert_close(model(inputs)[0], x, **TOLERANCE)


@pytest.mark.parametrize("family", EXPERTS)
@torch.inference_mode()
def test_the_velocity_at_any_time_is_the_joint_passes(family: str) -> None:
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 1)
    assert inputs.noise is not None
    found = model.head.velocity(head_inputs(model, inputs), inputs.noise, 0.3)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(found[0], Joint(model, inputs).velocity(inputs.noise[0], 0.3), **TOLERANCE)


@pytest.mark.parametrize("family", EXPERTS)
@torch.inference_mode()
def test_a_whole_last_layer_changes_nothing(family: str) -> None:
    """As stored policies have it: an expert reads no more of it than keys and values."""
    config = family_config(family)
    whole = random_model(replace(config, decoder=replace(config.decoder, last_layer="whole")))
    short, inputs = VLA(config).eval(), random_inputs(config, 2)
    state = whole.state_dict()
    unread = state.keys() - short.state_dict().keys()
    assert {name.rpartition("layers.2.")[2] for name in unread} == {
        "self_attn.q_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }
    short.load_state_dict({name: state[name] for name in short.state_dict()})
    torch.testing.assert_close(short(inputs), whole(inputs), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no row of it attends to anything"):
        short.decoder.layers[2](torch.zeros(1, 2, 32), (torch.ones(1, 2, 8),) * 2, rows=torch.tensor([0]))


@pytest.mark.parametrize("family", EXPERTS)
@torch.inference_mode()
def test_fixed_steps_know_no_other_time(family: str) -> None:
    model = random_model(family_config(family))
    head = model.head
    assert isinstance(head, FlowHead)
    before = sum(parameter.numel() for parameter in head.parameters())
    model.fix_steps()
    fixed = model.head
    assert isinstance(fixed, FlowHead)
    assert model.config.head == fixed.config == replace(head.config, fixed_steps=True)
    assert sum(parameter.numel() for parameter in fixed.parameters()) < before
    assert not any("time_mlp" in name or "dense" in name for name in fixed.sensitive if family == "pi0.5")
    with pytest.raises(ValueError, match=r"0\.35"):
        fixed.conditions([0.35])
    model.fix_steps()
    assert model.head is fixed


@pytest.mark.parametrize("family", EXPERTS)
@torch.inference_mode()
def test_steps_are_fixed_by_weights_that_are_on_disk(family: str) -> None:
    """Each linear that only the time goes through is read once, and not kept."""
    config = family_config(family)
    whole, lazy, inputs = random_model(config), empty_model(config), random_inputs(config, 1)
    stored = Stored(whole.state_dict())
    lazy.fix_steps(stored)
    whole.fix_steps()
    time = {name for name in stored.state if ".dense." in name or "head.time_mlp" in name}
    time |= {name for name in stored.state if "action_time_mlp_in" in name}
    assert sorted(stored.names) == sorted(time)
    fill(lazy, stored)
    found, expected = lazy.state_dict(), whole.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    torch.testing.assert_close(lazy(inputs), whole(inputs), rtol=1e-5, atol=1e-5)


def test_half_of_the_time_is_sines() -> None:
    assert not list(CONFIG.head.faults())
    assert isinstance(CONFIG.head, FlowHeadConfig)
    assert "width must be even, got 25" in next(replace(CONFIG.head, width=25).faults())


def test_tokens_of_a_step_overwrite_those_of_the_step_before() -> None:
    prefix = torch.arange(6.0).view(1, 1, 3, 2)
    cache = ExpertCache((prefix, prefix + 10), room=3)
    for first in (20.0, 30.0):
        state = torch.full((1, 1, 1, 2), first)
        cache.write(state, state + 5)
        keys, values = cache.read(1)
        assert keys.flatten().tolist() == [0, 1, 2, 3, 4, 5, first, first]
        assert values.flatten().tolist() == [10, 11, 12, 13, 14, 15, first + 5, first + 5]
    cache.extend(1)
    cache.write(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert cache.read()[0].flatten().tolist() == [0, 1, 2, 3, 4, 5, 30, 30]
    assert cache.read(2)[1][0, 0, 4:].flatten().tolist() == [1] * 4


@pytest.mark.parametrize("family", EXPERTS)
def test_a_head_that_has_acted_can_be_trained(family: str) -> None:
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 1)
    given = head_inputs(model, inputs)
    with torch.inference_mode():
        model.head.velocity(given, given.noise, 0.5)
    weight = model.head.action_in_proj.weight.requires_grad_()
    model.head.velocity(given, given.noise, 0.5).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


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
    for (k, v), (k2, v2) in zip(*(head_inputs(model, x).prefix for x in (inputs, other)), strict=True):
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
    assert [k.shape[2] for k, _ in head_inputs(model, inputs, pruner).prefix] == [38, 38, 22]
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
        {"state_in": "expert"},
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


def test_an_experts_state_goes_through_one_linear_and_no_adaptive_norm() -> None:
    with pytest.raises(InputError, match="proprio_layers must be 1, got 2"):
        replace(family_config("pi0"), proprio_layers=2)
    with pytest.raises(InputError, match="adaptive_norms and state_in 'expert' cannot be combined"):
        replace(family_config("pi0.5"), state_in="expert", proprio_dim=5)


def test_only_an_expert_can_do_without_the_last_hidden_states() -> None:
    config = family_config("tokens")
    with pytest.raises(InputError, match="last_layer 'keys_values' needs an action expert"):
        replace(config, decoder=replace(config.decoder, last_layer="keys_values"))
