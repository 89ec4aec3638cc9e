"""Quantizing a whole model, in the order the data takes: vision, projector, decoder, head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from sqap.defaults import defaults
from sqap.errors import InputError
from sqap.models import ModelInputs
from sqap.models.config import DecoderConfig
from sqap.models.decoder import Decoder
from sqap.models.heads import HeadProtocol
from sqap.models.stages import fill_around, stages, widen_around
from sqap.models.storage import STORAGE_DTYPE, Progress, Weights, fill, widen
from sqap.models.stream import Stream
from sqap.models.vla import VLA
from sqap.quantization.embedding import prepare_table, quantize_table, quantizes_table
from sqap.quantization.fused import fuse
from sqap.quantization.kv import set_kv_bits
from sqap.quantization.linear import QuantizedLinear
from sqap.quantization.partial import Partial
from sqap.quantization.rotation import (
    HadamardLinear,
    Rotation,
    prepare_rotated,
    rotate_input,
    rotate_norm,
    rotate_stage,
)
from sqap.quantization.sequential import Sequential, own, prepare, share, wanted
from sqap.recipe import Quantization


@defaults()
def quantize_model(
    model: VLA,
    quantization: Quantization,
    inputs: Sequence[ModelInputs] = (),
    *,
    weights: Weights | None = None,
    progress: Progress | None = None,
    partial: Partial | None = None,
) -> VLA:
    """A rotated and quantized copy of ``model``, which is left as it is. One stage is in 32 bits at a time.

    Whatever the types of ``model``, the copy computes in float32. Its embedding table may be narrower.

    Args:
        model: a float model, neither rotated nor quantized.
        quantization: what to do.
        inputs: calibration observations; rounding "gptq" needs at least one.
        weights: where to read what ``model`` has on the meta device.
        progress: gets (weights done, weights in all) after each stage.
        partial: keeps finished stages, so that an interrupted run goes on from them.

    Raises:
        InputError: the model is already quantized or rotated, a linear's shape does not fit its scheme (found
            before the work begins), an override matches no linear, calibration is missing, or a weight or an
            input is not finite.
    """
    model = share(model)
    _check_floats(dict(stages(model)))
    model.fix_steps(weights)
    _check(dict(stages(model)), quantization, expert=model.config.head.has_expert)
    if weights is not None:
        fill_around(model, weights)
    widen_around(model, [stage for _, stage in stages(model)])
    walk = Sequential(quantization, partial=partial, weights=weights)
    if progress is not None:
        walk.done = _counter(progress, [stage for _, stage in stages(model)])
    rotation = _rotation(model.config.decoder, quantization)
    if rotation is not None:
        own(model.decoder.embed_tokens)
        if model.proprio is not None:
            own(model.proprio)
        rotate_input(model.decoder.embed_tokens, model.proprio, rotation)
        model.decoder.embed_tokens.to(STORAGE_DTYPE)  # calibrate on what is stored, in half the memory
        rotated: set[nn.Module] = set()  # the head's layers, which come before the rest of it
        walk.before = lambda _, stage: rotate_stage(stage, rotation, rotated)
    if quantizes_table(model.config.decoder, quantization):
        quantize_table(model.decoder)

    streams = model.streams(inputs, walk.through, keep=model.config.head.has_expert)
    streams = quantize_layers(walk, model.decoder, streams, rotation)
    set_kv_bits(model.decoder, quantization.kv_bits)
    if weights is not None:
        fill(model.head, weights, prefix="head.", dtype=torch.float32)
    widen(model.head)
    head = cast(HeadProtocol, model.head)
    read = [
        head.inputs(model.decoder, stream, model.layout(given), given)
        for stream, given in zip(streams, inputs, strict=True)
    ]
    head.calibrate(read, walk.through)
    fuse(model)
    return model


@defaults()
def quantize_decoder(
    decoder: Decoder,
    quantization: Quantization,
    hidden: Sequence[Tensor] = (),
    *,
    progress: Progress | None = None,
    partial: Partial | None = None,
) -> Decoder:
    """A rotated and quantized copy of a decoder that stands alone, as a language model's.

    What it returns is in the original basis, so that a language model's output matrix stays as it is.

    Args:
        decoder: float weights of any type, which may be mapped from a file: a layer is in memory at a time.
        quantization: what to do; the grids of the other parts do not matter.
        hidden: embedded calibration sequences ``(1, tokens, width)``; rounding "gptq" needs at least one.
        progress: gets (weights done, weights in all) after each layer.
        partial: keeps finished layers, so that an interrupted run goes on from them.

    Raises:
        InputError: as `quantize_model`.
    """
    _check({f"decoder.layers.{i}": layer for i, layer in enumerate(decoder.layers)}, quantization)
    dtype = decoder.embed_tokens.weight.dtype
    decoder = share(decoder)
    widen_around(decoder, decoder.layers)
    walk = Sequential(quantization, partial=partial)
    if progress is not None:
        walk.done = _counter(progress, decoder.layers)
    rotation = _rotation(decoder.config, quantization)
    if rotation is not None:
        own(decoder.embed_tokens)
        rotate_input(decoder.embed_tokens, None, rotation)
        walk.before = lambda _, stage: rotate_stage(stage, rotation)
    hidden = [h.float() if rotation is None else rotation.residual.apply(h.float()) for h in hidden]
    quantize_layers(walk, decoder, [decoder.start(x) for x in hidden], rotation)
    set_kv_bits(decoder, quantization.kv_bits)
    fuse(decoder)
    return decoder.to(dtype)


def quantize_layers(
    walk: Sequential, decoder: Decoder, streams: Sequence[Stream], rotation: Rotation | None
) -> list[Stream]:
    """Quantize a decoder's layers in place; calibration streams go in, and come out behind the last layer."""
    exact = list(streams) if walk.quantization.correction else None
    found = decoder.run(streams, partial(walk.through, exact=exact))
    if rotation is not None:
        decoder.norm = rotate_norm(decoder.norm, rotation)
    return found


def prepare_quantized(model: VLA, quantization: Quantization) -> None:
    """Give a fresh ``model`` the modules `quantize_model` would, with weights yet to be loaded.

    Raises:
        InputError: the model is already rotated or quantized, or a linear's shape does not fit the recipe.
    """
    _check(dict(stages(model)), quantization, expert=model.config.head.has_expert)
    if quantization.rotate:
        prepare_rotated(model)
    if quantizes_table(model.config.decoder, quantization):
        prepare_table(model.decoder)
    for name, stage in stages(model):
        prepare(name, stage, quantization)
    set_kv_bits(model.decoder, quantization.kv_bits)
    fuse(model)


def _rotation(config: DecoderConfig, quantization: Quantization) -> Rotation | None:
    return Rotation.of(config, quantization.rotation_seed) if quantization.rotate else None


def _counter(progress: Progress, staged: Iterable[nn.Module]) -> Callable[[int], None]:
    total = sum(parameter.numel() for stage in staged for parameter in stage.parameters())
    return lambda count: progress(count, total)


def _check_floats(staged: Mapping[str, nn.Module]) -> None:
    for stage in staged.values():
        if any(isinstance(module, QuantizedLinear) for module in stage.modules()):
            raise InputError("the model is already quantized")
        if any(isinstance(module, HadamardLinear) for module in stage.modules()):
            raise InputError("the model is already rotated; quantize the one it was made from")


def _check(staged: Mapping[str, nn.Module], quantization: Quantization, expert: bool = False) -> None:
    if expert and quantization.kv_bits is not None:
        raise InputError("kv_bits must be null: the action expert reads keys and values as they are")
    _check_floats(staged)
    for name, stage in staged.items():
        wanted(name, stage, quantization)
    names = [
        f"{name}.{key}"
        for name, stage in staged.items()
        for key, module in stage.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for override in quantization.overrides:
        if not any(override.matches(name) for name in names):
            raise InputError(f"the override {override.pattern!r} matches no linear of the model")
