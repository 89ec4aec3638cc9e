"""Fractions of a factorial: regular ones beside the published table, balanced ones by what they promise."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest

from sqap.errors import InputError
from sqap.study.fractions import choose

NAMES = "ABCDEF"


@pytest.mark.parametrize(
    ("factors", "powers", "resolution"),
    # Box, Hunter & Hunter (2005), table 6.22: 2^(3-1) III, 2^(4-1) IV, 2^(5-1) V, 2^(5-2) III, 2^(6-1) VI,
    # 2^(6-2) IV, 2^(6-3) III.
    [(3, 1, 3), (4, 1, 4), (5, 1, 5), (5, 2, 3), (6, 1, 6), (6, 2, 4), (6, 3, 3)],
)
def test_two_level_fractions_have_the_published_resolution(
    factors: int, powers: int, resolution: int
) -> None:
    levels = dict.fromkeys(NAMES[:factors], ("low", "high"))
    chosen = choose(levels, Fraction(1, 2**powers), ("low",) * factors, 0)
    assert (chosen.kind, chosen.resolution) == ("regular fraction", resolution)
    assert len(chosen.runs) == 2 ** (factors - powers) == len(set(chosen.runs))
    assert ("low",) * factors in chosen.runs
    assert len(chosen.generators) == powers
    # In any `resolution` - 1 factors every combination occurs equally often: that is what it means.
    for part in itertools.combinations(range(factors), resolution - 1):
        counts = Counter(tuple(run[i] for i in part) for run in chosen.runs)
        assert len(counts) == 2 ** len(part)
        assert len(set(counts.values())) == 1
    aliased = any("cannot be told from" in sentence for sentence in chosen.aliasing)
    assert aliased == (resolution < 5)


def test_aliases_are_told() -> None:
    chosen = choose(dict.fromkeys("ABC", (0, 1)), Fraction(1, 2), (0, 0, 0), 0)
    assert chosen.generators == ("C = A x B",)
    assert set(chosen.aliasing) == {
        "A cannot be told from B x C",
        "B cannot be told from A x C",
        "C cannot be told from A x B",
    }
    assert set(chosen.runs) == {(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)}


FACTORS = {"bits": (1, 2, 3, 4), "rotation": (0, 1), "keep": (1.0, 0.5, 0.25), "after": (3,)}


@pytest.mark.parametrize("fraction", [Fraction(1, 2), Fraction(5, 12), Fraction(3, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_subsets_are_balanced_and_hold_the_baseline(fraction: Fraction, seed: int) -> None:
    baseline = (1, 0, 1.0, 3)
    chosen = choose(FACTORS, fraction, baseline, seed)
    assert chosen.kind == "balanced subset"
    assert len(chosen.runs) == len(set(chosen.runs)) == fraction * 24
    assert baseline in chosen.runs
    for i, levels in enumerate(FACTORS.values()):
        counts = [sum(run[i] == level for run in chosen.runs) for level in levels]
        assert max(counts) - min(counts) <= 1
    for (i, a), (j, b) in itertools.combinations(enumerate(FACTORS.values()), 2):
        counts = [sum(run[i] == x and run[j] == y for run in chosen.runs) for x in a for y in b]
        assert max(counts) - min(counts) <= 2
    assert choose(FACTORS, fraction, baseline, seed) == chosen


def test_the_share_of_an_interaction_that_is_told_is_the_one_in_the_effect() -> None:
    """Of three cells of a 2 x 2 the interaction is in both effects, and least squares says how much."""
    chosen = choose({"A": (0, 1), "B": (0, 1)}, Fraction(3, 4), (0, 0), 0)
    assert set(chosen.aliasing) == {
        "the effect of A has up to 1.00 of A x B in it",
        "the effect of B has up to 1.00 of A x B in it",
    }


def test_all_is_the_full_factorial() -> None:
    chosen = choose(FACTORS, Fraction(1), (1, 0, 1.0, 3), 0)
    assert (chosen.kind, len(chosen.runs), chosen.aliasing) == ("full factorial", 24, ())


@pytest.mark.parametrize(
    ("fraction", "sentence"),
    [
        (Fraction(0), "must be above 0 and at most 1, got 0"),
        (Fraction(3, 2), "must be above 0 and at most 1, got 3/2"),
        (Fraction(1, 6), "leaves 4, but main effects alone need 7; ask for at least 7/24"),
    ],
)
def test_impossible_fractions_are_refused(fraction: Fraction, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        choose(FACTORS, fraction, (1, 0, 1.0, 3), 0)
