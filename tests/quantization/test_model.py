"""A whole model quantized stage by stage: what is replaced, how close it stays, and what is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.models import VLA, ModelInputs
from sqap.models.stages import stages
from sqap.quantization import (
    Partial,
    QuantizedLinear,
    list_linears,
    prepare_quantized,
    quantize_decoder,
    quantize_model,
    rotate_decoder,
)
from sqap.quantization.rotation import is_rotated
from sqap.recipe import Override, Quantization, Scheme

MakeModel = Callable[..., VLA]
W8A8 = Quantization(Scheme(8, 8))
WHOLE = Quantization(
    Scheme(4, 8),
    vision=Scheme(4, 8),
    projector=Scheme(8, 8),
    head=Scheme(8, 8),
    sensitive=Scheme(8, 8),
    rounding="gptq",
    clip=True,
    rotation_seed=3,
)
RECIPES = [
    W8A8,
    Quantization(Scheme(4, 8, "group", 32)),
    Quantization(Scheme(4, 4, activation_symmetric=False), rotate=False),
    Quantization(Scheme(4, 8), kv_bits=4, rotation_seed=1),
    WHOLE,
]


@pytest.fixture
def calibration(inputs: ModelInputs) -> list[ModelInputs]:
    (pixels,), ids, noise = inputs.pixels, inputs.token_ids, inputs.noise
    assert noise is not None
    return [ModelInputs([pixels[i : i + 1]], ids[i : i + 1], noise[i : i + 1]) for i in range(2)]


def hidden(model: VLA, inputs: ModelInputs) -> Tensor:
    return model.decoder(model.embed(inputs))[:, -1]


@pytest.mark.parametrize(("recipe", "error"), [(W8A8, 0.03), (Quantization(Scheme(4, 8)), 0.35)])
@torch.no_grad()
def test_a_quantized_policy_stays_close(
    make_model: MakeModel, inputs: ModelInputs, recipe: Quantization, error: float
) -> None:
    model = make_model()
    exact, found = hidden(model, inputs), hidden(quantize_model(model, recipe), inputs)
    assert 0 < (found - exact).norm() < error * exact.norm()


@torch.no_grad()
def test_gptq_on_what_quantized_layers_produce_beats_rounding(
    make_model: MakeModel, inputs: ModelInputs, calibration: list[ModelInputs]
) -> None:
    model = make_model()
    exact = hidden(model, inputs)

    def error(recipe: Quantization) -> float:
        return float((hidden(quantize_model(model, recipe, calibration), inputs) - exact).norm())

    nearest = Quantization(Scheme(4, 8))
    assert error(dataclasses.replace(nearest, rounding="gptq", clip=True)) < 0.8 * error(nearest)


@torch.no_grad()
def test_a_policy_in_bfloat16_is_quantized_in_32_bits(make_model: MakeModel, inputs: ModelInputs) -> None:
    exact = hidden(make_model(), inputs)
    small = quantize_model(make_model().bfloat16(), W8A8)
    found = hidden(small, dataclasses.replace(inputs, pixels=[p.bfloat16() for p in inputs.pixels]))
    assert found.dtype == torch.float32
    assert (found.float() - exact).norm() < 0.05 * exact.norm()


def test_every_decoder_linear_is_replaced_and_nothing_else(make_model: MakeModel) -> None:
    linears = [name for name, module in make_model().named_modules() if isinstance(module, nn.Linear)]
    model = quantize_model(make_model(), Quantization())
    for name in linears:
        assert isinstance(model.get_submodule(name), QuantizedLinear) == name.startswith("decoder."), name
    assert sum(name.startswith("decoder.") for name in linears) == 2 * 7
    assert is_rotated(model)
    down: Any = model.get_submodule("decoder.layers.1.mlp.down_proj")
    assert down.hadamard_block == 128


def test_stages_hold_every_linear_and_all_can_be_quantized(
    make_model: MakeModel, calibration: list[ModelInputs]
) -> None:
    model = make_model()
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    staged = {
        f"{stage}.{name}"
        for stage, module in stages(model)
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear)
    }
    assert staged == names
    assert all(linear.quantized for linear in list_linears(quantize_model(model, WHOLE, calibration)))


def test_overrides_spare_or_widen_what_they_match(make_model: MakeModel) -> None:
    overrides = (
        Override("decoder.layers.0.mlp.*", Scheme(8, 8)),
        Override("decoder.layers.1.self_attn.?_proj"),
    )
    small = quantize_model(make_model(), Quantization(overrides=overrides))
    bits = {linear.name: linear.weight_bits for linear in list_linears(small) if linear.part == "decoder"}
    assert bits["decoder.layers.0.mlp.up_proj"] == 8
    assert bits["decoder.layers.0.self_attn.q_proj"] == 4
    assert bits["decoder.layers.1.self_attn.q_proj"] == 16
    with pytest.raises(InputError, match=r"'decoder\.layers\.7\.\*' matches no linear"):
        quantize_model(make_model(), Quantization(overrides=(Override("decoder.layers.7.*"),)))


def test_the_original_is_left_alone(make_model: MakeModel, calibration: list[ModelInputs]) -> None:
    model, untouched = make_model(), make_model()
    quantize_model(model, WHOLE, calibration)
    for name, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert [n for n, _ in model.named_modules()] == [n for n, _ in untouched.named_modules()]


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_a_quantized_policy_loads_into_a_prepared_one(
    make_model: MakeModel, inputs: ModelInputs, calibration: list[ModelInputs], recipe: Quantization
) -> None:
    loaded = make_model()
    saved = quantize_model(make_model(), recipe, calibration)
    prepare_quantized(loaded, recipe)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(inputs), saved(inputs))


@torch.no_grad()
def test_a_decoder_alone_returns_to_its_original_basis(make_model: MakeModel) -> None:
    decoder = make_model(width=144, mlp=320).decoder  # 144 = 36 * 4: no power of two
    x = decoder.embed_tokens(torch.tensor([[1, 5, 9, 2, 7, 3]]))
    small = quantize_decoder(decoder, dataclasses.replace(W8A8, rotation_seed=5, rounding="gptq"), [x])
    exact = decoder(x)
    y = small.embed_tokens(torch.tensor([[1, 5, 9, 2, 7, 3]]))
    assert not torch.allclose(x, y, atol=0.1)
    assert (small(y) - exact).norm() < 0.03 * exact.norm()


@torch.no_grad()
def test_an_interrupted_run_goes_on_where_it_was(
    make_model: MakeModel, calibration: list[ModelInputs], tmp_path: Path
) -> None:
    whole = quantize_model(make_model(), WHOLE, calibration).state_dict()
    seen: list[int] = []

    def interrupt(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with Partial(tmp_path / "p") as partial:
        partial.begin("key")
        with pytest.raises(KeyboardInterrupt):
            quantize_model(make_model(), WHOLE, calibration, progress=interrupt, partial=partial)
    assert seen == sorted(set(seen))
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "p").glob("*.safetensors")}
    assert len(finished) == 3
    with Partial(tmp_path / "p") as partial:
        partial.begin("key")
        resumed = quantize_model(make_model(), WHOLE, calibration, partial=partial).state_dict()
    for name, written in finished.items():
        assert (tmp_path / "p" / name).stat().st_mtime_ns == written
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


def test_a_group_size_that_does_not_fit_names_the_linear_and_changes_nothing(make_model: MakeModel) -> None:
    model, untouched = make_model(), make_model()
    recipe = Quantization(Scheme(weight_granularity="group", group_size=80))
    for verb in (quantize_model, prepare_quantized):
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
        quantize_model(model, Quantization())


def test_inputs_that_are_not_finite_are_named(make_model: MakeModel, calibration: list[ModelInputs]) -> None:
    calibration[0].pixels[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"vision\.0\.blocks\.0\.attn\.qkv inputs that are not finite"):
        quantize_model(make_model(), WHOLE, calibration)


def test_gptq_without_calibration_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(InputError, match="at least one frame"):
        quantize_model(make_model(), dataclasses.replace(W8A8, rounding="gptq"))


def test_quantizing_or_rotating_twice_is_refused(make_model: MakeModel) -> None:
    model = quantize_model(make_model(), Quantization())
    for verb in (quantize_model, prepare_quantized):
        with pytest.raises(InputError, match="already quantized"):
            verb(model, Quantization())
    rotated = make_model()
    rotate_decoder(rotated)
    with pytest.raises(InputError, match="already rotated"):
        quantize_model(rotated, Quantization())
