"""A robot's numbers and normalised ones: states in, actions out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sqap.errors import InputError
from sqap.processing import (
    AddState,
    Binarize,
    Clamp,
    MeanStd,
    Pad,
    Range,
    Take,
    normalize_state,
    state_dim,
    unnormalize,
)


def test_the_state_is_scaled_and_clipped_where_the_mask_says() -> None:
    steps = Range((-2.0, 0.0, 0.0), (2.0, 4.0, 1.0), (True, True, False)), Clamp()
    for given, expected in [((1.0, 8.0, 0.3), (0.5, 1.0, 0.3)), ((-9.0, 1.0, -1.4), (-1.0, -0.5, -1.0))]:
        state = normalize_state(np.array(given), steps)
        assert state.dtype == torch.float32
        np.testing.assert_allclose(state, [expected], rtol=1e-6)
    with pytest.raises(InputError, match="a state of 3 numbers, got 2"):
        normalize_state(np.zeros(2), steps)


def test_a_state_that_never_varied_is_divided_by_a_hundred_millionth() -> None:
    """OpenVLA-OFT adds 1e-8 to every range."""
    statistics = Range((0.0, 0.0), (0.0, 0.0), (True, True))
    state = normalize_state(np.array([0.0, 5e-9]), (statistics,))
    np.testing.assert_allclose(state, [[-1.0, 0.0]], atol=1e-6)


def test_the_state_is_lerobots() -> None:
    """By mean and deviation, zeros behind; nothing is clipped."""
    mean, std, state = np.array([1.0, -2.0, 5.0]), np.array([0.5, 4.0, 0.0]), np.array([3.0, -2.5, 5.0])
    found = normalize_state(state, (MeanStd(tuple(mean), tuple(std)), Pad(32)))
    expected = np.concatenate([(state - mean) / (std + 1e-8), np.zeros(29)])
    np.testing.assert_allclose(found, [expected], rtol=1e-6)
    assert found[0, 0] == 4
    np.testing.assert_allclose(
        normalize_state(np.array([3.0]), (MeanStd((1.0,), (0.0,), 0.5),)), [[4.0]], rtol=1e-6
    )


def test_a_range_is_lerobots_without_an_epsilon() -> None:
    """By percentiles or extremes: 2 (x - low) / (high - low) - 1, and back."""
    low, high, x = np.array([0.0, -3.0]), np.array([1e-6, 5.0]), np.array([2e-6, 7.0])
    bounds = Range(tuple(low), tuple(high), (True, True), epsilon=0.0)
    found = normalize_state(x, (bounds,))
    np.testing.assert_allclose(found, [2 * (x - low) / (high - low) - 1], rtol=1e-6)
    np.testing.assert_allclose(unnormalize(found.double().numpy(), (bounds,)), [x], rtol=1e-6)


def test_how_many_numbers_a_state_has() -> None:
    mean = MeanStd((0.0,) * 3, (1.0,) * 3)
    assert state_dim((mean, Pad(32)), 32) == 3
    assert state_dim((Clamp(), Range((0.0,), (1.0,), (True,))), 7) == 1
    assert state_dim((Pad(32),), 32) == 32
    with pytest.raises(InputError, match="33 numbers cannot be padded to 32"):
        normalize_state(np.zeros(33), (Pad(32),))


def test_a_masked_dimension_is_the_action_itself() -> None:
    statistics = Range(low=(2.0, 5.0), high=(4.0, 9.0), mask=(True, False))
    actions = unnormalize(np.array([[0.25, 0.3], [-1.0, -0.7]]), (Clamp(), statistics))
    assert actions.dtype == np.float32
    assert np.array_equal(actions, np.array([[3.25, 0.3], [2.0, -0.7]], dtype=np.float32))


@pytest.mark.parametrize("before", [(Clamp(),), ()])
def test_a_binarized_gripper_is_open_from_one_half_on(before: tuple[Clamp, ...]) -> None:
    given = np.array([[0.5, np.nextafter(0.5, 0)], [-1.0, 0.50001], [1.0, 0.0]])
    copy = given.copy()
    steps = *before, Binarize((0, 1)), Range((0.0,) * 2, (1.0, 4.0), (False, False))
    assert unnormalize(given, steps).tolist() == [[1, 0], [0, 1], [1, 0]]
    assert np.array_equal(given, copy)
    # Before its bounds, as CogACT does: 0 is then the middle between them.
    scaled = *before, Binarize((1,)), Range((0.0,) * 2, (1.0, 4.0), (True, True))
    assert unnormalize(given, scaled).tolist() == [[0.75, 2], [0, 4], [1, 2]]


def test_a_gripper_follows_its_robots_convention() -> None:
    """LIBERO's opens at -1: what is at or above the threshold becomes that, the rest 1."""
    given = np.array([[0.3, 0.7], [0.9, 0.1]])
    assert unnormalize(given, (Binarize((1,), 0.6, low=1.0, high=-1.0),)).tolist() == [
        [pytest.approx(0.3), -1],
        [pytest.approx(0.9), 1],
    ]


def test_actions_are_cut_only_where_the_family_does() -> None:
    bounds = Range((-1.0, -1.0), (3.0, 3.0), (True, True))
    actions = np.array([[2.0, -2.0]])
    assert unnormalize(actions, (Clamp(), bounds)).tolist() == [[3.0, -1.0]]
    assert unnormalize(actions, (bounds,)).tolist() == [[5.0, -3.0]]
    assert actions.tolist() == [[2.0, -2.0]]


def test_padded_actions_are_cut_before_their_statistics() -> None:
    """LeRobot's: 32 dimensions of which the robot has two, by mean and deviation."""
    actions = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32) * 3
    found = unnormalize(actions, (Take(2), MeanStd((1.0, -2.0), (0.5, 4.0))))
    assert found.shape == (5, 2)
    np.testing.assert_allclose(found, actions[:, :2] * [0.5, 4.0] + [1.0, -2.0], rtol=1e-5)


def test_relative_actions_begin_at_the_state() -> None:
    actions, state = np.array([[0.25, 1.0], [0.5, -1.0]], dtype=np.float32), np.array([10.0, 20.0, 30.0])
    steps = MeanStd((0.0, 0.0), (2.0, 2.0)), AddState((0,))
    assert unnormalize(actions, steps, state).tolist() == [[10.5, 2], [11, -2]]
    assert actions[0].tolist() == [0.25, 1]
    with pytest.raises(InputError, match="relative to the robot's state, and the observation has none"):
        unnormalize(actions, steps)
    with pytest.raises(InputError, match=r"dimensions must be below 1, got \[1\]"):
        unnormalize(actions, (AddState((1,)),), state[:1])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Range((0.0,), (1.0, 1.0), (True,)), "must have one length, got 1, 2 and 1"),
        (lambda: Range((0.0,), (1.0,), (True,), -1.0), "epsilon must not be negative, got -1.0"),
        (lambda: MeanStd((0.0,), (1.0, 1.0)), "mean and std must have one length, got 1 and 2"),
        (lambda: MeanStd((0.0,), (1.0,), -1.0), "epsilon must not be negative, got -1.0"),
        (lambda: Take(0), "the width must be at least 1, got 0"),
        (lambda: Binarize((1, 1)), r"must be different ones from 0 on, got \[1, 1\]"),
        (lambda: AddState((-1,)), r"must be different ones from 0 on, got \[-1\]"),
        (lambda: Take(3).after(2), "3 dimensions cannot be taken of 2"),
        (lambda: Range((0.0,), (1.0,), (True,)).after(2), "its statistics are of 1 dimensions, for 2"),
        (lambda: MeanStd((0.0,), (1.0,)).after(2), "its statistics are of 1 dimensions, for 2"),
        (lambda: Binarize((2,)).after(2), r"dimensions must be below 2, got \[2\]"),
    ],
)
def test_steps_that_cannot_be_are_refused(make, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make()
