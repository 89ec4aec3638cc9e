"""The three criteria of SQAP-VLA (arXiv 2509.09090), random selection, and a uniform grid.

Visual tokens lie on a square grid of ``N = grid * grid`` patches, row-major from the top left. Image
coordinates are shares of the image's sides: (0, 0) is its top left corner, (1, 1) the bottom right.
Ties go to the lower index, or are broken at random where a generator is given: the same input and the same
seed always keep the same tokens.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

GOLDEN_RATIO = (5**0.5 - 1) / 2


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices ``(k,)`` of the largest ``scores`` ``(N,)``, best first."""
    return ranked(scores)[:k]


def first(order: Tensor, free: Tensor, count: int | Tensor) -> Tensor:
    """Mask ``(N,)`` of the first ``count`` tokens in ``order`` ``(N,)`` that ``free`` ``(N,)`` marks.

    Where fewer are marked, it is all of them. No shape depends on a value, so it does not synchronize.
    """
    marked = free.gather(0, order)
    return torch.zeros_like(free).scatter(0, order, marked & (marked.cumsum(0) <= count))


def ranked(scores: Tensor) -> Tensor:
    """Indices ``(N,)`` of ``scores`` ``(N,)``, the largest first; ties go to the lower index."""
    # torch.topk leaves ties to the implementation; a stable sort does not.
    return scores.sort(descending=True, stable=True).indices


def places(mask: Tensor, count: int) -> Tensor:
    """Indices ``(count,)``, ascending, of a mask with ``count`` marks: nonzero() without synchronizing."""
    return ranked(mask.byte())[:count]


def distances(grid: int, centre: tuple[float, float]) -> Tensor:
    """Distance ``(N,)`` from every patch centre to ``centre`` (u, v), which may lie outside the image."""
    offsets = _patch_centres(grid) - centre
    return torch.from_numpy(np.hypot(offsets[:, 0], offsets[:, 1]))


def ring(grid: int, centre: tuple[float, float], inner: float, outer: float) -> Tensor:
    """Mask ``(N,)`` of the patches whose centres are between ``inner`` and ``outer`` from ``centre``.

    Both radii count as inside. They are shares of the image's side.
    """
    distance = distances(grid, centre)
    return (inner <= distance) & (distance <= outer)


def farthest_points(
    grid: int,
    kept: Tensor,
    count: int,
    generator: torch.Generator | None = None,
    left: Tensor | None = None,
    rank: Tensor | None = None,
) -> Tensor:
    """Farthest-point sampling (Gonzalez 1985): each next patch is the one farthest from all before it.

    A grid has many ties, and with the same sample at every step a policy would never see the other patches.
    With a generator, ties are broken at random, and with nothing kept the first pick is random, too.

    It is computed on the CPU, whatever the device of the masks; `farthest_mask` does not synchronize.

    Args:
        kept: mask ``(N,)`` of the patches to start from; with none and without a generator, the first pick
            is the patch nearest the image's centre.
        count: patches to add, at most those not kept.
        generator: breaks ties; without it they go to the lower index.
        left: mask ``(N,)`` of the patches to choose from; all if not given.
        rank: ``(N,)`` in place of what ``generator`` would draw: of two patches equally far away, the one
            with the higher rank is picked.

    Returns:
        ``(count,)`` indices in the order they were picked; none of them was kept before.
    """
    between = _squared_distances(grid)
    tokens = len(between)
    seeds = kept.cpu().nonzero().flatten().tolist()
    if generator is None and rank is None:
        ranks, first = np.arange(tokens)[::-1], (grid - 1) // 2 * (grid + 1)
    else:
        ranks = (permutation(tokens, generator) if rank is None else rank).numpy()
        first = int(ranks.argmax())
    gone = np.zeros(tokens, dtype=bool) if left is None else ~left.cpu().numpy()
    if gone[first]:
        first = int(np.where(gone, -1, ranks).argmax())
    picked = [] if seeds else [first]
    nearest = between[seeds + picked].min(axis=0)
    nearest[gone] = -1
    while len(picked) < count:
        picked.append(int((nearest * tokens + ranks).argmax()))
        np.minimum(nearest, between[picked[-1]], out=nearest)
    return torch.tensor(picked[:count], dtype=torch.int64, device="cpu")


def farthest_mask(
    grid: int, kept: Tensor, count: Tensor, most: int, rank: Tensor, left: Tensor | None = None
) -> Tensor:
    """The patches that `farthest_points` picks, by tensor operations that do not synchronize.

    Args:
        kept: mask ``(N,)`` of the patches to start from.
        count: patches to add, a tensor of one value.
        most: the largest that ``count`` may be: so many picks are made, four small operations each.
        rank: ``(N,)`` breaks ties.
        left: mask ``(N,)`` of the patches to choose from; all if not given.

    Returns:
        Mask ``(N,)``.
    """
    between, tokens = _distances_on(grid, kept.device), grid * grid
    nearest = torch.where(kept[:, None], between, 2 * tokens).amin(0)  # farther than any two patches are
    if left is not None:
        nearest = nearest.masked_fill(~left, -1)
    picks = []
    for _ in range(most):
        picks.append(torch.add(rank, nearest, alpha=tokens).argmax(0, keepdim=True))
        nearest = torch.minimum(nearest, between.index_select(0, picks[-1])[0])
    if not picks:
        return torch.zeros_like(kept)
    turn, place = (torch.arange(n, dtype=torch.int64, device=kept.device) for n in (most, tokens))
    return ((torch.cat(picks)[:, None] == place) & (turn < count)[:, None]).any(0)


def permutation(tokens: int, generator: torch.Generator | None = None) -> Tensor:
    """A uniformly random permutation ``(tokens,)``, drawn on the CPU for every device."""
    return torch.randperm(tokens, generator=generator, dtype=torch.int64, device="cpu")


def uniform_grid(grid: int, count: int) -> Tensor:
    """Exactly ``count`` patches ``(count,)``, ascending, spread evenly in both directions.

    Rows share the count as evenly as whole numbers allow. Inside a row the patches are equally spaced,
    and each row is shifted against the one before by the golden ratio of that space, so that no columns
    line up.
    """
    before = (np.arange(grid + 1) * count + grid // 2) // grid
    in_row = np.diff(before)
    indices = []
    for turn, row in enumerate(np.flatnonzero(in_row)):
        shift = turn * GOLDEN_RATIO % 1
        columns = (np.arange(in_row[row]) + shift) * grid / in_row[row]
        indices.append(row * grid + columns.astype(np.int64))
    return torch.from_numpy(np.concatenate(indices))


@lru_cache
def _patch_centres(grid: int) -> np.ndarray:
    """``(N, 2)`` image coordinates (u, v)."""
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    centres: np.ndarray = (np.stack([columns, rows], axis=1) + 0.5) / grid
    return centres


@lru_cache
def _squared_distances(grid: int) -> np.ndarray:
    """``(N, N)`` squared distances in patches; integers, so that ties are exact."""
    rows, columns = np.divmod(np.arange(grid * grid, dtype=np.int32), np.int32(grid))
    squared: np.ndarray = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    return squared


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a tensor made inside inference mode could never be used outside it
def _distances_on(grid: int, device: torch.device) -> Tensor:
    """`_squared_distances` as int64 ``(N, N)`` on a device."""
    return torch.from_numpy(_squared_distances(grid)).long().to(device)
