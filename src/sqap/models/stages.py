"""The model's stages by name, and what belongs to none of them.

A stage is as much of a model as is held in 32 bits at once (`sqap.models.through`). Together they hold every
linear but those of the robot's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import nn

from sqap.models.storage import STORAGE_DTYPE, Weights, fill, widen
from sqap.models.vision import VisionEncoder
from sqap.models.vla import VLA


def stages(model: VLA) -> Iterator[tuple[str, nn.Module]]:
    """The model's stages by name, in the order the data takes."""
    for i, encoder in enumerate(model.vision):
        for j, block in enumerate(cast(VisionEncoder, encoder).blocks):
            yield f"vision.{i}.blocks.{j}", block
    yield "projector", model.projector
    for j, layer in enumerate(model.decoder.layers):
        yield f"decoder.layers.{j}", layer
    yield "head", model.head


def fill_around(model: VLA, weights: Weights) -> None:
    """Read what belongs to no stage: in 32 bits, but for the embedding table."""
    fill(model.decoder.embed_tokens, weights, prefix="decoder.embed_tokens.", dtype=STORAGE_DTYPE)
    staged = {f"{name}.{key}" for name, stage in stages(model) for key, _ in stage.named_parameters()}
    fill(model, weights, skip=staged, dtype=torch.float32)


def widen_around(model: nn.Module, staged: Iterable[nn.Module]) -> None:
    """Compute in 32 bits between the stages; they themselves get there one by one."""
    widen(model, {id(parameter) for stage in staged for parameter in stage.parameters()})
