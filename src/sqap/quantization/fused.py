"""Layers all of whose linears are quantized run as one native call each."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sqap import kernels
from sqap.kernels.layer import Layer, Norm
from sqap.models.decoder import DecoderLayer, FloatKV, RMSNorm
from sqap.models.heads.diffusion import DiTBlock
from sqap.models.vision import Block, LayerScale
from sqap.quantization.linear import QuantizedLinear

FUSED = DecoderLayer, Block, DiTBlock
LANES = 8  # heads are multiples of this many channels wide

_layers: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], Layer]] = WeakKeyDictionary()


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
    if kernels.chosen() == kernels.REFERENCE or not _fits(layer):
        return None
    linears, others = _parts(layer)
    bound = [linear.bound() for linear in linears if isinstance(linear, QuantizedLinear)]
    if len(bound) < len(linears) or any(p is not None and p.dtype != torch.float32 for p in others):
        return None
    key = *map(id, bound), *map(kernels.address, others)
    found = _layers.get(layer)
    if found is None or found[0] != key:
        _layers[layer] = found = key, _bind(layer, bound)
    return found[1](x, rope, rows, kept)


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


def _bind(layer: nn.Module, linears: list[kernels.Linear]) -> Layer:
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
