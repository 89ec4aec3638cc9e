"""How a budget of bytes, or of error, is spent."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqap.budget import _last, _steps, fit
from sqap.errors import InputError
from sqap.recipe import Override, Pruning, Scheme
from sqap.sensitivity import blocks, kept_apart
from tests.coarse import COARSE, coarse_replay


@pytest.fixture
def replay(policy, observe):
    return coarse_replay(policy, observe, Pruning(keep_ratio=0.5))


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


def test_steps_cost_what_raising_their_blocks_costs(replay):
    """An override of the recipe goes before a raised block: what it fixes is neither raised nor paid for."""
    fixed = Override("decoder.layers.*.mlp.*", None), Override("projector.*", Scheme(8, 8))
    recipe = dataclasses.replace(COARSE, overrides=fixed)
    steps = _steps(replay, recipe, None)
    assert {step.block for step in steps} == set(blocks(replay.policy, recipe)) - {"projector"}
    spared = [step.override for step in steps if step.override.scheme is None]
    finest = dataclasses.replace(recipe, overrides=(*kept_apart(replay.policy, recipe), *spared))
    paid = replay.measure("", finest).weight_bytes - replay.measure("", recipe).weight_bytes
    assert sum(step.cost for step in steps) == paid > 0


def test_exactly_one_target_is_wanted(replay):
    for targets in ({}, {"target_bytes": 1, "target_error": 1.0}):
        with pytest.raises(InputError, match="one of the two"):
            fit(replay, COARSE, **targets)


@given(st.integers(0, 20), st.integers(-1, 20))
@settings(deadline=None)
def test_the_last_that_holds_is_found(size, last):
    found = _last(lambda n: n <= last, size)
    assert found == (None if last < 0 else min(last, size))
