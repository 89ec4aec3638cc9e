"""A layer that was bound to native code notices what becomes of its modules: hooks, settings, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.kernels import cpu
from sqap.models.config import DecoderConfig, VisionConfig
from sqap.models.decoder import DecoderLayer, rope_angles
from sqap.models.heads.diffusion import DiTBlock
from sqap.models.vision import Block, FiLM
from sqap.quantization import QuantizedLinear
from sqap.quantization.fused import fuse, run_fused
from sqap.recipe import Scheme

CONFIG = DecoderConfig(vocabulary=8, width=64, depth=1, heads=4, kv_heads=2, head_dim=16, mlp_width=96)
VISION = VisionConfig(
    image_size=28, patch_size=14, width=48, depth=1, heads=2, mlp_width=80, activation="gelu"
)


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "chosen", lambda: cpu.PORTABLE)


def quantized(layer: nn.Module) -> nn.Module:
    """Every linear of the layer quantized, and the layer bound."""
    for name, linear in [*layer.named_modules()]:
        if isinstance(linear, nn.Linear):
            owner, _, attribute = name.rpartition(".")
            low = QuantizedLinear.from_linear(linear, Scheme(8, 8))
            setattr(layer.get_submodule(owner), attribute, low)
    layer.eval().requires_grad_(False)
    fuse(layer)
    return layer


@pytest.fixture
def layer() -> nn.Module:
    torch.manual_seed(0)
    return quantized(DecoderLayer(CONFIG))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(1))


def run(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, DecoderLayer):
        out: Tensor = layer(x, rope_angles(torch.arange(x.shape[1])[None], CONFIG, torch.float32))[0]
        return out
    done: Tensor = layer(x)
    return done


def by_modules(layer: nn.Module, x: Tensor) -> Tensor:
    fused, layer.fused = layer.fused, None
    try:
        return run(layer, x)
    finally:
        layer.fused = fused


Register = Callable[[nn.Module, Callable[..., None]], Any]
KINDS: dict[str, Register] = {
    "forward": nn.Module.register_forward_hook,
    "before forward": nn.Module.register_forward_pre_hook,
    "every module's": lambda _, hook: nn.modules.module.register_module_forward_hook(hook),
    "before every module's": lambda _, hook: nn.modules.module.register_module_forward_pre_hook(hook),
}


@pytest.mark.parametrize("first", [True, False], ids=["before the first call", "later"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp", "input_layernorm", "mlp.down_proj"])
def test_hooks_in_a_layer_are_called(layer: nn.Module, x: Tensor, name: str, kind: str, first: bool) -> None:
    module, seen = layer.get_submodule(name), []
    expected = by_modules(layer, x)
    if not first:
        run(layer, x)
    handle = KINDS[kind](module, lambda *given: seen.append(given[0]))
    try:
        found = run(layer, x)
    finally:
        handle.remove()
    assert module in seen
    assert torch.equal(found, expected)
    calls = len(seen)
    run(layer, x)
    assert len(seen) == calls
    assert run_fused(layer, x) is not None


def test_a_hook_may_change_what_a_module_returns(layer: nn.Module, x: Tensor) -> None:
    run(layer, x)
    with layer.mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output)):
        found = run(layer, x)
    assert float((found - run(layer, x)).abs().max()) > 0.1


def test_backward_hooks_leave_the_layer_to_its_modules(layer: nn.Module, x: Tensor) -> None:
    with layer.mlp.register_full_backward_hook(lambda *_: None):
        assert run_fused(layer, x) is None
    with layer.mlp.register_full_backward_pre_hook(lambda *_: None):
        assert run_fused(layer, x) is None
    assert run_fused(layer, x) is not None


def test_hooks_of_the_layer_itself_are_called_around_the_native_one(layer: nn.Module, x: Tensor) -> None:
    seen: list[nn.Module] = []
    with layer.register_forward_hook(lambda module, *_: seen.append(module)):
        run(layer, x)
        assert seen == [layer]
        assert run_fused(layer, x) is not None


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("input_layernorm", "eps", 3.0),
        ("post_attention_layernorm", "eps", 3.0),
        ("self_attn", "causal", False),
    ],
)
def test_settings_of_a_decoder_layer_may_change(
    layer: nn.Module, x: Tensor, name: str, attribute: str, value: object
) -> None:
    before = run(layer, x)
    setattr(layer.get_submodule(name), attribute, value)
    found, expected = run(layer, x), by_modules(layer, x)
    assert run_fused(layer, x) is not None
    assert float((expected - before).norm() / before.norm()) > 0.05
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(
    ("name", "attribute", "value"), [("norm1", "eps", 3.0), ("mlp", "activation", "none")]
)
def test_settings_of_a_block_may_change(name: str, attribute: str, value: object) -> None:
    torch.manual_seed(0)
    block, x = quantized(DiTBlock(48, 2)), torch.randn(1, 9, 48)
    before = run(block, x)
    setattr(block.get_submodule(name), attribute, value)
    found, expected = run(block, x), by_modules(block, x)
    assert float((expected - before).norm() / before.norm()) > 0.02
    assert float((found - expected).norm() / expected.norm()) < 0.01


def test_a_module_that_is_added_or_runs_otherwise_is_noticed(layer: nn.Module, x: Tensor) -> None:
    run(layer, x)
    layer.mlp.forward = lambda x: torch.zeros_like(x)
    assert run_fused(layer, x) is None
    assert torch.equal(run(layer, x), by_modules(layer, x))
    del layer.mlp.forward
    assert run_fused(layer, x) is not None

    block, image = quantized(Block(VISION, 0)), torch.randn(1, 4, 48)
    assert run_fused(block, image) is not None
    block.film = FiLM(8, 48)
    assert run_fused(block, image) is None


SENTENCE = (
    r"a quantized linear has no gradient, and its input needs one: run the model under torch\.no_grad\(\)"
)


@pytest.mark.parametrize("path", [*cpu.paths()])
def test_a_gradient_through_a_quantized_linear_is_refused(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(cpu, "chosen", lambda: path)
    linear = QuantizedLinear.from_linear(nn.Linear(16, 8), Scheme(4, 8))
    plain, trained = torch.ones(2, 16), torch.ones(2, 16, requires_grad=True)
    with pytest.raises(InputError, match=SENTENCE):
        linear(trained)
    with pytest.raises(InputError, match=SENTENCE):
        linear(plain, "silu", trained)
    expected = linear(plain)
    with torch.no_grad():
        assert torch.equal(linear(trained), expected)


def test_a_gradient_through_a_layer_is_refused(layer: nn.Module, x: Tensor) -> None:
    expected = run(layer, x)
    with pytest.raises(InputError, match=SENTENCE):
        run(layer, x.clone().requires_grad_())
    layer.input_layernorm.weight.requires_grad_()
    with pytest.raises(InputError, match=SENTENCE):
        run(layer, x)
    with torch.no_grad():
        assert torch.equal(run(layer, x), expected)
