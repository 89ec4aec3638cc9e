"""Every family goes through rotation and quantization, whatever its head and its other inputs."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.models import VLA, ModelConfig, ModelInputs, empty_model
from sqap.quantization import (
    QuantizedLinear,
    list_linears,
    prepare_quantized,
    quantize_model,
    rotate_decoder,
)
from sqap.recipe import Quantization, Recipe, Scheme
from tests.families import EXPERTS, FAMILIES, Stored, family_config, random_inputs, random_model

WHOLE = Quantization(
    Scheme(8, 8),
    vision=Scheme(8, 8),
    projector=Scheme(8, 8),
    head=Scheme(8, 8),
    sensitive=Scheme(8, 8),
    rounding="gptq",
    clip=True,
    rotation_seed=3,
)


def calibration(config: ModelConfig) -> list[ModelInputs]:
    return [random_inputs(config, 1, seed) for seed in range(3)]


def outputs(model: VLA, inputs: ModelInputs) -> Tensor:
    """What can be compared as numbers: logits instead of the tokens chosen by them."""
    if model.config.head.kind == "tokens":
        hidden = model.decoder(model.embed(inputs))[:, -1]
        return model.head.lm_head(hidden)  # type: ignore[operator, union-attr]
    out: Tensor = model(inputs)
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [None, 3])
@torch.no_grad()
def test_rotation_changes_nothing(family: str, seed: int | None) -> None:
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 2)
    rotated = copy.deepcopy(model)
    rotate_decoder(rotated, seed)
    assert not torch.allclose(rotated.embed(inputs), model.embed(inputs), atol=0.01)
    torch.testing.assert_close(outputs(rotated, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_everything_is_quantized_but_the_robots_state(family: str) -> None:
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 2)
    small = quantize_model(model, WHOLE, calibration(config))
    untouched = random_model(config).state_dict()
    assert all(torch.equal(untouched[name], value) for name, value in model.state_dict().items())
    floats = [linear.name for linear in list_linears(small) if not linear.quantized]
    assert floats == [f"proprio.layers.{i}" for i in range(config.proprio_layers) if config.decoder_state]
    exact = outputs(model, inputs)
    assert 0 < (outputs(small, inputs) - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_loads_into_a_prepared_model(family: str) -> None:
    config = family_config(family)
    recipe = dataclasses.replace(WHOLE, decoder=Scheme(4, 8))
    saved = quantize_model(random_model(config), recipe, calibration(config))
    loaded = VLA(saved.config)
    prepare_quantized(loaded, recipe)
    loaded.load_state_dict(saved.state_dict())
    inputs = random_inputs(config, 2)
    assert torch.equal(loaded(inputs), saved(inputs))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_presets_leave_what_reads_or_writes_actions_state_and_time(family: str, bits: int) -> None:
    """Quantized, a thousandth of the head's weights would cost most of the error of all of them."""
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 2)
    for preset in (Recipe.w4a4(keep=0.5), Recipe.w4a8(keep=0.5)):
        assert preset.quantization is not None
        assert preset.quantization.sensitive is None
    scheme = Scheme(4, bits)
    as_presets = dataclasses.replace(WHOLE, decoder=scheme, head=scheme, sensitive=None)
    small = quantize_model(model, as_presets, calibration(config))
    floats = {linear.name for linear in list_linears(small) if not linear.quantized and linear.part == "head"}
    ends = {"head.action_in_proj", "head.action_out_proj"}
    time = {f"head.action_time_mlp_{part}" for part in ("in", "out")}
    assert floats == {"flow": ends | time, "pi0": ends | time | {"head.state_proj"}, "pi0.5": ends}[family]
    if family != "pi0":  # whose state of five numbers has no 4-bit grid
        whole = quantize_model(model, dataclasses.replace(as_presets, sensitive=scheme), calibration(config))
        exact = model(inputs)
        assert (small(inputs) - exact).norm() < (whole(inputs) - exact).norm()


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_weights_may_be_on_disk(family: str) -> None:
    config = family_config(family)
    model = random_model(config)
    model.decoder.embed_tokens.bfloat16()  # which it is read as
    expected = quantize_model(model, WHOLE, calibration(config)).state_dict()
    stored = Stored(model.state_dict())
    found = quantize_model(empty_model(config), WHOLE, calibration(config), weights=stored).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", ["flow", "pi0"])
@torch.no_grad()
def test_a_policy_stored_whole_still_acts(family: str) -> None:
    """As policies were quantized before last layers were cut and steps fixed, all linears but the state's."""
    config = family_config(family)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, last_layer="whole"))
    model, inputs = random_model(config), random_inputs(config, 2)
    exact = model(inputs)
    recipe = Quantization(*[Scheme(8, 8)] * 5, rotate=False)
    stored = VLA(config)
    prepare_quantized(stored, recipe)
    assert stored.head.action_time_mlp_in.weight.shape == (24, 48)  # type: ignore[union-attr]
    state = model.state_dict()
    for name, module in stored.named_modules():
        if isinstance(module, QuantizedLinear):
            packed = QuantizedLinear.from_linear(model.get_submodule(name), Scheme(8, 8))  # type: ignore[arg-type]
            state |= {f"{name}.{key}": value for key, value in packed.state_dict().items()}
    stored.load_state_dict(state)
    assert 0 < (stored.eval()(inputs) - exact).norm() < 0.1 * exact.norm()


@torch.no_grad()
def test_of_adaptive_norms_a_compressed_head_keeps_what_they_are_told() -> None:
    config = family_config("pi0.5")
    small = quantize_model(random_model(config), WHOLE, calibration(config))
    assert small.config.head == dataclasses.replace(config.head, fixed_steps=True)  # type: ignore[type-var]
    assert not any("dense" in name or "time_mlp" in name for name in small.state_dict())
    steps, modulations = 10, small.head.get_buffer("layers.1.input_layernorm.modulation")
    assert modulations.shape == (steps, 3 * 24)
    assert modulations.dtype == torch.float32


def test_an_expert_reads_keys_and_values_as_they_are() -> None:
    config = family_config("flow")
    recipe = dataclasses.replace(WHOLE, kv_bits=8)
    with pytest.raises(InputError, match="kv_bits must be null"):
        quantize_model(random_model(config), recipe, calibration(config))
