"""From scores and the gripper's place to exactly the budgeted number of visual tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.pruning import criteria, rivals
from sqap.pruning.criteria import first, ranked
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

    def cpu(self) -> Selection:
        """The same with its tensors on the CPU."""
        scores = None if self.scores is None else self.scores.cpu()
        return replace(
            self, top=self.top.cpu(), ring=self.ring.cpu(), sampled=self.sampled.cpu(), scores=scores
        )


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

        Tensors are on one device, which need not be waited for, but for "farthest" points and the methods
        `rivals.BY_FEATURES`: these are computed on the CPU.

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
            return Selection(none, none, first(self._drawn(generator, left), left, budget), target)
        if method == "uniform":
            return Selection(none, none, self._mask(criteria.uniform_grid(self.grid, budget), left), target)
        if method in rivals.BY_FEATURES:
            chosen = rivals.choose(method, budget, left, features, scores)
            return Selection(none, none, self._mask(chosen, left), target, scores)
        if scores is None:
            raise InputError(f"pruning method {method!r} ranks tokens by attention, but got no scores")
        scores = scores.masked_fill(~left, -torch.inf)
        if method == "attention":
            return Selection(first(ranked(scores), left, budget), none, none, target, scores)
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
        top = first(ranked(scores), left, share)
        # The two shares are rounded separately and could together exceed the budget by one.
        ring = self._ring(target, left & ~top, min(round(self.settings.ring_share * budget), budget - share))
        kept = top | ring
        free, count = left & ~kept, budget - kept.sum()
        if self.settings.rest == "farthest":
            rest = criteria.farthest_points(self.grid, kept, int(count), generator, left)
            return Selection(top, ring, self._mask(rest, left), target, scores)
        if self.settings.rest != "changed" or change is None:
            order = self._drawn(generator, left)
        else:
            order = ranked(change)
        return Selection(top, ring, first(order, free, count), target, scores)

    def _ring(self, target: tuple[float, float] | None, free: Tensor, share: int) -> Tensor:
        """At most ``share`` ring tokens, nearest to the end effector first: contact is at its fingers."""
        if target is None or not self.settings.ring_share:
            self._warn_once()
            return torch.zeros_like(free)
        order = criteria.distances(self.grid, target).sort(stable=True).indices
        inside = criteria.ring(self.grid, target, *self.settings.ring)
        return first(_there(order, free), free & _there(inside, free), share)

    def _drawn(self, generator: torch.Generator | None, like: Tensor) -> Tensor:
        return _there(criteria.permutation(self.tokens, generator), like)

    def _warn_once(self) -> None:
        if self.settings.ring_share and not self._warned:
            self._warned = True
            logger.warning(
                "the end effector's place in the image is not known (the observation lacks its camera or its "
                "position, or it is behind the camera): pruning goes without the ring around it"
            )

    def _mask(self, indices: Tensor, like: Tensor) -> Tensor:
        mask = torch.zeros(self.tokens, dtype=torch.bool, device="cpu")
        mask[indices] = True
        return _there(mask, like)


def _there(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of the CPU on the device of ``like``, without waiting for that."""
    return tensor.to(like.device, non_blocking=True)
