"""SmolVLA as LeRobot publishes it: SmolVLM2's first layers, and a flow-matching expert."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from sqap.checkpoints import lerobot
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.known_keys import SMOLVLA
from sqap.checkpoints.lerobot import Defaults, LeRobotConfig
from sqap.checkpoints.opened import Opened
from sqap.checkpoints.tokenizer import Vocabulary
from sqap.checkpoints.weights import Source, Table, TensorSet, linear_table, scaled
from sqap.config import PolicyConfig
from sqap.errors import CheckpointError
from sqap.models import DecoderConfig, ModelConfig, VisionConfig
from sqap.processing import Normalize, ResizeWithPad, Scale

FAMILY, TYPES = "SmolVLA", ("smolvla",)
# Its tokenizer fills the table; one that is far from that is another's.
VOCABULARY = Vocabulary("SmolVLM2", first=None, spare=1024)
DEFAULTS = Defaults(
    modes={"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    longest=48,
    tokenizer="HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
)
# SmolVLM2's, which no file of the checkpoint says: channels of a head, of vision and text alike. The rotary
# base is LeRobot's own, whatever SmolVLM2's configuration says.
HEAD_DIM, NORM_EPS = 64, 1e-5
BOTH = "model.vlm_with_expert."
VISION, TEXT = f"{BOTH}vlm.model.vision_model.", f"{BOTH}vlm.model.text_model."
CONNECTOR = f"{BOTH}vlm.model.connector.modality_projection.proj.weight"
OUTPUT = f"{BOTH}vlm.lm_head.weight"
EXPERT = f"{BOTH}lm_expert."
PROJECTIONS = ("action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj")


def recognise(directory: Path) -> bool:
    """Whether ``directory`` is SmolVLA's."""
    return lerobot.is_type(directory, TYPES)


def open(directory: Path, choices: Choices) -> Opened:
    """Open a directory that was recognised.

    Raises:
        CheckpointError: something is missing, damaged, does not fit or is not supported.
    """
    choices.refuse(FAMILY, "chunk", "bounds", "ema", "film")
    config = lerobot.read_config(directory, SMOLVLA)
    if config.state_dim is None:
        raise CheckpointError(f"{config.path}: input_features has no observation.state, which {FAMILY} reads")
    tensors = lerobot.open_weights(directory)
    around = lerobot.read_around(directory, config, tensors, choices, DEFAULTS)
    vision = lerobot.read_vision(tensors, VISION, HEAD_DIM)
    config.square("resize_imgs_with_padding", vision.image_size)
    model = _model(config, tensors, vision, len(around.cameras))
    policy = PolicyConfig(
        family="smolvla",
        model=model,
        cameras=around.cameras,
        images=((Scale(), ResizeWithPad(vision.image_size, "bottom_right"), Normalize()),),
        actions=around.actions,
        prompt=around.prompt,
        state=lerobot.padded(around.state, config.padded_state),
        n_action_steps=config.n_action_steps,
    )
    table = _table(model, tensors)
    return lerobot.open_policy(directory, choices, policy, around, VOCABULARY, tensors, table)


def _model(config: LeRobotConfig, tensors: TensorSet, vision: VisionConfig, cameras: int) -> ModelConfig:
    decoder = _decoder(config, tensors)
    shuffled = tensors.shape(CONNECTOR, 2)[1]
    side = math.isqrt(shuffled // vision.width)
    if side**2 * vision.width != shuffled or not side or vision.grid % side:
        raise CheckpointError(
            f"{tensors.where}: {CONNECTOR} reads {shuffled} channels, which are no square of patches of "
            f"{vision.width} that divides a grid of {vision.grid}"
        )
    return ModelConfig(
        vision=(vision,),
        projector=(decoder.width,),
        decoder=decoder,
        head=lerobot.read_head(
            config,
            tensors,
            EXPERT,
            decoder,
            "num_steps",
            self_attention_every=_self_attention_every(config),
        ),
        pixel_shuffle=side,
        cameras=cameras,
        proprio_dim=config.padded_state,
        proprio_layers=1,
        image_first=True,
        projector_bias=False,
    )


def _decoder(config: LeRobotConfig, tensors: TensorSet) -> DecoderConfig:
    rows, width = tensors.shape(lerobot.table_name(tensors, f"{TEXT}embed_tokens.weight", OUTPUT), 2)
    layers = f"{TEXT}layers."
    queries, keys = (tensors.shape(f"{layers}0.self_attn.{kind}_proj.weight", 2)[0] for kind in "qk")
    heads, kv_heads = queries // HEAD_DIM, keys // HEAD_DIM
    if (heads * HEAD_DIM, kv_heads * HEAD_DIM) != (queries, keys) or not kv_heads or heads % kv_heads:
        raise CheckpointError(
            f"{tensors.where}: the language model is no SmolVLM2, whose heads are {HEAD_DIM} wide: it has "
            f"queries of {queries} channels and keys of {keys}"
        )
    depth = tensors.count(layers)
    for name in ("num_vlm_layers", "num_expert_layers"):
        said = config.data.get(name)
        if said is not None and (type(said) is not int or (said > 0 and said != depth)):
            raise CheckpointError(
                f"{config.path}: {name} is {said!r}, but there are {depth} layers of the language model, and "
                "an expert of as many is supported"
            )
    return DecoderConfig(
        vocabulary=rows,
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        mlp_width=tensors.shape(f"{layers}0.mlp.gate_proj.weight", 2)[0],
        norm_eps=NORM_EPS,
        causal=False,
        embed_scale=width**0.5,
        last_layer="keys_values",
    )


def _self_attention_every(config: LeRobotConfig) -> int:
    """After how many layers of the expert its tokens see each other again."""
    mode, every = (
        config.data.get("attention_mode", "cross_attn"),
        config.data.get("self_attn_every_n_layers", 2),
    )
    if type(mode) is not str or type(every) is not int:
        raise CheckpointError(
            f"{config.path}: attention_mode must be a name, self_attn_every_n_layers a number"
        )
    if "cross" not in mode:
        return 1
    if every < 1:
        raise CheckpointError(
            f"{config.path}: self_attn_every_n_layers is {every}, by which no layer of the expert has "
            "self-attention; supported are 1 and more"
        )
    return every


def _table(model: ModelConfig, tensors: TensorSet) -> Table:
    (vision,), decoder = model.vision, model.decoder
    # LeRobot scales what the connector gives, and not the state.
    scale = partial(scaled, by=decoder.embed_scale)
    return {
        **lerobot.vision_table(vision, "vision.0.", VISION),
        "projector.layers.0.weight": Source((CONNECTOR,), scale),
        **linear_table("proprio.layers.0.", "model.state_proj."),
        "decoder.embed_tokens.weight": lerobot.embedding(tensors, f"{TEXT}embed_tokens.weight", OUTPUT),
        **lerobot.layers_table(decoder.depth, "decoder.", TEXT),
        "decoder.norm.weight": Source((f"{TEXT}norm.weight",)),
        **lerobot.layers_table(decoder.depth, "head.", EXPERT),
        "head.norm.weight": Source((f"{EXPERT}norm.weight",)),
        **{k: s for name in PROJECTIONS for k, s in linear_table(f"head.{name}.", f"model.{name}.").items()},
    }
