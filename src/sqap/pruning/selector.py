"""From scores and the gripper's place to exactly the budgeted number of visual tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.pruning import criteria, rivals
from sqap.recipe import Pruning

logger = logging.getLogger("sqap")


@dataclass(frozen=True, eq=False)
class Selection:
    """The visual tokens that go on, and why: three disjoint masks ``(N,)`` over the patch grid.

    Args:
        top: kept for their rank.
        ring: kept for being around the end effector.
        sampled: kept by chance or to cover the rest of the scene, or by a rival that does not rank.
        target: the end effector in image coordinates (u, v), if it is known. The image is what the policy
            looks at: a crop's corners are at (0, 0) and (1, 1).
        scores: ``(N,)`` what tokens were ranked by, if they were.
    """

    top: Tensor
    ring: Tensor
    sampled: Tensor
    target: tuple[float, float] | None = None
    scores: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """``(N,)``, true for every kept token."""
        return self.top | self.ring | self.sampled

    @property
    def kept(self) -> Tensor:
        """``(budget,)`` indices, ascending."""
        return self.mask.nonzero().flatten()


@dataclass
class Selector:
    """Applies one pruning setting to the visual tokens of one camera. One serves all steps of a policy.

    Args:
        settings: the recipe's pruning.
        grid: patches along a side; there are ``grid * grid`` visual tokens.
        top_k: how many tokens of the last budget calibration trusts the ranking with; None trusts it with its
            whole share.
        layers: decoder layers, counted from 0, that method "lookahead" looks at.
    """

    settings: Pruning
    grid: int
    top_k: int | None = None
    layers: tuple[int, ...] = ()
    _warned: bool = field(default=False, init=False, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """Visual tokens before pruning."""
        return self.grid**2

    @property
    def budget(self) -> int:
        """Visual tokens behind the last cut."""
        return self.settings.budget(self.tokens)

    def select(
        self,
        scores: Tensor | None,
        target: tuple[float, float] | None = None,
        generator: torch.Generator | None = None,
        *,
        features: Tensor | None = None,
        left: Tensor | None = None,
        cut: int = -1,
        change: Tensor | None = None,
    ) -> Selection:
        """Choose exactly as many tokens as the budget of a cut.

        Args:
            scores: ``(N,)`` what the method ranks by.
            target: the end effector in image coordinates (u, v); without it the ring is left out and
                its share goes to the rest.
            generator: of what is left to chance, ties of farthest points included.
            features: ``(N, width)`` of the tokens, for methods that compare them with each other.
            left: mask ``(N,)`` of the tokens that earlier cuts have left; all if not given.
            cut: the cut's number; the last by default.
            change: ``(N,)`` how much the tokens have changed since the step before, where that is known.

        Raises:
            InputError: the method needs scores or features, and there are none.
        """
        if left is None:
            left = torch.ones(self.tokens, dtype=torch.bool, device="cpu")
        method, budget = self.settings.method, self.settings.budget(self.tokens, cut)
        none = torch.zeros_like(left)
        if method == "random":
            return Selection(none, none, self._mask(criteria.random_tokens(left, budget, generator)), target)
        if method == "uniform":
            return Selection(none, none, self._mask(criteria.uniform_grid(self.grid, budget)), target)
        if method in rivals.BY_FEATURES:
            chosen = rivals.choose(method, budget, left, features, scores)
            return Selection(none, none, self._mask(chosen), target, scores)
        if scores is None:
            raise InputError(f"pruning method {method!r} ranks tokens by attention, but got no scores")
        scores = scores.masked_fill(~left, -torch.inf)
        if method == "attention":
            return Selection(self._mask(criteria.top_k(scores, budget)), none, none, target, scores)
        return self._share(scores, target, generator, left, budget, change)

    def _share(
        self,
        scores: Tensor,
        target: tuple[float, float] | None,
        generator: torch.Generator | None,
        left: Tensor,
        budget: int,
        change: Tensor | None,
    ) -> Selection:
        """The best by score, the ring, and the rest."""
        share = round(self.settings.top_share * budget)
        if self.top_k is not None:  # of the last budget
            share = min(share, round(self.top_k * budget / self.budget))
        top = self._mask(criteria.top_k(scores, share))
        ring = self._ring(top, target, left, budget)
        kept = top | ring
        count = budget - int(kept.sum())
        if self.settings.rest == "farthest":
            rest = criteria.farthest_points(self.grid, kept, count, generator, left)
        elif self.settings.rest == "changed" and change is not None:
            rest = criteria.top_k(change.masked_fill(~left | kept, -torch.inf), count)
        else:
            rest = criteria.random_tokens(left & ~kept, count, generator)
        return Selection(top, ring, self._mask(rest), target, scores)

    def _ring(self, top: Tensor, target: tuple[float, float] | None, left: Tensor, budget: int) -> Tensor:
        """Ring tokens not in ``top``, nearest to the end effector first: contact is at its fingers."""
        if target is None or not self.settings.ring_share:
            self._warn_once()
            return torch.zeros_like(top)
        free = criteria.ring(self.grid, target, *self.settings.ring) & ~top & left
        # The two shares are rounded separately and could together exceed the budget by one.
        share = min(round(self.settings.ring_share * budget), budget - int(top.sum()))
        closeness = -criteria.distances(self.grid, target).masked_fill(~free, torch.inf)
        return self._mask(criteria.top_k(closeness, min(share, int(free.sum()))))

    def _warn_once(self) -> None:
        if self.settings.ring_share and not self._warned:
            self._warned = True
            logger.warning(
                "the end effector's place in the image is not known (the observation lacks its camera or its "
                "position, or it is behind the camera): pruning goes without the ring around it"
            )

    def _mask(self, indices: Tensor) -> Tensor:
        mask = torch.zeros(self.tokens, dtype=torch.bool, device="cpu")
        mask[indices] = True
        return mask
