"""Weights on disk: bfloat16 where they are floats, as they are where they are packed; and read from there."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sqap.errors import CheckpointError, SqapError

STORAGE_DTYPE = torch.bfloat16
Progress = Callable[[int, int], None]
COMPUTED = torch.float32, torch.bfloat16, torch.float16


class Weights(Protocol):
    """A model's tensors, read from files when they are asked for."""

    @property
    def where(self) -> Path:
        """The directory that the files are in, for messages."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of the files."""

    def hash_files(self, progress: Progress | None = None) -> str:
        """The `fingerprint`, while ``progress`` gets (bytes hashed, bytes in all)."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of their own by the model's parameter names, in the type they are stored in."""


@dataclass(frozen=True)
class Rounded:
    """Weights with the values that they have once they are stored by us: `STORAGE_DTYPE`."""

    weights: Weights

    @property
    def where(self) -> Path:
        """Of the weights that are rounded."""
        return self.weights.where

    @property
    def fingerprint(self) -> str:
        """Of the weights that are rounded."""
        return self.weights.fingerprint

    def hash_files(self, progress: Progress | None = None) -> str:
        """The same."""
        return self.weights.hash_files(progress)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of their own, in `STORAGE_DTYPE`."""
        found = self.weights.read(names)
        return {name: found.pop(name).to(STORAGE_DTYPE) for name in [*found]}


@torch.inference_mode(False)  # or the weights could never be changed outside of it
def fill(
    module: nn.Module,
    weights: Weights,
    *,
    prefix: str = "",
    skip: Collection[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Give a module the weights that it has on the meta device.

    Args:
        module: whose parameters go by ``prefix`` and their own names.
        weights: where they are.
        prefix: the module's name in its model, with a dot behind.
        skip: parameters to be left on the meta device.
        dtype: what they become; None leaves them in the types they are stored in.
        device: where they go; the CPU by default.

    Raises:
        CheckpointError: one holds a value that is not finite.
    """
    missing = [n for n, parameter in module.named_parameters() if parameter.is_meta and n not in skip]
    found = weights.read(prefix + name for name in missing)
    named = {}
    for name in missing:  # one by one, so that not all are there in both types
        tensor = found.pop(prefix + name)
        tensor = tensor.to(dtype or tensor.dtype)
        _check_finite(f"{weights.where}: {prefix}{name}", tensor, CheckpointError)
        named[name] = tensor.to(device or tensor.device)
    module.load_state_dict(named, assign=True, strict=False)
    module.requires_grad_(False)


def widen(module: nn.Module, skip: Collection[int] = ()) -> None:
    """Compute in float32, but for the parameters whose ids are in ``skip``; packed integers stay packed.

    Embedding tables, of which a step reads a few rows, stay as they are.
    """
    _cast([p for p in _without_tables(module) if id(p) not in skip], torch.float32)


def narrow(module: nn.Module) -> None:
    """Compute in `STORAGE_DTYPE`, which changes no value that was stored; packed integers stay packed."""
    _cast(module.parameters(), STORAGE_DTYPE)


def unify(model: nn.Module, head: nn.Module) -> None:
    """One type for all that was filled with the types of a file: the one that most values are stored in.

    A ``head`` of the model is computed in the finest type that it has; embedding tables stay in their own.
    Types other than `COMPUTED` become float32.
    """
    inside = {id(parameter) for parameter in head.parameters()}
    rest = [parameter for parameter in _without_tables(model) if id(parameter) not in inside]
    counts: Counter[torch.dtype] = Counter()
    for parameter in rest:
        counts[parameter.dtype] += parameter.numel()
    _cast(rest, counts.most_common(1)[0][0])
    _cast([*head.parameters()], reduce(torch.promote_types, (p.dtype for p in head.parameters())))


def _without_tables(module: nn.Module) -> list[nn.Parameter]:
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return [parameter for parameter in module.parameters() if id(parameter) not in tables]


def _cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype if dtype in COMPUTED else torch.float32)


def check_finite(module: nn.Module, error: type[SqapError], prefix: str = "") -> None:
    """Refuse weights that are not finite; those on the meta device are checked when they are read.

    Raises:
        SqapError: of the given kind, with the name of the first tensor that holds NaN or infinity.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta:
            _check_finite(prefix + name, tensor, error)


def _check_finite(name: str, tensor: Tensor, error: type[SqapError]) -> None:
    # The extremes are NaN if any value is; one pass, a thirtieth of the time of isfinite() in bfloat16.
    if tensor.numel() and not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
        raise error(f"{name} holds values that are not finite; such a policy cannot act")


def stored_tensors(module: nn.Module, weights: Weights | None = None) -> dict[str, Tensor]:
    """The module's state as it is written: parameters in `STORAGE_DTYPE`, buffers untouched.

    What is on the meta device is read from ``weights``, in that type at most.
    """
    parameters = dict(module.named_parameters())
    missing = [name for name, parameter in parameters.items() if parameter.is_meta]
    read = Rounded(weights).read(missing) if weights is not None and missing else {}
    state = {name: read.get(name, tensor) for name, tensor in module.state_dict().items()}
    for name, tensor in read.items():
        _check_finite(f"{weights and weights.where}: {name}", tensor, CheckpointError)
    return {
        name: (tensor.to(STORAGE_DTYPE) if name in parameters else tensor).contiguous()
        for name, tensor in state.items()
    }


def stored_bytes(module: nn.Module) -> int:
    """Bytes of the module's weights on disk."""
    parameters = {name for name, _ in module.named_parameters()}
    return sum(
        tensor.numel() * (STORAGE_DTYPE.itemsize if name in parameters else tensor.element_size())
        for name, tensor in module.state_dict().items()
    )


def size(count: float) -> str:
    """Bytes in units of 10^6, or 10^9 from the first one on."""
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def round_to_storage(module: nn.Module) -> None:
    """Give parameters the values they will have on disk, so that saving and loading change nothing.

    They are float32 in memory, as a loaded policy's; embedding tables, of which a step reads a few rows, stay
    in that type in memory too.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(STORAGE_DTYPE, copy=True)
    widen(module)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
