"""The model stage by stage, for what is done to one part at a time and for models larger than memory.

A stage is as much of a model as is held in 32 bits at once: a block of a vision encoder or of the decoder,
the projector, the head. Together they hold every linear but those of the robot's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sqap.models.decoder import Decoder, rope_angles
from sqap.models.storage import STORAGE_DTYPE, Weights, fill, widen
from sqap.models.vision import VisionEncoder
from sqap.models.vla import VLA, ModelInputs, pixel_shuffle

# Takes a stage's name, the stage, states and what runs the stage on one; gives what becomes of the states.
Through = Callable[[str, nn.Module, Sequence[Any], Callable[[nn.Module, Any], Any]], list[Any]]


def stages(model: VLA) -> Iterator[tuple[str, nn.Module]]:
    """The model's stages by name, in the order the data takes."""
    for i, encoder in enumerate(model.vision):
        for j, block in enumerate(cast(VisionEncoder, encoder).blocks):
            yield f"vision.{i}.blocks.{j}", block
    yield "projector", model.projector
    for j, layer in enumerate(model.decoder.layers):
        yield f"decoder.layers.{j}", layer
    yield "head", model.head


def embed_through(model: VLA, inputs: Sequence[ModelInputs], through: Through) -> list[Tensor]:
    """What the decoder reads, ``(batch, tokens, width)`` for each of ``inputs``."""
    language = [model.language(given.token_ids) for given in inputs]
    features = [_see(model, i, inputs, language, through) for i in range(len(model.vision))]
    side = model.config.pixel_shuffle
    joined = [pixel_shuffle(torch.cat(parts, -1), side) for parts in zip(*features, strict=True)]
    projected = through("projector", model.projector, joined, lambda stage, x: stage(x))
    tokens = model.config.visual_tokens
    visual = [x.reshape(-1, tokens, x.shape[-1]) for x in projected]
    return [model.sequence(v, given) for v, given in zip(visual, inputs, strict=True)]


def run_layer(
    decoder: Decoder, layer: nn.Module, x: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """One of the decoder's layers on a whole sequence ``(batch, tokens, width)``, and what ``rows`` see."""
    out: tuple[Tensor, Tensor | None] = layer(x, whole_rope(decoder, x), rows=rows)
    return out


def whole_rope(decoder: Decoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of a whole sequence ``(batch, tokens, width)``, for any batch (`rope_angles`)."""
    positions = torch.arange(x.shape[1], dtype=torch.int64, device=x.device)[None]
    return rope_angles(positions, decoder.config, x.dtype)


def fill_around(model: VLA, weights: Weights) -> None:
    """Read what belongs to no stage: in 32 bits, but for the embedding table."""
    fill(model.decoder.embed_tokens, weights, prefix="decoder.embed_tokens.", dtype=STORAGE_DTYPE)
    staged = {f"{name}.{key}" for name, stage in stages(model) for key, _ in stage.named_parameters()}
    fill(model, weights, skip=staged, dtype=torch.float32)


def widen_around(model: nn.Module, staged: Iterable[nn.Module]) -> None:
    """Compute in 32 bits between the stages; they themselves get there one by one."""
    widen(model, {id(parameter) for stage in staged for parameter in stage.parameters()})


def streamed(weights: Weights | None, dtype: torch.dtype) -> Through:
    """Runs stages in ``dtype``, each in memory only while it runs if its weights have to be read or cast."""

    def through(name: str, stage: nn.Module, states: Sequence[Any], call: Callable[..., Any]) -> list[Any]:
        with loaded(name, stage, weights, dtype):
            return [call(stage, state) for state in states]

    return through


@contextmanager
def loaded(name: str, stage: nn.Module, weights: Weights | None, dtype: torch.dtype) -> Iterator[None]:
    """A stage in ``dtype``: read if it is on the meta device, else cast; afterwards it is as it was."""
    missing = [key for key, parameter in stage.named_parameters() if parameter.is_meta]
    there = [(parameter, parameter.data) for parameter in stage.parameters() if not parameter.is_meta]
    if missing and weights is not None:
        fill(stage, weights, prefix=f"{name}.", dtype=dtype)
    for parameter, data in there:
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in there:
            parameter.data = data
        empty = {key: stage.get_parameter(key).to("meta") for key in missing}
        stage.load_state_dict(empty, assign=True, strict=False)


def _see(
    model: VLA, i: int, inputs: Sequence[ModelInputs], language: Sequence[Tensor | None], through: Through
) -> list[Tensor]:
    encoder = cast(VisionEncoder, model.vision[i])
    states = [encoder.embed(given.pixels[i]) for given in inputs]
    for j, block in enumerate(encoder.blocks):
        pairs = list(zip(states, language, strict=True))
        states = through(f"vision.{i}.blocks.{j}", block, pairs, lambda stage, pair: stage(*pair))
    return [encoder.features(x) for x in states]
