"""Selects visual tokens within a budget, by scores and by the position of the end effector."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.pruning import criteria, rivals
from sqap.pruning.criteria import first, ranked
from sqap.recipe import Pruning
from sqap.recipe.pruning import SHARED

logger = logging.getLogger("sqap")


@dataclass(frozen=True, eq=False)
class Selection:
    """The visual tokens that are kept, as three disjoint masks ``(N,)`` over the patch grid.

    Args:
        top: kept by score.
        ring: kept because they are around the end effector.
        sampled: kept at random, by farthest-point sampling, or by a method that does not rank.
        target: the end effector in image coordinates (u, v), if it is known. The image is what the policy
            looks at: a crop's corners are at (0, 0) and (1, 1).
        scores: ``(N,)`` by which the tokens were ranked; None if they were not.
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

    @property
    def tensors(self) -> list[Tensor]:
        """The masks, and the scores if there are any."""
        return [x for x in (self.top, self.ring, self.sampled, self.scores) if x is not None]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Selection:
        """The same with copies of its `tensors` in their place."""
        top, ring, sampled, *scores = tensors
        return replace(self, top=top, ring=ring, sampled=sampled, scores=scores[0] if scores else None)


@dataclass(frozen=True, eq=False)
class Draws:
    """Inputs of a selection that are computed on the CPU: a random order and the end effector's position.

    Args:
        order: a random permutation ``(N,)`` of the tokens, or the rank that breaks ties between farthest
            points; None for a deterministic selection.
        nearest: ``(N,)`` indices, the nearest to the end effector first; None without a ring.
        inside: mask ``(N,)`` of the ring.
    """

    order: Tensor | None = None
    nearest: Tensor | None = None
    inside: Tensor | None = None

    def to(self, place: Callable[[Tensor], Tensor]) -> Draws:
        """The same with its tensors where ``place`` puts them."""
        moved = (None if x is None else place(x) for x in (self.order, self.nearest, self.inside))
        return Draws(*moved)


@dataclass
class Selector:
    """Applies a recipe's pruning to the visual tokens of one camera. It keeps no state between steps.

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

    @property
    def captures(self) -> bool:
        """Whether `select` computes on the device alone, so that a CUDA graph can capture it."""
        return self.settings.method not in (*rivals.BY_FEATURES, "uniform")

    def draw(
        self,
        target: tuple[float, float] | None = None,
        generator: torch.Generator | None = None,
        *,
        changed: bool = False,
    ) -> Draws:
        """The inputs of `select` that are computed on the CPU, for one cut and camera.

        Args:
            target: as of `select`.
            generator: as of `select`.
            changed: whether `select` will be given ``change``.
        """
        settings, order = self.settings, None
        shares = settings.method in SHARED
        by_chance = settings.rest == "random" or (settings.rest == "changed" and not changed)
        by_chance |= settings.rest == "farthest" and generator is not None  # ties are
        if settings.method == "random" or (shares and by_chance):
            order = criteria.permutation(self.tokens, generator)
        if not shares or not settings.ring_share or target is None:
            return Draws(order)
        nearest = criteria.distances(self.grid, target).sort(stable=True).indices
        return Draws(order, nearest, criteria.ring(self.grid, target, *settings.ring))

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
        draws: Draws | None = None,
    ) -> Selection:
        """Choose exactly as many tokens as the budget of a cut.

        All tensors are on one device, without synchronizing with it. Exceptions are the methods
        `rivals.BY_FEATURES`, and "farthest" points without a generator, which are computed on the CPU.

        Args:
            scores: ``(N,)`` by which the method ranks.
            target: the end effector in image coordinates (u, v); without it the ring is left out and
                its share goes to the rest.
            generator: of random choices, ties between farthest points included.
            features: ``(N, width)`` of the tokens, for methods that compare them with each other.
            left: mask ``(N,)`` of the tokens that earlier cuts have kept; all by default.
            cut: index of the cut; the last by default.
            change: ``(N,)`` how much each token has changed since the previous step, if known.
            draws: what `draw` returned, on the device of the tensors; computed here by default.

        Raises:
            InputError: the method needs scores or features, and there are none.
        """
        if left is None:
            left = torch.ones(self.tokens, dtype=torch.bool, device="cpu")
        method, budget = self.settings.method, self.settings.budget(self.tokens, cut)
        draws = draws or self.draw(target, generator, changed=change is not None)
        none = torch.zeros_like(left)
        if method == "random":
            return Selection(none, none, first(_order(draws, left), left, budget), target)
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
        return self._share(scores, target, generator, left, budget, change, draws)

    def _share(
        self,
        scores: Tensor,
        target: tuple[float, float] | None,
        generator: torch.Generator | None,
        left: Tensor,
        budget: int,
        change: Tensor | None,
        draws: Draws,
    ) -> Selection:
        """The best by score, the ring, and the rest."""
        share = round(self.settings.top_share * budget)
        if self.top_k is not None:  # of the last budget
            share = min(share, round(self.top_k * budget / self.budget))
        top = first(ranked(scores), left, share)
        # The two shares are rounded separately and could together exceed the budget by one.
        ring = self._ring(draws, left & ~top, min(round(self.settings.ring_share * budget), budget - share))
        kept = top | ring
        free, count = left & ~kept, budget - kept.sum()
        if self.settings.rest == "farthest":
            return Selection(
                top, ring, self._farthest(kept, count, budget - share, draws, left), target, scores
            )
        order = ranked(change) if draws.order is None and change is not None else _order(draws, left)
        return Selection(top, ring, first(order, free, count), target, scores)

    def _farthest(self, kept: Tensor, count: Tensor, most: int, draws: Draws, left: Tensor) -> Tensor:
        """The ``count`` patches, at most ``most``, that are farthest from those kept."""
        if kept.is_cpu or draws.order is None:
            rest = criteria.farthest_points(self.grid, kept, int(count), left=left, rank=draws.order)
            return self._mask(rest, left)
        return criteria.farthest_mask(self.grid, kept, count, most, _copied(draws.order, kept), left)

    def _ring(self, draws: Draws, free: Tensor, share: int) -> Tensor:
        """At most ``share`` ring tokens, those nearest to the end effector first."""
        if draws.nearest is None or draws.inside is None:
            self._warn_once()
            return torch.zeros_like(free)
        return first(_copied(draws.nearest, free), free & _copied(draws.inside, free), share)

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
        return _copied(mask, like)


def _order(draws: Draws, like: Tensor) -> Tensor:
    assert draws.order is not None, "the random order has been drawn"
    return _copied(draws.order, like)


def _copied(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a CPU tensor on the device of ``like``; does not synchronize."""
    return tensor.to(like.device, non_blocking=True)
