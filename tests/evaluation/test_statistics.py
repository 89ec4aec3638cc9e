import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from sqap.errors import InputError
from sqap.evaluation.statistics import (
    detectable,
    flips,
    jerk,
    mcnemar_exact,
    mean,
    paired_difference,
    pairs_needed,
    path_length,
    percentile,
    wilson,
)

counts = st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def paired(both, only_a, only_b, neither):
    table = [(True, True)] * both + [(True, False)] * only_a
    table += [(False, True)] * only_b + [(False, False)] * neither
    return [a for a, _ in table], [b for _, b in table]


class TestWilson:
    @pytest.mark.parametrize(
        ("successes", "n", "low", "high"),
        [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
    )
    def test_published_values(self, successes, n, low, high):
        # 81 of 263: Newcombe (1998), table I, method 3.
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)

    @settings(deadline=None)
    @given(counts, st.sampled_from([0.8, 0.95, 0.99]))
    def test_equals_scipy(self, count, confidence):
        interval = binomtest(*count).proportion_ci(confidence, method="wilson")
        assert wilson(*count, confidence) == pytest.approx((interval.low, interval.high), abs=1e-9)

    @settings(deadline=None)
    @given(counts)
    def test_contains_the_estimate_and_stays_within_bounds(self, count):
        successes, n = count
        low, high = wilson(successes, n)
        assert 0 <= low <= successes / n <= high <= 1

    @pytest.mark.parametrize(("successes", "n"), [(0, 0), (5, 4), (-1, 4)])
    def test_impossible_counts_are_refused(self, successes, n):
        with pytest.raises(InputError, match=f"got {successes} of {n}"):
            wilson(successes, n)

    @pytest.mark.parametrize("confidence", [0, 1, 1.5, 95])
    def test_impossible_confidence_is_refused(self, confidence):
        with pytest.raises(InputError, match=f"between 0 and 1, got {confidence}"):
            wilson(8, 10, confidence=confidence)


class TestMcNemar:
    @settings(deadline=None)
    @given(st.integers(0, 80), st.integers(0, 80))
    def test_equals_scipy(self, wins, losses):
        expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert mcnemar_exact(wins, losses) == pytest.approx(expected, rel=1e-9)

    def test_no_discordant_pairs_prove_nothing(self):
        assert mcnemar_exact(0, 0) == 1.0

    def test_hundreds_of_pairs_do_not_overflow(self):
        assert 0 < mcnemar_exact(1200, 1000) < 1e-4


class TestPairedDifference:
    def test_published_value(self):
        # Bentur et al. (2009) as analysed by Fagerland, Lydersen and Laake (2014): -0.508 to -0.013.
        difference, low, high = paired_difference(*paired(1, 1, 7, 12))
        assert difference == pytest.approx(-6 / 21)
        assert (low, high) == pytest.approx((-0.508, -0.013), abs=5e-4)

    @settings(deadline=None)
    @given(outcomes)
    def test_bounds_and_antisymmetry(self, table):
        a, b = [x for x, _ in table], [y for _, y in table]
        difference, low, high = paired_difference(a, b)
        assert difference == pytest.approx(np.mean(a) - np.mean(b))
        assert -1 <= low < high <= 1
        assert paired_difference(b, a) == pytest.approx((-difference, -high, -low))

    def test_covers_the_truth_as_often_as_it_says(self):
        # 30 pairs, 20 % wins and 10 % losses; exact coverage summed over the multinomial.
        n, win, loss = 30, 0.2, 0.1
        covered = 0.0
        for w in range(n + 1):
            for k in range(n + 1 - w):
                _, low, high = paired_difference(*paired(0, w, k, n - w - k))
                if low <= win - loss <= high:
                    ways = math.comb(n, w) * math.comb(n - w, k)
                    covered += ways * win**w * loss**k * (1 - win - loss) ** (n - w - k)
        assert 0.93 < covered < 0.98

    @pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False])])
    def test_unpaired_lists_are_refused(self, a, b):
        with pytest.raises(InputError, match=f"got {len(a)} and {len(b)}"):
            paired_difference(a, b)


class TestPercentileAndMean:
    def test_interpolates(self):
        assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
        assert mean([1, 2, 6]) == 3.0

    def test_nothing_has_neither(self):
        assert percentile([], 50) is None
        assert mean([]) is None


class TestJerk:
    def test_cubic_motion_has_its_constant_jerk(self):
        # x = c t^3 along a unit vector has jerk 6 c everywhere; differences of a cubic are exact.
        hz, c, metres = 40.0, 0.7, 0.02
        t = np.arange(20) / hz
        position = c * t[:, None] ** 3 * np.array([2 / 3, -1 / 3, 2 / 3])
        actions = np.diff(position, axis=0) / metres
        assert jerk(actions, metres, hz) == pytest.approx(6 * c)

    def test_constant_acceleration_has_none(self):
        assert jerk(np.outer(np.arange(10.0), np.ones(4))) == pytest.approx(0)

    def test_fingers_do_not_count(self):
        actions = np.zeros((10, 4))
        actions[::2, 3] = 1
        assert jerk(actions) == 0

    def test_alternating_is_four_units_per_step_cubed(self):
        assert jerk(np.array([[1.0, 0, 0], [-1, 0, 0]] * 3)) == pytest.approx(4)

    def test_three_actions_have_one(self):
        # The displacement changes by (1, 2, 2), then by (-1, 3, -2): the difference is (-2, 1, -4).
        actions = np.array([[0.0, 0, 0, 5], [1, 2, 2, 9], [0, 5, 0, 1]])
        assert jerk(actions) == pytest.approx(21**0.5)

    def test_single_precision_is_summed_in_double(self):
        actions = np.array([[0.1, 0, 0], [0.7, 0, 0], [-0.3, 0, 0]], dtype=np.float32)
        a, b, c = (float(x) for x in actions[:, 0])
        assert jerk(actions) == pytest.approx(abs(c - 2 * b + a), rel=1e-14)

    def test_two_actions_have_none(self):
        assert jerk(np.array([[1.0, 0, 0], [-1, 0, 0]])) == 0.0


class TestMotion:
    def test_the_path_is_as_long_as_its_steps(self):
        actions = np.array([[3.0, 4, 0, 9], [0, 0, -2, 9], [0, 0, 0, 9]])
        assert path_length(actions, metres=0.5) == pytest.approx(3.5)

    def test_a_gripper_that_is_told_nothing_does_not_change_its_mind(self):
        assert flips(np.array([1.0, 0.5, 0, 0.1, -1, 0, -2, 3])) == 2
        assert flips(np.array([])) == flips(np.zeros(3)) == 0


class TestPower:
    def test_a_published_case(self):
        # Connor (1987), page 209: 45 % and 5 % of discordant pairs take 23 pairs, at 5 % and a power of 80 %.
        assert pairs_needed(0.4, 0.5) == 23

    @pytest.mark.parametrize(("change", "discordance", "power"), [(0.05, 0.2, 0.8), (0.06, 0.3, 0.9)])
    def test_so_many_pairs_have_the_power(self, change, discordance, power):
        # The formula is McNemar's chi-square's, without correction for continuity.
        pairs = pairs_needed(change, discordance, power=power)
        chances = [(discordance + change) / 2, (discordance - change) / 2, 1 - discordance]
        wins, losses, _ = np.random.default_rng(0).multinomial(pairs, chances, size=20_000).T
        rejected = (wins - losses) ** 2 > 1.96**2 * (wins + losses)
        assert rejected.mean() == pytest.approx(power, abs=0.02)

    @settings(deadline=None)
    @given(st.integers(20, 2000), st.floats(0.05, 1))
    def test_what_is_detectable_needs_no_more_pairs_than_there_are(self, pairs, discordance):
        change = detectable(pairs, discordance)
        if change is None:
            assert pairs_needed(discordance, discordance) > pairs
        else:
            assert pairs_needed(change, discordance) <= pairs
            assert change < 1e-5 or pairs_needed(0.99 * change, discordance) >= pairs

    def test_pairs_that_never_differ_show_nothing(self):
        assert detectable(100, 0.0) is None

    @pytest.mark.parametrize(("change", "discordance"), [(0.0, 0.2), (0.3, 0.2), (0.1, 1.2)])
    def test_impossible_shares_are_refused(self, change, discordance):
        with pytest.raises(InputError, match=f"got {discordance}"):
            pairs_needed(change, discordance)
