"""The quantized linear against plain arithmetic, and the swap of a whole decoder."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.models import VLA
from sqap.quantization import QuantizedLinear, prepare_quantized, quantize_decoder, rotate_decoder
from sqap.quantization import linear as linear_module
from sqap.quantization.grid import quantize_activation, quantize_weight
from sqap.quantization.linear import integer_matmul
from sqap.quantization.packing import pack_int4
from sqap.quantization.rotation import HadamardLinear, block_hadamard, is_rotated
from sqap.recipe import Quantization

MakeModel = Callable[..., VLA]
Inputs = tuple[list[Tensor], Tensor, Tensor]

W8A8 = Quantization(8, 8)
RECIPES = [
    Quantization(4, 8),
    Quantization(4, 4, activation_granularity="tensor"),
    Quantization(8, 8, weight_granularity="tensor"),
    Quantization(4, 8, weight_granularity="group", group_size=16),
    Quantization(8, 8, weight_granularity="group", group_size=32, rotate=False),
]


def random_linear(inputs: int = 64, outputs: int = 24, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("block", [0, 32])
@torch.no_grad()
def test_forward_is_dequantize_and_multiply(recipe: Quantization, block: int) -> None:
    source = random_linear()
    quantized = QuantizedLinear.from_linear(HadamardLinear(source, block) if block else source, recipe)
    x = torch.randn(2, 7, 64)
    rotated = block_hadamard(x, block) if block else x
    q, scale = quantize_activation(rotated, recipe.activation_bits, recipe.activation_granularity)
    expected = (q * scale) @ quantized.dequantized().T + source.bias
    torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_stored_as_integers(recipe: Quantization) -> None:
    source = random_linear()
    quantized = QuantizedLinear.from_linear(source, recipe)
    q, scale = quantize_weight(
        source.weight, recipe.weight_bits, recipe.weight_granularity, recipe.group_size
    )
    assert torch.equal(quantized.weight, pack_int4(q) if recipe.weight_bits == 4 else q)
    assert torch.equal(quantized.scale, scale)
    assert quantized.weight.nbytes == 64 * 24 * recipe.weight_bits // 8
    assert not list(quantized.parameters())


@pytest.mark.parametrize("levels", [7, 127])
@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 256, 64), (5, 7, 3), (40, 640, 48)])
@pytest.mark.parametrize("fast", [True, False])
def test_products_are_exact_integers(
    levels: int, shape: tuple[int, int, int], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:  # as on a CPU whose int8 product is wrong or slow
        monkeypatch.setattr(linear_module, "_int8_matmul_is_exact", lambda: False)
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-levels, levels + 1, (rows, inputs), generator=generator)
    weight = torch.randint(-levels, levels + 1, (outputs, inputs), generator=generator)
    q[0], weight[0] = levels, levels  # where 16-bit sums would saturate
    found = integer_matmul(q.to(torch.int8), weight.to(torch.int8))
    assert found.dtype == torch.float32
    assert torch.equal(found.long(), q @ weight.T)


@torch.no_grad()
def test_rotation_rescues_four_bits_from_outliers() -> None:
    gain = torch.ones(256)
    gain[[3, 70, 200]] = 10
    source = random_linear(256, 256, bias=False)
    source.weight /= gain  # the outliers are large, but say no more than any other channel
    rotated = nn.Linear(256, 256, bias=False)
    rotated.weight.copy_(block_hadamard(source.weight, 256))
    x = gain * torch.randn(50, 256)

    def error(linear: nn.Linear) -> float:
        quantized = QuantizedLinear.from_linear(linear, Quantization(4, 4))
        return float((quantized(x) - source(x)).norm() / source(x).norm())

    assert error(HadamardLinear(rotated, 256)) < 0.5 * error(source)


def test_zero_inputs_give_the_bias() -> None:
    source = random_linear()
    quantized = QuantizedLinear.from_linear(source, Quantization(4, 4))
    assert torch.equal(quantized(torch.zeros(3, 64)), source.bias.detach().expand(3, -1))


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_casting_a_model_keeps_its_scales(cast: Callable[[nn.Module], nn.Module]) -> None:
    quantized = QuantizedLinear.from_linear(random_linear(), Quantization())
    scale, weight = quantized.scale.clone(), quantized.weight.clone()
    cast(quantized)
    assert quantized.scale.dtype == torch.float32
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.weight, weight)
    assert quantized.bias is not None
    x = torch.randn(3, 64).to(quantized.bias.dtype)
    assert quantized(x).dtype == x.dtype


def test_a_linear_can_be_moved_to_the_meta_device() -> None:
    quantized = QuantizedLinear.from_linear(random_linear(), Quantization()).to("meta")
    assert quantized.weight.is_meta
    assert quantized.scale.is_meta
    assert not quantized.to_empty(device="cpu").scale.is_meta


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_state_dict_round_trip_is_exact(recipe: Quantization) -> None:
    source = random_linear()
    saved = QuantizedLinear.from_linear(source, recipe)
    loaded = QuantizedLinear.empty_like(random_linear(), recipe)
    loaded.load_state_dict(saved.state_dict())
    x = torch.randn(4, 64)
    assert torch.equal(loaded(x), saved(x))


def hidden(model: VLA, inputs: Inputs) -> Tensor:
    return model.cognition(model.see(inputs[0]), inputs[1])


@pytest.mark.parametrize(("recipe", "error"), [(W8A8, 0.03), (Quantization(4, 8), 0.35)])
@torch.no_grad()
def test_a_quantized_policy_stays_close(
    make_model: MakeModel, inputs: Inputs, recipe: Quantization, error: float
) -> None:
    model, quantized = make_model(), make_model()
    quantize_decoder(quantized, recipe)
    exact, found = hidden(model, inputs), hidden(quantized, inputs)
    assert 0 < (found - exact).norm() < error * exact.norm()


@pytest.mark.parametrize("cast_first", [True, False])
@torch.no_grad()
def test_a_policy_may_be_cast_before_or_after(
    make_model: MakeModel, inputs: Inputs, cast_first: bool
) -> None:
    exact, model = hidden(make_model(), inputs), make_model()
    if cast_first:
        model.bfloat16()
    quantize_decoder(model, W8A8)
    model.bfloat16()
    found = hidden(model, ([inputs[0][0].bfloat16()], *inputs[1:]))
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.05 * exact.norm()


def test_every_decoder_linear_is_replaced_and_nothing_else(make_model: MakeModel) -> None:
    model = make_model()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantize_decoder(model, Quantization())
    for name in linears:
        assert isinstance(model.get_submodule(name), QuantizedLinear) == name.startswith("decoder."), name
    assert sum(name.startswith("decoder.") for name in linears) == 2 * 7
    assert is_rotated(model)
    down: Any = model.get_submodule("decoder.layers.1.mlp.down_proj")
    assert down.hadamard_block == 128


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_a_quantized_policy_loads_into_a_prepared_one(
    make_model: MakeModel, inputs: Inputs, recipe: Quantization
) -> None:
    saved, loaded = make_model(), make_model()
    quantize_decoder(saved, recipe)
    prepare_quantized(loaded, recipe)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(*inputs), saved(*inputs))


def test_a_rotated_model_is_not_rotated_again(make_model: MakeModel) -> None:
    once, twice = make_model(), make_model()
    quantize_decoder(once, W8A8)
    rotate_decoder(twice)
    quantize_decoder(twice, W8A8)
    for name, value in once.state_dict().items():
        assert torch.equal(twice.state_dict()[name], value), name
    rotated = make_model()
    rotate_decoder(rotated)
    with pytest.raises(InputError, match="rotate = false"):
        quantize_decoder(rotated, Quantization(rotate=False))


def test_a_group_size_that_does_not_fit_names_the_linear_and_changes_nothing(make_model: MakeModel) -> None:
    model, untouched = make_model(), make_model()
    recipe = Quantization(weight_granularity="group", group_size=80)
    for verb in (quantize_decoder, prepare_quantized):
        with pytest.raises(InputError, match=r"decoder\.layers\.0\.self_attn\.q_proj .* 80 .* 128"):
            verb(model, recipe)
    assert not is_rotated(model)
    for name, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_weight_that_is_not_finite_is_named(make_model: MakeModel) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("decoder.layers.1.mlp.up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"decoder\.layers\.1\.mlp\.up_proj .* not finite"):
        quantize_decoder(model, Quantization())


def test_quantizing_twice_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    quantize_decoder(model, Quantization())
    for verb in (quantize_decoder, prepare_quantized):
        with pytest.raises(InputError, match="already quantized"):
            verb(model, Quantization())
