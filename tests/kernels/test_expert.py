"""An action expert's layer in one native call is what its modules make of the same tokens."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqap.kernels import cpu
from sqap.kernels.backend import LayerSpec, Norm
from sqap.kernels.cpu.layer import CpuLayer
from sqap.models.config import DecoderConfig, FlowHeadConfig
from sqap.models.decoder import RMSNorm, rope_angles
from sqap.models.heads import FlowHead
from sqap.models.heads.expert import ExpertCache, ExpertLayer
from sqap.models.heads.fixed_steps import fix_steps
from sqap.models.heads.velocity import FlowInputs
from sqap.models.layout import Layout, Segment
from sqap.quantization import QuantizedLinear
from sqap.quantization.fused import fuse, run_fused_expert
from sqap.recipe import Scheme
from tests.kernels.test_layer import PATHS, W8A8, assert_near, quantize

DECODER = DecoderConfig(8, 64, 2, 6, 2, 24, 112, causal=False)
GEMMA = DecoderConfig(8, 64, 2, 4, 1, 40, 112, causal=False, activation="gelu_tanh")
SMOLVLA = FlowHeadConfig(action_dim=4, horizon=11, width=56, mlp_width=96)
PI0 = replace(SMOLVLA, self_attention_every=1, causal_actions=False)
PI05 = replace(PI0, adaptive_norms=True)
# SmolVLA, pi0 with its state's token, and pi0.5.
HEADS = {"smolvla": (SMOLVLA, DECODER, 0), "pi0": (PI0, GEMMA, 3), "pi0.5": (PI05, GEMMA, 0)}
SCHEMES = {"W8A8": W8A8, "W4A8": Scheme(4, 8)}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "chosen", lambda: request.param)
    return str(request.param)


@torch.inference_mode(False)
def head_of(name: str, scheme: Scheme = W8A8) -> FlowHead:
    """A head of fixed steps with random weights, whose layers are quantized and fused."""
    torch.manual_seed(0)
    config, decoder, state = HEADS[name]
    head = FlowHead(config, decoder, state).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1)
    head = fix_steps(head)
    for norm in head.adaptive_norms().values():
        norm.modulation = torch.randn_like(norm.modulation) / 2
    quantize(head.layers, scheme)
    fuse(head)
    return head.requires_grad_(False)


def by_modules(head: FlowHead) -> FlowHead:
    """A copy that runs module by module."""
    other = copy.deepcopy(head)
    for layer in other.experts:
        layer.fused = None
    return other


def inputs_of(head: FlowHead, prefix: int, batch: int = 1) -> FlowInputs:
    """Keys and values of as many tokens as ``prefix``, and noise."""
    torch.manual_seed(1)
    config, decoder = head.config, head.decoder_config
    shape = batch, decoder.kv_heads, prefix, decoder.head_dim
    segments = [Segment("text", prefix)]
    if head.state_dim:
        segments.append(Segment("state", 1, 1, expert=True))
    segments.append(Segment("actions", config.horizon, 2, config.causal_actions, expert=True))
    return FlowInputs(
        [(torch.randn(shape), torch.randn(shape)) for _ in range(decoder.depth)],
        torch.randn(batch, config.horizon, config.action_dim),
        Layout(tuple(segments)),
        torch.randn(batch, head.state_dim) if head.state_dim else None,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", HEADS)
@torch.inference_mode()
def test_velocities(path: str, name: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every denoising step at the same noise, so that a level more or less does not grow."""
    head = head_of(name, SCHEMES[scheme])
    modules, calls = by_modules(head), []

    def at_the_noise(velocity: Any, noise: Tensor) -> Tensor:
        return torch.stack([velocity(noise, time) for time in head.times])

    for one in (head, modules):
        monkeypatch.setattr(one, "integrate", at_the_noise)
    call, pack = CpuLayer.__call__, CpuLayer.prefix
    monkeypatch.setattr(CpuLayer, "__call__", lambda *a, **k: calls.append("layer") or call(*a, **k))
    monkeypatch.setattr(CpuLayer, "prefix", lambda *a: calls.append("prefix") or pack(*a))
    for batch, prefix in ((1, 5), (2, 37), (1, 300)):
        inputs = inputs_of(head, prefix, batch)
        found = head.act(None, inputs)
        # The prefix, constant over the steps, is packed once for each layer.
        assert calls.count("layer") == head.config.sample_steps * len(head.layers)
        assert calls.count("prefix") == len(head.layers)
        calls.clear()
        expected = modules.act(None, inputs)
        assert not calls
        for velocity, right in zip(found, expected, strict=True):
            assert_near(velocity, right)
        assert found.diff(dim=0).abs().amax((1, 2, 3)).min() > 0  # every step has conditions of its own


@torch.inference_mode()
def test_actions(path: str) -> None:
    for name in HEADS:
        head = head_of(name)
        inputs = inputs_of(head, 20)
        found, expected = head.act(None, inputs), by_modules(head).act(None, inputs)
        assert float((found - expected).norm() / (expected - inputs.noise).norm()) < 0.05


def test_a_token_sees_none_behind_it(path: str) -> None:
    """Bit for bit, where actions are causal; where they are not, all see the last one."""
    for name, causal in (("smolvla", True), ("pi0.5", False)):
        head = head_of(name)
        layer, other = head.experts[0], torch.randn(1, 11, 56)
        changed = other.clone()
        changed[:, -1] += 1
        first, second = (run(layer, x, cache_of(head, 33)) for x in (other, changed))
        assert torch.equal(first[:, :-1], second[:, :-1]) is causal
        assert not torch.equal(first[:, -1], second[:, -1])


def cache_of(head: FlowHead, prefix: int) -> ExpertCache:
    """What the first layer attends to."""
    inputs = inputs_of(head, prefix)
    return head.caches(inputs.prefix, inputs.layout)[0]


def run(layer: ExpertLayer, x: Tensor, cache: ExpertCache, step: int = 0) -> Tensor:
    """One native call."""
    decoder = DECODER if layer.self_attn.head_dim == DECODER.head_dim else GEMMA
    rope = rope_angles(torch.arange(cache.length, cache.length + x.shape[1])[None], decoder, torch.float32)
    done = run_fused_expert(layer, x, cache, rope, step)
    assert done is not None
    return done


@pytest.mark.parametrize("tokens", [1, 4, 30, 33, 70])
@pytest.mark.parametrize("cross", [False, True])
def test_any_number_of_tokens(path: str, tokens: int, cross: bool) -> None:
    torch.manual_seed(0)
    for causal in (False, True):
        layer = ExpertLayer(replace(SMOLVLA, causal_actions=causal), DECODER, cross)
        quantize(layer)
        for prefix in (1, 40, 257):
            x, mask = torch.randn(3, tokens, 56), None
            cache = layer.self_attn.cache(
                (torch.randn(3, 2, prefix, 24), torch.randn(3, 2, prefix, 24)), tokens
            )
            if causal and not cross:
                mask = torch.ones(tokens, prefix + tokens, dtype=torch.bool).tril(prefix)
            rope = rope_angles(torch.arange(tokens)[None], DECODER, torch.float32)
            expected = layer(x, cache, (rope, rope), mask)
            done = run_fused_expert(layer, x, cache, rope, 0)
            assert done is not None
            assert_near(done, expected)


def test_the_same_with_any_number_of_threads(path: str) -> None:
    head, before = head_of("pi0.5"), torch.get_num_threads()
    x, found = torch.randn(1, 11, 56), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(run(head.experts[0], x, cache_of(head, 90)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_new_modulations_are_noticed() -> None:
    """The layer has copies of these: other values in the same buffer, and another buffer."""
    head = head_of("pi0.5")
    layer, x = head.experts[0], torch.randn(1, 11, 56)
    cache = cache_of(head, 9)
    results = [run(layer, x, cache, 3)]
    layer.input_layernorm.modulation[3] += 1
    results.append(run(layer, x, cache, 3))
    layer.input_layernorm.modulation = layer.input_layernorm.modulation * 2
    results.append(run(layer, x, cache, 3))
    for before, after in pairwise(results):
        assert float((before - after).norm() / before.norm()) > 0.02


def test_what_the_native_layer_does_not_know_is_left_to_the_modules() -> None:
    head = head_of("smolvla")
    layer, x, cache = head.experts[0], torch.randn(1, 11, 56), cache_of(head, 9)
    rope = rope_angles(torch.arange(11)[None], DECODER, torch.float32)
    assert run_fused_expert(layer, x.bfloat16(), cache, rope, 0) is None
    assert run_fused_expert(layer, x.clone().requires_grad_(), cache, rope, 0) is None
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    assert run_fused_expert(layer, x, cache, rope, 0) is None
    handle.remove()
    assert run_fused_expert(layer, x, cache, rope, 0) is not None
    layer.mlp.up_proj = nn.Linear(56, 96)
    assert run_fused_expert(layer, x, cache, rope, 0) is None
    torch.manual_seed(0)
    computed = quantize(ExpertLayer(PI05, GEMMA, cross=False))  # its modulations are computed, not stored
    assert run_fused_expert(computed, x, cache_of(head_of("pi0.5"), 9), rope, 0) is None


def spec_of(cross: bool, kv_heads: int = 2) -> LayerSpec:
    """A layer 16 wide, of four query heads 8 wide."""

    def linear(inputs: int, outputs: int) -> cpu.CpuLinear:
        return QuantizedLinear(inputs, outputs, W8A8).bound()

    return LayerSpec(
        inputs=[linear(16, 32), *([] if cross else [linear(16, 8 * kv_heads) for _ in range(2)])],
        out=linear(32, 16),
        up=[linear(16, 24), linear(16, 24)],
        down=linear(24, 16),
        norms=(Norm(None, None, 1e-6, rms=True),) * 2,
        gains=(None, None),
        function="silu",
        heads=(4, kv_heads, 8),
        causal=False,
        cross=cross,
    )


def test_prefixes_that_do_not_fit_are_refused(path: str) -> None:
    own, cross, other = CpuLayer(spec_of(False)), CpuLayer(spec_of(True)), CpuLayer(spec_of(False, 4))
    x, keys, angles = torch.ones(1, 5, 16), torch.ones(1, 2, 3, 8), torch.ones(1, 5, 8)
    prefix, two = own.prefix(keys, keys, 4), keys.expand(2, -1, -1, -1)
    for layer, arguments, sentence in (
        (own, {"prefix": prefix}, "more tokens than a prefix has room for"),
        (
            own,
            {"prefix": own.prefix(two, two, 5)},
            "another layer",
        ),
        (other, {"prefix": prefix}, "another layer"),
        (cross, {}, "behind a prefix"),
        (cross, {"prefix": prefix, "rows": torch.tensor([1])}, "behind a prefix"),
        (cross, {"prefix": prefix, "kept": (torch.ones(1, 2, 5, 8),) * 2}, "behind a prefix"),
        (cross, {"prefix": prefix, "first": 2}, "behind a prefix"),
    ):
        with pytest.raises(ValueError, match=sentence):
            layer(x, (angles, angles), **arguments)
    assert cross(x, (angles, angles), prefix=prefix)[0].shape == x.shape  # it puts nothing behind the prefix
    for given, sentence in (
        ((keys[:, :1], keys, 4), r"a prefix's keys must be \(1, 2, 3, 8\), got \(1, 1, 3, 8\)"),
        ((keys, keys[..., :4], 4), r"a prefix's values must be \(1, 2, 3, 8\), got \(1, 2, 3, 4\)"),
        ((keys, keys.double(), 4), "contiguous float32 on the CPU"),
        ((keys[:, :, :0], keys[:, :, :0], 4), "a prefix has at least one token"),
    ):
        with pytest.raises(ValueError, match=sentence):
            own.prefix(*given)


def test_layers_of_parts_that_do_not_fit_are_refused(path: str) -> None:
    for changed, sentence in (
        ({"inputs": spec_of(False).inputs}, "one linear or three"),
        ({"heads": (2, 2, 8)}, "queries do not fit the heads"),
        ({"causal": True}, "no order"),
    ):
        with pytest.raises(ValueError, match=sentence):
            CpuLayer(replace(spec_of(True), **changed))


def test_an_experts_norms_are_as_they_were() -> None:
    """RMSNorm's weights, where norms are not adaptive, are not taken for modulations."""
    head = head_of("smolvla")
    layer, x, cache = head.experts[0], torch.randn(1, 11, 56), cache_of(head, 9)
    before = run(layer, x, cache)
    assert isinstance(layer.input_layernorm, RMSNorm)
    assert torch.equal(run(layer, x, cache, step=7), before)
