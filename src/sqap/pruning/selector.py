"""From scores and the gripper's place to exactly the budgeted number of visual tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.pruning import criteria
from sqap.pruning.attention import AttentionWatcher, query_rows, score_layers
from sqap.recipe import Pruning

logger = logging.getLogger("sqap")


@dataclass(frozen=True, eq=False)
class Selection:
    """The visual tokens that go on, and why: three disjoint masks ``(N,)`` over the patch grid.

    Args:
        top: kept for the attention they receive.
        ring: kept for being around the end effector.
        sampled: kept to cover the rest of the scene, or by a baseline that looks at neither.
        target: the end effector in image coordinates (u, v), if it is known. The image is what the policy
            looks at: a crop's corners are at (0, 0) and (1, 1).
    """

    top: Tensor
    ring: Tensor
    sampled: Tensor
    target: tuple[float, float] | None = None

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
        top_k: how many tokens calibration trusts the attention ranking with; None trusts it with its
            whole share.
    """

    settings: Pruning
    grid: int
    top_k: int | None = None
    _warned: bool = field(default=False, init=False, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """Visual tokens before pruning."""
        return self.grid**2

    @property
    def budget(self) -> int:
        """Visual tokens after pruning."""
        return self.settings.budget(self.tokens)

    def select(
        self,
        scores: Tensor | None,
        target: tuple[float, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> Selection:
        """Choose exactly `budget` tokens.

        Args:
            scores: ``(N,)`` attention received; only methods "random" and "uniform" do without.
            target: the end effector in image coordinates (u, v); without it the ring is left out and
                its share is sampled.
            generator: of method "random", and of ties in the sampling.

        Raises:
            InputError: the method ranks by attention and there are no scores.
        """
        none = torch.zeros(self.tokens, dtype=torch.bool, device="cpu")
        method = self.settings.method
        if method == "random":
            sampled = self._mask(criteria.random_tokens(self.tokens, self.budget, generator))
            return Selection(none, none, sampled, target)
        if method == "uniform":
            sampled = self._mask(criteria.uniform_grid(self.grid, self.budget))
            return Selection(none, none, sampled, target)
        if scores is None:
            raise InputError(f"pruning method {method!r} ranks tokens by attention, but got no scores")
        if method == "attention":
            return Selection(self._mask(criteria.top_k(scores, self.budget)), none, none, target)
        return self._select_sqap(scores, target, generator)

    def _select_sqap(
        self, scores: Tensor, target: tuple[float, float] | None, generator: torch.Generator | None
    ) -> Selection:
        share = round(self.settings.top_share * self.budget)
        top = self._mask(criteria.top_k(scores, share if self.top_k is None else min(self.top_k, share)))
        ring = self._ring(top, target)
        left = self.budget - int((top | ring).sum())
        sampled = self._mask(criteria.farthest_points(self.grid, top | ring, left, generator))
        return Selection(top, ring, sampled, target)

    def _ring(self, top: Tensor, target: tuple[float, float] | None) -> Tensor:
        """Ring tokens not in ``top``, nearest to the end effector first: contact is at its fingers."""
        if target is None:
            self._warn_once()
            return torch.zeros_like(top)
        free = criteria.ring(self.grid, target, *self.settings.ring) & ~top
        # The two shares are rounded separately and could together exceed the budget by one.
        share = min(round(self.settings.ring_share * self.budget), self.budget - int(top.sum()))
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


class StepPruner:
    """The decoder's `TokenPruner` for one forward pass over one observation.

    A batch of several is refused: the first would decide which tokens of the others go on. Every camera has a
    budget of its own, and the ring where its place and the end effector's are known.

    Args:
        selector: what to keep of each camera's tokens.
        length: tokens in the decoder's sequence, visual ones included.
        visual: positions of the visual ones.
        targets: per camera, the end effector in its image's coordinates, if known.
        generator: randomness of method "random", and of ties.

    Attributes:
        selections: what was kept, per camera; empty before the pruning layer, and if nothing is pruned.
    """

    def __init__(
        self,
        selector: Selector,
        length: int,
        visual: slice,
        targets: Sequence[tuple[float, float] | None] = (None,),
        generator: torch.Generator | None = None,
    ) -> None:
        settings = selector.settings
        self.selections: tuple[Selection, ...] = ()
        self._selector, self._length, self._visual = selector, length, visual
        self._targets, self._generator = targets, generator
        self._prunes_after = settings.after_layer - 1
        rows = query_rows(settings.score_queries, visual, length)
        self._watcher = AttentionWatcher(score_layers(settings), rows, visual, len(targets))
        # The decoder asks what to keep only where scores were asked for; one row is the cheapest.
        self._any_row = rows[-1:]

    def score_rows(self, layer: int) -> Tensor | None:
        if self._selector.budget == self._selector.tokens:
            return None
        rows = self._watcher.score_rows(layer)
        return self._any_row if rows is None and layer == self._prunes_after else rows

    def keep(self, layer: int, received: Tensor) -> Tensor | None:
        """As `TokenPruner.keep`.

        Raises:
            InputError: there is more than one observation.
        """
        if len(received) != 1:
            raise InputError(
                f"a pruner chooses tokens for one observation, got a batch of {len(received)}: "
                "run them one at a time, each with a pruner of its own"
            )
        self._watcher.keep(layer, received)
        if layer != self._prunes_after:
            return None
        scores = self._watcher.scores
        self.selections = tuple(
            self._selector.select(None if scores is None else scores[i], target, self._generator)
            for i, target in enumerate(self._targets)
        )
        kept = torch.ones(self._length, dtype=torch.bool, device="cpu")
        kept[self._visual] = torch.cat([s.mask for s in self.selections])
        return kept.nonzero().T
