"""Sizes and variants of the four parts. A supported policy is one `ModelConfig`, never new code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqap.errors import InputError


@dataclass(frozen=True)
class VisionConfig:
    """One ViT encoder.

    ``take_block`` is the block whose output becomes the visual tokens, counted as Python does: -1 the
    last one, -2 the one before (what OpenVLA and CogACT read). ``mean`` and ``std`` normalise pixels
    in [0, 1]. ``stem`` is a single patch convolution, or early convolutions for policies trained from
    scratch (Xiao et al. 2021). Positions belong to patches alone, as in timm's DINOv2 with registers: a class
    token's would be a constant added to a constant. ``film`` lets the instruction modulate every block, as in
    OpenVLA-OFT+.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    stem: Literal["patch", "convolutions"] = "patch"
    class_token: bool = False
    registers: int = 0
    layer_scale: bool = False
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    norm_eps: float = 1e-6
    take_block: int = -1
    final_norm: bool = True
    film: bool = False

    def __post_init__(self) -> None:
        if self.patch_size < 1:
            raise InputError(f"patch_size must be at least 1, got {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-style decoder.

    ``vocabulary`` counts the rows of the embedding table. Without ``causal`` every token sees every other, as
    in OpenVLA-OFT's parallel decoding.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    causal: bool = True


@dataclass(frozen=True)
class DiffusionHeadConfig:
    """CogACT's action head: a DiT on noisy action chunks, conditioned on the cognition token."""

    action_dim: int
    horizon: int
    width: int
    depth: int
    heads: int
    train_steps: int = 100
    sample_steps: int = 10
    guidance: float = 1.5
    kind: Literal["diffusion"] = "diffusion"

    def __post_init__(self) -> None:
        if not 1 <= self.sample_steps <= self.train_steps:
            raise InputError(f"sample_steps must be from 1 to {self.train_steps}, got {self.sample_steps}")


@dataclass(frozen=True)
class TokenHeadConfig:
    """OpenVLA's actions: one token of the language model per dimension, decoded one after the other.

    The ids right below ``last_token`` stand for the ``bins - 1`` centres of [-1, 1] cut at ``bins`` points,
    the first centre for the highest id. ``vocabulary`` counts the rows of the output matrix.
    """

    action_dim: int
    vocabulary: int
    bins: int = 256
    last_token: int = 32_000
    kind: Literal["tokens"] = "tokens"

    @property
    def horizon(self) -> int:
        """One action at a time."""
        return 1


@dataclass(frozen=True)
class RegressionHeadConfig:
    """OpenVLA-OFT's actions: a residual MLP reads all dimensions of an action off the decoder in parallel."""

    action_dim: int
    horizon: int
    width: int
    depth: int = 2
    kind: Literal["regression"] = "regression"


@dataclass(frozen=True)
class FlowHeadConfig:
    """SmolVLA's actions: an expert as deep as the decoder, but narrower, that moves noise along a flow.

    Every ``self_attention_every``-th of its layers, from the first one on, lets action tokens see each
    other; the others make keys and values of the decoder's alone. Time, from 0 to 1, is told by sines of
    periods from ``min_period`` to ``max_period``.
    """

    action_dim: int
    horizon: int
    width: int
    mlp_width: int
    self_attention_every: int = 2
    sample_steps: int = 10
    min_period: float = 4e-3
    max_period: float = 4.0
    kind: Literal["flow"] = "flow"


HeadConfig = DiffusionHeadConfig | TokenHeadConfig | RegressionHeadConfig | FlowHeadConfig


@dataclass(frozen=True)
class ModelConfig:
    """A whole policy.

    ``projector`` lists the output widths of its linears; GELU stands between them. ``pixel_shuffle`` r makes
    one visual token of each r x r square of patches, as in SmolVLM. Every one of ``cameras`` images goes
    through the same encoders; ``proprio_dim`` numbers of the robot's state become one more token, by
    ``proprio_layers`` linears. The sequence begins with BOS, images and state; with ``image_first``, as in
    SmolVLA, with the images, and ends with the state.
    """

    vision: tuple[VisionConfig, ...]
    projector: tuple[int, ...]
    decoder: DecoderConfig
    head: HeadConfig
    pixel_shuffle: int = 1
    cameras: int = 1
    proprio_dim: int | None = None
    proprio_layers: int = 2
    image_first: bool = False

    def __post_init__(self) -> None:
        if not self.vision:
            raise InputError("vision must name at least one encoder")
        if isinstance(self.head, FlowHeadConfig) != self.image_first or (
            self.image_first and (self.proprio_dim is None or self.decoder.causal)
        ):
            raise InputError(
                "a flow-matching head goes with image_first, a robot's state and a decoder that is not causal"
            )
        if self.pixel_shuffle < 1 or self.vision[0].grid % self.pixel_shuffle:
            raise InputError(
                f"pixel_shuffle {self.pixel_shuffle} does not divide a grid of {self.vision[0].grid} patches"
            )

    @property
    def grid(self) -> int:
        """Visual tokens along one side of an image."""
        return self.vision[0].grid // self.pixel_shuffle

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all images; several encoders see the same patches and are concatenated."""
        return self.cameras * self.grid**2

    @property
    def visual(self) -> slice:
        """Where the visual tokens are in the decoder's sequence."""
        start = 0 if self.image_first else 1
        return slice(start, start + self.visual_tokens)
