"""LoRA adapters in a checkpoint's directory: the weights beside them may have them merged already, or not.

OpenVLA-OFT's training leaves ``lora_adapter/`` beside the merged weights; an adapter may also lie beside the
base that it was trained on, which would act without it. No file tells the two apart, but the weights do.
D = scale * B A is the update of a linear. If it is merged into the weight W = base + D, then <W, D> / <D, D>
is about 1. If W is the base alone it is about 0, since base and update are all but orthogonal.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from sqap.checkpoints.pickles import torch_file
from sqap.checkpoints.tensors import TensorFile, safetensors_file
from sqap.checkpoints.weights import TensorSet
from sqap.errors import CheckpointError
from sqap.serialization import read_json

CONFIG = "adapter_config.json"
SAFE, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
# What peft puts before a module's name and behind it.
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Linears that are compared, spread over the model.
SAMPLE = 4
MERGED = 0.5
logger = logging.getLogger("sqap")


def find(directory: Path) -> list[Path]:
    """The folders that hold an adapter: the directory itself, and those in it."""
    patterns = [f"{folder}{name}" for name in (CONFIG, SAFE, PICKLE) for folder in ("", "*/")]
    return sorted({path.parent for pattern in patterns for path in directory.glob(pattern)})


def names(directory: Path) -> list[str]:
    """The names of all tensors of a directory's adapters.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    files = [_open(folder) for folder in find(directory)]
    return [name for file in files if file is not None for name in file.tensors]


def refuse_unmerged(directory: Path, tensors: TensorSet) -> None:
    """Refuse a directory whose weights lack the adapter beside them.

    Where that cannot be told, an adapter right beside the weights is refused. One in a folder of its own,
    where the authors' training leaves it, is logged.

    Raises:
        CheckpointError: an adapter is not merged, or cannot be read.
    """
    for folder in find(directory):
        share = _merged_share(folder, tensors)
        if share is None and folder != directory:
            logger.warning("%s: cannot tell whether the weights have this adapter merged", folder)
        elif share is None or share < MERGED:
            raise CheckpointError(
                f"{folder} has a LoRA adapter that is not merged into the weights: merge it into its "
                "base and save that (peft's merge_and_unload, then save_pretrained), or take the adapter "
                "away if the weights are meant as they are"
            )


def _merged_share(folder: Path, tensors: TensorSet) -> float | None:
    """How much of the adapter the weights contain, about 0 or 1; None if the two cannot be compared."""
    file = _open(folder)
    if file is None:
        return None
    modules = [
        name.removesuffix(DOWN)
        for name, info in file.tensors.items()
        if name.endswith(DOWN)
        and name.removesuffix(DOWN) + UP in file.tensors
        and len(info.shape) == 2
        and _weight(name.removesuffix(DOWN)) in tensors.tensors
    ]
    common = size = 0.0
    for module in modules[:: max(1, math.ceil(len(modules) / SAMPLE))]:
        update = file.read([module + DOWN, module + UP])
        (weight,) = tensors.read([_weight(module)]).values()
        a, b = update[module + DOWN].double(), update[module + UP].double()
        if weight.shape != (b.shape[0], a.shape[1]):
            return None
        # <W, BA> and <BA, BA> without the product, which is as large as the weight.
        common += _inner(b.T @ weight.double(), a)
        size += _inner(b.T @ b, a @ a.T)
    if not modules:
        return None
    return common / (_scale(folder) * size) if size else 1.0  # one that changes nothing is merged


def _open(folder: Path) -> TensorFile | None:
    if (folder / SAFE).is_file():
        return safetensors_file(folder / SAFE)
    return torch_file(folder / PICKLE) if (folder / PICKLE).is_file() else None


def _weight(module: str) -> str:
    return f"{module.removeprefix(PREFIX)}.weight"


def _inner(x: Tensor, y: Tensor) -> float:
    return float(torch.sum(x * y))


def _scale(folder: Path) -> float:
    """What the update is multiplied by: alpha / rank, or with rank-stabilised LoRA alpha / sqrt(rank)."""
    config = read_json(folder / CONFIG, CheckpointError) if (folder / CONFIG).is_file() else {}
    config = config if isinstance(config, dict) else {}
    alpha, rank = config.get("lora_alpha", 8), config.get("r", 8)  # peft's defaults
    if not all(isinstance(number, int | float) and number > 0 for number in (alpha, rank)):
        raise CheckpointError(f"{folder / CONFIG}: r and lora_alpha must be positive numbers")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
