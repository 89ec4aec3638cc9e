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
from sqap.models.kv import FloatKV
from sqap.models.vision import Block, LayerScale
from sqap.quantization.linear import QuantizedLinear

FUSED = DecoderLayer, Block, DiTBlock

# Of a module, what is read when its layer is bound; "forward" where an instance has one of its own.
ATTRIBUTES = "eps", "causal", "heads", "kv_heads", "head_dim", "width", "activation", "kv_format", "forward"
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"

# Where a module keeps something, under which name, and what it was when the layer was bound.
Place = tuple[dict[str, Any], str, object]


@dataclass(frozen=True)
class _Bound:
    """A layer bound to its tensors, with what is needed to check that they are unchanged.

    It is checked before every call, and a diffusion head's layers are called forty times in a step: reading
    the modules' own dictionaries with ``map`` takes a few microseconds, reading their attributes fifty.

    Args:
        fused: the layer; None where its backend runs its modules one by one.
        backend: of its linears.
        name: the backend's.
        places: the attributes, parameters, buffers and submodules that the layer had when it was bound.
        tensors: of these, those that are tensors.
        addresses: where the tensors' values are.
        hooks: the modules' dictionaries of hooks, which must be empty.
        modules: the modules' dictionaries of submodules, and their lengths.
    """

    fused: FusedLayer | None
    backend: kernels.Backend
    name: str
    places: tuple[tuple[dict[str, Any], ...], tuple[str, ...], tuple[object, ...]]
    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    hooks: tuple[Mapping[int, object], ...]
    modules: tuple[tuple[Mapping[str, object], ...], tuple[int, ...]]

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
        return all(map(eq, map(Tensor.data_ptr, self.tensors), self.addresses))

    def trains(self) -> bool:
        """Whether one of its parameters requires a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors)


_layers: WeakKeyDictionary[nn.Module, _Bound] = WeakKeyDictionary()


def fuse(model: nn.Module) -> None:
    """Let the layers of ``model`` run as one call each, where they can."""
    for module in model.modules():
        if isinstance(module, FUSED):
            module.fused = run_fused
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
    if found is None or found.fused is None or not found.fused.takes(x, first, past):
        return None
    return found.fused(x, rope, rows, kept, first)


def look_fused(
    layers: Sequence[nn.Module], x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor
) -> Tensor | None:
    """What ``rows`` would attend to in later layers (`kernels.Backend.look`); None as of `run_fused`."""
    found = [bound for bound in (_found(layer, x) for layer in layers) if bound is not None]
    fused = [bound.fused for bound in found if bound.fused is not None]
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
    return _Bound(
        fused=backend.layer(_spec(layer, [linear.bound() for linear in linears])),
        backend=backend,
        name=backend.name,
        places=(owners, names, values),
        tensors=tensors,
        addresses=tuple(tensor.data_ptr() for tensor in tensors),
        hooks=hooks,
        modules=(modules, tuple(map(len, modules))),
    )


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
    return not isinstance(layer, Block) or layer.film is None


def _linears(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The layer's linears in the order that they run in."""
    if isinstance(layer, DecoderLayer):
        attn, mlp = layer.self_attn, layer.mlp
        first = attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
        return *first, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    assert isinstance(layer, Block | DiTBlock)
    return layer.attn.qkv, layer.attn.proj, layer.mlp.fc1, layer.mlp.fc2


def _gains(layer: Block | DiTBlock) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(layer, DiTBlock):
        return None, None
    first, second = (s.scale_factor if isinstance(s, LayerScale) else None for s in (layer.ls1, layer.ls2))
    return first, second


def _norm(norm: nn.LayerNorm | RMSNorm) -> Norm:
    if isinstance(norm, RMSNorm):
        return Norm(norm.weight, None, norm.eps, rms=True)
    return Norm(norm.weight, norm.bias, norm.eps)


def _spec(layer: nn.Module, linears: list[kernels.Linear]) -> LayerSpec:
    if isinstance(layer, DecoderLayer):
        attn = layer.self_attn
        return LayerSpec(
            inputs=linears[:3],
            out=linears[3],
            up=linears[4:6],
            down=linears[6],
            norms=(_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)),
            gains=(None, None),
            function=layer.mlp.activation,
            heads=(attn.heads, attn.kv_heads, attn.head_dim),
            causal=attn.causal,
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
