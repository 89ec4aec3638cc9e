"""Bootstrap and sign flips over tasks beside SciPy's, Holm's correction beside published cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import bootstrap, permutation_test

from sqap.evaluation.clusters import EXACT, bootstrap_interval, holm, sign_flip

values = st.integers(1, 8).flatmap(
    lambda tasks: arrays(np.float64, (3, tasks), elements=st.floats(-1, 1).map(lambda x: round(x, 3)))
)
p_lists = st.lists(st.floats(0, 1), min_size=1, max_size=12)

# Efron & Tibshirani (1993), table 2.1: survival of the mice that were treated.
MICE = np.array([94.0, 197, 16, 38, 99, 141, 23])


class TestBootstrap:
    def test_resampled_means_spread_as_published(self):
        # Table 2.2 has 23.36, the bootstrap's standard error of the mean for infinitely many resamples. The
        # mean of 7 is nearly normal: the ends of a 68.27 % interval are a standard error from it.
        (low, high), *_ = bootstrap_interval(MICE[None], confidence=0.6827)
        assert (high - low) / 2 == pytest.approx(23.36, abs=0.8)
        assert (high + low) / 2 == pytest.approx(86.86, abs=1.5)

    def test_equals_scipys_percentile_interval(self):
        expected = bootstrap((MICE,), np.mean, method="percentile", n_resamples=10_000, rng=1)
        interval = expected.confidence_interval
        assert bootstrap_interval(MICE[None])[0] == pytest.approx((interval.low, interval.high), abs=2)

    @settings(deadline=None)
    @given(values)
    def test_lies_among_the_values_and_holds_rows_apart(self, rows):
        found = bootstrap_interval(rows, resamples=200)
        assert (rows.min(1) - 1e-9 <= found[:, 0]).all()
        assert (found[:, 0] <= found[:, 1] + 1e-12).all()
        assert (found[:, 1] <= rows.max(1) + 1e-9).all()
        np.testing.assert_allclose(found[1], bootstrap_interval(rows[1:2], resamples=200)[0])


class TestSignFlip:
    @settings(deadline=None, max_examples=30)
    @given(values)
    def test_equals_scipys_exact_permutation_test(self, rows):
        found = sign_flip(rows)
        for row, p in zip(rows, found, strict=True):
            if len(row) > 1:
                expected = permutation_test(
                    (row, np.zeros_like(row)), lambda a, b: np.mean(a - b), permutation_type="samples"
                )
                assert p == pytest.approx(expected.pvalue)

    def test_darwins_maize(self):
        # Fisher (1935), section 21: of the 2^15 patterns of signs of Darwin's 15 differences, 863 in each
        # direction have as large a sum as was observed: p = 2 x 863 / 32768.
        inches = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], dtype=float)
        assert len(inches) > EXACT
        assert sign_flip(inches[None], resamples=40_000)[0] == pytest.approx(2 * 863 / 32768, abs=0.004)

    def test_one_task_says_nothing(self):
        assert sign_flip(np.array([[0.7]]))[0] == 1.0


class TestHolm:
    def test_a_published_case(self):
        # Wright (1992), "Adjusted p-values for simultaneous inference", Biometrics 48, on Holm's procedure:
        # the smallest of four times 4, the next times 3, and so on, never less than the one before.
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_none(self):
        assert holm([]) == []

    @given(p_lists)
    def test_lies_between_no_correction_and_bonferronis_and_keeps_the_order(self, p_values):
        found = holm(p_values)
        for p, adjusted in zip(p_values, found, strict=True):
            assert p <= adjusted <= min(1.0, len(p_values) * p) + 1e-12
        order = np.argsort(p_values, kind="stable")
        assert (np.diff(np.array(found)[order]) >= 0).all()

    @settings(deadline=None)
    @given(p_lists)
    def test_equals_statsmodels(self, p_values):
        multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
        np.testing.assert_allclose(holm(p_values), multitest.multipletests(p_values, method="holm")[1])
