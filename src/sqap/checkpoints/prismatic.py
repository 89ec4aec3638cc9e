"""What OpenVLA, OpenVLA-OFT and CogACT share: the Prismatic VLM under them, as names, sizes and constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqap.checkpoints.choices import Choices
from sqap.checkpoints.tokenizer import Vocabulary
from sqap.checkpoints.weights import Source, Table, TensorSet, linear_table, without_batch
from sqap.errors import CheckpointError
from sqap.models import DecoderConfig, HeadConfig, ModelConfig, VisionConfig
from sqap.processing import ImageSteps, Lower, PromptConfig, Template, stretched
from sqap.processing.images import Triple

PROMPT = Lower(), Template("In: What action should the robot take to {instruction}?\nOut:")
VOCABULARY = Vocabulary("Llama 2", first=1)
EOS, SPACE = 2, 29871  # the end of a sequence, and the lone space that stands before actions
# Rows that Prismatic adds to Llama's embedding table, for a padding token and for alignment.
PADDING_ROWS = 64
STATISTICS = "dataset_statistics.json"


@dataclass(frozen=True)
class Encoder:
    """What the tensors of one of timm's vision encoders do not tell."""

    mean: Triple
    std: Triple
    class_token: bool = False
    layer_scale: bool = False


DINO = Encoder((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), class_token=True, layer_scale=True)
SIGLIP = Encoder((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ENCODERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": DINO,
    "vit_so400m_patch14_siglip_224": SIGLIP,
    "vit_so400m_patch14_siglip_384": SIGLIP,
}


@dataclass(frozen=True)
class Backbone:
    """One of Prismatic's pairs of encoders, or a single one."""

    encoders: tuple[str, ...]
    image_size: int


_DINO, _SIGLIP, _SIGLIP_384 = ENCODERS
BACKBONES = {
    "dinosiglip-vit-so-224px": Backbone((_DINO, _SIGLIP), 224),
    "dinosiglip-vit-so-384px": Backbone((_DINO, _SIGLIP_384), 384),
    "siglip-vit-so400m": Backbone((_SIGLIP,), 224),
    "siglip-vit-so400m-384px": Backbone((_SIGLIP_384,), 384),
    "dinov2-vit-l": Backbone((_DINO,), 224),
}
HEADS = 16


@dataclass(frozen=True)
class Names:
    """What a layout calls the parts, each with its dot behind.

    Args:
        fused: two encoders.
        single: one encoder alone.
        projector: its linears, of which a single encoder has but two.
        llm: the language model.
        layer_scale: the gain of a residual branch.
    """

    fused: tuple[str, str]
    single: str
    projector: tuple[str, str, str]
    llm: str
    layer_scale: str

    def vision(self, count: int) -> tuple[str, ...]:
        """Prefixes of one or two encoders."""
        return (self.single,) if count == 1 else self.fused

    def linears(self, count: int) -> tuple[str, ...]:
        """Prefixes of the projector behind one or two encoders."""
        return self.projector[: count + 1]


STEM = {"patch_embed.weight": "patch_embed.proj.weight", "patch_embed.bias": "patch_embed.proj.bias"}
BLOCK = tuple(
    f"{module}.{kind}"
    for module in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
)
LAYER = (
    "input_layernorm.weight",
    *(f"self_attn.{kind}_proj.weight" for kind in "qkvo"),
    "post_attention_layernorm.weight",
    *(f"mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")),
)
ROTARY = "layers.*.rotary_emb.inv_freq"


@dataclass(frozen=True)
class VLM:
    """The vision-language model: its sizes, where its tensors are, and which of them it does not need.

    ``images`` is what is done to an image for each of the vision encoders.
    """

    vision: tuple[VisionConfig, ...]
    images: tuple[ImageSteps, ...]
    projector: tuple[int, ...]
    decoder: DecoderConfig
    table: Table
    unused: tuple[str, ...]


def describe_vlm(
    tensors: TensorSet,
    names: Names,
    vision: Sequence[VisionConfig],
    normalise: Sequence[tuple[Triple, Triple]],
    decoder: DecoderConfig,
) -> VLM:
    """The model of given parts, as ``names`` calls them; ``normalise`` is each encoder's mean and deviation.

    Raises:
        CheckpointError: the projector is missing.
    """
    prefixes, linears = names.vision(len(vision)), names.linears(len(vision))
    table = decoder_table(decoder, f"{names.llm}model.")
    unused = [f"{names.llm}model.{ROTARY}"]
    for i, (prefix, config) in enumerate(zip(prefixes, vision, strict=True)):
        table |= vision_table(config, f"vision.{i}.", prefix, layer_scale=names.layer_scale)
        unused += unused_vision(config, prefix)
    for i, prefix in enumerate(linears):
        table |= linear_table(f"projector.layers.{i}.", prefix)
    widths = tuple(tensors.shape(f"{prefix}weight", 2)[0] for prefix in linears)
    images = tuple(stretched(v.image_size, *how) for v, how in zip(vision, normalise, strict=True))
    return VLM(tuple(vision), images, widths, decoder, table, tuple(unused))


def vision_config(tensors: TensorSet, prefix: str, encoder: Encoder, image_size: int) -> VisionConfig:
    """An encoder's sizes by its tensors' shapes.

    Raises:
        CheckpointError: the tensors that tell them are missing.
    """
    width, _, _, patch = tensors.shape(f"{prefix}patch_embed.proj.weight", 4)
    registers = tensors.shape(f"{prefix}reg_token", 3)[1] if encoder.class_token else 0
    return VisionConfig(
        image_size=image_size,
        patch_size=patch,
        width=width,
        depth=tensors.count(f"{prefix}blocks."),
        heads=HEADS,
        mlp_width=tensors.shape(f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
        class_token=encoder.class_token,
        registers=registers,
        layer_scale=encoder.layer_scale,
        take_block=-2,
        final_norm=False,
    )


def vision_table(
    config: VisionConfig, ours: str, theirs: str, *, layer_scale: str, block: str = "blocks.{}."
) -> Table:
    """Where an encoder's parameters come from; ``block`` is what its blocks are called."""
    table = {ours + name: Source((theirs + source,)) for name, source in STEM.items()}
    tokens = ["pos_embed"] + ["cls_token"] * config.class_token + ["reg_token"] * bool(config.registers)
    table |= {ours + name: Source((theirs + name,), without_batch) for name in tokens}
    scales = ("ls1", "ls2") if config.layer_scale else ()
    for j in range(config.depth - 1):
        mine, other = f"{ours}blocks.{j}.", theirs + block.format(j)
        table |= {mine + name: Source((other + name,)) for name in BLOCK}
        table |= {f"{mine}{n}.scale_factor": Source((f"{other}{n}.{layer_scale}",)) for n in scales}
    return table


def unused_vision(config: VisionConfig, prefix: str) -> list[str]:
    """What nothing reads of an encoder whose last block but one is taken."""
    return [f"{prefix}blocks.{config.depth - 1}.*", f"{prefix}norm.*", f"{prefix}attn_pool.*"]


def decoder_table(config: DecoderConfig, theirs: str) -> Table:
    """Where the decoder's parameters come from."""
    names = ["embed_tokens.weight", "norm.weight"]
    names += [f"layers.{j}.{name}" for j in range(config.depth) for name in LAYER]
    return {f"decoder.{name}": Source((theirs + name,)) for name in names}


def check_one_action(choices: Choices) -> None:
    """Refuse another chunk than OpenVLA's.

    Raises:
        CheckpointError: it was chosen.
    """
    if choices.chunk not in (None, 1):
        raise CheckpointError(f"a step of OpenVLA is one action, and cannot be a chunk of {choices.chunk}")


def prompt(*append: int) -> PromptConfig:
    """Prismatic's question, and the token ids that follow it."""
    return PromptConfig(PROMPT, append=append)


def make_model(
    vlm: VLM, head: HeadConfig, cameras: tuple[str, ...], proprio_dim: int | None = None
) -> ModelConfig:
    """The whole model around a vision-language model."""
    return ModelConfig(
        vision=vlm.vision,
        projector=vlm.projector,
        decoder=vlm.decoder,
        head=head,
        cameras=len(cameras),
        proprio_dim=proprio_dim,
    )
