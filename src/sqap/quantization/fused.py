"""Runs layers whose linears are all quantized as one call of their backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import eq, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sqap import kernels
from sqap.kernels.backend import FusedLayer, LayerSpec, Norm
from sqap.models.decoder import Decoder, DecoderLayer, RMSNorm
from sqap.models.heads.diffusion import DiTBlock
from sqap.models.heads.expert import AdaptiveNorm, ExpertCache, ExpertLayer
from sqap.models.kv import FloatKV
from sqap.models.vision import Block, LayerScale
from sqap.quantization.linear import QuantizedLinear

FUSED = DecoderLayer, Block, DiTBlock

# Of a module, what is read when its layer is bound; "forward" where an instance has one of its own.
ATTRIBUTES = (
    "eps", "causal", "cross", "heads", "kv_heads", "head_dim", "width", "activation", "kv_format", "forward",
)  # fmt: skip
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"

# Where a module keeps something, under which name, and what it was when the layer was bound.
Place = tuple[dict[str, Any], str, object]


@dataclass(frozen=True)
class _Bound:
    """A layer bound to its tensors, with what is needed to check that they are unchanged.

    It is checked before every call, and a diffusion head's layers are called forty times in a step: reading
    the modules' own dictionaries with ``map`` takes a few microseconds, reading their attributes fifty.

    Args:
        fused: the layer; None where its backend runs its modules one by one. An expert's with adaptive norms
            is one for each denoising step.
        backend: of its linears.
        name: the backend's.
        places: the attributes, parameters, buffers and submodules that the layer had when it was bound.
        tensors: of these, those that are tensors.
        addresses: where the tensors' values are.
        hooks: the modules' dictionaries of hooks, which must be empty.
        modules: the modules' dictionaries of submodules, and their lengths.
        copied: tensors whose values the layer has copies of.
        versions: of these.
    """

    fused: tuple[FusedLayer | None, ...]
    backend: kernels.Backend
    name: str
    places: tuple[tuple[dict[str, Any], ...], tuple[str, ...], tuple[object, ...]]
    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    hooks: tuple[Mapping[int, object], ...]
    modules: tuple[tuple[Mapping[str, object], ...], tuple[int, ...]]
    copied: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def holds(self) -> bool:
        """Whether nothing has been replaced and no hook was registered since the layer was bound."""
        if self.name != self.backend.name or any(self.hooks):
            return False
        owners, names, values = self.places
        if not all(map(is_, map(dict.get, owners, names), values)):
            return False
        if not all(map(eq, map(len, self.modules[0]), self.modules[1])):
            return False
        # A tensor may be the same object with other storage.
        if not all(map(eq, map(Tensor.data_ptr, self.tensors), self.addresses)):
            return False
        return not self.copied or all(map(eq, map(_version, self.copied), self.versions))

    def trains(self) -> bool:
        """Whether one of its parameters requires a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors)


_layers: WeakKeyDictionary[nn.Module, _Bound] = WeakKeyDictionary()


def fuse(model: nn.Module) -> None:
    """Let the layers of ``model`` run as one call each, where they can."""
    for module in model.modules():
        if isinstance(module, FUSED):
            module.fused = run_fused
        elif isinstance(module, ExpertLayer):
            module.fused = run_fused_expert
        elif isinstance(module, Decoder):
            module.fused_look = look_fused


def run_fused(
    layer: nn.Module,
    x: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
    rows: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor | None] | None:
    """What the layer makes of ``x`` ``(batch, tokens, width)`` behind ``first``, and what ``rows`` attend to.

    ``kept`` has earlier tokens' keys and values, and is filled with those of ``x`` behind them. None where it
    takes the modules: the backend cannot run the layer on such tokens, a linear is not quantized, modules in
    the layer have hooks, or something needs a gradient.
    """
    found = _found(layer, x)
    past = 0 if kept is None else kept[0].shape[2] - x.shape[1]
    fused = None if found is None else found.fused[0]
    if fused is None or not fused.takes(x, first, past):
        return None
    return fused(x, rope, rows, kept, first)


def run_fused_expert(
    layer: nn.Module, x: Tensor, cache: ExpertCache, rope: tuple[Tensor, Tensor], step: int
) -> Tensor | None:
    """What an expert layer makes of action tokens ``x`` ``(batch, tokens, width)``; None as of `run_fused`.

    The prefix in ``cache`` is packed for the layer once, in the first denoising step.
    """
    found = _found(layer, x)
    fused = None if found is None else found.fused[step % len(found.fused)]
    if fused is None or not fused.takes(x):
        return None
    prefix = cache.packed(found, fused.prefix)
    return None if prefix is None else fused(x, rope, prefix=prefix)[0]


def look_fused(
    layers: Sequence[nn.Module], x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor
) -> Tensor | None:
    """What ``rows`` would attend to in later layers (`kernels.Backend.look`); None as of `run_fused`."""
    found = [bound for bound in (_found(layer, x) for layer in layers) if bound is not None]
    fused = [bound.fused[0] for bound in found if bound.fused[0] is not None]
    if not fused or len(fused) < len(layers) or any(bound.backend is not found[0].backend for bound in found):
        return None
    return found[0].backend.look(fused, x, rope, rows)


def _found(layer: nn.Module, x: Tensor) -> _Bound | None:
    """The layer bound to its backend, anew where something has changed; None where that would not do."""
    found = _layers.get(layer)
    if found is None or not found.holds():
        found = _bind(layer)
        if found is None:
            return None
        _layers[layer] = found
    return None if torch.is_grad_enabled() and (x.requires_grad or found.trains()) else found


def _bind(layer: nn.Module) -> _Bound | None:
    """The layer as it is now; None if no backend's would do."""
    hooks = tuple(_hooks(layer))
    if any(hooks) or not _fits(layer):
        return None
    if any("forward" in vars(module) for module in layer.modules() if module is not layer):
        return None
    linears = [linear for linear in _linears(layer) if isinstance(linear, QuantizedLinear)]
    if len(linears) < len(_linears(layer)):
        return None
    backend = linears[0].backend
    if any(linear.backend is not backend for linear in linears):
        return None
    owners, names, values = zip(*_places(layer), strict=True)
    tensors = tuple(kept for kept in values if isinstance(kept, Tensor))
    modules = tuple(module._modules for module in layer.modules())
    copied = tuple(module.modulation for module in layer.modules() if isinstance(module, AdaptiveNorm))
    bound = [linear.bound() for linear in linears]
    steps = len(copied[0]) if copied else 1
    return _Bound(
        fused=tuple(backend.layer(_spec(layer, bound, step)) for step in range(steps)),
        backend=backend,
        name=backend.name,
        places=(owners, names, values),
        tensors=tensors,
        addresses=tuple(tensor.data_ptr() for tensor in tensors),
        hooks=hooks,
        modules=(modules, tuple(map(len, modules))),
        copied=copied,
        versions=tuple(map(_version, copied)),
    )


def _version(tensor: Tensor) -> int:
    """A number that changes with the tensor's values; one made in inference mode has none."""
    return 0 if tensor.is_inference() else tensor._version


def _places(layer: nn.Module) -> Iterator[Place]:
    """All that the layer and the modules in it hold, and what else the native layer is told of them."""
    for module in layer.modules():
        for kept in (module._modules, module._buffers, module._parameters):
            yield from ((kept, name, value) for name, value in kept.items())
        present = vars(module)
        yield from ((present, name, present.get(name)) for name in ATTRIBUTES if _may_have(module, name))


def _may_have(module: nn.Module, name: str) -> bool:
    return name == "forward" or name in vars(module)


def _hooks(layer: nn.Module) -> Iterator[Mapping[int, object]]:
    """The dictionaries of hooks that would be called in the layer; the layer's own are called in any case."""
    for module in layer.modules():
        if module is not layer:
            yield from (vars(module)[name] for name in HOOKS)
    yield from (getattr(nn.modules.module, f"_global{name}") for name in HOOKS)


def _fits(layer: nn.Module) -> bool:
    """Whether a `LayerSpec` says all that this layer does."""
    if isinstance(layer, DecoderLayer):
        return isinstance(layer.self_attn.kv_format, FloatKV)
    if isinstance(layer, ExpertLayer):
        norms = layer.input_layernorm, layer.post_attention_layernorm
        return all(isinstance(norm, RMSNorm) or "modulation" in norm._buffers for norm in norms)
    return not isinstance(layer, Block) or layer.film is None


def _linears(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The layer's linears in the order that they run in."""
    if isinstance(layer, DecoderLayer | ExpertLayer):
        attn, mlp = layer.self_attn, layer.mlp
        own = () if _cross(layer) else (attn.k_proj, attn.v_proj)
        return attn.q_proj, *own, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    assert isinstance(layer, Block | DiTBlock)
    return layer.attn.qkv, layer.attn.proj, layer.mlp.fc1, layer.mlp.fc2


def _cross(layer: nn.Module) -> bool:
    return isinstance(layer, ExpertLayer) and layer.self_attn.cross


def _gains(layer: Block | DiTBlock) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(layer, DiTBlock):
        return None, None
    first, second = (s.scale_factor if isinstance(s, LayerScale) else None for s in (layer.ls1, layer.ls2))
    return first, second


def _norm(norm: nn.LayerNorm | RMSNorm) -> Norm:
    if isinstance(norm, RMSNorm):
        return Norm(norm.weight, None, norm.eps, rms=True)
    return Norm(norm.weight, norm.bias, norm.eps)


def _at(norm: nn.Module, step: int) -> tuple[Norm, Tensor | None]:
    """An expert's or a decoder's norm in a denoising step, and the gain of the branch behind it."""
    if isinstance(norm, RMSNorm):
        return _norm(norm), None
    assert isinstance(norm, AdaptiveNorm)
    scale, shift, gate = norm.modulation[step].chunk(3)
    return Norm(1 + scale, shift, norm.eps, rms=True), gate


def _spec(layer: nn.Module, linears: list[kernels.Linear], step: int = 0) -> LayerSpec:
    if isinstance(layer, DecoderLayer | ExpertLayer):
        attn, cross = layer.self_attn, _cross(layer)
        *inputs, out, gate, up, down = linears
        first, second = _at(layer.input_layernorm, step), _at(layer.post_attention_layernorm, step)
        return LayerSpec(
            inputs=inputs,
            out=out,
            up=[gate, up],
            down=down,
            norms=(first[0], second[0]),
            gains=(first[1], second[1]),
            function=layer.mlp.activation,
            heads=(attn.heads, attn.kv_heads, attn.head_dim),
            causal=attn.causal,
            cross=cross,
        )
    assert isinstance(layer, Block | DiTBlock)
    heads = layer.attn.heads
    return LayerSpec(
        inputs=linears[:1],
        out=linears[1],
        up=linears[2:3],
        down=linears[3],
        norms=(_norm(layer.norm1), _norm(layer.norm2)),
        gains=_gains(layer),
        function=layer.mlp.activation,
        heads=(heads, heads, layer.attn.width // heads),
        causal=False,
    )
