"""Recipes: presets, the JSON form, and every setting that is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqap.errors import InputError
from sqap.recipe import RECIPE_VERSION, Cut, Override, Pruning, PruningMethod, Quantization, Recipe, Scheme
from sqap.recipe.version1 import ACTIONS


@st.composite
def quantizations(draw: st.DrawFn) -> Quantization:
    weight_bits, activation_bits = draw(st.sampled_from([(4, 4), (4, 8), (8, 8)]))
    granularity = draw(st.sampled_from(["channel", "group", "tensor"]))
    activations = draw(st.sampled_from(["token", "group", "tensor"]))
    return Quantization(
        Scheme(
            weight_bits,
            activation_bits,
            weight_granularity=granularity,
            group_size=draw(st.sampled_from([2, 32, 128])) if granularity == "group" else None,
            activation_granularity=activations,
            activation_group_size=draw(st.sampled_from([2, 32])) if activations == "group" else None,
        ),
        rotate=draw(st.booleans()),
    )


METHODS = get_args(PruningMethod)


@st.composite
def prunings(draw: st.DrawFn) -> Pruning:
    after_layer = draw(st.integers(1, 32))
    method = draw(st.sampled_from(METHODS))
    keep = draw(st.floats(1e-6, 1))
    later = () if method == "uniform" else draw(st.sampled_from([(), (Cut(after_layer + 2, keep / 2),)]))
    first, last = 0, after_layer - 1
    if method == "lookahead":
        first, last = after_layer + 2, 64
    layers = st.lists(st.integers(first, last), min_size=1, max_size=4, unique=True).map(tuple)
    top_share = draw(st.floats(0, 1))
    inner = draw(st.floats(0, 0.5))
    return Pruning(
        keep_ratio=keep,
        after_layer=after_layer,
        method=method,
        score_queries=draw(st.sampled_from(["text", "last", None])),
        score_layers=draw(st.none() | layers),
        top_share=top_share,
        overlap=draw(st.floats(0, 1)),
        ring=(inner, inner + draw(st.floats(0.01, 0.5))),
        ring_share=(1 - top_share) / 2,
        rest=draw(st.sampled_from(["random", "farthest"])),
        later=later,
    )


recipes = st.builds(Recipe, st.none() | quantizations(), st.none() | prunings())


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return bool(text) and "\n" not in text and not text.endswith(".")


@given(recipes)
def test_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(Recipe.w4a4(keep=0.4).to_json()))
    assert Recipe.read(path) == Recipe.w4a4(keep=0.4)
    assert Recipe.read(str(path)) == Recipe.w4a4(keep=0.4)


VERSION_1: dict[str, Any] = {
    "quantization": {
        "weight_bits": 4,
        "activation_bits": 4,
        "activation_granularity": "group",
        "activation_group_size": 32,
        "vision": {"weight_bits": 4, "activation_bits": 8},
        "head": {"weight_bits": 8, "activation_bits": 8},
        "overrides": [
            {"pattern": "decoder.layers.0.*", "scheme": None},
            {"pattern": ACTIONS, "scheme": None},
        ],
        "rounding": "gptq",
    },
    "pruning": {"keep_ratio": 0.4},
    "version": 1,
}


def test_version_1_is_read() -> None:
    """Its inherited grids are the decoder's; sensitive linears had the head's if not overridden."""
    decoder = Scheme(4, 4, activation_granularity="group", activation_group_size=32)
    override = Override("decoder.layers.0.*")
    quantization = Quantization(
        decoder, vision=Scheme(4, 8), head=Scheme(8, 8), overrides=(override,), rounding="gptq"
    )
    assert Recipe.from_json(VERSION_1) == Recipe(quantization, Pruning(keep_ratio=0.4))
    whole = {**VERSION_1, "quantization": {**VERSION_1["quantization"], "overrides": []}}
    found = Recipe.from_json(whole).quantization
    assert found is not None
    assert (found.sensitive, found.overrides) == (Scheme(8, 8), ())
    assert Recipe.from_json({"version": 1}) == Recipe()
    named = {key: value for key, value in VERSION_1.items() if key != "version"}
    assert Recipe.from_json(named) == Recipe.from_json(VERSION_1), "the decoder's grids tell it, too"


def test_sensitive_linears_are_apart_from_their_head() -> None:
    quantization = Quantization(head=Scheme(8, 8), overrides=(Override("head.fc2", Scheme(4, 8)),))
    assert quantization.scheme("head.fc1") == Scheme(8, 8)
    assert quantization.scheme("head.fc3", sensitive=True) is None
    assert quantization.scheme("head.fc2", sensitive=True) == Scheme(4, 8)  # an override comes first
    assert replace(quantization, sensitive=Scheme(8, 8)).scheme("head.fc3", True) == Scheme(8, 8)
    assert quantization.scheme("proprio.0") is None


def test_a_short_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"pruning": {"keep_ratio": 0.5}}')
    assert Recipe.read(path) == Recipe(None, Pruning(keep_ratio=0.5))


def test_the_empty_recipe_does_nothing() -> None:
    assert Recipe() == Recipe(quantization=None, pruning=None, version=RECIPE_VERSION)
    assert Recipe.from_json({}) == Recipe()


@pytest.mark.parametrize(("preset", "bits"), [(Recipe.w4a8, (4, 8)), (Recipe.w4a4, (4, 4))])
def test_presets(preset: Any, bits: tuple[int, int]) -> None:
    recipe = preset(keep=0.25)
    assert (recipe.quantization.decoder.weight_bits, recipe.quantization.decoder.activation_bits) == bits
    assert recipe.quantization.sensitive is None
    assert recipe.quantization.rotate
    assert recipe.pruning.keep_ratio == 0.25
    assert preset(keep=1).pruning is None
    with pytest.raises(InputError, match=r"keep_ratio must be in \(0, 1\]"):
        preset(keep=0)


def test_the_papers_preset_does_not_follow_our_defaults() -> None:
    recipe = Recipe.paper()
    assert recipe.quantization == Quantization(Scheme(4, 4), rotate=True)
    assert recipe.pruning is not None
    assert (recipe.pruning.keep_ratio, recipe.pruning.after_layer, recipe.pruning.method) == (0.6, 2, "sqap")
    assert recipe.pruning.score_layers is None


def test_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Recipe().version = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 3}, "weight_bits must be 4 or 8, got 3"),
        ({"activation_bits": 16}, "activation_bits must be 4 or 8, got 16"),
        ({"weight_bits": 8, "activation_bits": 4}, "W8A4"),
        ({"group_size": 32}, "contradicts weight_granularity='channel'"),
        ({"weight_granularity": "group"}, "group_size=None contradicts"),
        ({"weight_granularity": "tensor", "group_size": 32}, "contradicts weight_granularity='tensor'"),
        ({"weight_granularity": "group", "group_size": 0}, "positive even number, got 0"),
        ({"weight_granularity": "group", "group_size": -32}, "positive even number, got -32"),
        ({"weight_granularity": "group", "group_size": 31}, "positive even number, got 31"),
        ({"activation_group_size": 32}, "contradicts activation_granularity='token'"),
        ({"activation_granularity": "group"}, "activation_group_size=None contradicts"),
    ],
)
def test_grids_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Scheme(**settings)
    assert one_sentence(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"keep_ratio": -0.5}, "got -0.5"),
        ({"keep_ratio": 1.01}, "got 1.01"),
        ({"keep_ratio": float("nan")}, "got nan"),
        ({"after_layer": 0}, "after_layer must be at least 1, got 0"),
        ({"method": "sqap", "score_layers": (2,)}, r"score_layers \[2\] must name layers from 0 to 1"),
        ({"method": "sqap", "score_layers": (-1, 0)}, "must name layers from 0 to 1"),
        ({"score_layers": ()}, r"score_layers \[\] must name layers"),
        ({"score_layers": (2, 1)}, r"score_layers \[2, 1\] must name layers from 2 on"),
        ({"score_layers": (3,), "later": (Cut(4, 0.1),)}, r"score_layers \[3\] must name layers from 4 on"),
        ({"later": (Cut(2, 0.1),)}, "after layer 2 must come later and keep fewer .* after layer 2"),
        ({"later": (Cut(4, 0.6),)}, "a cut to 0.6 .* keep fewer than the one before it, to 0.6"),
        ({"later": (Cut(4, 0.0),)}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"method": "uniform", "later": (Cut(4, 0.1),)}, "'uniform' has one cut"),
        ({"method": "fastv"}, "method must be one of lookahead, sqap, attention"),
        ({"top_share": 1.5}, r"top_share must be in \[0, 1\]"),
        ({"overlap": -0.1}, r"overlap must be in \[0, 1\]"),
        ({"ring_share": float("nan")}, r"ring_share must be in \[0, 1\]"),
        ({"top_share": 0.8, "ring_share": 0.3}, "add up to more than the budget"),
        ({"ring": (0.2, 0.1)}, "inner < outer"),
        ({"ring": (-0.1, 0.1)}, "0 <= inner"),
        ({"ring": (0.1, 0.1)}, "inner < outer"),
        ({"ring": (0.1, float("nan"))}, "inner < outer"),
    ],
)
def test_pruning_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Pruning(**settings)
    assert one_sentence(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "recipe must be an object"),
        ({"prunning": {}}, "recipe has no setting 'prunning'; it has quantization, pruning, version"),
        ({"pruning": {"keep": 0.5}}, "recipe.pruning has no setting 'keep'; it has keep_ratio"),
        (
            {"quantization": {"decoder": {"weight_bits": "4"}}},
            "recipe.quantization.decoder.weight_bits must be",
        ),
        (
            {"version": 2, "quantization": {"weight_bits": 4}},
            "no setting 'weight_bits'; it has decoder, vision",
        ),
        ({"version": 1, "quantization": {"weight_bits": 3}}, "weight_bits must be 4 or 8, got 3"),
        ({"version": 1, "quantization": {"bits": 3}}, "recipe.quantization has no setting 'bits'"),
        ({"quantization": {"rotate": 1}}, "recipe.quantization.rotate must be bool"),
        ({"pruning": {"method": "fastv"}}, "'lookahead', 'sqap', .*, got 'fastv'"),
        ({"pruning": {"ring": [0.1]}}, "recipe.pruning.ring must have 2 entries, got 1"),
        ({"pruning": {"score_layers": [0, "1"]}}, r"recipe.pruning.score_layers\[1\] must be int"),
        ({"pruning": {"later": [{"after_layer": 3}]}}, r"recipe.pruning.later\[0\] lacks 'keep_ratio'"),
        ({"pruning": {"keep_ratio": 2}}, r"keep_ratio must be in \(0, 1\]"),
        ({"version": RECIPE_VERSION + 1}, "reads recipe versions 1 and 2, the recipe is 3"),
    ],
)
def test_json_refuses(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Recipe.from_json(data)
    assert one_sentence(caught.value)


def test_settings_that_are_left_out_are_the_methods() -> None:
    look, mix = Pruning(), Pruning(method="sqap")
    assert (look.method, look.top_share, look.ring_share, look.rest) == ("lookahead", 0.75, 0, "random")
    assert (mix.top_share, mix.ring_share, mix.rest) == (0.5, 0.3, "farthest")
    assert Pruning(top_share=0.5, rest="farthest").top_share == 0.5


def test_each_cut_has_its_budget() -> None:
    pruning = Pruning(0.5, 2, later=(Cut(4, 0.25), Cut(7, 0.1)))
    assert [pruning.budget(256, cut) for cut in range(3)] == [128, 64, 26]
    assert (pruning.budget(256), pruning.last_layer) == (26, 7)
    with pytest.raises(InputError, match=r"keep_ratio 0\.001 keeps none of 256"):
        Pruning(0.5, later=(Cut(4, 0.001),)).budget(256)


@given(st.floats(0.01, 1), st.integers(100, 1024))
def test_budget_is_the_rounded_share(keep: float, tokens: int) -> None:
    budget = Pruning(keep_ratio=keep).budget(tokens)
    assert 1 <= budget <= tokens
    assert abs(budget - keep * tokens) <= 0.5


@pytest.mark.parametrize(("keep", "expected"), [(1, 256), (0.6, 154), (0.4, 102), (0.25, 64), (0.002, 1)])
def test_budget_of_the_reference_grid(keep: float, expected: int) -> None:
    assert Pruning(keep_ratio=keep).budget(256) == expected


@pytest.mark.parametrize("tokens", [16, 256])
def test_a_budget_of_nothing_is_refused(tokens: int) -> None:
    with pytest.raises(InputError, match=f"keeps none of {tokens} visual tokens") as caught:
        Pruning(keep_ratio=0.001).budget(tokens)
    assert one_sentence(caught.value)
