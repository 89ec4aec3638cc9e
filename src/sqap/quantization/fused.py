"""Layers all of whose linears are quantized run as one native call each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import eq, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sqap import kernels
from sqap.kernels.layer import Layer, Norm, look
from sqap.models.decoder import Decoder, DecoderLayer, FloatKV, RMSNorm
from sqap.models.heads.diffusion import DiTBlock
from sqap.models.vision import Block, LayerScale
from sqap.quantization.linear import QuantizedLinear

FUSED = DecoderLayer, Block, DiTBlock
LANES = 8  # heads are multiples of this many channels wide

# Of a module, what is read when its layer is bound; "forward" where an instance has one of its own.
ATTRIBUTES = "eps", "causal", "heads", "kv_heads", "head_dim", "width", "activation", "kv_format", "forward"
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"

# Where a module keeps something, under which name, and what it was when the layer was bound.
Place = tuple[dict[str, Any], str, object]


@dataclass(frozen=True)
class _Bound:
    """A layer that is bound to its tensors, and how to see that it still has them.

    It is looked at before every call, and a diffusion head's layers are called forty times in a step: the
    modules' own dictionaries are asked, by loops that Python runs in C. That takes a few microseconds, where
    attributes of modules take fifty.

    Args:
        native: the layer.
        path: of its products.
        places: all that the layer and the modules in it hold and are.
        tensors: of these, those that are tensors.
        addresses: where the tensors' values are.
        hooks: dictionaries that are empty as long as nobody wants to see what the modules in the layer do.
        modules: dictionaries of modules, to which none may be added.
    """

    native: Layer
    path: str
    places: tuple[tuple[dict[str, Any], ...], tuple[str, ...], tuple[object, ...]]
    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    hooks: tuple[Mapping[int, object], ...]
    modules: tuple[tuple[Mapping[str, object], ...], tuple[int, ...]]

    def holds(self) -> bool:
        """Whether nothing has been replaced, and nobody has hooked into the layer."""
        if self.path != kernels.chosen() or any(self.hooks):
            return False
        owners, names, values = self.places
        if not all(map(is_, map(dict.get, owners, names), values)):
            return False
        if not all(map(eq, map(len, self.modules[0]), self.modules[1])):
            return False
        # A tensor may stay, and what is in it be elsewhere.
        return all(map(eq, map(Tensor.data_ptr, self.tensors), self.addresses))

    def trains(self) -> bool:
        """Whether one of its parameters is to be given a gradient."""
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

    ``kept`` is filled with keys and values. None where it takes PyTorch: another device or type than float32,
    a linear that is not quantized, hooks on modules in the layer, gradients.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or (first and len(x) != 1):
        return None
    native = _found(layer, x)
    return None if native is None else native(x, rope, rows, kept, first)


def look_fused(
    layers: Sequence[nn.Module], x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor
) -> Tensor | None:
    """What ``rows`` would attend to in later layers (`sqap.kernels.layer.look`); None as of `run_fused`."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or len(x) != 1:
        return None
    found = [native for native in (_found(layer, x) for layer in layers) if native is not None]
    return look(found, x, rope, rows) if len(found) == len(layers) else None


def _found(layer: nn.Module, x: Tensor) -> Layer | None:
    """The native layer, bound anew where something has changed; None where it would not do."""
    found = _layers.get(layer)
    if found is None or not found.holds():
        found = _bind(layer)
        if found is None:
            return None
        _layers[layer] = found
    if torch.is_grad_enabled() and (x.requires_grad or found.trains()):
        return None
    return found.native


def _bind(layer: nn.Module) -> _Bound | None:
    """The layer as it is now; None if the native one would not do."""
    hooks = tuple(_hooks(layer))
    if kernels.chosen() == kernels.REFERENCE or any(hooks) or not _fits(layer):
        return None
    if any("forward" in vars(module) for module in layer.modules() if module is not layer):
        return None
    linears, others = _parts(layer)
    bound = [linear.bound() for linear in linears if isinstance(linear, QuantizedLinear)]
    if len(bound) < len(linears) or any(p is not None and p.dtype != torch.float32 for p in others):
        return None
    owners, names, values = zip(*_places(layer), strict=True)
    tensors = tuple(kept for kept in values if isinstance(kept, Tensor))
    modules = tuple(module._modules for module in layer.modules())
    return _Bound(
        native=_native(layer, bound),
        path=kernels.chosen(),
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
    """Whether the native layer knows all that this one does."""
    if isinstance(layer, DecoderLayer):
        return isinstance(layer.self_attn.kv_format, FloatKV) and layer.self_attn.head_dim % LANES == 0
    assert isinstance(layer, Block | DiTBlock)
    if isinstance(layer, Block) and layer.film is not None:
        return False
    return layer.attn.width % (LANES * layer.attn.heads) == 0


def _parts(layer: nn.Module) -> tuple[tuple[nn.Module, ...], tuple[Tensor | None, ...]]:
    """The layer's linears in the order that they run in, and its other parameters."""
    if isinstance(layer, DecoderLayer):
        attn, mlp = layer.self_attn, layer.mlp
        linears = (
            attn.q_proj,
            attn.k_proj,
            attn.v_proj,
            attn.o_proj,
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
        )
        return linears, (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    assert isinstance(layer, Block | DiTBlock)
    norms = layer.norm1, layer.norm2
    parameters = [parameter for norm in norms for parameter in (norm.weight, norm.bias)]
    return (layer.attn.qkv, layer.attn.proj, layer.mlp.fc1, layer.mlp.fc2), (*parameters, *_gains(layer))


def _gains(layer: Block | DiTBlock) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(layer, DiTBlock):
        return None, None
    first, second = (s.scale_factor if isinstance(s, LayerScale) else None for s in (layer.ls1, layer.ls2))
    return first, second


def _norm(norm: nn.LayerNorm | RMSNorm) -> Norm:
    if isinstance(norm, RMSNorm):
        return Norm(norm.weight, None, norm.eps, rms=True)
    return Norm(norm.weight, norm.bias, norm.eps)


def _native(layer: nn.Module, linears: list[kernels.Linear]) -> Layer:
    if isinstance(layer, DecoderLayer):
        attn = layer.self_attn
        return Layer(
            inputs=linears[:3],
            out=linears[3],
            up=linears[4:6],
            down=linears[6],
            norms=(_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)),
            gains=(None, None),
            function="silu",
            heads=(attn.heads, attn.kv_heads, attn.head_dim),
            causal=attn.causal,
        )
    assert isinstance(layer, Block | DiTBlock)
    heads = layer.attn.heads
    return Layer(
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
