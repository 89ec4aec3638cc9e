"""Which combinations of levels a fraction of a factorial runs, and what it then cannot tell apart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

import numpy as np

from sqap.errors import InputError
from sqap.study.factors import Level

Run = tuple[Level, ...]  # a level of each factor
Factors = Mapping[str, Sequence[Level]]

STARTS = 8  # random subsets that exchanges begin from
NOTABLE = 0.05  # share of an interaction in a main effect, from which on it is told


@dataclass(frozen=True)
class Chosen:
    """Some of the combinations.

    Args:
        kind: what the fraction is called.
        runs: combinations, in the order of the full factorial.
        generators: of a regular fraction.
        resolution: of a regular fraction.
        aliasing: sentences on what cannot be told apart.
    """

    kind: str
    runs: tuple[Run, ...]
    generators: tuple[str, ...] = ()
    resolution: int | None = None
    aliasing: tuple[str, ...] = ()


def choose(factors: Factors, fraction: Fraction, baseline: Run, seed: int) -> Chosen:
    """All combinations, or a fraction of them that has the baseline's among it.

    Raises:
        InputError: the fraction is no share, or leaves fewer combinations than main effects need.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"--fraction must be above 0 and at most 1, got {fraction}")
    runs = tuple(itertools.product(*factors.values()))
    if fraction == 1:
        return Chosen("full factorial", runs)
    varied = {name: levels for name, levels in factors.items() if len(levels) > 1}
    needed = 1 + sum(len(levels) - 1 for levels in varied.values())
    count = ceil(fraction * len(runs))
    if count < needed:
        raise InputError(
            f"--fraction {fraction} of {len(runs)} combinations leaves {count}, but main effects alone need "
            f"{needed}; ask for at least {Fraction(needed, len(runs))}, or name fewer levels"
        )
    powers = fraction.denominator.bit_length() - 1
    two_levels = all(len(levels) == 2 for levels in varied.values())
    if two_levels and fraction == Fraction(1, 2**powers) and len(varied) - powers >= 2:
        return _regular(factors, runs, baseline, powers)
    return _balanced(factors, runs, baseline, count, seed)


def _regular(factors: Factors, runs: Sequence[Run], baseline: Run, powers: int) -> Chosen:
    """The last factors are set by products of others: the baseline's levels are +1, the others -1."""
    names = [name for name, levels in factors.items() if len(levels) > 1]
    free, made = names[:-powers], names[-powers:]
    products = [
        frozenset(part) for size in range(2, len(free) + 1) for part in itertools.combinations(free, size)
    ]
    best: tuple[tuple[int, ...], list[frozenset[str]]] | None = None
    for sources in itertools.permutations(products, powers):
        words = _words([source | {name} for source, name in zip(sources, made, strict=True)])
        lengths = tuple(sorted(map(len, words)))
        if best is None or lengths > best[0]:
            best = lengths, words
            chosen = dict(zip(made, sources, strict=True))
    assert best is not None, "there are products of two factors"
    positions = {name: i for i, name in enumerate(factors)}

    def sign(run: Run, name: str) -> int:
        return 1 if run[positions[name]] == baseline[positions[name]] else -1

    kept = tuple(
        run
        for run in runs
        if all(sign(run, name) == prod(sign(run, s) for s in source) for name, source in chosen.items())
    )
    generators = tuple(f"{name} = {_product(source, names)}" for name, source in chosen.items())
    return Chosen("regular fraction", kept, generators, best[0][0], _aliases(best[1], names))


def _words(generators: Sequence[frozenset[str]]) -> list[frozenset[str]]:
    """The defining relation: all products of the generators, in which what occurs twice cancels."""
    words = []
    for size in range(1, len(generators) + 1):
        for part in itertools.combinations(generators, size):
            word: frozenset[str] = frozenset()
            for generator in part:
                word ^= generator
            words.append(word)
    return words


def _aliases(words: Sequence[frozenset[str]], names: Sequence[str]) -> tuple[str, ...]:
    """Main effects and interactions of two factors that have the same contrast."""
    effects = [frozenset(part) for size in (1, 2) for part in itertools.combinations(names, size)]
    told = []
    for i, effect in enumerate(effects):
        others = [other for other in effects[i + 1 :] if effect ^ other in words]
        if others:
            told.append(
                f"{_product(effect, names)} cannot be told from "
                f"{' and '.join(_product(other, names) for other in others)}"
            )
    return tuple(told)


def _product(effect: frozenset[str], names: Sequence[str]) -> str:
    return " x ".join(name for name in names if name in effect)


def _balanced(factors: Factors, runs: Sequence[Run], baseline: Run, count: int, seed: int) -> Chosen:
    """Levels, and pairs of levels, as equally often as exchanges of single runs make them."""
    columns = _indicators(factors, runs)
    target = columns.mean(0) * count
    first = runs.index(baseline)
    random = np.random.default_rng(seed)
    best: tuple[float, np.ndarray] | None = None
    for _ in range(STARTS):
        others = np.delete(np.arange(len(runs)), first)
        picked = np.concatenate([[first], random.choice(others, count - 1, replace=False)])
        found = _exchange(columns, target, picked)
        if best is None or found[0] < best[0] - 1e-9:
            best = found
    assert best is not None
    kept = tuple(runs[i] for i in sorted(best[1]))
    return Chosen("balanced subset", kept, aliasing=_biases(factors, kept))


def _exchange(columns: np.ndarray, target: np.ndarray, picked: np.ndarray) -> tuple[float, np.ndarray]:
    """Exchange runs but the first as long as that brings the counts closer to ``target``, in squares."""
    picked = picked.copy()
    apart = columns[picked].sum(0) - target
    sizes = (columns**2).sum(1)
    improved = True
    while improved:
        improved = False
        for i in range(1, len(picked)):
            without = apart - columns[picked[i]]
            costs = without @ without + 2 * columns @ without + sizes
            free = np.ones(len(columns), dtype=bool)
            free[picked] = False
            costs[~free] = np.inf
            other = int(costs.argmin())
            if costs[other] < apart @ apart - 1e-9:
                picked[i], apart, improved = other, without + columns[other], True
    return float(apart @ apart), picked


def _indicators(factors: Factors, runs: Sequence[Run]) -> np.ndarray:
    """``(runs, columns)``: one for each level of each factor that varies, and for each pair of levels."""
    levels = [
        np.array([[run[i] == level for level in options] for run in runs], dtype=float)
        for i, options in enumerate(factors.values())
        if len(options) > 1
    ]
    pairs = [
        (a[:, :, None] * b[:, None, :]).reshape(len(runs), -1) for a, b in itertools.combinations(levels, 2)
    ]
    return np.concatenate([*levels, *pairs], axis=1)


def _biases(factors: Factors, runs: Sequence[Run]) -> tuple[str, ...]:
    """How much of interactions of two factors is in the main effects of a model without interactions."""
    coded = {
        name: _effects(factors[name], [run[i] for run in runs])
        for i, name in enumerate(factors)
        if len(factors[name]) > 1
    }
    ones = np.ones((len(runs), 1))
    solve = np.linalg.pinv(np.concatenate([ones, *coded.values()], axis=1))
    spans, at = {}, 1
    for name, columns in coded.items():
        spans[name] = slice(at, at + columns.shape[1])
        at += columns.shape[1]
    found = []
    for a, b in itertools.combinations(coded, 2):
        product = (coded[a][:, :, None] * coded[b][:, None, :]).reshape(len(runs), -1)
        share = np.abs(solve @ product)
        found += [(float(share[span].max()), name, f"{a} x {b}") for name, span in spans.items()]
    return tuple(
        f"the effect of {name} has up to {share:.2f} of {interaction} in it"
        for share, name, interaction in sorted(found, reverse=True)
        if share >= NOTABLE
    )


def _effects(options: Sequence[Level], column: Sequence[Level]) -> np.ndarray:
    """Effect coding: the last level is -1 in all columns of a factor."""
    rows = [[float(level == o) - float(level == options[-1]) for o in options[:-1]] for level in column]
    return np.array(rows)
