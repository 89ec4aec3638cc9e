"""Packed policies turned back into floats, for tools that know nothing of packed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sqap.kernels.hadamard import block_hadamard
from sqap.kernels.levels import quantize_activation
from sqap.policy import Policy
from sqap.quantization import QuantizedEmbedding, QuantizedLinear


def dense(policy: Policy, dtype: torch.dtype) -> Policy:
    """The same weights as floats of ``dtype``, nothing pruned, no rotation left at run time."""
    unpack(policy.model, dtype)
    policy.model.to(dtype)
    return Policy(policy.model, policy.config, policy.tokenizer)


def unpack(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Turn packed linears and tables into those that PyTorch has, in place."""
    for name, linear in [*module.named_modules()]:
        parent, _, attribute = name.rpartition(".")
        if isinstance(linear, QuantizedEmbedding):
            weight = linear.dequantized().to(dtype)
            rows, width = weight.shape
            # Given its weight: rows drawn on the meta device would import PyTorch's compiler.
            table = nn.Embedding(rows, width, _weight=weight, _freeze=True)
            setattr(module.get_submodule(parent), attribute, table)
        elif isinstance(linear, QuantizedLinear):
            made = nn.Linear(
                linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
            )
            made.weight = nn.Parameter(dense_weight(linear).to(dtype), requires_grad=False)
            if linear.bias is not None:
                made.bias = nn.Parameter(linear.bias.to(dtype), requires_grad=False)
            setattr(module.get_submodule(parent), attribute, made)


def dense_weight(linear: nn.Linear | QuantizedLinear) -> torch.Tensor:
    """The float32 weight ``(out, in)`` of a linear, packed or not, that expects an input as it comes."""
    if isinstance(linear, nn.Linear):
        return linear.weight.float()
    weight = linear.dequantized()
    if linear.hadamard_block:  # symmetric: what the input would be multiplied by, the weight may be
        weight = block_hadamard(weight, linear.hadamard_block)
    return weight


class Int8Linear(nn.Module):
    """8-bit weights with a scale per channel, 8-bit inputs with one per token, multiplied by `torch._int_mm`.

    Args:
        linear: that it is made of, on any device.
    """

    LEAST = 32  # tokens: cuBLAS multiplies no fewer than 17

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        q, scale, _ = quantize_activation(linear.weight.detach(), 8, "token")
        self.weight, self.scale, self.bias = q, scale[:, 0], linear.bias

    def forward(self, x: Tensor) -> Tensor:
        q, scale, _ = quantize_activation(x.reshape(-1, x.shape[-1]), 8, "token")
        tokens = len(q)
        if tokens < self.LEAST:
            q = torch.cat([q, q.new_zeros(self.LEAST - tokens, q.shape[1])])
        sums: Tensor = torch._int_mm(q, self.weight.T)[:tokens]
        out = sums.float() * scale * self.scale
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def eight(module: nn.Module) -> None:
    """Turn PyTorch's linears into `Int8Linear`, in place, where cuBLAS multiplies such sizes."""
    for name, linear in [*module.named_modules()]:
        if isinstance(linear, nn.Linear) and linear.in_features % 8 == linear.out_features % 8 == 0:
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, Int8Linear(linear))
