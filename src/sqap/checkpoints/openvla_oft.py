"""OpenVLA-OFT: OpenVLA's layout, and beside it files of ``torch.save`` with what fine-tuning added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sqap.checkpoints import openvla, prismatic
from sqap.checkpoints.choices import Choices, choose_cameras
from sqap.checkpoints.dataset_statistics import Dataset, check_length, read_range
from sqap.checkpoints.opened import CONFIG, Opened, open_published
from sqap.checkpoints.openvla import NAMES, components
from sqap.checkpoints.pickles import torch_file
from sqap.checkpoints.prismatic import VLM, VOCABULARY
from sqap.checkpoints.robots import Platform, check_film, check_proprio, choose_platform
from sqap.checkpoints.tensors import open_safetensors, shorten
from sqap.checkpoints.weights import Part, Source, Table, TensorSet, linear_table
from sqap.config import PolicyConfig
from sqap.errors import CheckpointError
from sqap.models import RegressionHeadConfig, VisionConfig
from sqap.processing import Clamp, Range, cropped
from sqap.serialization import read_object

FAMILY = "OpenVLA-OFT"
HEAD, PROPRIO, FILM, DIFFUSION = "action_head.", "proprio_projector.", "film.", "noisy_action_projector"
MODULE = "module."  # torch's DistributedDataParallel
# It learned from random crops of this share of the area, and is shown the central one.
CROP = 0.9
LORA_ALPHA = 16


CAMERA_COUNTS = (1, 2, 3)


def recognise(directory: Path) -> bool:
    """Whether ``directory`` is OpenVLA's and was tuned in OpenVLA-OFT's way."""
    return openvla.is_openvla(directory) and not openvla.recognise(directory)


def open(directory: Path, choices: Choices) -> Opened:
    """Open a directory that was recognised.

    Raises:
        CheckpointError: something is missing, damaged, does not fit or is not supported.
    """
    choices.refuse(FAMILY, "ema")
    config = read_object(directory / CONFIG, CheckpointError)
    dataset = openvla.read_dataset(directory, config, choices.unnorm_key)
    tensors = _open_tensors(directory)
    vlm = _adapt(openvla.read_vlm(directory, config, tensors), tensors)
    action_dim = tensors.shape(f"{HEAD}model.fc2.weight", 2)[0]
    platform = choose_platform(directory, dataset.key, action_dim, choices)
    check_film(directory, config, platform, choices.film, found=vlm.vision[0].film)
    names = _cameras(choices.cameras, platform, len(vlm.vision))
    head = _head(tensors, action_dim, platform)
    proprio = _proprio(tensors, dataset, platform)
    check_proprio(directory, found=proprio is not None)
    policy = PolicyConfig(
        family="openvla-oft",
        model=prismatic.make_model(vlm, head, names, proprio.width if proprio else None),
        cameras=names,
        images=tuple(cropped(steps, CROP) for steps in vlm.images),
        actions=(_actions(dataset, platform, action_dim),),
        prompt=prismatic.prompt(prismatic.SPACE, prismatic.EOS),
        state=(proprio, Clamp()) if proprio else None,
    )
    table = vlm.table | _head_table(head)
    if proprio:
        for i in (0, 1):
            table |= linear_table(f"proprio.layers.{i}.", f"{PROPRIO}fc{i + 1}.")
    unused = (*vlm.unused, f"{NAMES.llm}lm_head.weight")
    return open_published(directory, choices, policy, VOCABULARY, tensors, table, unused)


def merge_lora(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A weight ``(out, ...)`` with its low-rank update ``a`` ``(rank, ...)`` and ``b`` ``(out, rank, ...)``.

    Of a linear, or of the convolution that cuts patches, where ``b`` is a convolution of 1 x 1. The result
    is in 32 bits, so that a small update is not rounded away.
    """
    rank = a.shape[0]
    update = b.flatten(1).float() @ a.flatten(1).float() * (min(rank, LORA_ALPHA) / rank)
    return weight.float() + update.view(weight.shape)


def _open_tensors(directory: Path) -> TensorSet:
    """All files under one set of names, those of the added parts behind a prefix of their own."""
    if components(directory, DIFFUSION):
        raise CheckpointError(
            f"{directory} has a {DIFFUSION}: OpenVLA-OFT's diffusion head is not supported, the L1 head is"
        )
    parts = [Part(file) for file in open_safetensors(directory)]
    for name, prefix in (("action_head", HEAD), ("proprio_projector", PROPRIO), ("vision_backbone", FILM)):
        path = _find_component(directory, name, needed=prefix == HEAD)
        if path is not None:
            parts.append(Part(torch_file(path), prefix, strip=MODULE))
    tensors = TensorSet(directory, parts)
    if any(name.startswith(f"{HEAD}noise_predictor.") for name in tensors.tensors):
        raise CheckpointError(
            f"{directory} has OpenVLA-OFT's diffusion head, which is not supported; its L1 head is"
        )
    return tensors


def _find_component(directory: Path, name: str, *, needed: bool) -> Path | None:
    found = components(directory, name)
    if len(found) > 1:
        names = shorten([path.name for path in found])
        raise CheckpointError(f"{directory} has several of {name}; leave one of them there: {names}")
    if not found and needed:
        raise CheckpointError(
            f"{directory} is incomplete: it has no {name}--*_checkpoint.pt, which the L1 head is in (the "
            "discrete head, which needs none, is not supported)"
        )
    return found[0] if found else None


def _adapt(vlm: VLM, tensors: TensorSet) -> VLM:
    """OpenVLA's model, all of whose tokens see each other; with FiLM, if its vision was tuned that way."""
    vlm = replace(vlm, decoder=replace(vlm.decoder, causal=False))
    if not any(name.startswith(FILM) for name in tensors.tensors):
        return vlm
    vision = tuple(replace(config, film=True) for config in vlm.vision)
    table = {name: source for name, source in vlm.table.items() if not name.startswith("vision.")}
    unused = [*vlm.unused, "vision_backbone.*"]
    for i, (prefix, config) in enumerate(zip(NAMES.vision(len(vision)), vision, strict=True)):
        table |= _film_table(config, f"vision.{i}.", FILM + prefix)
        unused += prismatic.unused_vision(config, FILM + prefix)
    table = {name: _merged(source, tensors) for name, source in table.items()}
    return replace(vlm, vision=vision, table=table, unused=tuple(unused))


def _film_table(config: VisionConfig, ours: str, theirs: str) -> Table:
    """An encoder whose blocks are wrapped, each with two linears beside it."""
    block = "blocks.{}.block."
    table = prismatic.vision_table(config, ours, theirs, layer_scale=NAMES.layer_scale, block=block)
    for j in range(config.depth - 1):
        for kind in ("scale", "shift"):
            linear = linear_table(f"{ours}blocks.{j}.film.{kind}.", f"{theirs}blocks.{j}.{kind}.")
            table |= linear
    return table


def _merged(source: Source, tensors: TensorSet) -> Source:
    module, _, kind = source.names[0].rpartition(".")
    base = f"{module}.base_layer.{kind}"
    if base not in tensors.tensors:
        return source
    if kind == "bias":
        return Source((base,))
    return Source((base, f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"), merge_lora)


def _cameras(given: tuple[str, ...] | None, platform: Platform, encoders: int) -> tuple[str, ...]:
    """Upstream splits the pixels of several images by the channels of two encoders."""
    counts = CAMERA_COUNTS if encoders > 1 else CAMERA_COUNTS[:1]
    return choose_cameras(given, platform.cameras[: counts[-1]], counts, FAMILY)


def _head(tensors: TensorSet, action_dim: int, platform: Platform) -> RegressionHeadConfig:
    return RegressionHeadConfig(
        action_dim=action_dim,
        horizon=platform.horizon,
        width=tensors.shape(f"{HEAD}model.fc1.weight", 2)[0],
        depth=tensors.count(f"{HEAD}model.mlp_resnet_blocks."),
    )


def _head_table(head: RegressionHeadConfig) -> Table:
    modules = {"norm1.": "layer_norm1.", "fc1.": "fc1.", "norm2.": "layer_norm2.", "fc2.": "fc2."}
    for j in range(head.depth):
        modules[f"blocks.{j}.norm."] = f"mlp_resnet_blocks.{j}.ffn.0."
        modules[f"blocks.{j}.fc."] = f"mlp_resnet_blocks.{j}.ffn.1."
    table: Table = {}
    for ours, theirs in modules.items():
        table |= linear_table(f"head.{ours}", f"{HEAD}model.{theirs}")
    return table


def _actions(dataset: Dataset, platform: Platform, action_dim: int) -> Range:
    actions = read_range(dataset, "action", platform.bounds)
    check_length(dataset, "actions", actions.width, action_dim)
    return actions


def _proprio(tensors: TensorSet, dataset: Dataset, platform: Platform) -> Range | None:
    """How the robot's state is normalised, if the policy reads it."""
    if not any(name.startswith(PROPRIO) for name in tensors.tensors):
        return None
    statistics = read_range(dataset, "proprio", platform.bounds)
    wanted = tensors.shape(f"{PROPRIO}fc1.weight", 2)[1]
    check_length(dataset, "states", statistics.width, wanted)
    return statistics
