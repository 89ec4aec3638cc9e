"""What quantizing costs in robot units, and how a budget is spent."""

import dataclasses

import numpy as np
import pytest

from sqap.errors import InputError
from sqap.models.storage import stored_bytes
from sqap.recipe import Override, Pruning, Quantization, Recipe, Scheme
from sqap.sensitivity import Replay, action_error, block_sensitivity, blocks, compare_options
from tests.coarse import COARSE, UNITS, coarse_replay


@pytest.fixture
def replay(policy, observe):
    return coarse_replay(policy, observe, Pruning(keep_ratio=0.5, method="sqap"))


def test_errors_are_in_the_robots_units(policy):
    config = dataclasses.replace(policy.config, units=UNITS)
    original = np.zeros((2, 5, 4))
    original[..., 3] = [1, -1, 1, -1, 1]
    candidate = original + np.array([0.3, 0.4, 0, 0])
    candidate[0, 0, 3] = -0.5
    error = action_error(original, candidate, config)
    assert error.millimetres == pytest.approx(5)
    assert error.drift == pytest.approx(25)
    assert error.gripper_flips == pytest.approx(1 / 10)
    same = action_error(original, original, config)
    assert (same.millimetres, same.gripper_flips, same.relative) == (0, 0, 0)
    unknown = action_error(original, candidate, dataclasses.replace(config, units=None))
    assert unknown.millimetres is None
    assert unknown.relative == error.relative > 0


def test_every_block_is_quantized_alone(replay):
    names = blocks(replay.policy, COARSE)
    assert names == ["vision.0.blocks.0", "projector", *(f"decoder.layers.{i}" for i in range(4)), "head"]
    options = block_sensitivity(replay, COARSE)
    assert [option.name for option in options] == names
    full = stored_bytes(replay.policy.model)
    union = replay.measure("all", COARSE)
    saved = sum(full - option.weight_bytes for option in options)
    assert saved == full - union.weight_bytes
    assert all(option.error.millimetres > 0 for option in options)
    assert options[-1].overlap == 1  # the head is behind the attention


def test_options_lead_from_plain_rounding_to_the_recipe(replay):
    recipe = Recipe.w4a8(keep=1).quantization
    options = compare_options(replay, dataclasses.replace(recipe, kv_bits=8))
    assert [option.name for option in options] == [
        "round to nearest", "+ Hadamard", "+ random signs", "+ clip search", "+ GPTQ", "the recipe"
    ]  # fmt: skip
    assert len({option.error.millimetres for option in options}) == 6
    assert replay.measure("", recipe).error == options[-2].error


@pytest.mark.parametrize(
    "pattern", ["decoder.layers.*.mlp.down_proj", "*.down_proj|head.final_layer", "*_proj"]
)
def test_a_block_alone_keeps_the_overrides_that_name_its_linears(replay, pattern):
    """A wildcard is an override of every block in which it matches."""
    recipe = dataclasses.replace(COARSE, overrides=(Override(pattern, Scheme(8, 8)),))
    full = stored_bytes(replay.policy.model)
    options = block_sensitivity(replay, recipe)
    assert [option.name for option in options] == blocks(replay.policy, recipe)
    saved = sum(full - option.weight_bytes for option in options)
    assert saved == full - replay.measure("all", recipe).weight_bytes


def test_nothing_to_replay_is_refused(policy):
    with pytest.raises(InputError, match="at least one frame"):
        Replay(policy, [])


def test_the_overlap_is_of_the_ranking_that_prunes(policy, observe):
    replay = Replay(policy, [observe(seed) for seed in range(3)], Pruning(keep_ratio=0.5, after_layer=1))
    fine, coarse = (
        replay.measure(name, Quantization(Scheme(bits, bits), rotate=False)).overlap
        for name, bits in (("fine", 8), ("coarse", 4))
    )
    assert 0 < coarse <= fine <= 1
    assert fine > 0.8
