"""Quantizing a whole model, in the order the data takes: eyes, projector, decoder, hands."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.models.config import DecoderConfig
from sqap.models.decoder import Decoder, DecoderLayer, rope_angles
from sqap.models.heads.ddim import ddim_sample
from sqap.models.heads.diffusion import DiffusionHead
from sqap.models.vision import VisionEncoder
from sqap.models.vla import VLA, pixel_shuffle
from sqap.quantization.kv import set_kv_bits
from sqap.quantization.linear import QuantizedLinear
from sqap.quantization.partial import Partial
from sqap.quantization.rotation import (
    HadamardLinear,
    Rotation,
    prepare_rotated,
    rotate_input,
    rotate_layer,
    rotate_norm,
)
from sqap.quantization.sequential import Sequential, own, prepare, wanted
from sqap.recipe import Quantization

Progress = Callable[[int, int], None]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class ModelInputs:
    """What a model is given for one calibration observation.

    Args:
        pixels: one ``(1, 3, size, size)`` per vision encoder.
        token_ids: ``(1, text tokens)``.
        noise: ``(1, horizon, action_dim)``.
    """

    pixels: list[Tensor]
    token_ids: Tensor
    noise: Tensor


def share(module: M) -> M:
    """A copy of ``module`` whose tensors are those of the original until it is given others."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b for b in module.buffers()}
    return copy.deepcopy(module, memo)


@torch.inference_mode()
def quantize_model(
    model: VLA,
    quantization: Quantization,
    inputs: Sequence[ModelInputs] = (),
    *,
    progress: Progress | None = None,
    partial: Partial | None = None,
) -> VLA:
    """A rotated and quantized copy of ``model``, which is left as it is. One stage is in 32 bits at a time.

    Args:
        model: a float model, neither rotated nor quantized.
        quantization: what to do.
        inputs: calibration observations; rounding "gptq" needs at least one.
        progress: gets (stages done, stages).
        partial: keeps finished stages, so that an interrupted run goes on from them.

    Raises:
        InputError: the model is already quantized or rotated, a linear's shape does not fit its scheme (found
            before the work begins), an override matches no linear, calibration is missing, or a weight or an
            input is not finite.
    """
    _check(dict(stages(model)), quantization)
    dtype = model.decoder.embed_tokens.weight.dtype
    model = share(model)
    _float_around(model, [stage for _, stage in stages(model)])
    walk = _walker(quantization, len(list(stages(model))), progress, partial)
    rotation = _rotation(model.config.decoder, quantization)

    features = [_see(walk, model, i, inputs) for i in range(len(model.vision))]
    joined = [
        pixel_shuffle(torch.cat(f, -1), model.config.pixel_shuffle) for f in zip(*features, strict=True)
    ]
    if rotation is not None:
        last = cast(nn.Linear, model.projector.layers[-1])
        walk.before = lambda _, __: rotate_input(model.decoder.embed_tokens, last, rotation)
        own(model.decoder.embed_tokens)
    visual = walk.through("projector", model.projector, joined, lambda m, x: m(x))

    hidden = [model.sequence(v, i.token_ids) for v, i in zip(visual, inputs, strict=True)]
    hidden = quantize_layers(walk, model.decoder, hidden, rotation)
    set_kv_bits(model.decoder, quantization.kv_bits)
    if hidden:
        condition = torch.cat([h[:, -1] for h in hidden])
        states = _denoising(model.head, condition, torch.cat([i.noise.float() for i in inputs]))
    else:
        states = []
    walk.through("head", model.head, states, lambda m, s: cast(DiffusionHead, m).predict_noise(*s))
    return model.to(dtype)


@torch.inference_mode()
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
        progress: gets (layers done, layers).
        partial: keeps finished layers, so that an interrupted run goes on from them.

    Raises:
        InputError: as `quantize_model`.
    """
    _check({f"decoder.layers.{i}": layer for i, layer in enumerate(decoder.layers)}, quantization)
    dtype = decoder.embed_tokens.weight.dtype
    decoder = share(decoder)
    _float_around(decoder, decoder.layers)
    walk = _walker(quantization, len(decoder.layers), progress, partial)
    rotation = _rotation(decoder.config, quantization)
    if rotation is not None:
        own(decoder.embed_tokens)
        rotate_input(decoder.embed_tokens, None, rotation)
    hidden = [h.float() if rotation is None else rotation.residual.apply(h.float()) for h in hidden]
    quantize_layers(walk, decoder, hidden, rotation)
    set_kv_bits(decoder, quantization.kv_bits)
    return decoder.to(dtype)


def quantize_layers(
    walk: Sequential, decoder: Decoder, hidden: list[Tensor], rotation: Rotation | None
) -> list[Tensor]:
    """Quantize a decoder's layers in place; ``hidden`` ``(1, tokens, width)`` goes in and comes out."""

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        out: Tensor = layer(x, rope_angles(positions, decoder.config, x.dtype))[0]
        return out

    if rotation is not None:
        walk.before = lambda _, layer: rotate_layer(cast(DecoderLayer, layer), rotation)
    for i, layer in enumerate(decoder.layers):
        hidden = walk.through(f"decoder.layers.{i}", layer, hidden, call)
    walk.before = lambda _, __: None
    if rotation is not None:
        decoder.norm = rotate_norm(decoder.norm, rotation)
    return [decoder.norm(x) for x in hidden]


def prepare_quantized(model: VLA, quantization: Quantization) -> None:
    """Give a fresh ``model`` the modules `quantize_model` would, with weights yet to be loaded.

    Raises:
        InputError: the model is already rotated or quantized, or a linear's shape does not fit the recipe.
    """
    _check(dict(stages(model)), quantization)
    if quantization.rotate:
        prepare_rotated(model)
    for name, stage in stages(model):
        prepare(name, stage, quantization)
    set_kv_bits(model.decoder, quantization.kv_bits)


def stages(model: VLA) -> Iterator[tuple[str, nn.Module]]:
    """The model's stages by name, in the order the data takes; together they hold every linear."""
    for i, encoder in enumerate(model.vision):
        for j, block in enumerate(cast(VisionEncoder, encoder).blocks):
            yield f"vision.{i}.blocks.{j}", block
    yield "projector", model.projector
    for j, layer in enumerate(model.decoder.layers):
        yield f"decoder.layers.{j}", layer
    yield "head", model.head


def _float_around(model: nn.Module, inner: Iterable[nn.Module]) -> None:
    """Compute in 32 bits between the stages too; they themselves get there one by one."""
    staged = {id(parameter) for stage in inner for parameter in stage.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in staged:
            parameter.data = parameter.data.float()


def _see(walk: Sequential, model: VLA, i: int, inputs: Sequence[ModelInputs]) -> list[Tensor]:
    encoder = cast(VisionEncoder, model.vision[i])
    states = [encoder.embed(given.pixels[i].float()) for given in inputs]
    for j, block in enumerate(encoder.blocks):
        states = walk.through(f"vision.{i}.blocks.{j}", block, states, lambda m, x: m(x))
    return [encoder.features(x) for x in states]


def _denoising(head: DiffusionHead, condition: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the head is asked while it samples: noisy chunks, their time steps and conditions."""
    asked = []
    both = head.conditions(condition)

    def ask(x: Tensor, t: Tensor) -> Tensor:
        asked.append(head.batch(x, t, both))
        return head.guided_noise(x, t, both)

    ddim_sample(ask, noise, head.alpha_bar, head.config.sample_steps)
    return asked


def _rotation(config: DecoderConfig, quantization: Quantization) -> Rotation | None:
    return Rotation.of(config, quantization.rotation_seed) if quantization.rotate else None


def _walker(
    quantization: Quantization, total: int, progress: Progress | None, partial: Partial | None
) -> Sequential:
    walk = Sequential(quantization, partial=partial)
    if progress is not None:
        walk.done = lambda count: progress(count, total)
    return walk


def _check(staged: Mapping[str, nn.Module], quantization: Quantization) -> None:
    for name, stage in staged.items():
        if any(isinstance(module, QuantizedLinear) for module in stage.modules()):
            raise InputError("the model is already quantized")
        if any(isinstance(module, HadamardLinear) for module in stage.modules()):
            raise InputError("the model is already rotated; quantize the one it was made from")
        wanted(name, stage, quantization)
    names = [
        f"{name}.{key}"
        for name, stage in staged.items()
        for key, module in stage.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for override in quantization.overrides:
        if not any(fnmatchcase(name, override.pattern) for name in names):
            raise InputError(f"the override {override.pattern!r} matches no linear of the model")
