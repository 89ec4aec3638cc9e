"""The cheapest pruning setting that a policy can bear: successive halving over paired episodes.

Many settings run a few episodes, the better half some more, and so on (Jamieson & Talwalkar 2016), all on
the same seeds with the same noise as the policy without pruning. What is left at the end was chosen on those
seeds, so it is confirmed on others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from sqap.errors import InputError
from sqap.evaluation.statistics import paired_difference
from sqap.models import DecoderConfig
from sqap.pruning.lookahead import layers_to_look_at, look_cost, whole_layers
from sqap.recipe import Cut, Pruning

RUNGS = (2, 4, 8)  # episodes per task, in all, after each
KEEPS = (0.6, 0.4, 0.25, 0.15, 0.1)
CONFIDENCE = 0.95

# Success by task and seed.
Outcomes = Mapping[tuple[str, int], bool]
# Runs a setting, or no pruning, for so many episodes per task from a seed on.
Play = Callable[[Pruning | None, int, int], Outcomes]


@dataclass(frozen=True)
class Standing:
    """How a setting does beside the policy without pruning.

    Args:
        pruning: the setting.
        cost: multiply-adds of the decoder's layers, looking ahead included; 1 without pruning.
        episodes: pairs.
        difference: of success, as a share.
        low: end of its interval.
        high: the other end.
    """

    pruning: Pruning
    cost: float
    episodes: int
    difference: float
    low: float
    high: float

    @property
    def name(self) -> str:
        """The setting in a few words."""
        return ", then ".join(f"{cut.keep_ratio} after layer {cut.after_layer}" for cut in self.pruning.cuts)


def candidates(decoder: DecoderConfig, tokens: int) -> list[Pruning]:
    """Settings worth a try, of method "lookahead": single cuts, and cuts to a half that are followed by more.

    Args:
        decoder: of the policy.
        tokens: visual tokens of a camera.
    """
    depths = sorted({max(1, round(decoder.depth * share)) for share in (1 / 12, 1 / 6, 1 / 3, 1 / 2)})
    keeps = [keep for keep in KEEPS if round(keep * tokens) >= 1]
    found = [Pruning(keep, after) for after in depths for keep in keeps]
    for first, second in pairwise(depths):
        found += [Pruning(0.5, first, later=(Cut(second, keep),)) for keep in keeps if keep <= 0.25]
    return [pruning for pruning in found if pruning.last_layer < decoder.depth]


def decoder_cost(pruning: Pruning, decoder: DecoderConfig) -> float:
    """Multiply-adds of the decoder's layers, looking ahead included, as a share of those without pruning.

    Of visual tokens alone, and without what grows with the square of their number.
    """
    look = len(layers_to_look_at(pruning, decoder)) * look_cost(decoder)
    seen = 1 + sum(cut.keep_ratio for cut in pruning.cuts[:-1])  # by the looks at all cuts
    return (whole_layers(pruning, decoder) + look * seen) / decoder.depth


def halve(
    settings: Sequence[Pruning],
    decoder: DecoderConfig,
    play: Play,
    *,
    max_drop: float,
    seed: int,
    rungs: Sequence[int] = RUNGS,
) -> Iterator[list[Standing]]:
    """After each rung the settings that are still in, the most promising first.

    A setting is out as soon as its interval says that it loses more than ``max_drop``. Of the others half go
    on: those that seem to lose no more come first, the cheapest in front; then the rest, by success.

    Args:
        settings: to choose from.
        decoder: of the policy.
        play: runs one.
        max_drop: largest loss of success that is borne, as a share.
        seed: of each task's first episode.
        rungs: episodes per task, in all, after each.

    Raises:
        InputError: the loss that is borne is negative.
    """
    if max_drop < 0:
        raise InputError(f"the largest drop must be 0 or more, got {100 * max_drop:g} points")
    left = list(settings)
    for number, episodes in enumerate(rungs):
        unpruned = play(None, episodes, seed)
        standings = [compare(pruning, decoder, play(pruning, episodes, seed), unpruned) for pruning in left]
        standings = [standing for standing in standings if standing.high >= -max_drop]
        standings.sort(
            key=lambda s: (s.difference < -max_drop, s.cost if s.difference >= -max_drop else -s.difference)
        )
        if number + 1 < len(rungs):
            standings = standings[: ceil(len(standings) / 2)]
        yield standings
        left = [standing.pruning for standing in standings]
        if not left:
            return


def compare(pruning: Pruning, decoder: DecoderConfig, pruned: Outcomes, unpruned: Outcomes) -> Standing:
    """A setting beside no pruning, on the episodes that both have run."""
    shared = [key for key in pruned if key in unpruned]
    difference, low, high = paired_difference(
        [pruned[key] for key in shared], [unpruned[key] for key in shared], CONFIDENCE
    )
    return Standing(pruning, decoder_cost(pruning, decoder), len(shared), difference, low, high)
