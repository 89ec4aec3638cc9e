"""A recipe: everything that decides how a policy is compressed, as a frozen value and as JSON.

Unknown keys and settings that contradict each other are refused with the reason, so that a recipe
either does what it says or does not exist.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from sqap.errors import InputError
from sqap.serialization import from_json, read_json

RECIPE_VERSION = 1
# The linears that read or write actions, whatever the head: few weights, and nothing behind them to make good
# for their errors.
ACTIONS = "head.x_embedder|head.final_layer|head.fc2|head.lm_head|head.action_*_proj"

GROUPS = {"group_size": "weight_granularity", "activation_group_size": "activation_granularity"}

WeightGranularity = Literal["channel", "group", "tensor"]
ActivationGranularity = Literal["token", "group", "tensor"]
PruningMethod = Literal["sqap", "attention", "random", "uniform"]
ScoreQueries = Literal["text", "last"]
Rounding = Literal["nearest", "gptq"]


@dataclass(frozen=True)
class Scheme:
    """The grids of one linear: uniform, weights symmetric.

    Args:
        weight_bits: 4 or 8.
        activation_bits: 4 or 8; quantized at run time.
        weight_granularity: one scale per output channel, per group of input channels, or per tensor.
        group_size: input channels per scale; only with ``weight_granularity="group"``.
        activation_granularity: one scale per token, per group of a token's channels, or per tensor.
        activation_group_size: channels per scale; only with ``activation_granularity="group"``.
        activation_symmetric: False adds a zero point, which suits inputs that lean to one side, as
            those behind a GELU do.

    Raises:
        InputError: no kernel has these bits, or the settings contradict each other.
    """

    weight_bits: int = 4
    activation_bits: int = 8
    weight_granularity: WeightGranularity = "channel"
    group_size: int | None = None
    activation_granularity: ActivationGranularity = "token"
    activation_group_size: int | None = None
    activation_symmetric: bool = True

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            if getattr(self, name) not in (4, 8):
                raise InputError(f"{name} must be 4 or 8, got {getattr(self, name)}")
        if (self.weight_bits, self.activation_bits) == (8, 4):
            raise InputError("W8A4 is not supported: 4-bit activations need 4-bit weights")
        for size_name, granularity_name in GROUPS.items():
            size, granularity = getattr(self, size_name), getattr(self, granularity_name)
            if (granularity == "group") != (size is not None):
                raise InputError(
                    f"{size_name}={size} contradicts {granularity_name}={granularity!r}; "
                    "a group size goes with granularity 'group' and with no other"
                )
            if size is not None and (size < 2 or size % 2):
                raise InputError(f"{size_name} must be a positive even number, got {size}")


@dataclass(frozen=True)
class Override:
    """Another scheme for some linears.

    Args:
        pattern: matches their names as a shell would, as ``decoder.layers.0.mlp.*``; several patterns are
            separated by ``|``.
        scheme: their grids; None leaves them in bfloat16.
    """

    pattern: str
    scheme: Scheme | None = None

    def matches(self, name: str) -> bool:
        """Whether this is about the linear called ``name``."""
        return any(fnmatchcase(name, pattern) for pattern in self.pattern.split("|"))


@dataclass(frozen=True)
class Quantization(Scheme):
    """Which linears are quantized, and how: the inherited grids are the decoder's.

    Args:
        vision: grids of the vision encoder's linears; None leaves them in bfloat16, as the paper does.
        projector: of the projector's.
        head: of the action head's.
        overrides: exceptions by name; the first that matches counts.
        rounding: to the nearest level, or by GPTQ (Frantar et al. 2023), which needs calibration frames.
        correction: share, from 0 to 1, of what quantized layers have done to the inputs of a decoder's linear
            that its weights make up for before GPTQ rounds them (QEP, Arai & Ichikawa 2025). All of it would
            fit the calibration frames too closely.
        clip: search each weight scale for the smallest squared error instead of covering the largest weight.
        rotate: Hadamard-rotate the decoder's residual stream, values and inner activations first.
        rotation_seed: of the random signs in those rotations; None for plain Hadamard matrices.
        kv_bits: 4 or 8 bits for keys and values, behind a Hadamard matrix per head; None leaves them.
    """

    vision: Scheme | None = None
    projector: Scheme | None = None
    head: Scheme | None = None
    overrides: tuple[Override, ...] = ()
    rounding: Rounding = "nearest"
    correction: float = 0.0
    clip: bool = False
    rotate: bool = True
    rotation_seed: int | None = None
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.correction <= 1:
            raise InputError(f"correction must be in [0, 1], got {self.correction}")
        if self.correction and self.rounding != "gptq":
            raise InputError(f"correction {self.correction} needs rounding = 'gptq'")
        if self.kv_bits not in (None, 4, 8):
            raise InputError(f"kv_bits must be 4, 8 or null, got {self.kv_bits}")
        if self.rotation_seed is not None and (self.rotation_seed < 0 or not self.rotate):
            raise InputError(f"rotation_seed {self.rotation_seed} must be 0 or more, and needs rotate = true")

    def scheme(self, name: str) -> Scheme | None:
        """The grids of the linear called ``name`` in the model, or None if it is left as it is."""
        for override in self.overrides:
            if override.matches(name):
                return override.scheme
        part = name.partition(".")[0]
        if part == "decoder":
            return Scheme(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Scheme)})
        return {"vision": self.vision, "projector": self.projector, "head": self.head}.get(part)


@dataclass(frozen=True)
class Pruning:
    """Which visual tokens go on after decoder layer ``after_layer``.

    The budget is exactly ``round(keep_ratio * N)``. Method ``"sqap"`` fills it with the three criteria of
    the paper: the top tokens by attention of the quantized model, the ring around the end effector, and
    farthest-point sampling for the rest. ``"attention"`` (FastV), ``"random"`` and ``"uniform"`` are the
    baselines.

    Args:
        keep_ratio: share of visual tokens kept, in (0, 1].
        after_layer: number of decoder layers that still see every token; at least 1.
        method: the criterion.
        score_queries: whose attention counts: every token after the image ("text"), or the last alone.
        score_layers: the decoder layers (counted from 0, each below ``after_layer``) whose attention is
            averaged into the scores; None is the last layer that sees every token.
        top_share: largest share of the budget the attention ranking may take; calibration may lower it.
        overlap: the ranking is trusted up to the largest k at which quantized and full-precision top k
            overlap at least this much on the calibration frames.
        ring: inner and outer radius around the projected end effector, as shares of the side of the crop that
            is looked at.
        ring_share: largest share of the budget the ring may take.
    """

    keep_ratio: float = 0.6
    after_layer: int = 2
    method: PruningMethod = "sqap"
    score_queries: ScoreQueries = "text"
    score_layers: tuple[int, ...] | None = None
    top_share: float = 0.5
    overlap: float = 0.8
    ring: tuple[float, float] = (0.05, 0.2)
    ring_share: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise InputError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}")
        if self.after_layer < 1:
            raise InputError(f"after_layer must be at least 1, got {self.after_layer}")
        if self.score_layers is not None:
            outside = [layer for layer in self.score_layers if not 0 <= layer < self.after_layer]
            if outside or not self.score_layers:
                raise InputError(
                    f"score_layers {list(self.score_layers)} must name layers from 0 to "
                    f"{self.after_layer - 1}: those that see every token, with after_layer {self.after_layer}"
                )
        for name in ("top_share", "overlap", "ring_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.top_share + self.ring_share > 1:
            raise InputError(
                f"top_share {self.top_share} and ring_share {self.ring_share} add up to more than the budget"
            )
        if not 0 <= self.ring[0] < self.ring[1]:
            raise InputError(f"ring must be (inner, outer) with 0 <= inner < outer, got {self.ring}")

    def budget(self, tokens: int) -> int:
        """Exactly how many of ``tokens`` visual tokens are kept.

        Raises:
            InputError: the ratio is so small that none would be.
        """
        kept = round(self.keep_ratio * tokens)
        if kept < 1:
            raise InputError(
                f"keep_ratio {self.keep_ratio} keeps none of {tokens} visual tokens; "
                f"{1 / tokens:.4g} keeps one"
            )
        return kept


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
        _check_version(self.version)

    @classmethod
    def w4a8(cls, keep: float = 0.6) -> Recipe:
        """4-bit weights, 8-bit activations, the whole policy; fast on CPUs."""
        return cls(_whole(Scheme(4, 8)), _pruning(keep))

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
        return cls(Quantization(4, 4), Pruning(keep_ratio=0.6, after_layer=2))

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON file.

        Raises:
            InputError: the file is missing, is not JSON, or is not a valid recipe.
        """
        return cls.from_json(read_json(Path(path), InputError))

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            InputError: a key is unknown or missing, or a value is not allowed.
        """
        version = data.get("version", RECIPE_VERSION) if isinstance(data, dict) else RECIPE_VERSION
        _check_version(version)  # before the keys, which another version may well have others of
        recipe: Recipe = from_json(cls, data, "recipe", InputError)
        return recipe

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return dataclasses.asdict(self)


def _check_version(version: Any) -> None:
    if version != RECIPE_VERSION:
        raise InputError(f"this sqap reads recipe version {RECIPE_VERSION}, the recipe is {version}")


def _whole(decoder: Scheme) -> Quantization:
    """The quantizer that measured best; see docs/quantizer.md."""
    rest = Scheme(4, 8)
    return Quantization(
        **dataclasses.asdict(decoder),
        vision=rest,
        projector=rest,
        head=rest,
        overrides=(Override(ACTIONS),),
        rounding="gptq",
        clip=True,
        rotation_seed=0,
    )


def _pruning(keep: float) -> Pruning | None:
    """The mix of criteria that measured best on the reference policy; see docs/naive-vs-designed.md."""
    if keep == 1:
        return None
    return Pruning(keep_ratio=keep, score_layers=(0, 1), top_share=0.25, ring_share=0.1)
