"""Layers all of whose linears are quantized run as one native call each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sqap import kernels
from sqap.kernels.layer import Layer, Norm
from sqap.models.decoder import Attention, DecoderLayer, FloatKV, RMSNorm
from sqap.models.heads.diffusion import DiTBlock
from sqap.models.vision import Block, LayerScale
from sqap.quantization.linear import QuantizedLinear

FUSED = DecoderLayer, Block, DiTBlock
LANES = 8  # heads are multiples of this many channels wide

# Where a module keeps something, under which name, and what it was when the layer was bound.
Place = tuple[Mapping[str, object], str, object]


@dataclass(frozen=True)
class _Bound:
    """A layer that is bound to its tensors, and how to see that it still has them.

    It is looked at before every call, and a diffusion head's layers are called forty times in a step: the
    modules' own dictionaries are asked, which takes a microsecond where attributes of modules take fifty.
    """

    native: Layer
    path: str
    places: tuple[Place, ...]
    addresses: tuple[tuple[Tensor, int], ...]

    def holds(self) -> bool:
        """Whether nothing has been replaced."""
        if self.path != kernels.chosen():
            return False
        for owner, name, kept in self.places:
            if owner.get(name) is not kept:
                return False
        # A tensor may stay, and what is in it be elsewhere.
        return all(tensor.data_ptr() == address for tensor, address in self.addresses)


_layers: WeakKeyDictionary[nn.Module, _Bound] = WeakKeyDictionary()


def fuse(model: nn.Module) -> None:
    """Let the layers of ``model`` run as one call each, where they can."""
    for module in model.modules():
        if isinstance(module, FUSED):
            module.fused = run_fused


def run_fused(
    layer: nn.Module,
    x: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
    rows: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """What the layer makes of ``x`` ``(batch, tokens, width)``, and what ``rows`` attend to.

    ``kept`` is filled with keys and values. None where it takes PyTorch: another device or type than float32,
    a linear that is not quantized.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.requires_grad:
        return None
    found = _layers.get(layer)
    if found is None or not found.holds():
        found = _bind(layer)
        if found is None:
            return None
        _layers[layer] = found
    return found.native(x, rope, rows, kept)


def _bind(layer: nn.Module) -> _Bound | None:
    """The layer as it is now; None if the native one would not do."""
    if kernels.chosen() == kernels.REFERENCE or not _fits(layer):
        return None
    linears, others = _parts(layer)
    bound = [linear.bound() for linear in linears if isinstance(linear, QuantizedLinear)]
    if len(bound) < len(linears) or any(p is not None and p.dtype != torch.float32 for p in others):
        return None
    places = tuple(_places(layer))
    addresses = tuple((kept, kept.data_ptr()) for _, _, kept in places if isinstance(kept, Tensor))
    return _Bound(_native(layer, bound), kernels.chosen(), places, addresses)


def _places(layer: nn.Module) -> Iterator[Place]:
    """All that the layer and the modules in it hold."""
    for module in layer.modules():
        for kept in (module._modules, module._buffers, module._parameters):
            yield from ((kept, name, value) for name, value in kept.items())
        if isinstance(module, Attention):
            yield vars(module), "kv_format", module.kv_format


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
