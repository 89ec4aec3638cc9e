"""Weights that make up for errors in their inputs: the closed form, and what it does to a decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.models.decoder import Decoder
from sqap.quantization import quantize_decoder
from sqap.quantization import sequential as module
from sqap.quantization.correction import Correction
from sqap.quantization.gptq import PANEL, Hessian
from sqap.recipe import Quantization, Recipe, Scheme
from tests.families import DECODER, family_config, random_model

METHOD = Quantization(Scheme(4, 8), rounding="gptq", clip=True, rotate=False)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(size=st.integers(1, 2 * PANEL + 3), outputs=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_a_factor_solves_for_what_it_was_made_of(size: int, outputs: int, seed: int) -> None:
    x, y = random(seed, 3 * size + 5, size), random(seed + 1, size, outputs)
    hessian = Hessian(torch.randperm(size, generator=torch.Generator().manual_seed(seed)))
    hessian.add(x)
    factor = hessian.factor(0.01)
    h = x.double().T @ x.double() + factor.damping * torch.eye(size)
    expected = torch.linalg.solve(h, y.double()).float()
    torch.testing.assert_close(factor.solve(y), expected, rtol=1e-3, atol=1e-5)


def correct(linear: nn.Linear, x: Tensor, exact: Tensor, share: float, damping: float = 1e-6) -> Tensor:
    hessian, correction = Hessian(torch.arange(linear.in_features)), Correction(linear)
    for part, meant in zip(x.chunk(3), exact.chunk(3), strict=True):
        hessian.add(part[None])
        correction.add(part[None], meant[None])
    return correction.weight(hessian.factor(damping), share)


def test_all_of_the_way_is_least_squares() -> None:
    linear = nn.Linear(24, 7, bias=False).requires_grad_(False)
    exact = random(0, 300, 24)
    x = exact @ (torch.eye(24) + 0.1 * random(1, 24, 24)) + 0.05 * random(2, 300, 24)
    target = exact @ linear.weight.T
    expected = torch.linalg.lstsq(x.double(), target.double()).solution.T.float()
    torch.testing.assert_close(correct(linear, x, exact, 1), expected, rtol=1e-3, atol=1e-4)
    half = (linear.weight + expected) / 2
    torch.testing.assert_close(correct(linear, x, exact, 0.5), half, rtol=1e-3, atol=1e-4)


def test_exact_inputs_need_no_correction() -> None:
    linear = nn.Linear(24, 7).requires_grad_(False)
    x = random(0, 300, 24)
    torch.testing.assert_close(correct(linear, x, x, 1), linear.weight)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_model(family_config("diffusion")).decoder


def calibration(count: int, seed: int) -> list[Tensor]:
    return [random(seed + i, 1, 30, DECODER.width) for i in range(count)]


def error(decoder: Decoder, small: Decoder, hidden: list[Tensor]) -> float:
    return float(sum((decoder(x) - small(x)).square().sum() for x in hidden))


@torch.no_grad()
def test_a_decoder_comes_nearer_to_the_exact_one(decoder: Decoder) -> None:
    seen, unseen = calibration(16, 0), calibration(4, 100)
    plain = quantize_decoder(decoder, METHOD, seen)
    before = decoder.state_dict()
    corrected = quantize_decoder(decoder, replace(METHOD, correction=0.5), seen)
    assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())
    assert error(decoder, corrected, seen) < 0.97 * error(decoder, plain, seen)
    assert error(decoder, corrected, unseen) < error(decoder, plain, unseen)


@torch.no_grad()
def test_the_first_layer_has_nothing_to_make_up_for_in_its_first_linears(decoder: Decoder) -> None:
    seen = calibration(4, 0)
    plain, corrected = (
        quantize_decoder(decoder, replace(METHOD, correction=c), seen).state_dict() for c in (0.0, 1.0)
    )
    same = {name for name in plain if torch.equal(plain[name], corrected[name])}
    linears = {name for name in plain if name.endswith("proj.weight")}
    assert same & linears == {f"layers.0.self_attn.{p}_proj.weight" for p in "qkv"}


@torch.no_grad()
def test_an_interrupted_run_ends_where_another_does(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from sqap.quantization import Partial

    recipe, seen = replace(METHOD, correction=0.5), calibration(4, 0)
    expected = quantize_decoder(decoder, recipe, seen).state_dict()
    partial = Partial(tmp_path_factory.mktemp("partial"))
    partial.begin("key")
    replaced = module.Sequential._replace

    def stop(self: module.Sequential, name: str, *rest: Any) -> None:
        if name == "decoder.layers.2":
            raise KeyboardInterrupt
        replaced(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module.Sequential, "_replace", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_decoder(decoder, recipe, seen, partial=partial)
    assert partial.load("decoder.layers.1") is not None
    found = quantize_decoder(decoder, recipe, seen, partial=partial).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"correction": 1.5}, r"correction must be in \[0, 1\], got 1.5"),
        ({"correction": 0.5, "rounding": "nearest"}, "correction 0.5 needs rounding = 'gptq'"),
    ],
)
def test_what_makes_no_sense_is_refused(settings_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        replace(METHOD, **settings_)


def test_a_recipe_keeps_it() -> None:
    recipe = Recipe(replace(METHOD, correction=0.25))
    assert Recipe.from_json(recipe.to_json()) == recipe
