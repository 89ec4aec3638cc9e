"""Hadamard rotation: outlier channels spread over all, the function unchanged (QuaRot, Ashkboos et al. 2024).

With an orthonormal H, ``W x = (W H)(Hᵀ x)``. The residual stream and the values are rotated by rewriting
the weights on both sides, for nothing at run time; only the MLP's inner activations, behind a
nonlinearity, are rotated as the model runs.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.models.decoder import DecoderLayer, RMSNorm
from sqap.models.vla import VLA

# Radix-16 butterflies are small matrix products: on CPUs four times as fast as radix 2, and as one big one.
RADIX = 16


def largest_block(width: int) -> int:
    """The largest power of two that divides ``width``: 11008 = 43 * 256 gives 256."""
    return width & -width


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """Multiply each ``block`` of ``x`` ``(..., width)`` by the orthonormal Sylvester-Hadamard matrix.

    Symmetric, hence its own inverse. O(width log block), in the type of ``x``.

    Raises:
        InputError: ``block`` is not a power of two, or does not divide ``width``.
    """
    if block < 1 or largest_block(block) != block or x.shape[-1] % block:
        raise InputError(f"a Hadamard block must be a power of two that divides {x.shape[-1]}, got {block}")
    done = min(RADIX, block)
    y = x.reshape(-1, done) @ _hadamard(done, x.dtype, x.device)
    while done < block:  # H of size a * b is the Kronecker product of those of size a and b
        radix = min(RADIX, block // done)
        y = _hadamard(radix, x.dtype, x.device) @ y.view(-1, radix, done)
        done *= radix
    return y.view(x.shape)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a matrix made inside inference mode could never be used outside it
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).to(device, dtype)


class HadamardLinear(nn.Linear):
    """A linear whose weight expects inputs rotated by `block_hadamard`, and that rotates them itself."""

    def __init__(self, linear: nn.Linear, block: int) -> None:
        """Take over the parameters of ``linear`` as they are."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(block_hadamard(x, self.block), self.weight, self.bias)


class RotatedNorm(RMSNorm):
    """The final norm on a rotated residual stream: what it returns is in the original basis again."""

    def __init__(self, norm: RMSNorm) -> None:
        """Take over the gain of ``norm`` as it is."""
        nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps
        self.block = largest_block(len(norm.weight))

    def forward(self, x: Tensor) -> Tensor:
        wide = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)  # rotation leaves the mean square alone
        return block_hadamard(wide, self.block).to(x.dtype) * self.weight


def is_rotated(model: VLA) -> bool:
    """Whether the decoder's residual stream is rotated."""
    return isinstance(model.decoder.norm, RotatedNorm)


def prepare_rotated(model: VLA) -> None:
    """Give ``model`` the modules of a rotated one and leave the weights alone, as before loading them.

    Raises:
        InputError: the model is already rotated, or already quantized.
    """
    if is_rotated(model):
        raise InputError("the model is already rotated")
    for layer in _layers(model):
        if not isinstance(layer.mlp.down_proj, nn.Linear):
            raise InputError("the decoder is already quantized; rotation comes first")
        layer.mlp.down_proj = HadamardLinear(
            layer.mlp.down_proj, largest_block(layer.mlp.down_proj.in_features)
        )
    model.decoder.norm = RotatedNorm(model.decoder.norm)


@torch.no_grad()
def rotate_decoder(model: VLA) -> None:
    """Rotate the decoder's activations in place; hidden states and actions stay what they were.

    The gains of the norms go into the linears behind them; the residual stream is rotated at all that
    writes to it (embeddings, projector, o, down) and reads from it (q, k, v, gate, up); values are rotated
    per head and o undoes it; down rotates its own input. Widths that are no power of two are rotated in
    blocks of `largest_block`.

    Raises:
        InputError: the model is already rotated, or already quantized.
    """
    prepare_rotated(model)
    residual = largest_block(model.config.decoder.width)
    head = largest_block(model.config.decoder.head_dim)
    table = model.decoder.embed_tokens.weight
    table.copy_(block_hadamard(table.double(), residual))
    _rewrite(cast(nn.Linear, model.projector.layers[-1]), outputs=residual)
    for layer in _layers(model):
        attention, mlp = layer.self_attn, layer.mlp
        gain = layer.input_layernorm.weight
        _rewrite(attention.q_proj, gain=gain, inputs=residual)
        _rewrite(attention.k_proj, gain=gain, inputs=residual)
        _rewrite(attention.v_proj, gain=gain, inputs=residual, outputs=head)
        _rewrite(attention.o_proj, inputs=head, outputs=residual)
        gain.fill_(1)
        gain = layer.post_attention_layernorm.weight
        _rewrite(mlp.gate_proj, gain=gain, inputs=residual)
        _rewrite(mlp.up_proj, gain=gain, inputs=residual)
        _rewrite(mlp.down_proj, inputs=cast(HadamardLinear, mlp.down_proj).block, outputs=residual)
        gain.fill_(1)


def _rewrite(linear: nn.Linear, *, gain: Tensor | None = None, inputs: int = 1, outputs: int = 1) -> None:
    """``W`` becomes ``H_outputs W diag(gain) H_inputs``, in 64 bits so that it is rounded only once."""
    weight = linear.weight.double() if gain is None else linear.weight.double() * gain.double()
    weight = block_hadamard(block_hadamard(weight, inputs).T, outputs).T
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(block_hadamard(linear.bias.double(), outputs))


def _layers(model: VLA) -> list[DecoderLayer]:
    return [cast(DecoderLayer, layer) for layer in model.decoder.layers]
