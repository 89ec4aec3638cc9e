"""Sizes and variants of the four parts. A supported policy is one `ModelConfig`, never new code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from sqap.errors import InputError
from sqap.models.layout import Layout, Segment


@dataclass(frozen=True)
class VisionConfig:
    """One ViT encoder.

    ``take_block`` is the block whose output becomes the visual tokens, counted as Python does: -1 the
    last one, -2 the one before (what OpenVLA and CogACT read). ``stem`` is a single patch convolution, or
    early convolutions for policies trained from scratch (Xiao et al. 2021). Positions belong to patches
    alone, as in timm's DINOv2 with registers: a class token's would be a constant added to a constant.
    ``film`` lets the instruction modulate every block, as in OpenVLA-OFT+.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
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

    ``vocabulary`` counts the rows of the embedding table, whose rows are multiplied by ``embed_scale``: the
    square root of the width in SmolVLA and Gemma. Without ``causal`` every token sees every other, as in
    OpenVLA-OFT's parallel decoding.
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
    embed_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.embed_scale <= 0:
            raise InputError(f"embed_scale must be positive, got {self.embed_scale}")


class HeadSettings:
    """What a head's configuration tells the rest of the model; these are the answers of most heads."""

    noisy: ClassVar[bool] = False
    """Whether actions are sampled: their chunks then begin as noise."""

    has_expert: ClassVar[bool] = False
    """Whether actions are tokens of an expert that reads the keys and values of every decoder layer."""

    @property
    def placeholders(self) -> int:
        """Empty tokens in the decoder's sequence that actions are read from."""
        return 0

    def faults(self) -> Iterator[str]:
        """What is wrong with it, a clause each, but for sizes that are not positive."""
        return iter(())


@dataclass(frozen=True)
class DiffusionHeadConfig(HeadSettings):
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
    noisy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.sample_steps <= self.train_steps:
            raise InputError(f"sample_steps must be from 1 to {self.train_steps}, got {self.sample_steps}")

    def faults(self) -> Iterator[str]:
        if self.width % self.heads:
            yield f": {self.heads} heads do not share a width of {self.width} evenly"


@dataclass(frozen=True)
class TokenHeadConfig(HeadSettings):
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

    def faults(self) -> Iterator[str]:
        if not self.bins - 1 <= self.last_token < self.vocabulary:
            yield f": {self.bins} bins up to token {self.last_token} are not among {self.vocabulary} tokens"
        if self.bins < 2:
            yield f".bins must be at least 2, got {self.bins}"


@dataclass(frozen=True)
class RegressionHeadConfig(HeadSettings):
    """OpenVLA-OFT's actions: a residual MLP reads all dimensions of an action off the decoder in parallel."""

    action_dim: int
    horizon: int
    width: int
    depth: int = 2
    kind: Literal["regression"] = "regression"

    @property
    def placeholders(self) -> int:
        return self.horizon * self.action_dim


@dataclass(frozen=True)
class FlowHeadConfig(HeadSettings):
    """SmolVLA's actions: an expert as deep as the decoder, but narrower, that moves noise along a flow.

    Every ``self_attention_every``-th of its layers, from the first one on, lets action tokens see each
    other, with ``causal_actions`` those before themselves alone; the others make keys and values of the
    decoder's alone. Time, from 0 to 1, is told by sines of periods from ``min_period`` to ``max_period``.
    """

    action_dim: int
    horizon: int
    width: int
    mlp_width: int
    self_attention_every: int = 2
    sample_steps: int = 10
    min_period: float = 4e-3
    max_period: float = 4.0
    causal_actions: bool = True
    kind: Literal["flow"] = "flow"
    noisy: ClassVar[bool] = True
    has_expert: ClassVar[bool] = True

    def faults(self) -> Iterator[str]:
        if not 0 < self.min_period < self.max_period:
            yield ": min_period must be positive and less than max_period"


HeadConfig = DiffusionHeadConfig | TokenHeadConfig | RegressionHeadConfig | FlowHeadConfig


@dataclass(frozen=True)
class ModelConfig:
    """A whole policy.

    ``projector`` lists the output widths of its linears, which have biases if ``projector_bias``; GELU stands
    between them. ``pixel_shuffle`` r makes one visual token of each r x r square of patches, as in SmolVLM.
    Every one of ``cameras`` images goes through the same encoders; ``proprio_dim`` numbers of the robot's
    state become one more token, by ``proprio_layers`` linears. The sequence begins with BOS, images and
    state; with ``image_first``, as in SmolVLA, with the images, and ends with the state. ``state_in`` says
    whose token the state is: the decoder's, the action expert's (pi0), or none, since the text tells it
    (pi0.5).
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
    state_in: Literal["decoder", "expert", "text"] = "decoder"
    projector_bias: bool = True

    def __post_init__(self) -> None:
        if not self.vision:
            raise InputError("vision must name at least one encoder")
        if self.state_in == "expert" and not self.head.has_expert:
            raise InputError("state_in 'expert' needs an action expert, which only a flow-matching head has")
        if self.image_first and self.head.placeholders:
            raise InputError("a head that reads placeholders stands behind BOS: image_first must be false")
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
    def least_text(self) -> int:
        """Text tokens that a sequence needs, BOS and the end among them."""
        return 1 if self.image_first else 2

    @property
    def visual(self) -> slice:
        """Where the visual tokens are in the decoder's sequence."""
        return self.layout(self.least_text).span("visual")

    def layout(self, text_tokens: int) -> Layout:
        """The order of the tokens, the action expert's included, for so many ``text_tokens``."""
        visual, in_decoder = Segment("visual", self.visual_tokens), self.state_in == "decoder"
        states = [Segment("state", 1, int(self.image_first))] if self.proprio_dim and in_decoder else []
        if self.image_first:
            order = [visual, Segment("text", text_tokens), *states]
        else:
            slots = self.head.placeholders
            end = [Segment("actions", slots), Segment("end", 1)] if slots else []
            text = Segment("text", text_tokens - 1 - bool(end))
            order = [Segment("bos", 1), visual, *states, text, *end]
        order = [replace(segment, causal=self.decoder.causal) for segment in order]
        if isinstance(self.head, FlowHeadConfig):  # the only one with an expert
            block = order[-1].block + 1
            if self.proprio_dim and self.state_in == "expert":
                order.append(Segment("state", 1, block, expert=True))
                block += 1
            order.append(Segment("actions", self.head.horizon, block, self.head.causal_actions, expert=True))
        return Layout(tuple(order))
