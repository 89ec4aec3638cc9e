"""The design of a study: which policies are run, and what was merged or left out on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from sqap.errors import InputError
from sqap.models import ModelConfig
from sqap.pruning.check import check_pruning
from sqap.recipe import Recipe
from sqap.study.factors import PRUNING, QUANTIZATION, Level, meaningful, name, recipe
from sqap.study.fractions import Run, choose

BITS_16 = "rotation and rounding mean nothing at 16 bits"
UNPRUNED = "criteria and after mean nothing where all tokens are kept"


@dataclass(frozen=True)
class Cell:
    """One distinct policy of a study.

    Args:
        name: unique.
        levels: factor -> level; None where a factor means nothing.
        recipe: by which the policy is made.
    """

    name: str
    levels: dict[str, Level | None]
    recipe: Recipe


@dataclass(frozen=True)
class Merged:
    """Combinations that make a policy which another one makes, too."""

    reason: str
    runs: int


@dataclass(frozen=True)
class Impossible:
    """A combination that makes no policy."""

    levels: dict[str, Level | None]
    reason: str


@dataclass(frozen=True)
class Design:
    """What a study runs; its fields are documented in ``docs/ablate.md``."""

    factors: dict[str, tuple[Level, ...]]
    kind: str
    fraction: str
    runs: int
    chosen: int
    cells: tuple[Cell, ...]
    merged: tuple[Merged, ...]
    impossible: tuple[Impossible, ...]
    generators: tuple[str, ...]
    resolution: int | None
    aliasing: tuple[str, ...]
    baseline: str
    seed: int


def plan(
    factors: Mapping[str, Sequence[Level]],
    model: ModelConfig,
    fraction: Fraction = Fraction(1),
    seed: int = 0,
) -> Design:
    """The design of a study of a policy.

    Args:
        factors: factor -> levels, of all factors, as `sqap.study.factors.parse` gives them.
        model: of the policy, which decides what can be pruned.
        fraction: share of the combinations that is run.
        seed: of a balanced subset.

    Raises:
        InputError: the fraction does not fit, the baseline is impossible, or there is nothing to compare.
    """
    first = tuple(1.0 if key == "keep" and 1.0 in levels else levels[0] for key, levels in factors.items())
    chosen = choose(factors, fraction, first, seed)
    cells: dict[str, Cell] = {}
    merged: Counter[str] = Counter()
    impossible: dict[str, Impossible] = {}
    for run in chosen.runs:
        cell = _cell(factors, run)
        reason = _refusal(cell, model)
        if reason is not None:
            impossible[cell.name] = Impossible(cell.levels, reason)
        elif cell.name in cells:
            merged[_why(cell)] += 1
        else:
            cells[cell.name] = cell
    baseline = _cell(factors, first).name
    if baseline in impossible:
        raise InputError(f"the baseline {baseline} cannot be: {impossible[baseline].reason}")
    if len(cells) < 2:
        raise InputError(
            f"the design has one cell, {baseline}; there is nothing to compare: name more levels"
        )
    return Design(
        factors={key: tuple(levels) for key, levels in factors.items()},
        kind=chosen.kind,
        fraction=f"{fraction.numerator}/{fraction.denominator}",
        runs=prod(map(len, factors.values())),
        chosen=len(chosen.runs),
        cells=tuple(cells.values()),
        merged=tuple(Merged(reason, runs) for reason, runs in merged.items()),
        impossible=tuple(impossible.values()),
        generators=chosen.generators,
        resolution=chosen.resolution,
        aliasing=chosen.aliasing,
        baseline=baseline,
        seed=seed,
    )


def _cell(factors: Mapping[str, Sequence[Level]], run: Run) -> Cell:
    levels = meaningful(dict(zip(factors, run, strict=True)))
    return Cell(name(levels), levels, recipe(levels))


def _refusal(cell: Cell, model: ModelConfig) -> str | None:
    """Why a policy cannot be pruned so; None if it can."""
    if cell.recipe.pruning is None:
        return None
    try:
        check_pruning(cell.recipe.pruning, model)
    except InputError as problem:
        return str(problem)
    return None


def _why(cell: Cell) -> str:
    """Why a combination makes the same policy as another."""
    reasons = [
        reason
        for reason, factors in ((BITS_16, QUANTIZATION), (UNPRUNED, PRUNING))
        if all(cell.levels[factor] is None for factor in factors)
    ]
    return "; ".join(reasons)
