import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sqap.errors import InputError
from sqap.evaluation.ensemble import AdaptiveEnsemble, similarity_weights

HORIZON, WIDTH = 5, 3
numbers = st.floats(-2, 2).map(lambda x: round(x, 4))
predictions = st.integers(1, 7).flatmap(lambda n: arrays(np.float64, (n, WIDTH), elements=numbers))
episodes = st.integers(1, 9).flatmap(lambda n: arrays(np.float64, (n, HORIZON, WIDTH), elements=numbers))
windows = st.integers(1, HORIZON)
alphas = st.sampled_from([0.0, 0.1, 1.0, -2.0])


def run(chunks, window, alpha=0.1):
    ensemble = AdaptiveEnsemble(window, alpha)
    return np.stack([ensemble.add(chunk) for chunk in chunks])


def textbook(chunks, step, window, alpha):
    """The action at ``step``, number by number, from all chunks of the episode."""
    newest = chunks[step][0]
    total, action = 0.0, [0.0] * WIDTH
    for past in range(max(0, step - window + 1), step + 1):
        prediction = chunks[past][step - past]
        dot = sum(x * y for x, y in zip(prediction, newest, strict=True))
        cosine = dot / (math.hypot(*prediction) * math.hypot(*newest) + 1e-7)
        weight = math.exp(alpha * cosine)
        total += weight
        action = [a + weight * x for a, x in zip(action, prediction, strict=True)]
    return [a / total for a in action]


class TestWeights:
    @settings(deadline=None)
    @given(predictions, alphas)
    def test_are_positive_and_sum_to_one(self, predictions, alpha):
        weights = similarity_weights(predictions, alpha)
        assert weights.shape == (len(predictions),)
        assert (weights > 0).all()
        assert weights.sum() == pytest.approx(1, abs=1e-12)

    def test_by_hand(self):
        # At right angles to the newest, opposite to it, and along it: the length does not count.
        seen = np.array([[1.0, 0.0], [0.0, 5.0], [-3.0, 0.0], [2.0, 0.0]])
        raw = np.array([math.exp(0.1), 1, math.exp(-0.1), math.exp(0.1)])
        assert similarity_weights(seen, 0.1) == pytest.approx(raw / raw.sum(), abs=1e-7)

    @settings(deadline=None)
    @given(predictions)
    def test_without_alpha_all_weigh_the_same(self, predictions):
        assert similarity_weights(predictions, 0.0) == pytest.approx(1 / len(predictions))

    @settings(deadline=None)
    @given(predictions, alphas, st.randoms(use_true_random=False))
    def test_go_with_their_predictions_whatever_the_order_of_the_older_ones(self, predictions, alpha, random):
        order = list(range(1, len(predictions)))
        random.shuffle(order)
        order = [0, *order]
        shuffled = similarity_weights(predictions[order], alpha)
        assert shuffled == pytest.approx(similarity_weights(predictions, alpha)[order], abs=1e-12)

    @pytest.mark.parametrize("zero", [[[0, 0], [1, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    def test_a_zero_action_has_no_direction(self, zero):
        assert np.isfinite(similarity_weights(np.array(zero, dtype=float), 0.1)).all()


class TestActions:
    @settings(deadline=None)
    @given(episodes, windows, alphas)
    def test_equal_the_textbooks(self, chunks, window, alpha):
        expected = [textbook(chunks.tolist(), step, window, alpha) for step in range(len(chunks))]
        np.testing.assert_allclose(run(chunks, window, alpha), expected, rtol=0, atol=1e-12)

    @settings(deadline=None)
    @given(episodes)
    def test_a_window_of_one_is_the_newest_chunks_action(self, chunks):
        np.testing.assert_array_equal(run(chunks, 1), chunks[:, 0])

    @settings(deadline=None)
    @given(arrays(np.float64, WIDTH, elements=numbers), windows, alphas)
    def test_chunks_that_agree_are_obeyed(self, action, window, alpha):
        chunks = np.tile(action, (8, HORIZON, 1))
        np.testing.assert_allclose(run(chunks, window, alpha), chunks[:, 0], rtol=0, atol=1e-12)

    @settings(deadline=None)
    @given(episodes, windows, alphas)
    def test_lie_among_the_predictions(self, chunks, window, alpha):
        for step, action in enumerate(run(chunks, window, alpha)):
            seen = [chunks[past][step - past] for past in range(max(0, step - window + 1), step + 1)]
            assert (np.min(seen, axis=0) - 1e-12 <= action).all()
            assert (action <= np.max(seen, axis=0) + 1e-12).all()

    @settings(deadline=None)
    @given(episodes, windows, st.permutations(range(WIDTH)), st.sampled_from([1.0, -1.0]))
    def test_do_not_depend_on_the_order_of_the_axes_or_which_way_they_point(self, chunks, window, axes, sign):
        turned = run(sign * chunks[..., axes], window)
        np.testing.assert_allclose(turned, sign * run(chunks, window)[:, axes], rtol=0, atol=1e-12)

    @settings(deadline=None)
    @given(episodes, windows)
    def test_chunks_out_of_the_window_are_forgotten(self, chunks, window):
        np.testing.assert_array_equal(run(chunks, window)[-1], run(chunks[-window:], window)[-1])

    def test_keep_the_chunks_type(self):
        chunks = np.random.default_rng(0).normal(size=(6, HORIZON, WIDTH)).astype(np.float32)
        actions = run(chunks, 3)
        assert actions.dtype == np.float32
        np.testing.assert_allclose(actions, run(chunks.astype(np.float64), 3), rtol=1e-6, atol=1e-7)

    def test_a_chunk_that_the_caller_overwrites_is_remembered_as_it_was(self):
        chunks = np.random.default_rng(0).normal(size=(6, HORIZON, WIDTH))
        buffer, ensemble = np.empty((HORIZON, WIDTH)), AdaptiveEnsemble(4)
        actions = []
        for chunk in chunks:
            buffer[:] = chunk
            actions.append(ensemble.add(buffer))
        np.testing.assert_array_equal(actions, run(chunks, 4))


class TestRefusals:
    @pytest.mark.parametrize("window", [0, -3])
    def test_a_window_without_a_chunk(self, window):
        with pytest.raises(InputError, match=f"^an ensemble must be of at least 1 chunk, got {window}$"):
            AdaptiveEnsemble(window)

    def test_a_window_that_older_chunks_do_not_reach_over(self):
        AdaptiveEnsemble(HORIZON).add(np.zeros((HORIZON, WIDTH)))
        with pytest.raises(InputError, match=f"of 1 to {HORIZON} chunks.*hold {HORIZON} actions, got 6"):
            AdaptiveEnsemble(HORIZON + 1).add(np.zeros((HORIZON, WIDTH)))
