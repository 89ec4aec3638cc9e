"""The pruner of one step: which tokens of the decoder's sequence are kept at each cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.models.stream import LayerOutput
from sqap.pruning import criteria
from sqap.pruning.attention import per_camera, query_rows, score_layers
from sqap.pruning.memory import Memory
from sqap.pruning.rivals import BY_FEATURES, relevance
from sqap.pruning.selector import Draws, Selection, Selector


class StepPruner:
    """The decoder's `TokenPruner` for one forward pass over one observation.

    A batch of several is refused: the first would decide which tokens of the others go on. Every camera has a
    budget of its own, and the ring where its place and the end effector's are known.

    Args:
        selector: what to keep of each camera's tokens.
        length: tokens in the decoder's sequence, visual ones included.
        visual: positions of the visual ones.
        targets: per camera, the end effector in its image's coordinates, if known.
        generator: of random choices.
        memory: of the previous step, if there was one.
        device: of the model.
        draws: what `draw` returned, on that device; computed here by default.

    Attributes:
        selections: the tokens kept of each camera; empty before the first cut, and if nothing is pruned.
        memory: for the next step; None if the settings need none.
    """

    def __init__(
        self,
        selector: Selector,
        length: int,
        visual: slice,
        targets: Sequence[tuple[float, float] | None] = (None,),
        generator: torch.Generator | None = None,
        memory: Memory | None = None,
        device: torch.device | None = None,
        draws: Sequence[Sequence[Draws]] | None = None,
    ) -> None:
        settings, device = selector.settings, device or torch.device("cpu")
        self.selections: tuple[Selection, ...] = ()
        self.memory: Memory | None = None
        self._before = memory
        self._selector, self._length, self._visual = selector, length, visual
        self._targets, self._generator = targets, generator
        self._draws = draw(selector, targets, generator, memory) if draws is None else draws
        self._cuts = {cut.after_layer - 1: i for i, cut in enumerate(settings.cuts)}
        self._watched = score_layers(settings)
        self._rows = query_rows(settings.score_queries or "text", visual, length, device)
        # Positions, in the unpruned sequence, of the tokens that are left.
        self._positions = torch.arange(length, dtype=torch.int64, device=device)
        self._left = torch.ones(len(targets), selector.tokens, dtype=torch.bool, device=device)
        self._dropped = 0
        self._received: list[Tensor] = []

    def score_rows(self, layer: int) -> Tensor | None:
        if layer not in self._watched or self._selector.budget == self._selector.tokens:
            return None
        return self._rows - self._dropped  # visual tokens come before all rows

    def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
        """As `TokenPruner.keep`.

        Raises:
            InputError: there is more than one observation.
        """
        if output.received is not None and layer in self._watched:
            self._received.append(self._visual_of(output.received[0]))
        cut, tokens = self._cuts.get(layer), self._selector.tokens
        if cut is None or self._selector.settings.budget(tokens, cut) == tokens:
            return None
        if len(output.hidden) != 1:
            raise InputError(
                f"a pruner chooses tokens for one observation, got a batch of {len(output.hidden)}: "
                "run them one at a time, each with a pruner of its own"
            )
        scores, features, change = self._scores(output), self._features(output), self._change(output)
        self._received = []
        self.selections = tuple(
            self._selector.select(
                None if scores is None else scores[i],
                target,
                self._generator,
                features=None if features is None else features[i],
                left=self._left[i],
                cut=cut,
                change=None if change is None else change[i],
                draws=self._draws[cut][i],
            )
            for i, target in enumerate(self._targets)
        )
        self._left = torch.stack([selection.mask for selection in self.selections])
        whole = torch.ones(self._length, dtype=torch.bool, device=self._left.device)
        whole[self._visual] = self._left.flatten()
        self._dropped = self._left.numel() - len(self._targets) * self._selector.settings.budget(tokens, cut)
        places = criteria.places(whole[self._positions], self._length - self._dropped)
        self._positions = self._positions[places]
        return places[None]

    def _scores(self, output: LayerOutput) -> Tensor | None:
        """Scores ``(cameras, N)``; None if the method does not rank."""
        method = self._selector.settings.method
        if method == "lookahead":
            actions = self._selector.settings.score_queries == "actions"
            rows = None if actions else self._rows - self._dropped
            received = output.look_ahead(self._selector.layers, rows)[0]
            return per_camera(self._visual_of(received), len(self._targets))
        if method == "cdpruner":
            return self._by_camera(relevance(output.embedded[0], self._visual))
        if not self._received:
            return None
        return per_camera(torch.stack(self._received).mean(0), len(self._targets))

    def _features(self, output: LayerOutput) -> Tensor | None:
        """Features ``(cameras, N, width)``; None if the method does not compare tokens."""
        method = self._selector.settings.method
        if method == "dart":
            return self._by_camera(self._visual_of(output.hidden[0]))
        return self._by_camera(output.embedded[0, self._visual]) if method in BY_FEATURES else None

    def _change(self, output: LayerOutput) -> Tensor | None:
        """Change ``(cameras, N)`` since the previous step; None if it is not used or not known."""
        if self._selector.settings.rest != "changed":
            return None
        self.memory = Memory(self._by_camera(output.embedded[0, self._visual]))
        return None if self._before is None else self._before.change(self.memory.visual)

    def _visual_of(self, values: Tensor) -> Tensor:
        """The visual tokens' values ``(visual, ...)``, with 0 for tokens that were dropped."""
        if not self._dropped:
            return values[self._visual]
        whole = values.new_zeros(self._length, *values.shape[1:])
        whole[self._positions] = values
        return whole[self._visual]

    def _by_camera(self, values: Tensor) -> Tensor:
        return values.view(len(self._targets), -1, *values.shape[1:])


def draw(
    selector: Selector,
    targets: Sequence[tuple[float, float] | None],
    generator: torch.Generator | None,
    memory: Memory | None,
) -> list[list[Draws]]:
    """The inputs of a step's selections that are computed on the CPU, for each cut and camera."""
    settings, found = selector.settings, []
    for cut in range(len(settings.cuts)):
        if settings.budget(selector.tokens, cut) == selector.tokens:  # nothing is chosen there
            found.append([Draws()] * len(targets))
        else:
            found.append([selector.draw(t, generator, changed=memory is not None) for t in targets])
    return found
