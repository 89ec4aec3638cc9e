"""pi0 and pi0.5 as LeRobot publishes them: PaliGemma, and a flow-matching expert beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sqap.checkpoints import lerobot
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.known_keys import PI
from sqap.checkpoints.lerobot import Around, Defaults, LeRobotConfig
from sqap.checkpoints.opened import Opened
from sqap.checkpoints.prismatic import LAYER
from sqap.checkpoints.tokenizer import Vocabulary
from sqap.checkpoints.weights import Source, Table, TensorSet, linear_table
from sqap.config import PolicyConfig
from sqap.errors import CheckpointError
from sqap.models import DecoderConfig, ModelConfig, VisionConfig
from sqap.processing import EndWith, Normalize, ResizeWithPad, Scale, TextStep

# PaliGemma's tokens fill the table.
VOCABULARY = Vocabulary("PaliGemma", first=2, spare=1024)
# SigLIP's heads, which do not follow from its tensors; Gemma's follow, since keys have one head.
VISION_HEADS, NORM_EPS = 16, 1e-6
BOTH = "model.paligemma_with_expert."
PALIGEMMA, EXPERT = f"{BOTH}paligemma.model.", f"{BOTH}gemma_expert.model."
VISION, TEXT = f"{PALIGEMMA}vision_tower.vision_model.", f"{PALIGEMMA}language_model."
OUTPUT = f"{BOTH}paligemma.lm_head.weight"
# Files from before LeRobot 0.4.0 have other names, and were made for images that are padded otherwise.
OLD_TEXT = f"{BOTH}paligemma.language_model."
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Kind:
    """One of the two policies.

    Args:
        name: for messages.
        family: as a policy's configuration has it.
        linears: of the head, besides those that read and write actions.
        defaults: what it does where no files say it.
    """

    name: str
    family: str
    linears: tuple[str, ...]
    defaults: Defaults


def _defaults(mode: str, longest: int, steps: tuple[TextStep, ...]) -> Defaults:
    modes = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    return Defaults(modes, longest, "google/paligemma-3b-pt-224", steps)


PI0 = Kind(
    "pi0",
    "pi0",
    ("action_time_mlp_in", "action_time_mlp_out", "state_proj"),
    _defaults("MEAN_STD", 48, (EndWith("\n"),)),
)
PI05 = Kind(
    "pi0.5", "pi05", ("time_mlp_in", "time_mlp_out"), _defaults("QUANTILES", 200, lerobot.STATE_PROMPT)
)
TYPES = {"pi0": PI0, "pi05": PI05}


def recognise(directory: Path) -> bool:
    """Whether ``directory`` is pi0's or pi0.5's."""
    return lerobot.is_type(directory, (*TYPES,))


def open(directory: Path, choices: Choices) -> Opened:
    """Open a directory that was recognised.

    Raises:
        CheckpointError: something is missing, damaged, does not fit or is not supported.
    """
    config = lerobot.read_config(directory, PI)
    kind = TYPES[config.data["type"]]
    choices.refuse(kind.name, "chunk", "bounds", "ema", "film")
    tensors = lerobot.open_weights(directory)
    check_names(tensors, kind)
    around = lerobot.read_around(directory, config, tensors, choices, kind.defaults)
    if around.prompt.tells_state != (kind is PI05):
        which = "must have" if kind is PI05 else "must not have"
        raise CheckpointError(f"{directory}: {kind.name} {which} the step {lerobot.STATE_TEXT}")
    return assemble(directory, choices, config, tensors, kind, around)


def assemble(
    directory: Path,
    choices: Choices,
    config: LeRobotConfig,
    tensors: TensorSet,
    kind: Kind,
    around: Around,
) -> Opened:
    """Open a policy of which it is known what is around its model.

    Raises:
        CheckpointError: tensors are missing, damaged or do not fit.
    """
    vision = lerobot.read_vision(tensors, VISION, heads=VISION_HEADS)
    config.square("image_resolution", vision.image_size)
    model = _model(config, tensors, vision, kind, len(around.cameras))
    policy = PolicyConfig(
        family=kind.family,
        model=model,
        cameras=around.cameras,
        images=((Scale(), ResizeWithPad(vision.image_size, "center"), Normalize()),),
        actions=around.actions,
        prompt=around.prompt,
        state=around.state if kind is PI05 else lerobot.padded(around.state, config.padded_state),
        n_action_steps=config.n_action_steps,
    )
    table = _table(model, tensors, kind)
    return lerobot.open_policy(directory, choices, policy, around, VOCABULARY, tensors, table)


def one_more(weight: Tensor) -> Tensor:
    """A norm's gain, of which Gemma stores what it is above 1; in 32 bits."""
    return 1 + weight.float()


def check_names(tensors: TensorSet, kind: Kind) -> None:
    """Refuse tensors of the other policy, or of an old layout.

    Raises:
        CheckpointError: they are.
    """
    if any(name.startswith(OLD_TEXT) for name in tensors.tensors):
        raise CheckpointError(
            f"{tensors.where} has pi0's tensors as LeRobot named them before 0.4.0, when images were padded "
            "otherwise; take the policy that was converted anew, as lerobot/pi0_base"
        )
    other = PI0 if kind is PI05 else PI05
    found, missed = (f"model.{each.linears[0]}.weight" in tensors.tensors for each in (other, kind))
    if found and not missed:
        raise CheckpointError(
            f"{tensors.where}: its config.json says {kind.name}, and its tensors are {other.name}'s"
        )


def _model(
    config: LeRobotConfig, tensors: TensorSet, vision: VisionConfig, kind: Kind, cameras: int
) -> ModelConfig:
    decoder = _decoder(tensors)
    in_text = kind is PI05
    return ModelConfig(
        vision=(vision,),
        projector=(decoder.width,),
        decoder=decoder,
        head=lerobot.read_head(
            config,
            tensors,
            EXPERT,
            decoder,
            "num_inference_steps",
            self_attention_every=1,
            causal_actions=False,
            adaptive_norms=in_text,
        ),
        cameras=cameras,
        proprio_dim=None if in_text else config.padded_state,
        proprio_layers=1,
        image_first=True,
        state_in="text" if in_text else "expert",
    )


def _decoder(tensors: TensorSet) -> DecoderConfig:
    rows, width = tensors.shape(lerobot.table_name(tensors, f"{TEXT}embed_tokens.weight", OUTPUT), 2)
    layers = f"{TEXT}layers."
    queries, head_dim = (tensors.shape(f"{layers}0.self_attn.{kind}_proj.weight", 2)[0] for kind in "qk")
    if head_dim == 0 or head_dim % 2 or queries % head_dim:
        raise CheckpointError(
            f"{tensors.where}: the language model is no Gemma, whose heads share one of keys: it has queries "
            f"of {queries} channels and keys of {head_dim}"
        )
    return DecoderConfig(
        vocabulary=rows,
        width=width,
        depth=tensors.count(layers),
        heads=queries // head_dim,
        kv_heads=1,
        head_dim=head_dim,
        mlp_width=tensors.shape(f"{layers}0.mlp.gate_proj.weight", 2)[0],
        norm_eps=NORM_EPS,
        causal=False,
        embed_scale=width**0.5,
        activation="gelu_tanh",
        last_layer="keys_values",
    )


def _table(model: ModelConfig, tensors: TensorSet, kind: Kind) -> Table:
    (vision,), decoder = model.vision, model.decoder
    linears = ("action_in_proj", *kind.linears, "action_out_proj")
    return {
        **lerobot.vision_table(vision, "vision.0.", VISION),
        **linear_table("projector.layers.0.", f"{PALIGEMMA}multi_modal_projector.linear."),
        "decoder.embed_tokens.weight": lerobot.embedding(tensors, f"{TEXT}embed_tokens.weight", OUTPUT),
        **lerobot.layers_table(decoder.depth, "decoder.", TEXT, one_more),
        "decoder.norm.weight": Source((f"{TEXT}norm.weight",), one_more),
        **_expert_table(decoder.depth, adaptive=kind is PI05),
        **{k: s for name in linears for k, s in linear_table(f"head.{name}.", f"model.{name}.").items()},
    }


def _expert_table(depth: int, *, adaptive: bool) -> Table:
    if not adaptive:
        layers = lerobot.layers_table(depth, "head.", EXPERT, one_more)
        return layers | {"head.norm.weight": Source((f"{EXPERT}norm.weight",), one_more)}
    table = lerobot.layers_table(
        depth, "head.", EXPERT, names=tuple(n for n in LAYER if "layernorm" not in n)
    )
    norms = [f"layers.{i}.{name}" for i in range(depth) for name in NORMS]
    for name in (*norms, "norm"):
        table |= linear_table(f"head.{name}.dense.", f"{EXPERT}{name}.dense.")
    return table
