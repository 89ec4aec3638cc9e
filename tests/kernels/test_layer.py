"""A layer in one native call is what its modules make of the same tokens, one after the other."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from sqap.kernels import cpu
from sqap.kernels.backend import LayerSpec, Norm
from sqap.kernels.cpu.layer import CpuLayer
from sqap.kernels.hadamard import Hadamard
from sqap.models.config import DecoderConfig, VisionConfig
from sqap.models.decoder import Decoder, DecoderLayer, rope_angles
from sqap.models.heads.diffusion import DiTBlock
from sqap.models.kv import KVCache
from sqap.models.stream import Stream
from sqap.models.vision import Block
from sqap.quantization import QuantizedLinear
from sqap.quantization.fused import fuse, look_fused, run_fused
from sqap.quantization.kv import QuantizedKV
from sqap.quantization.rotation import HadamardLinear
from sqap.recipe import Scheme

PATHS = [path for path in cpu.paths() if path != cpu.REFERENCE]
W8A8 = Scheme(8, 8)  # fine enough that a level more or less is not seen
VISION = VisionConfig(
    image_size=28,
    patch_size=14,
    width=48,
    depth=1,
    heads=2,
    mlp_width=80,
    layer_scale=True,
    activation="gelu",
)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "chosen", lambda: request.param)
    return str(request.param)


def quantize(layer: nn.Module, scheme: Scheme = W8A8) -> nn.Module:
    """Every linear of the layer quantized, and other parameters random."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1)
    for name, linear in [*layer.named_modules()]:
        if isinstance(linear, nn.Linear):
            owner, _, attribute = name.rpartition(".")
            if attribute == "down_proj":
                linear = HadamardLinear(linear, 16)
            setattr(layer.get_submodule(owner), attribute, QuantizedLinear.from_linear(linear, scheme))
    return layer.requires_grad_(False)


def decoder_layer(
    heads: int = 4, kv_heads: int = 2, causal: bool = True
) -> tuple[DecoderLayer, DecoderConfig]:
    config = DecoderConfig(
        vocabulary=8,
        width=64,
        depth=1,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=24,
        mlp_width=112,
        causal=causal,
    )
    layer = DecoderLayer(config)
    quantize(layer)
    return layer, config


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    # A level of 255 more or less, now and then; of a key or a value, every token sees it.
    assert float((found - expected).norm() / expected.norm()) < 2e-2


@given(
    st.integers(1, 2),
    st.integers(1, 150),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.booleans(),
    st.integers(0, 2**31),
)
@example(1, 64, (4, 4), True, 0)
@example(2, 129, (4, 2), False, 0)
@settings(max_examples=25, deadline=None)
def test_a_decoder_layer(batch: int, tokens: int, heads: tuple[int, int], causal: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer, config = decoder_layer(*heads, causal=causal)
    x = torch.randn(batch, tokens, 64)
    positions = torch.randint(0, 500, (batch, tokens)).sort()[0]
    rope = rope_angles(positions, config, torch.float32)
    rows = torch.randperm(tokens)[: torch.randint(1, tokens + 1, ())].sort()[0]
    expected, scores = layer(x, rope, 0, None, rows)
    done = run_fused(layer, x, rope, rows)
    assert done is not None
    assert_near(done[0], expected)
    assert done[1] is not None
    assert torch.allclose(done[1], scores, atol=2e-3)
    assert torch.allclose(done[1].sum(1), torch.ones(batch), atol=1e-4)


@pytest.mark.parametrize("equal_norms", [True, False])
@pytest.mark.parametrize("activations", ["token", "tensor"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_look_ahead(path: str, causal: bool, activations: Any, equal_norms: bool) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(8, 64, 3, 4, 2, 24, 112, causal=causal)
    scheme = Scheme(8, 8, activation_granularity=activations, activation_symmetric=False)
    decoder = Decoder(config)
    for layer in decoder.layers:
        quantize(layer, scheme)
        if equal_norms:
            nn.init.ones_(layer.input_layernorm.weight)
    x, positions = torch.randn(1, 77, 64), torch.randint(0, 500, (1, 77)).sort()[0]
    rope = rope_angles(positions, config, torch.float32)
    for rows in (torch.arange(70, 77), torch.tensor([76]), torch.tensor([3, 40, 41])):
        for layers in ([0, 1, 2], [2], [1, 0]):
            decoder.fused_look = None
            expected = decoder.look_ahead(Stream((x,), (rope,), x), layers, rows)
            fuse(decoder)
            assert decoder.fused_look is not None
            found = decoder.fused_look([decoder.layers[i] for i in layers], x, rope, rows)
            assert found is not None
            assert torch.equal(found, decoder.look_ahead(Stream((x,), (rope,), x), layers, rows))
            # Modules take the scale of a tensor from the rows alone.
            assert torch.allclose(found, expected, atol=2e-3 if activations == "token" else 8e-3)
            assert found.sum().item() == pytest.approx(1)
    assert look_fused([decoder.layers[0]], x.expand(2, -1, -1), rope, rows) is None
    assert look_fused([decoder.layers[0]], x.double(), rope, rows) is None


@pytest.mark.parametrize("layer", [Block(VISION, 0), DiTBlock(48, 2)])
def test_an_encoder_block(path: str, layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer = quantize(copy.deepcopy(layer))
    x = torch.randn(2, 37, 48)
    expected = layer(x)
    before = x.clone()
    fuse(layer)
    assert_near(layer(x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("width", [8, 40, 64, 72])
@pytest.mark.parametrize("tokens", [1, 31, 33, 300])
def test_an_encoder_of_any_size(path: str, tokens: int, width: int) -> None:
    """Of few keys and of several blocks of them; a head's channels fill no whole register, or just one."""
    torch.manual_seed(tokens)
    layer = quantize(Block(replace(VISION, width=2 * width), 0))
    flat = (20 / (0.18 * width**1.5)) ** 0.5  # scores whose standard deviation is 20: e^score would overflow
    layer.attn.qkv.scale *= torch.tensor([flat, flat, 1]).repeat_interleave(2 * width)[:, None]
    layer.attn.qkv.bias.zero_()
    x = torch.randn(2, tokens, 2 * width)
    done = run_fused(layer, x)
    assert done is not None
    assert_near(done[0], layer(x))


def test_what_attention_rounds_is_little_beside_what_weights_of_four_bits_do(path: str) -> None:
    torch.manual_seed(0)
    layer = Block(replace(VISION, width=128, mlp_width=256, layer_scale=False), 0).requires_grad_(False)
    x = torch.randn(1, 300, 128)
    exact = layer(x) - x
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        owner, _, attribute = name.rpartition(".")
        linear = QuantizedLinear.from_linear(layer.get_submodule(name), Scheme(4, 8))
        setattr(layer.get_submodule(owner), attribute, linear)
    done, expected = run_fused(layer, x), layer(x)
    assert done is not None
    assert float((done[0] - expected).norm()) < 0.1 * float((expected - x - exact).norm())


def test_an_encoder_says_the_same_with_any_number_of_threads(path: str) -> None:
    """Bit for bit, though more threads share the queries of a head differently."""
    torch.manual_seed(0)
    layer, x, before = quantize(Block(VISION, 0)), torch.randn(1, 200, 48), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(run_fused(layer, x))
    finally:
        torch.set_num_threads(before)
    assert all(done is not None and torch.equal(done[0], found[0][0]) for done in found)


def test_what_is_no_number_stays_none_in_an_encoder(path: str) -> None:
    x = torch.randn(1, 40, 48)
    x[0, 7, 3] = torch.nan
    done = run_fused(quantize(Block(VISION, 0)), x)
    assert done is not None
    assert done[0].isnan().all()


def test_every_path_runs_a_layer(path: str) -> None:
    torch.manual_seed(0)
    layer, config = decoder_layer()
    x, rope = torch.randn(1, 70, 64), rope_angles(torch.arange(70)[None], config, torch.float32)
    expected, _ = layer(x, rope)
    done = run_fused(layer, x, rope)
    assert done is not None
    assert_near(done[0], expected)


@pytest.mark.parametrize("scheme", [W8A8, Scheme(4, 8)], ids=["W8A8", "W4A8"])
def test_a_layer_of_gemma(path: str, scheme: Scheme) -> None:
    """GeGLU, and heads that are together wider than the residual stream, with one key head for all."""
    torch.manual_seed(0)
    config = DecoderConfig(8, 48, 1, 4, 1, 32, 112, causal=False, activation="gelu_tanh")
    layer = DecoderLayer(config)
    quantize(layer, scheme)
    x, rope = torch.randn(1, 70, 48), rope_angles(torch.arange(70)[None], config, torch.float32)
    with torch.inference_mode():
        expected, _ = layer(x, rope)
        done = run_fused(layer, x, rope)
        layer.mlp.activation = "silu"
        other = run_fused(layer, x, rope)
    assert done is not None
    assert other is not None
    assert_near(done[0], expected)
    assert float((other[0] - expected).norm() / expected.norm()) > 2e-2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("first", [1, 5, 69, 70])
def test_the_last_tokens_alone_are_what_they_are_among_all(path: str, causal: bool, first: int) -> None:
    """Bit for bit; keys and values are kept of all tokens."""
    torch.manual_seed(0)
    layer, config = decoder_layer(causal=causal)
    x, rope = torch.randn(1, 70, 64), rope_angles(torch.arange(70)[None], config, torch.float32)
    rooms = [layer.self_attn.empty_kv(x) for _ in range(2)]
    whole, part = run_fused(layer, x, rope, None, rooms[0]), run_fused(layer, x, rope, None, rooms[1], first)
    assert whole is not None
    assert part is not None
    assert torch.equal(part[0], whole[0][:, first:])
    assert all(torch.equal(a, b) for a, b in zip(*rooms, strict=True))
    expected, _ = layer(x, rope, first=first)
    if first < 70:
        assert_near(part[0], expected)
    assert expected.shape == part[0].shape


def test_a_batch_has_no_last_tokens_alone(path: str) -> None:
    layer, config = decoder_layer()
    x, rope = torch.randn(2, 7, 64), rope_angles(torch.arange(7)[None], config, torch.float32)
    assert run_fused(layer, x, rope, first=3) is None


def test_positions_may_be_the_same_for_a_whole_batch(path: str) -> None:
    torch.manual_seed(0)
    layer, config = decoder_layer()
    x, rope = torch.randn(3, 20, 64), rope_angles(torch.arange(20)[None], config, torch.float32)
    expected, _ = layer(x, rope)
    done = run_fused(layer, x, rope)
    assert done is not None
    for found, one in zip(done[0], expected, strict=True):
        assert_near(found, one)


def test_tensors_that_do_not_fit_the_layer_are_refused(path: str) -> None:
    layer, _ = decoder_layer()
    x, angles, room = torch.ones(2, 5, 64), torch.ones(2, 5, 24), torch.ones(2, 2, 5, 24)
    for arguments, sentence in (
        ((torch.ones(2, 5, 48),), r"inputs must be \(2, 5, 64\), got \(2, 5, 48\)"),
        (
            (x, (angles, angles[:, :4])),
            r"positions \(2, 4, 24\) do not fit tokens that need \(2, 5, 24\)",
        ),
        ((torch.ones(3, 5, 64), (angles, angles)), r"rotary positions \(2, 5, 24\) do not fit"),
        ((x, (angles[..., :12], angles[..., :12])), r"rotary positions \(2, 5, 12\) do not fit"),
        (
            (x, None, None, (room, room[:1])),
            r"keys and values must be \(2, 2, 5, 24\), got \(1, 2, 5, 24\)",
        ),
        ((x, None, None, (room, room.double())), r"contiguous float32 on the CPU, got torch\.float64"),
        ((x, None, None, (room, room.transpose(0, 1))), "contiguous"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run_fused(layer, *arguments)
    with pytest.raises(IndexError):
        run_fused(layer, x, None, torch.tensor([5]))


def test_a_layer_of_parts_that_do_not_fit_is_refused(path: str) -> None:
    def linear(inputs: int, outputs: int) -> cpu.CpuLinear:
        return QuantizedLinear(inputs, outputs, W8A8).bound()

    norms = (Norm(None, None, 1e-6),) * 2
    good: dict[str, Any] = {
        "inputs": [linear(16, 32), linear(16, 16), linear(16, 16)], "out": linear(32, 16),
        "up": [linear(16, 24), linear(16, 24)], "down": linear(24, 16), "norms": norms,
        "gains": (None, None), "function": "silu", "heads": (4, 2, 8), "causal": True,
    }  # fmt: skip
    CpuLayer(LayerSpec(**good))
    for name, value, sentence in (
        ("inputs", [linear(16, 32), linear(16, 16), linear(16, 24)], "do not fit the heads"),
        ("inputs", [linear(16, 56)], "do not fit the heads"),
        ("inputs", [linear(16, 32)] * 2, "one linear or three"),
        ("out", linear(32, 24), "the output projection does not fit"),
        ("up", [linear(16, 24)] * 3, "one linear or two"),
        ("up", [linear(16, 24), linear(16, 32)], "the MLP's gate does not fit"),
        ("down", linear(32, 16), "the MLP does not fit"),
        ("heads", (3, 2, 8), "key heads do not divide query heads"),
        ("heads", (8, 4, 4), "multiple of 8"),
        ("norms", (Norm(torch.ones(8), None, 1e-6),) * 2, r"must be \(16,\), got \(8,\)"),
        ("gains", (torch.ones(16, dtype=torch.float64), None), "contiguous float32"),
    ):
        with pytest.raises(ValueError, match=sentence):
            CpuLayer(LayerSpec(**{**good, name: value}))


def test_keys_and_values_are_kept_for_later_tokens() -> None:
    torch.manual_seed(0)
    layer, config = decoder_layer()
    x, rope = torch.randn(1, 40, 64), rope_angles(torch.arange(40)[None], config, torch.float32)
    found = {}
    for fused in (False, True):
        layer.fused = run_fused if fused else None
        cache, parts = KVCache(1), []
        for part in (slice(0, 37), slice(37, 38), slice(38, 40)):
            parts.append(layer(x[:, part], (rope[0][:, part], rope[1][:, part]), 0, cache)[0])
        found[fused] = torch.cat(parts, dim=1)
    assert_near(found[True], found[False])


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(4, 8),
        Scheme(4, 4, activation_granularity="group", activation_group_size=8),
        Scheme(8, 8, "group", 8, activation_symmetric=False),
        Scheme(8, 8, activation_granularity="tensor"),
    ],
)
def test_a_layer_on_any_grid(scheme: Scheme) -> None:
    torch.manual_seed(0)
    layer = quantize(DiTBlock(48, 2), scheme)
    x = torch.randn(2, 9, 48)
    expected, done = layer(x), run_fused(layer, x)
    assert done is not None
    coarse = 0.1 if scheme.activation_bits == 4 else 0.02  # a level more or less
    assert float((done[0] - expected).norm() / expected.norm()) < coarse


def test_a_layer_notices_new_weights() -> None:
    torch.manual_seed(0)
    layer = quantize(DiTBlock(48, 2))
    fuse(layer)
    x = torch.randn(1, 5, 48)
    first = layer(x)
    layer.mlp.fc2 = QuantizedLinear.from_linear(nn.Linear(192, 48), W8A8)
    second = layer(x)
    layer.fused = None
    assert float((first - second).norm()) > 1
    assert_near(second, layer(x))


def test_a_copy_of_a_layer_has_its_own_weights() -> None:
    layer = quantize(DiTBlock(48, 2))
    fuse(layer)
    x = torch.randn(1, 5, 48)
    layer(x)
    other = copy.deepcopy(layer)
    other.mlp.fc2.scale.zero_()
    other.mlp.fc2.bias.zero_()
    assert not torch.equal(other(x), layer(x))


def test_what_the_native_layer_does_not_know_is_left_to_the_modules() -> None:
    layer, config = decoder_layer()
    x, rope = torch.randn(1, 5, 64), rope_angles(torch.arange(5)[None], config, torch.float32)
    assert run_fused(layer, x.bfloat16(), rope) is None
    assert run_fused(layer, x.clone().requires_grad_(), rope) is None
    film = VisionConfig(image_size=28, patch_size=14, width=48, depth=1, heads=2, mlp_width=80, film=True)
    assert run_fused(quantize(Block(film, 8)), torch.randn(1, 4, 48)) is None
    layer.self_attn.kv_format = QuantizedKV(8, Hadamard.of(24))
    assert run_fused(layer, x, rope) is None
    layer.mlp.up_proj = nn.Linear(64, 112)
    assert run_fused(layer, x, rope) is None
