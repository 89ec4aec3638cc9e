"""What factors do: contrasts, each a weighted sum of cells' success, with intervals over tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sqap.evaluation.clusters import bootstrap_interval, holm, sign_flip
from sqap.study.design import Cell
from sqap.study.factors import PRUNING, QUANTIZATION, Level

MATCHED, MODEL = "matched pairs", "main effects"
EFFECT, INTERACTION = "effect", "interaction"
QUANTIZING = ("bits", *QUANTIZATION)
Weights = dict[str, float]


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of cells; its fields are documented in ``docs/ablate.md``."""

    name: str
    kind: str
    factor: str
    level: Level
    base: Level
    criterion: str | None
    estimator: str
    weights: Weights


def estimate(weights: Sequence[Weights], success: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """``difference``, ``ci95``, ``p`` and ``p_holm`` of contrasts that belong together.

    Args:
        weights: cell -> weight, of each.
        success: cell -> ``(tasks,)`` shares.
    """
    if not weights:
        return []
    values = np.stack([sum(w * success[cell] for cell, w in each.items()) for each in weights])
    intervals, p_values = bootstrap_interval(values), sign_flip(values)
    corrected = holm(p_values.tolist())
    return [
        {"difference": float(row.mean()), "ci95": list(map(float, ci)), "p": float(p), "p_holm": p_holm}
        for row, ci, p, p_holm in zip(values, intervals, p_values, corrected, strict=True)
    ]


def contrasts(
    cells: Sequence[Cell], factors: Mapping[str, Sequence[Level]], *, fraction: bool
) -> tuple[list[Contrast], list[str]]:
    """All contrasts that ``cells`` can tell, and sentences on those that they cannot.

    Effects of a full factorial are means over pairs of cells that differ in nothing else, those of a fraction
    a least-squares model's. Interactions always are of matched pairs.
    """
    found: list[Contrast] = []
    lost: list[str] = []
    model = _main_effects(cells, factors) if fraction else {}
    for factor, levels in factors.items():
        for level in levels[1:]:
            name = f"{factor}: {level} minus {levels[0]}"
            if fraction:
                weights, how = model.get((factor, level)), MODEL
            else:
                weights, how = _mean_of_pairs(cells, factor, level, levels[0]), MATCHED
            if weights is None:
                lost.append(f"{name} cannot be estimated from the cells that have run")
            else:
                found.append(Contrast(name, EFFECT, factor, level, levels[0], None, how, weights))
    found += _interactions(cells, factors)
    return found, lost


def cell_interactions(cells: Sequence[Cell], baseline: Cell) -> dict[str, Weights]:
    """Of each quantized and pruned cell: what quantizing costs it, minus what it costs without pruning."""
    by_parts = {(_part(cell, QUANTIZING), _part(cell, ("keep", *PRUNING))): cell.name for cell in cells}
    plain = _part(baseline, QUANTIZING), _part(baseline, ("keep", *PRUNING))
    found = {}
    for (quantized, pruned), name in by_parts.items():
        corners = (plain[0], pruned), (quantized, plain[1]), plain
        if quantized != plain[0] and pruned != plain[1] and all(corner in by_parts for corner in corners):
            a, b, c = (by_parts[corner] for corner in corners)
            found[name] = {name: 1.0, a: -1.0, b: -1.0, c: 1.0}
    return found


def _part(cell: Cell, factors: Sequence[str]) -> tuple[Level | None, ...]:
    return tuple(cell.levels[factor] for factor in factors)


def _interactions(cells: Sequence[Cell], factors: Mapping[str, Sequence[Level]]) -> Iterator[Contrast]:
    by_criterion = {
        criterion: [c for c in cells if c.levels["criteria"] == criterion]
        for criterion in (None, *factors["criteria"])
    }
    for factor in QUANTIZING:
        base, *others = factors[factor]
        for level in others:
            pairs = {
                criterion: _mean_of_pairs(among, factor, level, base)
                for criterion, among in by_criterion.items()
            }
            unpruned = pairs.pop(None)
            for criterion, pruned in pairs.items():
                if unpruned is None or pruned is None:
                    continue
                name = f"{factor}: {level} minus {base}, under {criterion} minus unpruned"
                weights = _sum(pruned, unpruned, -1.0)
                yield Contrast(name, INTERACTION, factor, level, base, str(criterion), MATCHED, weights)


def _mean_of_pairs(cells: Sequence[Cell], factor: str, level: Level, base: Level) -> Weights | None:
    """Weights of the mean difference of cells that differ in ``factor`` alone; None if there are none.

    A factor that means nothing in one of two cells does not tell them apart: the policy in 16 bits is matched
    with each that is quantized to some bits, rotated or not.
    """
    ours = [cell for cell in cells if cell.levels[factor] == level]
    theirs = [cell for cell in cells if cell.levels[factor] == base]
    pairs = [(a, b) for a in ours for b in theirs if _alike(a, b, factor)]
    weights: Weights = {}
    for a, b in pairs:
        weights = _sum(weights, {a.name: 1 / len(pairs), b.name: -1 / len(pairs)})
    return weights or None


def _alike(a: Cell, b: Cell, factor: str) -> bool:
    others = [(x, b.levels[name]) for name, x in a.levels.items() if name != factor]
    return all(x == y or x is None or y is None for x, y in others)


def _sum(a: Weights, b: Weights, times: float = 1.0) -> Weights:
    return {cell: a.get(cell, 0.0) + times * b.get(cell, 0.0) for cell in (*a, *(c for c in b if c not in a))}


def _main_effects(
    cells: Sequence[Cell], factors: Mapping[str, Sequence[Level]]
) -> dict[tuple[str, Level], Weights]:
    """Weights of each level's coefficient in a least-squares model; of those alone that can be estimated.

    A factor that means nothing in a cell is at its first level there.
    """
    terms = [(factor, level) for factor, levels in factors.items() for level in levels[1:]]
    coded = [[float(cell.levels[factor] == level) for factor, level in terms] for cell in cells]
    design = np.column_stack([np.ones(len(cells)), np.array(coded).reshape(len(cells), -1)])
    solve = np.linalg.pinv(design)
    shares = solve @ design  # the identity, in the rows of what can be estimated
    found = {}
    for i, term in enumerate(terms, 1):
        if np.allclose(shares[i], np.eye(len(shares))[i], atol=1e-9):
            found[term] = {cell.name: float(w) for cell, w in zip(cells, solve[i], strict=True)}
    return found
