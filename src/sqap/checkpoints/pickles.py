"""Tensors in files of ``torch.save``, which are pickles; none of their code is ever run."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqap.checkpoints.tensors import DTYPES, TensorFile, TensorInfo, read_start, unsupported
from sqap.errors import CheckpointError

# Of dictionaries and lists in a file: one can be inside itself.
DEEPEST, MOST_CONTAINERS = 32, 100_000


def torch_file(path: Path) -> TensorFile:
    """A file of ``torch.save``, its nested dictionaries flattened to names with dots.

    Files from before PyTorch 1.6 cannot be mapped and are held in memory as a whole.

    Raises:
        CheckpointError: it is missing or truncated, or holds anything but tensors and plain containers;
            nothing in it was executed.
    """
    mappable = read_start(path).startswith(b"PK\x03\x04")
    found = _load_pickle(path, mmap=mappable)
    tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}
    return TensorFile(path, tensors, _map_pickle if mappable else partial(_held, found))


def _load_pickle(path: Path, *, mmap: bool) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as problem:  # a malformed pickle makes the unpickler raise anything
        raise CheckpointError(_refusal(path, problem)) from None
    tensors: dict[str, Tensor] = {}
    for name, tensor in _flatten(path, loaded):
        if name in tensors:
            raise CheckpointError(f"{path} holds {name!r} twice")
        if not _is_plain(tensor):
            raise CheckpointError(f"{path}: {name} is no plain tensor all of whose values are in the file")
        if tensor.dtype not in DTYPES.values():
            raise unsupported(path, name, tensor.dtype)
        tensors[name] = tensor
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is as large as the file says: a view of one number may claim any shape."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize
    )


def _map_pickle(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    return _load_pickle(path, mmap=True)


def _held(tensors: Mapping[str, Tensor], path: Path, names: Collection[str]) -> Mapping[str, Tensor]:
    """Those of a file that cannot be mapped. Functions of modules, so that they can be sent to a process."""
    return tensors


def _refusal(path: Path, problem: Exception) -> str:
    name = re.search(r"GLOBAL (\S+)", str(problem))
    if name:
        return (
            f"{path} holds {name[1]}, which is neither a tensor nor a plain container; "
            "it was refused and nothing in it was executed"
        )
    if isinstance(problem, pickle.UnpicklingError) and path.stat().st_size:
        return (
            f"{path} is damaged, or holds more than tensors and plain containers; nothing in it was executed"
        )
    return f"{path} is truncated or not a file of torch.save; download it again"


def _flatten(path: Path, loaded: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their path through dictionaries and lists; counters and the like are left out.

    Raises:
        CheckpointError: the containers have no end, as when one is inside itself.
    """
    containers = 0
    left: list[tuple[int, str, Any]] = [(0, "", loaded)]
    while left:
        depth, name, value = left.pop()
        if isinstance(value, Tensor):
            yield name, value
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            containers += 1
            if depth > DEEPEST or containers > MOST_CONTAINERS:
                raise CheckpointError(f"{path} holds containers inside each other without an end")
            items = [(depth + 1, f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
            left += reversed(items)
