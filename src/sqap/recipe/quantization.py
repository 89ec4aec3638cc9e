"""Which linears are quantized, and on what grids."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from sqap.errors import InputError

GROUPS = {"group_size": "weight_granularity", "activation_group_size": "activation_granularity"}

WeightGranularity = Literal["channel", "group", "tensor"]
ActivationGranularity = Literal["token", "group", "tensor"]
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
class Quantization:
    """Which linears are quantized, and how.

    Args:
        decoder: grids of the decoder's linears; None leaves them in bfloat16.
        vision: of the vision encoder's; None as the paper does.
        projector: of the projector's.
        head: of the action head's.
        sensitive: of those that the head calls sensitive, which read or write actions
            (`sqap.models.heads.HeadProtocol.sensitive`): few weights, whose errors no later layer corrects.
        overrides: exceptions by name; the first that matches counts.
        rounding: to the nearest level, or by GPTQ (Frantar et al. 2023), which needs calibration frames.
        correction: share, from 0 to 1, of what quantized layers have done to the inputs of a decoder's linear
            that its weights make up for before GPTQ rounds them (QEP, Arai & Ichikawa 2025). All of it would
            fit the calibration frames too closely.
        clip: search each weight scale for the smallest squared error instead of covering the largest weight.
        rotate: Hadamard-rotate the decoder's residual stream, values and inner activations first.
        rotation_seed: of the random signs in those rotations; None for plain Hadamard matrices.
        kv_bits: 4 or 8 bits for keys and values, behind a Hadamard matrix per head; None leaves them.
        embedding_bits: 8 stores the decoder's embedding table as integers with a scale for each row, 16 in
            bfloat16; None is 8 where the table is a tenth of the decoder's layers or more.
    """

    decoder: Scheme | None = Scheme()
    vision: Scheme | None = None
    projector: Scheme | None = None
    head: Scheme | None = None
    sensitive: Scheme | None = None
    overrides: tuple[Override, ...] = ()
    rounding: Rounding = "nearest"
    correction: float = 0.0
    clip: bool = False
    rotate: bool = True
    rotation_seed: int | None = None
    kv_bits: int | None = None
    embedding_bits: int | None = 16

    def __post_init__(self) -> None:
        if not 0 <= self.correction <= 1:
            raise InputError(f"correction must be in [0, 1], got {self.correction}")
        if self.correction and self.rounding != "gptq":
            raise InputError(f"correction {self.correction} needs rounding = 'gptq'")
        if self.kv_bits not in (None, 4, 8):
            raise InputError(f"kv_bits must be 4, 8 or null, got {self.kv_bits}")
        if self.embedding_bits not in (None, 8, 16):
            raise InputError(f"embedding_bits must be 8, 16 or null, got {self.embedding_bits}")
        if self.rotation_seed is not None and (self.rotation_seed < 0 or not self.rotate):
            raise InputError(f"rotation_seed {self.rotation_seed} must be 0 or more, and needs rotate = true")

    def scheme(self, name: str, sensitive: bool = False) -> Scheme | None:
        """The grids of the linear called ``name`` in the model, or None if it is left as it is.

        Args:
            name: its path.
            sensitive: whether the action head calls it so.
        """
        for override in self.overrides:
            if override.matches(name):
                return override.scheme
        part = name.partition(".")[0]
        parts = {"decoder": self.decoder, "vision": self.vision, "projector": self.projector}
        return parts.get(part, (self.sensitive if sensitive else self.head) if part == "head" else None)
