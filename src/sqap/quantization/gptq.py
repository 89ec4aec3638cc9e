"""GPTQ (Frantar et al. 2023): rounding that makes up for each weight's error in the weights still to be rounded.

With calibration inputs X, the error of rounding a row w to q is ||X (w - q)||^2 = (w - q) H (w - q)^T, where
H = X^T X. GPTQ is Babai's nearest plane algorithm on the lattice that H spans (Chen et al. 2025, "The Geometry
of LLM Quantization"): with H = N diag(d) N^T, N unit lower triangular and e = w - q,

    e H e^T = sum_j d_j (e_j + sum_{i > j} e_i N_ij)^2,

so that, from the last column to the first, rounding ``w_j + sum_{i > j} e_i N_ij`` is the best one can do. One
Cholesky factor is all it takes, and no inverse.

H and N are kept as the lower halves of panels of `PANEL` columns, half of a full square: of 11008 channels
that leaves 245 MB.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.quantization.grid import round_to_grid, row_chunks, rows_of, weight_levels

PANEL = 128  # columns
TOKENS = 512  # calibration inputs added at a time
CHUNK = 1 << 22  # weights rounded at a time
SMALLEST_DAMPING = 1e-4

logger = logging.getLogger("sqap")


@dataclass(frozen=True)
class Factor:
    """H + damping I = N diag(d) N^T, in the order in which GPTQ rounds the columns: from the last to the first.

    Args:
        order: the input channel in each place, ``(in,)``.
        panels: N in panels of `PANEL` columns, each from its diagonal block down.
        diagonal: d, ``(in,)``.
        damping: what was added to H's diagonal.
    """

    order: Tensor
    panels: Sequence[Tensor]
    diagonal: Tensor
    damping: float


class Hessian:
    """The lower half of H = X^T X, summed over calibration inputs X.

    Args:
        order: input channels by ascending importance, ``(in,)``: the last one is rounded first, when all
            others can still make up for its error.
        name: of the linear, for messages.
    """

    def __init__(self, order: Tensor, name: str = "the linear") -> None:
        self.order, self.name = order, name
        size = len(order)
        self._panels = [
            torch.zeros(size - start, min(PANEL, size - start), device=order.device)
            for start in range(0, size, PANEL)
        ]

    def add(self, x: Tensor) -> None:
        """Add inputs ``(..., in)`` of the linear.

        Raises:
            InputError: one is not finite.
        """
        for tokens in x.reshape(-1, len(self.order)).split(TOKENS):
            if not tokens.isfinite().all():
                raise InputError(f"calibration gives {self.name} inputs that are not finite")
            ordered = tokens[:, self.order].float()
            for start, panel in zip(range(0, len(self.order), PANEL), self._panels, strict=True):
                panel.addmm_(ordered[:, start:].T, ordered[:, start : start + PANEL])

    def factor(self, damping: float = 0.01) -> Factor:
        """Factorize in place: the Hessian is used up.

        Args:
            damping: added to the diagonal, as a share of its mean. Grows tenfold, with a warning, until the
                matrix can be factorized.

        Raises:
            InputError: the inputs were so large that their squares are not finite.
        """
        panels, self._panels = self._panels, []
        mean = float(torch.cat([panel.diagonal() for panel in panels]).mean(dtype=torch.float64))
        if not math.isfinite(mean):
            raise InputError(f"calibration gives {self.name} inputs too large to square")
        unit = mean or 1.0  # inputs that are all zero leave rounding to nearest
        _damp(panels, damping * unit)
        while (done := _factorize(panels)) < len(panels):
            _restore(panels[:done])
            larger = max(10 * damping, SMALLEST_DAMPING)
            logger.warning(
                "%s: the Hessian of its inputs is not positive definite with damping %g; going on with %g",
                self.name,
                damping,
                larger,
            )
            _damp(panels, (larger - damping) * unit)
            damping = larger
        diagonal = torch.cat([panel.diagonal() for panel in panels])
        for panel in panels:
            panel /= panel.diagonal().clone()
        return Factor(self.order, panels, diagonal.square_(), damping * unit)


def gptq(weight: Tensor, scale: Tensor, bits: int, factor: Factor) -> Tensor:
    """Round ``weight`` ``(out, in)`` to int8 levels of the same shape by GPTQ, or to nearest where that is better.

    By the calibration inputs, no row's error is larger than rounding to nearest makes it, up to the precision
    of 32-bit sums.

    Args:
        weight: finite, any floating type.
        scale: as `grid.max_scale` or `grid.clip_scale` give them; columns may be rounded in any order, since
            scales are fixed beforehand.
        bits: 4 or 8.
        factor: of the Hessian of the linear's inputs.
    """
    levels = round_to_grid(weight, scale, bits)
    for rows in row_chunks(weight, CHUNK):
        ordered = weight[rows][:, factor.order].T.float().contiguous()
        steps = _Steps(rows_of(scale, rows).T, factor.order * scale.shape[1] // len(factor.order))
        nearest = ordered - levels[rows][:, factor.order].T * steps.of(slice(None))
        found, error = _round(ordered, steps, bits, factor)
        better = ~_is_below(error, nearest, factor)
        levels[rows][better] = found.T[better][:, factor.order.argsort()]
    return levels


@dataclass(frozen=True)
class _Steps:
    """The scales of some rows: ``scale`` ``(groups, rows or 1)`` and the group of each place ``(in,)``."""

    scale: Tensor
    group: Tensor

    def of(self, places: slice) -> Tensor:
        """``(places, rows or 1)``."""
        return self.scale[self.group[places]]


def _round(weight: Tensor, steps: _Steps, bits: int, factor: Factor) -> tuple[Tensor, Tensor]:
    """Round rows ``(in, rows)``, transposed and in order, one column after the other.

    Returns int8 levels of the same shape and the error of each row ``(rows,)``. ``weight`` is overwritten.
    """
    levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    error = weight.new_zeros(weight.shape[1])
    for start, panel in _last_to_first(factor.panels):
        end = start + panel.shape[1]
        places = slice(start, end)
        target = torch.addmm(weight[places], panel[end - start :].T, weight[end:])
        q, scale = torch.empty_like(target), steps.of(places).expand_as(target)
        _round_panel(weight[places], target, q, scale, panel, weight_levels(bits))
        levels[places] = q
        error += factor.diagonal[places] @ (target - q * scale).square_()
    return levels, error - factor.damping * weight.square().sum(0)


def _round_panel(
    weight: Tensor, target: Tensor, q: Tensor, scale: Tensor, panel: Tensor, limits: tuple[int, int]
) -> None:
    """Turn ``weight`` ``(columns, rows)`` into what rounding leaves of it, and fill in ``target`` and ``q``.

    ``target`` comes with what later panels add to the weights, and gets what later columns of this one do.
    """
    for j in reversed(range(len(weight))):
        target[j].addmv_(weight[j + 1 :].T, panel[j + 1 : len(weight), j])
        torch.div(target[j], scale[j], out=q[j]).round_().clamp_(*limits)
        weight[j].addcmul_(q[j], scale[j], value=-1)


def _is_below(limit: Tensor, e: Tensor, factor: Factor) -> Tensor:
    """Whether the error of rounding by ``e`` ``(in, rows)`` is below ``limit`` ``(rows,)``, row by row."""
    error = e.square().sum(0).mul_(-factor.damping)
    for start, panel in _last_to_first(factor.panels):
        end = start + panel.shape[1]
        error += factor.diagonal[start:end] @ (panel.T @ e[start:]).square_()
        if (error >= limit).all():  # it only grows: most rows are decided by the first few panels
            break
    return error < limit


def _last_to_first(panels: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Each panel and the place of its first column."""
    return ((index * PANEL, panels[index]) for index in reversed(range(len(panels))))


def _damp(panels: Sequence[Tensor], amount: float) -> None:
    for panel in panels:
        panel.diagonal().add_(amount)


def _factorize(panels: list[Tensor]) -> int:
    """Put the Cholesky factor of H in its place; returns how many panels are done before one cannot be."""
    for index, panel in enumerate(panels):
        rest = panel.clone()
        for before, done in enumerate(panels[:index]):
            rows = done[(index - before) * PANEL :]
            rest.addmm_(rows, rows[: panel.shape[1]].T, alpha=-1)
        top, failed = torch.linalg.cholesky_ex(rest[: panel.shape[1]])
        if failed:
            return index
        panel[: len(top)] = top
        panel[len(top) :] = torch.linalg.solve_triangular(top.T, rest[len(top) :], upper=True, left=False)
    return len(panels)


def _restore(panels: list[Tensor]) -> None:
    """Undo `_factorize`: multiply the factor out again, the last panel first, since the others make it up."""
    for index in reversed(range(len(panels))):
        rows = [done[(index - before) * PANEL :] for before, done in enumerate(panels[: index + 1])]
        width = panels[index].shape[1]
        panels[index] = torch.stack([each @ each[:width].T for each in rows]).sum(0)
