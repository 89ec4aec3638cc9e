"""A recipe: everything that decides how a policy is compressed, as a frozen value and as JSON.

Unknown keys and settings that contradict each other are refused with the reason, so that a recipe
either does what it says or does not exist.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqap.errors import InputError, SqapError
from sqap.recipe.pruning import Cut, Pruning, PruningMethod, Rest, ScoreQueries
from sqap.recipe.quantization import (
    ActivationGranularity,
    Override,
    Quantization,
    Rounding,
    Scheme,
    WeightGranularity,
)
from sqap.recipe.version1 import from_version1, version_of
from sqap.serialization import from_json, read_json

__all__ = [
    "ActivationGranularity",
    "Cut",
    "Override",
    "Pruning",
    "PruningMethod",
    "Quantization",
    "Recipe",
    "Rest",
    "Rounding",
    "Scheme",
    "ScoreQueries",
    "WeightGranularity",
]

RECIPE_VERSION = 2
_W4A8 = Scheme(4, 8)


@dataclass(frozen=True)
class Recipe:
    """Quantization, pruning, or both. ``Recipe()`` leaves a policy as it is.

    Raises:
        InputError: a setting is out of range or contradicts another.
    """

    quantization: Quantization | None = field(default=None)
    pruning: Pruning | None = field(default=None)
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        if self.version != RECIPE_VERSION:
            raise InputError(_unknown(self.version))

    @classmethod
    def w4a8(cls, keep: float = 0.4) -> Recipe:
        """4-bit weights, 8-bit activations, the whole policy; fast on CPUs.

        0.4 of the visual tokens is the smallest share measured whose success, minus that without pruning, has
        an interval above -5 points on `reference` and `reference-smollm` (docs/pruning.md).
        """
        return cls(_whole(_W4A8), _pruning(keep))

    @classmethod
    def w8a8(cls, keep: float = 0.4) -> Recipe:
        """8-bit weights and activations, the whole policy: for policies that 4 bits hurt."""
        return cls(_whole(Scheme(8, 8), rest=Scheme(8, 8)), _pruning(keep))

    @classmethod
    def w4a4(cls, keep: float = 0.6) -> Recipe:
        """4-bit weights and activations in the decoder, 4-bit weights and 8-bit activations elsewhere.

        32 channels of an activation share a scale: with a scale per token, 4 bits cost twice the error.
        """
        decoder = Scheme(4, 4, activation_granularity="group", activation_group_size=32)
        return cls(_whole(decoder), _pruning(keep))

    @classmethod
    def paper(cls) -> Recipe:
        """The paper's own setting: W4A4, 60 % of the tokens kept after layer 2, ranked by its attention.

        How the paper shares the budget among its criteria is not known to us; half of it by attention and
        up to three tenths around the end effector is our reading.
        """
        return cls(Quantization(Scheme(4, 4)), Pruning(keep_ratio=0.6, after_layer=2, method="sqap"))

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON file.

        Raises:
            InputError: the file is missing, is not JSON, or is not a valid recipe.
        """
        return cls.from_json(read_json(Path(path), InputError))

    @classmethod
    def from_json(cls, data: Any, where: str = "recipe", error: type[SqapError] = InputError) -> Recipe:
        """The recipe that `to_json` wrote, in this version or in version 1.

        Args:
            data: plain data.
            where: names its place in messages.
            error: raised where a key is unknown or missing, or a value is not allowed.
        """
        version = version_of(data, RECIPE_VERSION)
        if version == 1:
            data = from_version1(data)
        elif version != RECIPE_VERSION:  # before the keys, which another version may well have others of
            raise error(f"{where}: {_unknown(version)}")
        recipe: Recipe = from_json(cls, data, where, error)
        return recipe

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return dataclasses.asdict(self)


def _unknown(version: Any) -> str:
    return f"this sqap reads recipe versions 1 and {RECIPE_VERSION}, the recipe is {version}"


def _whole(decoder: Scheme, rest: Scheme = _W4A8) -> Quantization:
    """The quantizer that measured best; see docs/quantizer.md."""
    return Quantization(
        decoder,
        vision=rest,
        projector=rest,
        head=rest,
        rounding="gptq",
        clip=True,
        rotation_seed=0,
        embedding_bits=None,
    )


def _pruning(keep: float) -> Pruning | None:
    """The criterion that measured best; see docs/pruning.md."""
    return None if keep == 1 else Pruning(keep_ratio=keep, after_layer=3)
