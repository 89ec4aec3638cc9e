"""Coverage: what is reported is what is stored, and a decoder that breaks its recipe is found out."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sqap.errors import CheckpointError
from sqap.models import VLA
from sqap.models.storage import stored_bytes
from sqap.quantization import check_coverage, list_linears, quantize_model, rotate_decoder
from sqap.quantization.linear import QuantizedLinear
from sqap.recipe import Override, Quantization, Scheme

MakeModel = Callable[..., VLA]
RECIPE = Quantization(Scheme(4, 8))
DOWN = "decoder.layers.1.mlp.down_proj"


@pytest.fixture
def quantized(make_model: MakeModel) -> VLA:
    model = make_model()
    model = quantize_model(model, RECIPE)
    return model


def replace(model: VLA, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def linear_at(model: VLA, name: str) -> QuantizedLinear:
    module = model.get_submodule(name)
    assert isinstance(module, QuantizedLinear)
    return module


def test_all_linears_of_all_parts_are_listed(make_model: MakeModel, quantized: VLA) -> None:
    names = [name for name, module in make_model().named_modules() if isinstance(module, nn.Linear)]
    reports = list_linears(quantized)
    assert [report.name for report in reports] == names
    assert {report.part for report in reports} == {"vision", "projector", "decoder", "head"}
    for report in reports:
        assert report.quantized == (report.part == "decoder")
        assert report.weight_bits == (4 if report.quantized else 16)


def test_a_report_tells_how_a_linear_is_stored(quantized: VLA) -> None:
    (report,) = [report for report in list_linears(quantized) if report.name == DOWN]
    assert (report.in_features, report.out_features) == (640, 128)
    assert (report.weight_bits, report.activation_bits) == (4, 8)
    assert (report.granularity, report.group_size, report.hadamard_block) == ("channel", None, 128)
    assert report.bytes == 640 * 128 // 2 + 128 * 4


def test_a_rotated_linear_in_floats_reports_its_transform(make_model: MakeModel) -> None:
    model = make_model()
    rotate_decoder(model)
    blocks = {report.name: report.hadamard_block for report in list_linears(model) if report.hadamard_block}
    assert blocks == {f"decoder.layers.{i}.mlp.down_proj": 128 for i in range(2)}
    assert {report.weight_bits for report in list_linears(model)} == {16}


def test_quantizing_saves_the_bytes_it_should(make_model: MakeModel) -> None:
    model = make_model()
    reports = [report for report in list_linears(model) if report.part == "decoder"]
    weights = sum(report.in_features * report.out_features for report in reports)
    channels = sum(report.out_features for report in reports)
    before = stored_bytes(model)
    model = quantize_model(model, RECIPE)
    assert stored_bytes(model) == before - 2 * weights + weights // 2 + 4 * channels


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        Quantization(Scheme(8, 8), rotate=False),
        Quantization(Scheme(4, 4, "group", 16)),
        Quantization(Scheme(4, 4, "tensor", activation_granularity="tensor")),
    ],
)
def test_a_quantized_decoder_is_covered_even_after_a_cast(
    make_model: MakeModel, recipe: Quantization
) -> None:
    model = make_model()
    model = quantize_model(model, recipe)
    check_coverage(model, recipe)
    check_coverage(model.bfloat16(), recipe)


def test_a_linear_quantized_against_the_recipe_is_found(make_model: MakeModel) -> None:
    spared = dataclasses.replace(RECIPE, overrides=(Override("decoder.layers.0.*"),))
    check_coverage(quantize_model(make_model(), spared), spared)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj is quantized, but the recipe"):
        check_coverage(quantize_model(make_model(), RECIPE), spared)


def test_a_report_tells_which_rotation_its_input_has(quantized: VLA) -> None:
    rotations = {report.name: report.rotation for report in list_linears(quantized)}
    layer = "decoder.layers.0"
    assert rotations[f"{layer}.self_attn.q_proj"] == rotations[f"{layer}.mlp.up_proj"] == "residual"
    assert rotations[f"{layer}.self_attn.o_proj"] == "heads"
    assert rotations[f"{layer}.mlp.down_proj"] == "online"
    assert rotations["projector.layers.0"] is None


def test_a_forgotten_linear_is_found(quantized: VLA) -> None:
    replace(quantized, "decoder.layers.1.self_attn.k_proj", nn.Linear(128, 64))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj is not quantized"):
        check_coverage(quantized, RECIPE)


def test_integers_kept_in_floats_are_found(quantized: VLA) -> None:
    down = linear_at(quantized, DOWN)
    down.weight = down.levels().float()
    with pytest.raises(CheckpointError, match=r"down_proj stores its weight as torch\.float32"):
        check_coverage(quantized, RECIPE)


def test_scales_that_were_rounded_or_lost_are_found(quantized: VLA) -> None:
    down = linear_at(quantized, DOWN)
    for scale in (down.scale.half(), torch.full_like(down.scale, float("nan"))):
        down.scale = scale
        with pytest.raises(CheckpointError, match="finite float32 scales"):
            check_coverage(quantized, RECIPE)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Quantization(Scheme(8, 8)), "weight_bits = 4, the recipe says 8"),
        (Quantization(Scheme(4, 4)), "activation_bits = 8, the recipe says 4"),
        (Quantization(Scheme(4, 8, "group", 16)), "weight_granularity = channel, the recipe says group"),
        (Quantization(Scheme(4, 8, activation_granularity="tensor")), "activation_granularity = token"),
        (Quantization(Scheme(4, 8), rotate=False), "the decoder is rotated"),
    ],
)
def test_another_recipe_is_found(quantized: VLA, recipe: Quantization, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_coverage(quantized, recipe)


def test_a_missing_transform_is_found(quantized: VLA) -> None:
    linear_at(quantized, DOWN).hadamard_block = 0
    with pytest.raises(CheckpointError, match=r"blocks of 0, the recipe needs 128"):
        check_coverage(quantized, RECIPE)


def test_a_decoder_left_in_floats_is_found(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(CheckpointError, match="not rotated"):
        check_coverage(model, RECIPE)
    with pytest.raises(CheckpointError, match="is not quantized"):
        check_coverage(model, Quantization(rotate=False))
