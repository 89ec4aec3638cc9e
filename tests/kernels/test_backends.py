"""The seat of another backend: an entry in the list is all that it takes. This one multiplies on "meta"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqap import kernels
from sqap.kernels import Grids, LayerSpec, Packed, cpu
from sqap.kernels.backend import Attention, FusedLayer
from sqap.models import VisionConfig
from sqap.models.config import DecoderConfig
from sqap.models.decoder import Decoder, rope_angles
from sqap.models.stream import Stream
from sqap.models.transformer import attend
from sqap.models.vision import Block
from sqap.quantization import QuantizedLinear
from sqap.quantization.fused import fuse, run_fused
from sqap.recipe import Scheme

CONFIG = DecoderConfig(vocabulary=8, width=64, depth=2, heads=4, kv_heads=2, head_dim=12, mlp_width=96)
META = torch.device("meta")


class Layer:
    """Takes bfloat16 alone."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.calls = spec, 0

    def takes(self, x: Tensor, first: int = 0, past: int = 0) -> bool:
        return x.dtype == torch.bfloat16

    def __call__(
        self, x: Tensor, rope: Any = None, rows: Any = None, kept: Any = None, first: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        return x[:, first:], None


class Seat:
    """Multiplies 8-bit weights on the meta device."""

    name = "seat"

    def __init__(self) -> None:
        self.bound: list[Packed] = []
        self.layers: list[Layer] = []
        self.looks: list[Sequence[FusedLayer]] = []

    def fits(self, device: torch.device, grids: Grids) -> bool:
        return device == META and grids.weight_bits == 8

    def linear(self, packed: Packed) -> kernels.Linear:
        self.bound.append(packed)
        return lambda x, function="none", times=None: x.new_empty(*x.shape[:-1], len(packed.weight))

    def layer(self, spec: LayerSpec) -> FusedLayer | None:
        if spec.function != "silu":
            return None
        self.layers.append(Layer(spec))
        return self.layers[-1]

    def look(self, layers: Sequence[FusedLayer], x: Tensor, rope: Any, rows: Tensor) -> Tensor | None:
        self.looks.append(layers)
        return x.new_empty(x.shape[:2])

    def attention(self, device: torch.device, dtype: torch.dtype) -> Attention | None:
        return (lambda q, k, v, causal, mask: q) if device == META and dtype == torch.float16 else None


@pytest.fixture
def seat(monkeypatch: pytest.MonkeyPatch) -> Seat:
    seat = Seat()
    monkeypatch.setattr(kernels, "BACKENDS", [seat, *kernels.BACKENDS])
    return seat


def linear(bits: int = 8) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(64, 24), Scheme(bits, 8, activation_symmetric=False))


def quantize(module: nn.Module, bits: int = 8) -> nn.Module:
    for name, child in [*module.named_modules()]:
        if isinstance(child, nn.Linear):
            owner, _, attribute = name.rpartition(".")
            low = QuantizedLinear.from_linear(child, Scheme(bits, 8))
            setattr(module.get_submodule(owner), attribute, low)
    fuse(module)
    return module.eval().requires_grad_(False)


def decoder() -> Decoder:
    quantized = quantize(Decoder(CONFIG))
    assert isinstance(quantized, Decoder)
    return quantized.to(META)


def test_the_first_that_fits_multiplies(seat: Seat) -> None:
    packed, x = linear(), torch.ones(2, 5, 64)
    expected = packed(x)
    assert packed.backend.name == cpu.chosen()
    moved = packed.to(META)
    assert moved(x.to(META)).shape == expected.shape
    moved(x.to(META))
    assert [bound.grids for bound in seat.bound] == [Grids(8, 8, False, 64)]
    assert seat.bound[0].weight is moved.weight
    assert linear(4).to(META).backend.name == "reference"
    assert linear(4).to(META)(x.to(META)).is_meta


@pytest.mark.parametrize(("path", "name"), [("portable", "portable"), (cpu.REFERENCE, "reference")])
def test_the_cpu_can_be_left_to_pytorch(path: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "chosen", lambda: path)
    assert linear().backend.name == name
    assert isinstance(linear().bound(), cpu.CpuLinear) == (path == "portable")


def test_a_layer_runs_where_its_linears_are(seat: Seat) -> None:
    layer = decoder().layers[0]
    x = torch.ones(1, 7, 64, dtype=torch.bfloat16, device=META)
    rope = rope_angles(torch.arange(7, device=META)[None], CONFIG, torch.bfloat16)
    for _ in range(2):
        assert layer(x, rope)[0].shape == x.shape
    assert layer(x, rope, first=3)[0].shape == (1, 4, 64)
    (bound,) = seat.layers  # bound once
    assert bound.calls == 3
    assert bound.spec.heads == (4, 2, 12)
    assert bound.spec.causal
    layer(x.float(), tuple(part.float() for part in rope))
    assert bound.calls == 3


def test_a_layer_that_no_backend_runs_is_asked_for_once(seat: Seat) -> None:
    config = VisionConfig(image_size=28, patch_size=14, width=48, depth=1, heads=2, mlp_width=80)
    asked, block, x = [], quantize(Block(config, 0)).to(META), torch.ones(1, 4, 48, device=META)
    layer = seat.layer
    seat.layer = lambda spec: asked.append(spec) or layer(spec)  # type: ignore[method-assign,func-returns-value]
    for _ in range(2):
        assert run_fused(block, x) is None
        assert block(x).shape == x.shape
    assert len(asked) == 1


def test_a_layer_of_two_backends_is_run_by_its_modules(seat: Seat) -> None:
    layer = decoder().layers[0]
    layer.mlp.up_proj = QuantizedLinear.from_linear(nn.Linear(64, 96, bias=False), Scheme(4, 8)).to(META)
    x = torch.ones(1, 7, 64, dtype=torch.bfloat16, device=META)
    assert run_fused(layer, x) is None
    assert not seat.layers


def test_a_look_ahead_is_the_backends(seat: Seat) -> None:
    model, x = decoder(), torch.ones(1, 7, 64, device=META)
    rope = rope_angles(torch.arange(7, device=META)[None], CONFIG, torch.float32)
    found = model.look_ahead(Stream((x,), (rope,), x), [1, 0], torch.tensor([6], device=META))
    assert found.shape == (1, 7)
    assert [list(layers) for layers in seat.looks] == [seat.layers]
    assert len(seat.layers) == 2


def test_attention_is_the_backends(seat: Seat) -> None:
    q = torch.ones(1, 2, 3, 8, dtype=torch.float16, device=META)
    assert attend(q, q, q) is q
    assert attend(q.float(), q.float(), q.float()).shape == q.shape


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("masked", ["causal", "mask", "none"])
def test_attention_in_bfloat16_on_a_cpu_is_pytorchs(heads: tuple[int, int], masked: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 9, 16).bfloat16() for n in (heads[0], heads[1], heads[1]))
    mask = torch.ones(9, 9, dtype=torch.bool).tril(2) if masked == "mask" else None
    found = attend(q, k, v, causal=masked == "causal", mask=mask)
    expected = attend(q.float(), k.float(), v.float(), causal=masked == "causal", mask=mask)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
