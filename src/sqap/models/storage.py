"""What weights are on disk: bfloat16 where they are floats, as they are where they are packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STORAGE_DTYPE = torch.bfloat16


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's state as it is written: parameters in `STORAGE_DTYPE`, buffers untouched."""
    parameters = {name for name, _ in module.named_parameters()}
    return {
        name: (tensor.to(STORAGE_DTYPE) if name in parameters else tensor).contiguous()
        for name, tensor in module.state_dict().items()
    }


def stored_bytes(module: nn.Module) -> int:
    """Bytes of the module's weights on disk."""
    parameters = {name for name, _ in module.named_parameters()}
    return sum(
        tensor.numel() * (STORAGE_DTYPE.itemsize if name in parameters else tensor.element_size())
        for name, tensor in module.state_dict().items()
    )


def round_to_storage(module: nn.Module) -> None:
    """Give parameters the values they will have on disk, so that saving and loading change nothing."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(STORAGE_DTYPE).to(parameter.dtype)
