"""What quantizing costs in robot units, and how a budget is spent."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqap.errors import InputError
from sqap.models.storage import stored_bytes
from sqap.processing import ActionUnits
from sqap.recipe import Override, Pruning, Quantization, Recipe, Scheme
from sqap.sensitivity import Replay, _last, action_error, block_sensitivity, blocks, compare_options, fit

UNITS = ActionUnits(translation=(0, 1, 2), millimetres=10.0, gripper=3)
COARSE = Quantization(4, 4, vision=Scheme(4, 8), projector=Scheme(4, 8), head=Scheme(4, 8), rotate=False)


@pytest.fixture
def replay(policy, observe):
    policy.config = dataclasses.replace(policy.config, units=UNITS)
    return Replay(policy, [observe(seed) for seed in range(3)], Pruning(keep_ratio=0.5))


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
    assert names == ["vision.0.blocks.0", "projector", *(f"decoder.layers.{i}" for i in range(3)), "head"]
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


def test_a_budget_of_bytes_is_spent_and_kept(replay):
    least = replay.measure("", COARSE)
    budget = least.weight_bytes + 3000
    fitted = fit(replay, COARSE, target_bytes=budget)
    found = replay.measure("", fitted)
    assert fitted.overrides
    assert least.weight_bytes < found.weight_bytes <= budget
    assert found.error.millimetres < least.error.millimetres
    with pytest.raises(InputError, match=f"no choice fits 1000 bytes: .* {least.weight_bytes}"):
        fit(replay, COARSE, target_bytes=1000)


def test_a_target_error_spares_no_more_blocks_than_it_takes(replay):
    start = replay.measure("", COARSE).error.millimetres
    fitted = fit(replay, COARSE, target_error=0.7 * start)
    assert fitted.overrides
    assert replay.measure("", fitted).error.millimetres <= 0.7 * start
    assert fit(replay, COARSE, target_error=2 * start) == COARSE
    fixed = dataclasses.replace(COARSE, overrides=(Override("head.*", Scheme(4, 4)),))
    with pytest.raises(InputError, match="no choice of blocks brings the error below"):
        fit(replay, fixed, target_error=1e-9)


def test_exactly_one_target_is_wanted(replay):
    for targets in ({}, {"target_bytes": 1, "target_error": 1.0}):
        with pytest.raises(InputError, match="one of the two"):
            fit(replay, COARSE, **targets)


def test_nothing_to_replay_is_refused(policy):
    with pytest.raises(InputError, match="at least one frame"):
        Replay(policy, [])


@given(st.integers(0, 20), st.integers(-1, 20))
@settings(deadline=None)
def test_the_last_that_holds_is_found(size, last):
    found = _last(lambda n: n <= last, size)
    assert found == (None if last < 0 else min(last, size))
