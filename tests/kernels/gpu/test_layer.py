"""A layer by the Triton programs is what its modules make of the same tokens, by the reference arithmetic."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqap import kernels
from sqap.kernels.reference import ReferenceBackend
from sqap.models.config import DecoderConfig
from sqap.models.decoder import Decoder, DecoderLayer, rope_angles
from sqap.models.heads.diffusion import DiTBlock
from sqap.models.kv import KVCache
from sqap.models.stream import Stream
from sqap.models.vision import Block
from sqap.quantization.fused import fuse, run_fused, run_fused_expert
from sqap.recipe import Scheme
from tests.kernels.gpu.conftest import Interpreted
from tests.kernels.test_expert import HEADS, head_of, inputs_of
from tests.kernels.test_layer import VISION, assert_near, decoder_layer, quantize


@pytest.fixture(autouse=True)
def seed(interpreted: Interpreted) -> None:
    torch.manual_seed(0)


def by_modules(monkeypatch: pytest.MonkeyPatch, layer: nn.Module, *given: Any, **more: Any) -> Any:
    """What the layer's modules return, with the reference's products."""
    with monkeypatch.context() as context:
        context.setattr(kernels, "BACKENDS", [ReferenceBackend()])
        return layer(*given, **more)


def rope_of(config: DecoderConfig, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    return rope_angles(torch.randint(0, 500, (batch, tokens)).sort()[0], config, torch.float32)


@pytest.mark.parametrize(
    ("batch", "heads", "causal"), [(1, (4, 2), False), (2, (3, 1), True), (1, (2, 2), True)]
)
def test_a_decoder_layer(
    monkeypatch: pytest.MonkeyPatch, batch: int, heads: tuple[int, int], causal: bool
) -> None:
    layer, config = decoder_layer(*heads, causal=causal)
    x, rope, rows = torch.randn(batch, 13, 64), rope_of(config, batch, 13), torch.tensor([2, 11, 12])
    expected, scores = by_modules(monkeypatch, layer, x, rope, 0, None, rows)
    kept, before = layer.self_attn.empty_kv(x), x.clone()
    done = run_fused(layer, x, rope, rows, kept)
    assert done is not None
    assert done[1] is not None
    assert_near(done[0], expected)
    torch.testing.assert_close(done[1], scores, atol=2e-3, rtol=0)
    assert torch.equal(x, before)
    for part, name in zip(kept, ("k_proj", "v_proj"), strict=True):
        made = by_modules(monkeypatch, getattr(layer.self_attn, name), layer.input_layernorm(x))
        wanted = made.view(batch, 13, heads[1], -1).transpose(1, 2)
        if name == "k_proj":
            wanted = by_modules(monkeypatch, layer.self_attn.keys, layer.input_layernorm(x), rope)
        assert_near(part, wanted)


@pytest.mark.parametrize(("causal", "first"), [(True, 1), (False, 9), (True, 12), (False, 13)])
def test_the_last_tokens_alone(monkeypatch: pytest.MonkeyPatch, causal: bool, first: int) -> None:
    layer, config = decoder_layer(causal=causal)
    x, rope = torch.randn(1, 13, 64), rope_of(config, 1, 13)
    expected, _ = by_modules(monkeypatch, layer, x, rope, first=first)
    whole, part = layer.self_attn.empty_kv(x), layer.self_attn.empty_kv(x)
    run_fused(layer, x, rope, None, whole)
    done = run_fused(layer, x, rope, None, part, first)
    assert done is not None
    assert done[0].shape == (1, 13 - first, 64)
    if first < 13:
        assert_near(done[0], expected)
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))
    assert run_fused(layer, x.expand(2, -1, -1), rope, first=first) is None


@pytest.mark.parametrize(("batch", "heads", "causal"), [(1, (4, 2), True), (2, (3, 1), False)])
def test_later_tokens(
    monkeypatch: pytest.MonkeyPatch, batch: int, heads: tuple[int, int], causal: bool
) -> None:
    """They attend to earlier keys and values, and leave their own behind them."""
    layer, config = decoder_layer(*heads, causal=causal)
    x, (cos, sin), rows = torch.randn(batch, 9, 64), rope_of(config, batch, 9), torch.tensor([0, 2])
    caches = KVCache(1, room=4), KVCache(1, room=4)
    for part in slice(0, 5), slice(5, 6), slice(6, 9):
        given = x[:, part], (cos[:, part], sin[:, part])
        asked = rows if part.stop == 9 else None
        expected, scores = by_modules(monkeypatch, layer, *given, 0, caches[0], asked)
        kept = caches[1].reserve(0, layer.self_attn.empty_kv(given[0]))
        done = run_fused(layer, *given, asked, kept)
        assert done is not None
        caches[1].commit(0, given[0].shape[1])
        assert_near(done[0], expected)
        if scores is not None:
            torch.testing.assert_close(done[1], scores, atol=2e-3, rtol=0)
    for found, wanted in zip(caches[1].stored(0), caches[0].stored(0), strict=True):
        assert found.shape == (batch, heads[1], 9, 24)
        assert_near(found, wanted)


def test_the_last_of_later_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, config = decoder_layer()
    x, rope, cache = torch.randn(1, 8, 64), rope_of(config, 1, 8), KVCache(1)
    expected, _ = by_modules(monkeypatch, layer, x, rope)
    parts = [(x[:, part], tuple(angles[:, part] for angles in rope)) for part in (slice(4), slice(4, 8))]
    layer.fused = run_fused
    layer(*parts[0], 0, cache)
    kept = cache.reserve(0, layer.self_attn.empty_kv(parts[1][0]))
    done = run_fused(layer, *parts[1], None, kept, 2)  # type: ignore[arg-type]
    assert done is not None
    assert_near(done[0], expected[:, 6:])


def test_a_decoder_goes_on_where_its_cache_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy decoding: every layer of every later token in one call, at the position that comes next."""
    decoder = Decoder(DecoderConfig(8, 64, 2, 4, 2, 24, 112))
    for layer in decoder.layers:
        quantize(layer)
    nn.init.normal_(decoder.embed_tokens.weight)
    x, calls = decoder.embed(torch.randint(0, 8, (1, 5))), Counter[bool]()

    def run(cache: KVCache) -> Tensor:
        return torch.cat([decoder(part, cache=cache) for part in x.split([3, 1, 1], dim=1)], dim=1)

    def counted(*given: Any) -> Any:
        done = run_fused(*given)
        calls[done is not None] += 1
        return done

    with torch.inference_mode():
        expected = by_modules(monkeypatch, run, KVCache(2))  # type: ignore[arg-type]
        fuse(decoder)
        for layer in decoder.layers:
            layer.fused = counted  # type: ignore[assignment]
        found = run(KVCache(2, room=2))
    assert calls == {True: 6}
    for token in range(5):
        assert_near(found[:, token], expected[:, token])


@pytest.mark.parametrize("layer", [Block(VISION, 0), DiTBlock(48, 2)], ids=["vit", "dit"])
@pytest.mark.parametrize("scheme", [Scheme(8, 8), Scheme(4, 8)], ids=["w8a8", "w4a8"])
def test_an_encoder_block(monkeypatch: pytest.MonkeyPatch, layer: nn.Module, scheme: Scheme) -> None:
    layer, x = quantize(copy.deepcopy(layer), scheme), torch.randn(2, 21, 48)
    expected = by_modules(monkeypatch, layer, x)
    fuse(layer)
    assert_near(layer(x), expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", HEADS)
def test_an_action_experts_layer(monkeypatch: pytest.MonkeyPatch, name: str, batch: int) -> None:
    """Cross-attention or its own tokens behind the prefix, causal or not; what a denoising step modulates."""
    head = head_of(name, Scheme(4, 8))
    inputs, given, steps = inputs_of(head, 7, batch), torch.randn(batch, 11, 56), head.conditions(head.times)
    actions = head.suffix(inputs.layout, slice(int(head.state_dim > 0), None))
    pairs = [head.caches(inputs.prefix, inputs.layout) for _ in range(2)]
    around, caches = actions.behind(pairs[0]), pairs[1]
    for i, layer in enumerate(head.experts):
        for step in (0, 3):
            surroundings = around.ropes, around.masks[i], steps[step].of_layer(i)
            expected = by_modules(monkeypatch, layer, given, around.caches[i], *surroundings)
            rope = around.ropes[int(layer.self_attn.cross)]
            found = run_fused_expert(layer, given, caches[i], rope, step)
            assert found is not None
            assert_near(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_between_the_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    layer, config = decoder_layer()
    x, rope = torch.randn(1, 13, 64), rope_of(config, 1, 13)
    expected, _ = by_modules(monkeypatch, layer, x, rope)
    done = run_fused(layer.to(dtype), x.to(dtype), rope)
    assert done is not None
    assert done[0].dtype == dtype
    assert float((done[0].float() - expected).norm() / expected.norm()) < 3e-2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_look_ahead(monkeypatch: pytest.MonkeyPatch, causal: bool, batch: int) -> None:
    config = DecoderConfig(8, 64, 2, 4, 2, 24, 112, causal=causal)
    decoder = Decoder(config)
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        quantize(layer)
    x, rope, rows = torch.randn(batch, 13, 64), rope_of(config, 1, 13), torch.tensor([10, 12])
    stream = Stream((x,), (rope,), x)
    expected = by_modules(monkeypatch, decoder.look_ahead, stream, [0, 1], rows)
    fuse(decoder)
    assert decoder.fused_look is not None
    found = decoder.fused_look([decoder.layers[i] for i in (0, 1)], x, rope, rows)  # type: ignore[misc]
    assert found is not None
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert decoder.fused_look([decoder.layers[0]], x.double(), rope, rows) is None  # type: ignore[list-item]


def test_a_norm_before_a_rotated_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """No recipe makes one; it takes PyTorch's norm."""
    layer, config = decoder_layer()
    layer.self_attn.q_proj.grids = kernels.Grids(8, 8, True, 64, hadamard_block=16)
    x, rope = torch.randn(1, 5, 64), rope_of(config, 1, 5)
    for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
        linear.grids = layer.self_attn.q_proj.grids
    expected, _ = by_modules(monkeypatch, layer, x, rope)
    done = run_fused(layer, x, rope)
    assert done is not None
    assert_near(done[0], expected)


def test_linears_of_the_same_tokens_on_other_grids_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, config = decoder_layer()
    layer.self_attn.k_proj = quantize(nn.Sequential(nn.Linear(64, 48, bias=False)), Scheme(4, 8))[0]  # type: ignore[index]
    x, rope = torch.randn(1, 5, 64), rope_of(config, 1, 5)
    assert run_fused(layer, x, rope) is None
    found, _ = layer(x, rope)
    assert_near(found, by_modules(monkeypatch, layer, x, rope)[0])
