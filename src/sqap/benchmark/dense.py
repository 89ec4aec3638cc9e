"""Packed policies turned back into floats, for tools that know nothing of packed weights."""

from __future__ import annotations

import torch
from torch import nn

from sqap.kernels.hadamard import block_hadamard
from sqap.policy import Policy
from sqap.quantization import QuantizedLinear


def dense(policy: Policy, dtype: torch.dtype) -> Policy:
    """The same weights as floats of ``dtype``, nothing pruned, no rotation left at run time."""
    unpack(policy.model, dtype)
    policy.model.to(dtype)
    return Policy(policy.model, policy.config, policy.tokenizer)


def unpack(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Turn packed linears into those that PyTorch has, in place."""
    for name, linear in [*module.named_modules()]:
        if isinstance(linear, QuantizedLinear):
            parent, _, attribute = name.rpartition(".")
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
