"""The best recipe within given limits: successive halving over paired episodes.

Settings beyond a limit of latency or bytes are out before any episode. The others run a few episodes, the
better half some more, and so on (Jamieson & Talwalkar 2016), all on the same seeds with the same noise as
the original policy. What is left at the end was chosen on those seeds, so it is confirmed on others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np

from sqap.errors import InputError
from sqap.evaluation.statistics import paired_difference
from sqap.models import DecoderConfig
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.recipe import Cut, Pruning

RUNGS = (2, 4, 8)  # episodes per task, in all, after each
KEEPS = (0.6, 0.4, 0.25, 0.15, 0.1)
CONFIDENCE = 0.95
ROUNDS = 3, 15  # timed steps of each setting, at least and at most
SECONDS = 60.0  # after which no further round begins

# Success by task and seed.
Outcomes = Mapping[tuple[str, int], bool]


@dataclass(frozen=True)
class Setting:
    """One way to compress a policy.

    Args:
        recipe: name of the recipe that quantizes it.
        pruning: which visual tokens go on; None for all.
    """

    recipe: str
    pruning: Pruning | None

    @property
    def kept(self) -> str:
        """The share of visual tokens that is kept, and where, in a few words."""
        if self.pruning is None:
            return "all visual tokens"
        return ", then ".join(f"{cut.keep_ratio} after layer {cut.after_layer}" for cut in self.pruning.cuts)

    @property
    def name(self) -> str:
        """The setting in a few words."""
        return f"{self.recipe}, keep {self.kept}"


@dataclass(frozen=True)
class Cost:
    """What a setting takes on this machine.

    Args:
        latency_ms: of a step; the median.
        fastest_ms: the fastest step.
        slowest_ms: the slowest.
        weight_bytes: as stored.
    """

    latency_ms: float
    fastest_ms: float
    slowest_ms: float
    weight_bytes: int


@dataclass(frozen=True)
class CostLimits:
    """What the setting that is looked for may cost; None is no limit.

    Args:
        drop: largest loss of success, as a share.
        latency_ms: of a step, on this machine.
        weight_bytes: as stored.

    Raises:
        InputError: a limit is negative, or none of latency and bytes could be met.
    """

    drop: float | None = None
    latency_ms: float | None = None
    weight_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.drop is not None and self.drop < 0:
            raise InputError(f"the largest drop must be 0 or more, got {100 * self.drop:g} points")
        for name, value in (("latency", self.latency_ms), ("number of bytes", self.weight_bytes)):
            if value is not None and value <= 0:
                raise InputError(f"the largest {name} must be above 0, got {value:g}")

    def within(self, costs: Mapping[Setting, Cost]) -> dict[Setting, Cost]:
        """The settings that cost no more.

        Raises:
            InputError: there is none; the message says what the cheapest cost.
        """
        most_ms, most_bytes = self.latency_ms, self.weight_bytes
        left = {
            setting: cost
            for setting, cost in costs.items()
            if (most_ms is None or cost.latency_ms <= most_ms)
            and (most_bytes is None or cost.weight_bytes <= most_bytes)
        }
        if not left:
            fastest = min(cost.latency_ms for cost in costs.values())
            smallest = min(cost.weight_bytes for cost in costs.values())
            raise InputError(
                f"no setting is within the limits: the fastest takes {fastest:.1f} ms, the smallest "
                f"{smallest} bytes"
            )
        return left


@dataclass(frozen=True)
class Standing:
    """How a setting does beside the original policy.

    Args:
        setting: which.
        cost: of it.
        episodes: pairs.
        difference: of success, as a share.
        low: end of its interval.
        high: the other end.
    """

    setting: Setting
    cost: Cost
    episodes: int
    difference: float
    low: float
    high: float


# Runs a setting, or the original for None, for so many episodes per task from a seed on.
Play = Callable[[Setting | None, int, int], Outcomes]


def candidates(decoder: DecoderConfig, tokens: int) -> list[Pruning | None]:
    """Prunings worth a try: none, single cuts of method "lookahead", and cuts to a half followed by more.

    Args:
        decoder: of the policy.
        tokens: visual tokens of a camera.
    """
    depths = sorted({max(1, round(decoder.depth * share)) for share in (1 / 12, 1 / 6, 1 / 3, 1 / 2)})
    keeps = [keep for keep in KEEPS if round(keep * tokens) >= 1]
    found = [Pruning(keep, after) for after in depths for keep in keeps]
    for first, second in pairwise(depths):
        found += [Pruning(0.5, first, later=(Cut(second, keep),)) for keep in keeps if keep <= 0.25]
    return [None, *(pruning for pruning in found if pruning.last_layer < decoder.depth)]


def step_times(
    policies: Sequence[Policy],
    observation: Observation,
    rounds: tuple[int, int] = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Milliseconds of the policies' steps, taken in turns after one that is not timed: a list for each.

    At least the first of ``rounds``, at most the second, and between them none that begins after `SECONDS`.
    ``progress`` gets (rounds done, at most).
    """
    for policy in policies:
        policy.step(observation, seed=0)
    times: list[list[float]] = [[] for _ in policies]
    least, most = rounds
    began = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - began > SECONDS:
            break
        for policy, own in zip(policies, times, strict=True):
            start = time.perf_counter()
            policy.step(observation, seed=0)
            own.append(1e3 * (time.perf_counter() - start))
        if progress is not None:
            progress(done + 1, most)
    return times


def cost_of(times: Sequence[float], weight_bytes: int) -> Cost:
    """The cost of a setting with these step times in milliseconds."""
    return Cost(float(np.median(times)), min(times), max(times), weight_bytes)


def halve(
    costs: Mapping[Setting, Cost],
    play: Play,
    *,
    max_drop: float | None,
    seed: int,
    rungs: Sequence[int] = RUNGS,
) -> Iterator[list[Standing]]:
    """After each rung the settings that are still in, the most promising first.

    Half of the settings go on. With ``max_drop`` a setting is out as soon as its interval says that it loses
    more; those that seem to lose no more come first, the fastest in front; then the rest, by success.
    Without, the order is that of success, and of latency where that is equal.

    Args:
        costs: settings to choose from.
        play: runs one.
        max_drop: largest loss of success that is borne, as a share.
        seed: of each task's first episode.
        rungs: episodes per task, in all, after each.
    """
    left = list(costs)
    for number, episodes in enumerate(rungs):
        original = play(None, episodes, seed)
        standings = [compare(s, costs[s], play(s, episodes, seed), original) for s in left]
        if max_drop is not None:
            standings = [standing for standing in standings if standing.high >= -max_drop]
        standings.sort(key=lambda standing: _rank(standing, max_drop))
        if number + 1 < len(rungs):
            standings = standings[: ceil(len(standings) / 2)]
        yield standings
        left = [standing.setting for standing in standings]
        if not left:
            return


def _rank(standing: Standing, max_drop: float | None) -> tuple[bool, float, float]:
    """Smaller is more promising."""
    latency, loss = standing.cost.latency_ms, -standing.difference
    if max_drop is None:
        return False, loss, latency
    return (False, latency, loss) if loss <= max_drop else (True, loss, latency)


def compare(setting: Setting, cost: Cost, compressed: Outcomes, original: Outcomes) -> Standing:
    """A setting beside the original, on the episodes that both have run."""
    shared = [key for key in compressed if key in original]
    difference, low, high = paired_difference(
        [compressed[key] for key in shared], [original[key] for key in shared], CONFIDENCE
    )
    return Standing(setting, cost, len(shared), difference, low, high)
