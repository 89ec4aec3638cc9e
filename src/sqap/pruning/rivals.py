"""Published criteria that compare visual tokens with each other instead of looking at attention.

DivPrune (Alvar et al. 2025, arXiv 2503.02175), DART (Wen et al. 2025, arXiv 2502.11494) and CDPruner (Zhang
et al. 2025, arXiv 2506.10967), written from the papers and cutting behind the same layer as all other methods
here. All of them are deterministic; ties go to the lower index. They choose tokens one by one on the CPU, so
that a step on a GPU synchronizes at each cut.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sqap.errors import InputError
from sqap.pruning.criteria import top_k

BY_FEATURES = ("divprune", "dart", "cdpruner")
PIVOTS = 8


def choose(
    method: str, count: int, left: Tensor, features: Tensor | None, relevance: Tensor | None = None
) -> Tensor:
    """``count`` indices by one of the methods `BY_FEATURES`.

    Args:
        method: its name.
        count: at most as many as are left.
        left: mask ``(N,)`` of the tokens to choose from.
        features: ``(N, width)``.
        relevance: ``(N,)`` of the tokens to the instruction; of CDPruner alone.

    Raises:
        InputError: there are no features, or no relevance where it is needed.
    """
    if features is None or (method == "cdpruner" and relevance is None):
        raise InputError(f"pruning method {method!r} compares the tokens' features, but got none")
    places = left.cpu().nonzero().flatten()
    some = features.cpu()[places].float()
    if method == "divprune":
        found = diverse(some, count)
    elif method == "dart":
        found = least_duplicated(some, count)
    else:
        assert relevance is not None
        found = determinantal(some, relevance.cpu()[places], count)
    return places[found]


def diverse(features: Tensor, count: int) -> Tensor:
    """DivPrune: greedily the token farthest by cosine from all chosen so far; ``(count,)`` indices.

    The first is the one whose nearest other is farthest away.
    """
    apart = 1 - _similarity(features)
    alone = apart.masked_fill(torch.eye(len(apart), dtype=torch.bool, device=apart.device), torch.inf)
    nearest, chosen = alone.amin(0), []
    for step in range(count):
        chosen.append(int(nearest.argmax()))
        nearest = apart[chosen[-1]].clone() if step == 0 else torch.minimum(nearest, apart[chosen[-1]])
        nearest[chosen] = -torch.inf
    return torch.tensor(chosen, dtype=torch.int64, device="cpu")


def least_duplicated(features: Tensor, count: int) -> Tensor:
    """DART: a few pivots, the tokens of the largest L1 norm, and of each those least similar to it.

    Half of the published pivots are text tokens; here all of them are visual.
    """
    chosen = top_k(features.abs().sum(-1), min(PIVOTS, count)).tolist()
    similar = _similarity(features)
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    free[chosen] = False
    pivots, rest = list(chosen), count - len(chosen)
    for i, pivot in enumerate(pivots):
        share = rest * (i + 1) // len(pivots) - rest * i // len(pivots)
        found = top_k((-similar[pivot]).masked_fill(~free, -torch.inf), share)
        free[found] = False
        chosen += found.tolist()
    return torch.tensor(chosen, dtype=torch.int64, device="cpu")


def determinantal(features: Tensor, relevance: Tensor, count: int) -> Tensor:
    """CDPruner: greedy MAP of a determinantal point process (Chen et al. 2018) on similarity times relevance.

    The relevance is scaled to [0, 1]. Tokens beyond the rank of the kernel, which add nothing to the
    determinant, come by relevance.
    """
    spread = relevance - relevance.min()
    weight = (spread + 1e-6) / spread.max().clamp_min(1e-6)
    kernel = (weight[:, None] * _similarity(features) * weight).double()
    gains, rows = kernel.diagonal().clone(), kernel.new_zeros(count, len(kernel))
    chosen: list[int] = []
    for step in range(count):
        best = int(gains.argmax())
        if gains[best] <= 1e-12:
            others = weight.clone()
            others[chosen] = -torch.inf
            chosen += top_k(others, count - step).tolist()
            break
        rows[step] = (kernel[best] - rows[:step, best] @ rows[:step]) / gains[best].sqrt()
        gains -= rows[step].square()
        chosen.append(best)
        gains[chosen] = -torch.inf
    return torch.tensor(chosen, dtype=torch.int64, device="cpu")


def relevance(embedded: Tensor, visual: slice) -> Tensor:
    """Mean cosine ``(visual,)`` of the visual tokens to the text behind them, both as the decoder reads them.

    CDPruner takes a text encoder's embedding, which these policies do not have.
    """
    image, text = (F.normalize(part.float(), dim=-1) for part in (embedded[visual], embedded[visual.stop :]))
    return (image @ text.T).mean(-1)


def _similarity(features: Tensor) -> Tensor:
    unit = F.normalize(features, dim=-1)
    return unit @ unit.T
