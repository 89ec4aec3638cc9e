"""Weights on disk: bfloat16 where they are floats, as they are where they are packed; and read from there."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

STORAGE_DTYPE = torch.bfloat16


class Weights(Protocol):
    """A model's tensors, read from files when they are asked for."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of the files."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of their own by the model's parameter names, in the type they are stored in."""


@torch.inference_mode(False)  # or the weights could never be changed outside of it
def fill(
    module: nn.Module,
    weights: Weights,
    *,
    prefix: str = "",
    skip: Collection[str] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Give a module the weights that it has on the meta device.

    Args:
        module: whose parameters go by ``prefix`` and their own names.
        weights: where they are.
        prefix: the module's name in its model, with a dot behind.
        skip: parameters to be left on the meta device.
        dtype: what they become; None leaves them in the types they are stored in.
    """
    missing = [n for n, parameter in module.named_parameters() if parameter.is_meta and n not in skip]
    found = weights.read(prefix + name for name in missing)
    named = {}
    for name in missing:  # one by one, so that not all are there in both types
        tensor = found.pop(prefix + name)
        named[name] = tensor.to(dtype or tensor.dtype)
    module.load_state_dict(named, assign=True, strict=False)
    module.requires_grad_(False)


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
    """Give parameters the values they will have on disk, so that saving and loading change nothing.

    Embedding tables, of which a step reads a few rows, stay in that type in memory too.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(STORAGE_DTYPE).to(parameter.dtype)
    for table in module.modules():
        if isinstance(table, nn.Embedding):
            table.to(STORAGE_DTYPE)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
