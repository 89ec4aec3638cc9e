"""Tensors in files, listed without being read and read a few at a time; files of safetensors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sqap.errors import CheckpointError, one_line
from sqap.serialization import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Other files of weights: shards without their index, and what transformers wrote before safetensors.
SHARDS, PICKLES = "model-*-of-*.safetensors", "pytorch_model*.bin"
# Mapped pages count as memory until the file is closed, so it is opened anew after this many bytes.
BATCH_BYTES = 256 << 20
SHOWN = 8
logger = logging.getLogger("sqap")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Others, of eight bits and fewer, come with scales that their numbers are to be multiplied by.
FLOATS = frozenset(dtype for dtype in DTYPES.values() if dtype.is_floating_point)


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Load = Callable[[Path, Collection[str]], Mapping[str, Tensor]]


class TensorFile:
    """A file of named tensors.

    Args:
        path: where it is.
        tensors: what is in it.
        load: gives those of some names that are in the file, mapped from the disk rather than read; they are
            let go of right after use.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], load: Load) -> None:
        self.path, self.tensors = path, tensors
        self._load = load

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Copies of tensors, in the type they are stored in; nothing stays mapped.

        Raises:
            CheckpointError: the file is no longer what it was when it was opened.
        """
        out: dict[str, Tensor] = {}
        for batch in self._batches(names):
            mapped = self._load(self.path, batch)
            for name in batch:
                if name not in mapped or tuple(mapped[name].shape) != self.tensors[name].shape:
                    raise CheckpointError(f"{self.path} was changed while it was in use")
                out[name] = mapped[name].detach().clone(memory_format=torch.contiguous_format)
        return out

    def _batches(self, names: Collection[str]) -> Iterator[list[str]]:
        batch: list[str] = []
        size = 0
        for name in names:
            if batch and size + self.tensors[name].nbytes > BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(name)
            size += self.tensors[name].nbytes
        if batch:
            yield batch


def safetensors_file(path: Path) -> TensorFile:
    """A safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or something else.
    """
    with _safetensors(path) as file:
        # Not by the tensors themselves: the library reads ahead what it maps.
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        tensors = {
            name: TensorInfo(tuple(found.get_shape()), _dtype(path, name, found.get_dtype()))
            for name, found in slices.items()
        }
    return TensorFile(path, tensors, _map_safetensors)


def open_safetensors(directory: Path) -> list[TensorFile]:
    """A directory's ``model.safetensors``, or else the shards that its index names.

    Where there is more than that, the order is transformers', and what is not read is logged.

    Raises:
        CheckpointError: there is neither, or a shard is missing, truncated or another model's.
    """
    shards, pickles = sorted(directory.glob(SHARDS)), sorted(directory.glob(PICKLES))
    # A broken link is a file that is missing, and not another's turn.
    if os.path.lexists(directory / SINGLE):
        _warn_unread(directory, SINGLE, shards + pickles)
        return [safetensors_file(directory / SINGLE)]
    if os.path.lexists(directory / INDEX):
        files = _open_shards(directory)
        read = {file.path for file in files}
        _warn_unread(directory, "the shards of its index", [p for p in shards + pickles if p not in read])
        return files
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights in {pickles[0].name}, and safetensors are read here: load and save "
            "the model with transformers (save_pretrained) to have them written"
        )
    raise CheckpointError(f"{directory} has no weights: neither {SINGLE} nor {INDEX} with its shards")


def _warn_unread(directory: Path, read: str, others: Collection[Path]) -> None:
    """Say what other weights there are: which ones are newer, no file tells."""
    if others:
        names = shorten([path.name for path in others])
        logger.warning("%s: %s is read, and %s beside it is not", directory, read, names)


def shorten(names: Collection[str]) -> str:
    """A list of names for a message, cut to a readable number."""
    shown = [name if name and name == one_line(name) else repr(name) for name in [*names][:SHOWN]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _open_shards(directory: Path) -> list[TensorFile]:
    index = directory / INDEX
    data = read_json(index, CheckpointError)
    listed = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    shards = sorted(set(listed.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r}, which is not a file beside it")
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} is incomplete: of {len(shards)} shards it lacks {shorten(missing)}"
        )
    files = [safetensors_file(directory / shard) for shard in shards]
    for file in files:
        _check_shard(file, {name for name, shard in listed.items() if shard == file.path.name})
    return files


def _check_shard(file: TensorFile, listed: set[str]) -> None:
    lacking, extra = sorted(listed - set(file.tensors)), sorted(set(file.tensors) - listed)
    if lacking or extra:
        problems = [f"it lacks {shorten(lacking)}"] if lacking else []
        problems += [f"it also has {shorten(extra)}"] if extra else []
        raise CheckpointError(
            f"{file.path} is not the shard that {INDEX} describes: {' and '.join(problems)}"
        )


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:  # the library has no types
    read_start(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: {problem}; download it again"
        ) from problem


def _map_safetensors(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    with _safetensors(path) as file:
        there = set(file.keys())
        return {name: file.get_tensor(name) for name in names if name in there}


def _dtype(path: Path, name: str, stored: str) -> torch.dtype:
    if stored not in DTYPES:
        raise unsupported(path, name, stored)
    return DTYPES[stored]


def unsupported(path: Path, name: str, stored: object) -> CheckpointError:
    """What is said of a tensor whose type is none of `DTYPES`."""
    return CheckpointError(f"{path}: {name} is stored as {stored}; supported are {', '.join(DTYPES)}")


def read_start(path: Path) -> bytes:
    """A file's first bytes, which tell what it is.

    Raises:
        CheckpointError: it cannot be read, is no file, or Git left a pointer in its place.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise CheckpointError(f"cannot read {path}: it is not a file")
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as problem:
        raise CheckpointError(f"cannot read {path}: {problem.strerror}") from problem
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is only a pointer to the file; fetch the file with `git lfs pull`")
    return start
