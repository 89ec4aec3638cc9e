"""Prismatic's own layout: ``config.json`` with a base VLM, statistics, and one file of ``torch.save``.

CogACT is published in it; so is OpenVLA as it came out of training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sqap.checkpoints import prismatic
from sqap.checkpoints.choices import Choices, choose_cameras
from sqap.checkpoints.dataset_statistics import Dataset, check_length, choose_dataset, read_range
from sqap.checkpoints.opened import CONFIG, Opened, open_published
from sqap.checkpoints.pickles import torch_file
from sqap.checkpoints.prismatic import VLM, VOCABULARY, Backbone, Names
from sqap.checkpoints.tensors import shorten
from sqap.checkpoints.weights import Part, Source, Table, TensorSet, linear_table
from sqap.config import PolicyConfig
from sqap.errors import CheckpointError
from sqap.models import DecoderConfig, DiffusionHeadConfig, TokenHeadConfig, VisionConfig
from sqap.processing import Binarize, Clamp
from sqap.serialization import read_object

FAMILY = "CogACT"
CAMERAS = ("image",)
CHECKPOINTS, LATEST = "checkpoints", "latest-checkpoint.pt"
# The VLMs whose images are stretched and whose language model is prompted as a plain Llama 2.
BASE_VLMS = {
    "prism-dinosiglip-224px+7b": "dinosiglip-vit-so-224px",
    "prism-dinosiglip-224px-controlled+7b": "dinosiglip-vit-so-224px",
    "prism-dinosiglip+7b": "dinosiglip-vit-so-384px",
    "prism-dinosiglip-controlled+7b": "dinosiglip-vit-so-384px",
    "prism-dinosiglip+13b": "dinosiglip-vit-so-384px",
    "prism-dinosiglip-controlled+13b": "dinosiglip-vit-so-384px",
    "prism-siglip+7b": "siglip-vit-so400m-384px",
    "prism-siglip-controlled+7b": "siglip-vit-so400m-384px",
    "prism-siglip-controlled+13b": "siglip-vit-so400m-384px",
}
NAMES = Names(
    fused=("model.vision_backbone.dino_featurizer.", "model.vision_backbone.siglip_featurizer."),
    single="model.vision_backbone.featurizer.",
    projector=(
        "model.projector.projector.0.",
        "model.projector.projector.2.",
        "model.projector.projector.4.",
    ),
    llm="model.llm_backbone.llm.",
    layer_scale="gamma",
)
ACTION_MODEL, EMA = "model.action_model.net.", "model.ema_diffusion.net."
UNUSED = ("optimizer.*",)
# Llama 2 as its own authors publish it, which is where Prismatic takes these from.
HEAD_DIM, NORM_EPS = 128, 1e-5
# CogACT-Small, -Base and -Large; the second has heads of 64, the first and the third do not follow from it.
DIT_HEADS = {384: 4, 768: 12, 1024: 16}
DIT_HEAD_DIM = 64
GRIPPER = 6
DIT = {
    "x_embedder.": "x_embedder.linear.",
    "t_embedder.0.": "t_embedder.mlp.0.",
    "t_embedder.2.": "t_embedder.mlp.2.",
    "z_embedder.": "z_embedder.linear.",
    "final_layer.": "final_layer.linear.",
}
DIT_BLOCK = ("attn.qkv.", "attn.proj.", "mlp.fc1.", "mlp.fc2.")
logger = logging.getLogger("sqap")


def recognise(directory: Path) -> bool:
    """Whether ``directory`` is a training run of Prismatic's, as CogACT is published."""
    return _base_vlm(read_object(directory / CONFIG, CheckpointError)) is not None


def open(directory: Path, choices: Choices) -> Opened:
    """Open a directory that was recognised: CogACT, or OpenVLA if it has no action model.

    Raises:
        CheckpointError: something is missing, damaged, does not fit or is not supported.
    """
    names = choose_cameras(choices.cameras, CAMERAS, (1,), FAMILY)
    choices.refuse(FAMILY, "bounds", "film")
    backbone = _backbone(directory)
    where = directory / prismatic.STATISTICS
    dataset = choose_dataset(read_object(where, CheckpointError), choices.unnorm_key, where)
    tensors = TensorSet(directory, [Part(torch_file(_find_checkpoint(directory)))])
    encoders = [prismatic.ENCODERS[name] for name in backbone.encoders]
    vision, normalise = _vision(tensors, backbone), [(encoder.mean, encoder.std) for encoder in encoders]
    vlm = prismatic.describe_vlm(tensors, NAMES, vision, normalise, _decoder(tensors))
    if any(name.startswith(ACTION_MODEL) for name in tensors.tensors):
        choices.refuse(FAMILY, "chunk")
        policy, table, unused = _cogact(vlm, tensors, dataset, names, _action_model(tensors, choices.ema))
    else:
        choices.refuse("OpenVLA", "ema")
        prismatic.check_one_action(choices)
        policy, table, unused = _openvla(vlm, tensors, dataset, names)
    return open_published(
        directory, choices, policy, VOCABULARY, tensors, vlm.table | table, (*vlm.unused, *UNUSED, *unused)
    )


def _action_model(tensors: TensorSet, ema: bool) -> str:
    """The raw action model, as the authors' loader takes unless it is told, or the averaged one."""
    averaged = any(name.startswith(EMA) for name in tensors.tensors)
    if ema and not averaged:
        raise CheckpointError(f"{tensors.where} has no averaged action model (ema_diffusion) to take")
    if averaged and not ema:
        logger.warning(
            "%s: the raw action model is read, as its authors' loader does; the averaged one beside it is "
            "read with ema (--ema)",
            tensors.where,
        )
    return EMA if ema else ACTION_MODEL


def _cogact(
    vlm: VLM, tensors: TensorSet, dataset: Dataset, cameras: tuple[str, ...], net: str
) -> tuple[PolicyConfig, Table, tuple[str, ...]]:
    """CogACT's policy, its head's tensors, and what it does not use."""
    head = _head(tensors, net)
    _check_head(head, tensors.where / CONFIG)
    # Upstream makes the seventh number, the gripper's, 0 or 1 whatever the dataset.
    binarize = (Binarize((GRIPPER,)),) if head.action_dim > GRIPPER else ()
    actions = read_range(dataset, "action")
    check_length(dataset, "actions", actions.width, head.action_dim)
    policy = PolicyConfig(
        family="cogact",
        model=prismatic.make_model(vlm, head, cameras),
        cameras=cameras,
        images=vlm.images,
        actions=(Clamp(), *binarize, actions),
        prompt=prismatic.prompt(prismatic.SPACE, prismatic.EOS),
    )
    other = "model.action_model.*" if net == EMA else "model.ema_diffusion.*"
    unused = (f"{NAMES.llm}lm_head.weight", f"{net}history_embedder.*", other)
    return policy, _head_table(head, net), unused


def _openvla(
    vlm: VLM, tensors: TensorSet, dataset: Dataset, cameras: tuple[str, ...]
) -> tuple[PolicyConfig, Table, tuple[str, ...]]:
    """OpenVLA's policy, its head's tensors, and what it does not use."""
    actions, rows = read_range(dataset, "action"), vlm.decoder.vocabulary
    head = TokenHeadConfig(actions.width, rows, last_token=rows - prismatic.PADDING_ROWS)
    policy = PolicyConfig(
        family="openvla",
        model=prismatic.make_model(vlm, head, cameras),
        cameras=cameras,
        images=vlm.images,
        actions=(Clamp(), actions),
        prompt=prismatic.prompt(prismatic.SPACE),
    )
    return policy, {"head.lm_head.weight": Source((f"{NAMES.llm}lm_head.weight",))}, ()


def _base_vlm(config: Mapping[str, Any]) -> str | None:
    """The model that was trained on, by name; it may have been given as the path of its own run."""
    vla = config.get("vla")
    name = vla.get("base_vlm") if isinstance(vla, dict) else None
    return PurePosixPath(name).name if isinstance(name, str) else None


def _backbone(directory: Path) -> Backbone:
    where = directory / CONFIG
    name = _base_vlm(read_object(where, CheckpointError))
    if name not in BASE_VLMS:
        raise CheckpointError(
            f"{where}: base_vlm {name} is not supported; supported are {', '.join(BASE_VLMS)}"
        )
    return prismatic.BACKBONES[BASE_VLMS[name]]


def _find_checkpoint(directory: Path) -> Path:
    folder = directory / CHECKPOINTS
    found = sorted(folder.glob("*.pt"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(f"{directory} has no weights: there must be one .pt file in {CHECKPOINTS}/")
    if folder / LATEST in found:
        return folder / LATEST
    names = shorten([path.name for path in found])
    raise CheckpointError(f"{folder} has several checkpoints; leave one of them there: {names}")


def _vision(tensors: TensorSet, backbone: Backbone) -> list[VisionConfig]:
    prefixes = NAMES.vision(len(backbone.encoders))
    encoders = [prismatic.ENCODERS[name] for name in backbone.encoders]
    return [
        prismatic.vision_config(tensors, prefix, encoder, _image_size(tensors, prefix, backbone))
        for prefix, encoder in zip(prefixes, encoders, strict=True)
    ]


def _image_size(tensors: TensorSet, prefix: str, backbone: Backbone) -> int:
    """The backbone's; one scaled down, whose tensors have another grid, has no pixels beyond its patches."""
    patch = tensors.shape(f"{prefix}patch_embed.proj.weight", 4)[-1]
    grid = math.isqrt(tensors.shape(f"{prefix}pos_embed", 3)[1])
    return backbone.image_size if backbone.image_size // patch == grid else grid * patch


def _decoder(tensors: TensorSet) -> DecoderConfig:
    vocabulary, width = tensors.shape(f"{NAMES.llm}model.embed_tokens.weight", 2)
    layers = f"{NAMES.llm}model.layers."
    queries, keys = (
        tensors.shape(f"{layers}0.self_attn.{kind}_proj.weight", 2)[0] // HEAD_DIM for kind in "qk"
    )
    if width != queries * HEAD_DIM or keys == 0 or queries % keys:
        raise CheckpointError(
            f"{tensors.where}: the language model is no Llama 2, whose heads are {HEAD_DIM} wide"
        )
    return DecoderConfig(
        vocabulary=vocabulary,
        width=width,
        depth=tensors.count(layers),
        heads=queries,
        kv_heads=keys,
        head_dim=HEAD_DIM,
        mlp_width=tensors.shape(f"{layers}0.mlp.gate_proj.weight", 2)[0],
        norm_eps=NORM_EPS,
    )


def _head(tensors: TensorSet, net: str) -> DiffusionHeadConfig:
    positions, width = tensors.shape(f"{net}positional_embedding", 2)
    return DiffusionHeadConfig(
        action_dim=tensors.shape(f"{net}x_embedder.linear.weight", 2)[1],
        horizon=positions - 1,
        width=width,
        depth=tensors.count(f"{net}blocks."),
        heads=DIT_HEADS.get(width, width // DIT_HEAD_DIM),
    )


def _check_head(head: DiffusionHeadConfig, where: Path) -> None:
    """Refuse a configuration that contradicts the action model's tensors, or has it look at past actions."""
    config = read_object(where, CheckpointError)
    implied = {
        "action_dim": head.action_dim,
        "future_action_window_size": head.horizon - 1,
        "past_action_window_size": 0,
    }
    for key, value in implied.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(
                f"{where}: {key} is {config[key]!r}, and the action model's tensors make it {value}"
            )


def _head_table(head: DiffusionHeadConfig, net: str) -> Table:
    linears = dict(DIT)
    for j in range(head.depth):
        linears |= {f"blocks.{j}.{name}": f"blocks.{j}.{name}" for name in DIT_BLOCK}
    table = {
        "head.positional_embedding": Source((f"{net}positional_embedding",)),
        "head.uncondition": Source((f"{net}z_embedder.uncondition",)),
    }
    for ours, theirs in linears.items():
        table |= linear_table(f"head.{ours}", net + theirs)
    return table
