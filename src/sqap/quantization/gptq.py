"""GPTQ (Frantar et al. 2023): what is rounded later makes up for the errors of what is rounded first.

With calibration inputs X, the error of rounding a row w to q is ||X (w - q)||^2 = (w - q) H (w - q)^T, where
H = X^T X. GPTQ is Babai's nearest plane algorithm on the lattice that H spans (Chen et al. 2025, "The
Geometry of LLM Quantization"): with H = N diag(d) N^T, N unit lower triangular and e = w - q,

    e H e^T = sum_j d_j (e_j + sum_{i > j} e_i N_ij)^2,

so that, from the last column to the first, rounding ``w_j + sum_{i > j} e_i N_ij`` to nearest makes each term
as small as it can then be. One Cholesky factor is all it takes, and no inverse.

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
from sqap.kernels.levels import level_range, row_chunks, rows_of
from sqap.quantization.grid import round_to_grid

PANEL = 128  # columns
STRIP = 16  # columns of a panel that make up for each other one by one
TOKENS = 512  # calibration inputs added at a time
CHUNK = 1 << 22  # weights rounded at a time
SMALLEST_DAMPING = 1e-4

logger = logging.getLogger("sqap")


@dataclass(frozen=True)
class Factor:
    """H + damping I = N diag(d) N^T, its columns ordered so that GPTQ rounds the last one first.

    Args:
        order: the input channel in each place, ``(in,)``.
        panels: N in panels of `PANEL` columns, each from its diagonal block down.
        diagonal: d, ``(in,)``.
        damping: what was added to H's diagonal.
        importance: the diagonal of H, by input channel ``(in,)``: what errors in its weights cost.
    """

    order: Tensor
    panels: Sequence[Tensor]
    diagonal: Tensor
    damping: float
    importance: Tensor

    def solve(self, y: Tensor) -> Tensor:
        """``(H + damping I)^-1 y`` for ``y`` ``(in, n)``, by input channel."""
        y = y[self.order]
        places = [slice(i * PANEL, i * PANEL + panel.shape[1]) for i, panel in enumerate(self.panels)]
        for here, panel in zip(places, self.panels, strict=True):
            top, below = panel[: panel.shape[1]], panel[panel.shape[1] :]
            y[here] = torch.linalg.solve_triangular(top, y[here], upper=False, unitriangular=True)
            y[here.stop :].addmm_(below, y[here], alpha=-1)
        y /= self.diagonal[:, None]
        for here, panel in zip(reversed(places), reversed(self.panels), strict=True):
            top, below = panel[: panel.shape[1]], panel[panel.shape[1] :]
            y[here].addmm_(below.T, y[here.stop :], alpha=-1)
            y[here] = torch.linalg.solve_triangular(top.T, y[here], upper=True, unitriangular=True)
        return y[self.order.argsort()]


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
            torch.zeros(size - start, min(PANEL, size - start), dtype=torch.float32, device=order.device)
            for start in range(0, size, PANEL)
        ]

    def add(self, x: Tensor) -> None:
        """Add inputs ``(..., in)`` of the linear.

        Raises:
            InputError: one is not finite.
        """
        size = len(self.order)
        inputs = x.reshape(-1, size)
        for tokens in row_chunks(inputs, TOKENS * size):
            ordered = inputs[tokens, self.order].float()
            if not ordered.isfinite().all():
                raise InputError(f"calibration gives {self.name} inputs that are not finite")
            for start, panel in zip(range(0, size, PANEL), self._panels, strict=True):
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
        importance = torch.cat([panel.diagonal() for panel in panels])[self.order.argsort()]
        mean = float(importance.mean(dtype=torch.float64))
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
        return Factor(self.order, panels, diagonal.square_(), damping * unit, importance)


def gptq(weight: Tensor, scale: Tensor, bits: int, factor: Factor) -> Tensor:
    """Round ``weight`` ``(out, in)`` to int8 levels by GPTQ, or rows to nearest where that is better.

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
        part = _Rows(weight[rows].T.float().contiguous(), rows_of(scale, rows).T, level_range(bits), factor)
        found, error = part.round()
        better = ~part.is_nearest_below(error)
        levels[rows][better] = found.T[better]
    return levels


@dataclass(frozen=True)
class _Rows:
    """Some rows of a weight ``(in, rows)`` and their scales ``(groups, rows or 1)``, transposed: one GEMM per
    panel, and contiguous columns inside it."""

    weight: Tensor
    scale: Tensor
    limits: tuple[int, int]
    factor: Factor

    def round(self) -> tuple[Tensor, Tensor]:
        """The levels ``(in, rows)``, int8, and the error of each row ``(rows,)``."""
        levels = torch.empty_like(self.weight, dtype=torch.int8)
        e = torch.empty_like(self.weight)  # in the factor's order
        error = e.new_zeros(e.shape[1])
        for places, panel in _last_to_first(self.factor.panels):
            e[places], scale = self._columns(places)
            target = torch.addmm(e[places], panel[panel.shape[1] :].T, e[places.stop :])
            q = _round_columns(e[places], target, scale, panel, self.limits)
            levels[self.factor.order[places]] = q.to(torch.int8)
            error += self.factor.diagonal[places] @ q.mul_(scale).sub_(target).square_()
        return levels, self._undamped(error, e)

    def is_nearest_below(self, limit: Tensor) -> Tensor:
        """Where the error of rounding to nearest is below ``limit`` ``(rows,)``."""
        e = torch.empty_like(self.weight)
        for places, _ in _last_to_first(self.factor.panels):
            weight, scale = self._columns(places)
            q = (weight / scale).round_().clamp_(*self.limits)
            torch.addcmul(weight, q, scale, value=-1, out=e[places])
        error = self._undamped(torch.zeros_like(limit), e)
        for places, panel in _last_to_first(self.factor.panels):
            error += self.factor.diagonal[places] @ (panel.T @ e[places.start :]).square_()
            if (error >= limit).all():  # it only grows: most rows are decided by the first few panels
                break
        return error < limit

    def _columns(self, places: slice) -> tuple[Tensor, Tensor]:
        """Weights and scales ``(places, rows)`` in the factor's order."""
        channels = self.factor.order[places]
        weight = self.weight[channels]
        return weight, self.scale[channels * len(self.scale) // len(self.weight)].expand_as(weight)

    def _undamped(self, error: Tensor, e: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(e, dim=0)
        return error - self.factor.damping * norm.square_()


def _round_columns(
    e: Tensor, target: Tensor, scale: Tensor, panel: Tensor, limits: tuple[int, int]
) -> Tensor:
    """Round the columns of a panel, the last one first, and return their levels; all ``(columns, rows)``.

    ``e`` comes with the weights and leaves with their errors; ``target`` comes with what later panels have
    added to the weights, and gets what later columns of this one do.
    """
    q = torch.empty_like(target)
    for stop in range(len(e), 0, -STRIP):
        start = max(0, stop - STRIP)
        target[start:stop].addmm_(panel[stop : len(e), start:stop].T, e[stop:])
        for j in reversed(range(start, stop)):
            target[j].addmv_(e[j + 1 : stop].T, panel[j + 1 : stop, j])
            torch.div(target[j], scale[j], out=q[j]).round_().clamp_(*limits)
            e[j].addcmul_(q[j], scale[j], value=-1)
    return q


def _last_to_first(panels: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Each panel and the places of its columns."""
    for index in reversed(range(len(panels))):
        yield slice(index * PANEL, index * PANEL + panels[index].shape[1]), panels[index]


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


def _restore(panels: Sequence[Tensor]) -> None:
    """Undo `_factorize`: multiply the factor out again, the last panel first, since the others make it up."""
    for index in reversed(range(len(panels))):
        product = torch.zeros_like(panels[index])
        for before, done in enumerate(panels[: index + 1]):
            rows = done[(index - before) * PANEL :]
            product.addmm_(rows, rows[: product.shape[1]].T)
        panels[index].copy_(product)
