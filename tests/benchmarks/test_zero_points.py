"""Grids with zero points, as the benchmark simulates them, and the settings of what is compared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from llm_perplexity import variants
from quantizer import corrected_recipes
from torch import nn
from zero_points import OffsetLinear, zero_points

from sqap.quantization.gptq import Hessian
from sqap.quantization.linear import QuantizedLinear
from sqap.recipe import Recipe, Scheme

GROUPS = Scheme(4, 8, weight_granularity="group", group_size=32)


def skewed(seed: int = 0) -> nn.Linear:
    """Weights that lean to one side, by another amount in each group."""
    linear = nn.Linear(64, 12, bias=False).requires_grad_(False)
    noise = torch.rand(12, 64, generator=torch.Generator().manual_seed(seed))
    linear.weight.copy_(noise + torch.arange(2).repeat_interleave(32))
    return linear


def test_they_lose_no_more_than_levels_from_the_smallest_weight_to_the_largest() -> None:
    weight = skewed().weight.clone()
    grouped = weight.view(12, 2, 32)
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    step = (high - low) / 15
    rounded = low + step * ((grouped - low) / step).round()
    found = OffsetLinear.from_linear(skewed(), GROUPS, clip=True).linear.weight
    assert (found - weight).square().sum() < 1.02 * (rounded.flatten(1) - weight).square().sum()
    assert all(len(row.unique()) <= 16 for row in found.view(24, 32))
    symmetric = QuantizedLinear.from_linear(skewed(), GROUPS, clip=True).dequantized()
    assert (found - weight).square().sum() < 0.5 * (symmetric - weight).square().sum()


def test_a_group_of_equal_weights_is_exact() -> None:
    linear = nn.Linear(64, 3, bias=False).requires_grad_(False)
    linear.weight.fill_(0.3)
    torch.testing.assert_close(
        OffsetLinear.from_linear(linear, GROUPS).linear.weight, torch.full((3, 64), 0.3)
    )


def test_gptq_on_shifted_weights_is_better_than_rounding() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        64, 64, generator=torch.Generator().manual_seed(2)
    )
    hessian = Hessian(torch.arange(64), "linear")
    hessian.add(x)
    meant = F.linear(x, skewed().weight)
    errors = [
        (F.linear(x, OffsetLinear.from_linear(skewed(), GROUPS, factor=factor).linear.weight) - meant)
        .square()
        .sum()
        for factor in (hessian.factor(), None)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_activations_are_rounded_on_the_way_in() -> None:
    linear = OffsetLinear.from_linear(skewed(), GROUPS)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    step = x.abs().amax(1, keepdim=True) / 127
    expected = F.linear(step * (x / step).round(), linear.linear.weight)
    torch.testing.assert_close(linear(x), expected)
    assert zero_points(x, 64).shape == x.shape


@pytest.mark.parametrize(
    ("name", "bits", "group", "activations"),
    [("w4a4-token group-128", 4, 64, None), ("w4a4 group-32", 4, 32, 32), ("w4a8", 8, None, None)],
)
def test_perplexitys_variants_are_on_the_grids_of_their_names(
    name: str, bits: int, group: int | None, activations: int | None
) -> None:
    made = variants()[name]
    scheme = made.scheme("decoder.layers.0.mlp.up_proj")
    assert scheme is not None
    assert (scheme.weight_bits, scheme.activation_bits) == (4, bits)
    assert (scheme.group_size, scheme.activation_group_size) == (group, activations)
    down = made.scheme("decoder.layers.0.mlp.down_proj")
    assert down is not None
    assert down.group_size == (128 if group == 64 else group)


def test_corrected_recipes_differ_from_the_preset_in_nothing_else() -> None:
    recipes = corrected_recipes()
    assert list(recipes) == [
        "full", "w4a8-whole", "w4a8-whole+0.25", "w4a8-whole+0.5",
        "w4a4-decoder", "w4a4-decoder+0.25", "w4a4-decoder+0.5",
    ]  # fmt: skip
    assert recipes["w4a8-whole"] == Recipe.w4a8(keep=1)
    quantization = recipes["w4a8-whole+0.5"].quantization
    assert quantization is not None
    assert quantization.correction == 0.5
