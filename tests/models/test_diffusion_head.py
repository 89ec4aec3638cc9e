"""The action head: guidance, the loss, and what the norms and tokens of a DiT must do."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sqap.models import DiffusionHeadConfig
from sqap.models.heads.ddim import ddim_sample
from sqap.models.heads.diffusion import CONDITION_DROPOUT, DiffusionHead

CONFIG = DiffusionHeadConfig(action_dim=4, horizon=6, width=32, depth=2, heads=2)
CONDITION_WIDTH = 20


def build(**changes: float) -> DiffusionHead:
    torch.manual_seed(0)
    return DiffusionHead(dataclasses.replace(CONFIG, **changes), CONDITION_WIDTH).eval()


@pytest.fixture
def condition() -> Tensor:
    return torch.randn(3, CONDITION_WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(2))


def published_network(w: dict[str, Tensor], x: Tensor, t: Tensor, z: Tensor, heads: int) -> Tensor:
    """CogACT's DiT written out: DiT's time embedding, one condition token in front, plain blocks."""
    rows, frequencies = len(x), torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    time = torch.cat([torch.cos(angles), torch.sin(angles)], 1) @ w["t_embedder.0.weight"].T
    time = F.silu(time + w["t_embedder.0.bias"]) @ w["t_embedder.2.weight"].T + w["t_embedder.2.bias"]
    token = time + z @ w["z_embedder.weight"].T + w["z_embedder.bias"]
    h = torch.cat([token[:, None], x @ w["x_embedder.weight"].T + w["x_embedder.bias"]], 1)
    h = h + w["positional_embedding"]

    def norm(v: Tensor) -> Tensor:
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    width = h.shape[-1]
    for block in (f"blocks.{i}." for i in range(CONFIG.depth)):
        qkv = norm(h) @ w[f"{block}attn.qkv.weight"].T + w[f"{block}attn.qkv.bias"]
        q, k, v = (p.view(rows, -1, heads, width // heads).transpose(1, 2) for p in qkv.split(width, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // heads), -1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        h = h + mixed @ w[f"{block}attn.proj.weight"].T + w[f"{block}attn.proj.bias"]
        inner = norm(h) @ w[f"{block}mlp.fc1.weight"].T + w[f"{block}mlp.fc1.bias"]
        inner = F.gelu(inner, approximate="tanh")
        h = h + inner @ w[f"{block}mlp.fc2.weight"].T + w[f"{block}mlp.fc2.bias"]
    return (norm(h) @ w["final_layer.weight"].T + w["final_layer.bias"])[:, 1:]


@torch.no_grad()
def test_network_is_cogacts(condition: Tensor, noise: Tensor) -> None:
    head, t = build(), torch.tensor([0, 37, 99])
    # Activations small enough that every norm's epsilon shows.
    small = ("positional_embedding", "embedder", "attn.proj", "mlp.fc2")
    for name, parameter in head.named_parameters():
        if any(part in name for part in small):
            parameter.mul_(0.01)

    expected = published_network(head.state_dict(), noise, t, condition, CONFIG.heads)

    torch.testing.assert_close(head.predict_noise(noise, t, condition), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance", [1.5, 4.0])
@torch.no_grad()
def test_guidance_is_two_passes(guidance: float, condition: Tensor, noise: Tensor) -> None:
    head = build(guidance=guidance)

    def two_passes(x: Tensor, t: Tensor) -> Tensor:
        given = head.predict_noise(x, t, condition)
        free = head.predict_noise(x, t, head.uncondition.repeat(len(x), 1))
        return free + guidance * (given - free)

    t = torch.full((3,), 40)
    torch.testing.assert_close(
        head.guided_noise(noise, t, head.conditions(condition)), two_passes(noise, t), atol=1e-4, rtol=1e-4
    )
    expected = ddim_sample(
        lambda x, t: two_passes(x, torch.full((3,), t)), noise, head.alpha_bar, CONFIG.sample_steps
    )
    torch.testing.assert_close(head.sample(condition, noise), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_both_halves_of_the_guidance_are_one_batch(condition: Tensor, noise: Tensor) -> None:
    head, batches = build(guidance=1.5), []
    head.blocks[0].register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    head.sample(condition, noise)
    assert batches == [2 * len(noise)] * CONFIG.sample_steps


@torch.no_grad()
def test_guidance_of_one_never_asks_without_the_condition(condition: Tensor, noise: Tensor) -> None:
    head = build(guidance=1.0)
    expected = ddim_sample(
        lambda x, t: head.predict_noise(x, torch.full((3,), t), condition),
        noise,
        head.alpha_bar,
        CONFIG.sample_steps,
    )

    head.uncondition.fill_(torch.nan)

    torch.testing.assert_close(head.sample(condition, noise), expected)


@torch.no_grad()
def test_condition_and_time_matter(condition: Tensor, noise: Tensor) -> None:
    head, t = build(), torch.full((3,), 50)
    base = head.predict_noise(noise, t, condition)

    assert base.shape == noise.shape
    assert not torch.allclose(base, head.predict_noise(noise, t, condition + 1))
    assert not torch.allclose(base, head.predict_noise(noise, t + 10, condition))


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix(condition: Tensor, noise: Tensor) -> None:
    head = build()
    alone = torch.cat([head.sample(condition[i : i + 1], noise[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(head.sample(condition, noise), alone, atol=1e-4, rtol=1e-4)


def test_loss_reaches_every_parameter() -> None:
    head = build().train()
    generator = torch.Generator().manual_seed(3)
    actions = torch.randn(256, 6, 4, generator=generator)
    condition = torch.randn(256, CONDITION_WIDTH, generator=generator, requires_grad=True)

    loss = head.loss(actions, condition)
    loss.backward()

    assert loss.isfinite()
    assert condition.grad is not None
    assert condition.grad.abs().sum() > 0
    without = [
        name
        for name, p in head.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or p.grad.norm() == 0
    ]
    assert without == []


@torch.no_grad()
def test_loss_of_predicting_nothing_is_the_noises_variance() -> None:
    head = build()
    head.final_layer.weight.zero_()
    assert head.final_layer.bias is not None
    head.final_layer.bias.zero_()

    loss = head.loss(torch.zeros(2000, 6, 4), torch.zeros(2000, CONDITION_WIDTH))

    assert loss.item() == pytest.approx(1.0, abs=0.03)


@torch.no_grad()
def test_training_drops_some_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    head = build()
    seen: list[Tensor] = []
    times: list[Tensor] = []

    def spy(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        seen.append(condition)
        times.append(t)
        return torch.zeros_like(x)

    monkeypatch.setattr(head, "predict_noise", spy)
    head.loss(torch.zeros(4000, 6, 4), torch.full((4000, CONDITION_WIDTH), 7.0))

    dropped = (seen[0] == head.uncondition).all(1)
    assert dropped.float().mean().item() == pytest.approx(CONDITION_DROPOUT, abs=0.03)
    assert (seen[0][~dropped] == 7).all()
    assert times[0].unique().tolist() == list(range(CONFIG.train_steps))


@torch.no_grad()
def test_loss_of_a_perfect_prediction_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head = build()

    def perfect(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x / (1 - head.alpha_bar[t]).sqrt().view(-1, 1, 1).float()

    monkeypatch.setattr(head, "predict_noise", perfect)
    loss = head.loss(torch.zeros(200, 6, 4), torch.zeros(200, CONDITION_WIDTH))
    assert loss.item() == pytest.approx(0, abs=1e-9)


def test_fresh_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    head = DiffusionHead(dataclasses.replace(CONFIG, width=256), 4000)
    assert head.uncondition.std().item() == pytest.approx(0.02, rel=0.1)
    assert head.positional_embedding.std().item() == pytest.approx(256**-0.5, rel=0.1)


@torch.no_grad()
def test_a_block_is_run_by_its_native_layer_where_that_can(condition: Tensor, noise: Tensor) -> None:
    head, t = build(), torch.full((3,), 40)
    exact = head.predict_noise(noise, t, condition)
    asked = []

    def declines(layer: object, x: Tensor) -> None:
        asked.append((layer, x.shape))

    for block in head.blocks:
        block.fused = declines
    assert torch.equal(head.predict_noise(noise, t, condition), exact)
    assert asked == [(block, (3, 7, 32)) for block in head.blocks]
    for block in head.blocks:
        block.fused = lambda layer, x: (torch.full_like(x, 7.0), None)
    expected = head.final_layer(head.norm_final(torch.full((3, 7, 32), 7.0)))[:, 1:]
    assert torch.equal(head.predict_noise(noise, t, condition), expected)


@torch.no_grad()
def test_bfloat16_keeps_the_schedule_exact(condition: Tensor, noise: Tensor) -> None:
    head = build()
    exact, schedule = head.sample(condition, noise), head.alpha_bar.clone()

    rough = head.bfloat16().sample(condition.bfloat16(), noise.bfloat16())

    assert rough.dtype == torch.bfloat16
    assert torch.equal(head.alpha_bar, schedule)
    assert (rough.float() - exact).norm() / exact.norm() < 0.2


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@torch.no_grad()
def test_every_chunk_has_its_own_condition(guidance: float, condition: Tensor, noise: Tensor) -> None:
    """Half as many conditions as chunks once passed for a pass without guidance."""
    head = build(guidance=guidance)
    with pytest.raises(ValueError, match="1 conditions for noise of 2 chunks"):
        head.sample(condition[:1], noise[:2])
    with pytest.raises(ValueError, match="2 conditions for noise of 1 chunks"):
        head.sample(condition[:2], noise[:1])
