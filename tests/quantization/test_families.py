"""Every family goes through rotation and quantization, whatever its head and its other inputs."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.models import VLA, ModelConfig, ModelInputs
from sqap.quantization import list_linears, prepare_quantized, quantize_model, rotate_decoder
from sqap.recipe import Quantization, Scheme
from tests.families import FAMILIES, family_config, random_inputs, random_model

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


def test_an_expert_reads_keys_and_values_as_they_are() -> None:
    config = family_config("flow")
    recipe = dataclasses.replace(WHOLE, kv_bits=8)
    with pytest.raises(InputError, match="kv_bits must be null"):
        quantize_model(random_model(config), recipe, calibration(config))
