"""A published checkpoint's tensors under the names of our model, read from disk when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from sqap.checkpoints.tensors import TensorFile, TensorInfo, shorten
from sqap.errors import CheckpointError
from sqap.models.storage import Progress

Shape = tuple[int, ...]
# Bytes done, and bytes in all.


def same(tensor: Tensor) -> Tensor:
    """A tensor as it is on disk."""
    return tensor


def without_batch(tensor: Tensor) -> Tensor:
    """``(1, ...)`` to ``(...)``."""
    return tensor.squeeze(0)


def copied(tensor: Tensor) -> Tensor:
    """A tensor of its own, where another parameter is made of the same one."""
    return tensor.clone()


def stacked(*tensors: Tensor) -> Tensor:
    """Tensors one behind the other along their first dimension."""
    return torch.cat(tensors)


def scaled(tensor: Tensor, by: float) -> Tensor:
    """A tensor times a number, in 32 bits."""
    return tensor.float() * by


@dataclass(frozen=True)
class Source:
    """Which tensors on disk one of ours is made of, and how.

    ``make`` is also run on the meta device, to learn the shape of what it makes.
    """

    names: tuple[str, ...]
    make: Callable[..., Tensor] = same


Table = dict[str, Source]


def linear_table(ours: str, theirs: str) -> Table:
    """The sources of a linear's weight and bias."""
    return {ours + kind: Source((theirs + kind,)) for kind in ("weight", "bias")}


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint; its names lose the prefix ``strip``, if they have it, and get ``prefix``.

    What else tells its names from those of the table, ``rename`` evens out.
    """

    file: TensorFile
    prefix: str = ""
    strip: str = ""
    rename: Callable[[str], str] = str


class TensorSet:
    """The tensors of several files under one set of names.

    Args:
        where: the checkpoint, for messages.
        parts: its files.

    Raises:
        CheckpointError: two tensors come to have one name.
    """

    def __init__(self, where: Path, parts: Sequence[Part]) -> None:
        self.where = where
        self.files = [part.file for part in parts]
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for part in parts:
            for inner in part.file.tensors:
                name = part.rename(part.prefix + inner.removeprefix(part.strip))
                if name in self._places:
                    raise CheckpointError(f"{part.file.path} has {inner}, which is there already")
                self._places[name] = part.file, inner
        self.tensors: Mapping[str, TensorInfo] = {
            name: file.tensors[inner] for name, (file, inner) in self._places.items()
        }

    def shape(self, name: str, rank: int) -> Shape:
        """A tensor's shape, to learn a model's size from.

        Raises:
            CheckpointError: there is no such tensor, or it has not ``rank`` dimensions.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.where} lacks {name}, by which the size of the model is known")
        shape = self.tensors[name].shape
        if len(shape) != rank:
            raise CheckpointError(f"{self.where}: {name} must have {rank} dimensions, not the shape {shape}")
        return shape

    def count(self, prefix: str) -> int:
        """How many numbered modules there are behind a prefix such as ``layers.``.

        Raises:
            CheckpointError: there are none, or one is missing between others.
        """
        behind = (name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix))
        found = {head for head in (name.partition(".")[0] for name in behind) if head.isdecimal()}
        # By the names alone: a number in one may be too large to be counted to.
        lacking = [str(i) for i in range(max(1, len(found))) if str(i) not in found]
        if lacking:
            raise CheckpointError(
                f"{self.where} lacks {prefix}{lacking[0]}, by which the size of the model is known"
            )
        return len(found)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Copies of tensors, each file being opened once."""
        by_file: dict[TensorFile, dict[str, str]] = {}
        for name in names:
            file, inner = self._places[name]
            by_file.setdefault(file, {})[inner] = name
        return {
            wanted[inner]: tensor
            for file, wanted in by_file.items()
            for inner, tensor in file.read(wanted).items()
        }


class CheckpointWeights:
    """Our model's parameters, made of a checkpoint's tensors.

    Args:
        tensors: what is on disk.
        table: for each of our parameters, where it comes from.
        shapes: our parameters' shapes.
        unused: patterns of names on disk that our model has no use for.

    Raises:
        CheckpointError: tensors are missing, unknown, of another shape or not floats; all are listed.
    """

    def __init__(
        self, tensors: TensorSet, table: Table, shapes: Mapping[str, Shape], unused: Sequence[str] = ()
    ) -> None:
        if table.keys() != shapes.keys():
            raise ValueError(f"the table and the model differ: {sorted(table.keys() ^ shapes.keys())}")
        self._tensors, self._table = tensors, table
        self.where = tensors.where
        self._fingerprint: str | None = None
        used = {name for source in table.values() for name in source.names}
        self.unused: list[str] = [
            name
            for name in tensors.tensors
            if name not in used and any(fnmatchcase(name, pattern) for pattern in unused)
        ]
        problems = _problems(tensors.tensors, table, shapes, used.union(self.unused))
        if problems:
            raise CheckpointError(f"{tensors.where} does not hold the model it describes: {problems}")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters by our names, in the type they are stored in; nothing stays mapped."""
        sources = {name: self._table[name] for name in names}
        found = self._tensors.read(dict.fromkeys(n for source in sources.values() for n in source.names))
        return {
            name: source.make(*(found[inner] for inner in source.names)) for name, source in sources.items()
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of all files, and over which of their tensors become which parameters.

        Reading them takes a while the first time.
        """
        return self.hash_files()

    def hash_files(self, progress: Progress | None = None) -> str:
        """The `fingerprint`, while ``progress`` is told how far it is.

        Raises:
            CheckpointError: a file cannot be read any more.
        """
        if self._fingerprint is None:
            contents = _hash([file.path for file in self._tensors.files], progress)
            table = sorted((name, source.names) for name, source in self._table.items())
            self._fingerprint = hashlib.sha256(f"{contents} {table}".encode()).hexdigest()
        return self._fingerprint


def _problems(
    tensors: Mapping[str, TensorInfo], table: Table, shapes: Mapping[str, Shape], expected: Collection[str]
) -> str:
    """All that is wrong, as one phrase; an empty one if all is well."""
    used = {name: None for source in table.values() for name in source.names}
    missing = [name for name in used if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    misfits = [
        problem
        for name, source in table.items()
        if all(inner in tensors for inner in source.names)
        and (problem := _misfit(name, source, [tensors[inner] for inner in source.names], shapes[name]))
    ]
    lists = {"missing": missing, "not known": unknown, "of another shape or kind": misfits}
    return "; ".join(f"{what}: {shorten(names)}" for what, names in lists.items() if names)


def _misfit(name: str, source: Source, found: Sequence[TensorInfo], wanted: Shape) -> str | None:
    """What is wrong with a parameter's tensors, if anything is."""
    integer = [n for n, info in zip(source.names, found, strict=True) if not info.dtype.is_floating_point]
    if integer:
        return f"{integer[0]} is not floating-point"
    given = [torch.empty(info.shape, dtype=info.dtype, device="meta") for info in found]
    try:
        made: Shape | None = tuple(source.make(*given).shape)
    except (RuntimeError, IndexError):  # shapes that do not go together
        made = None
    if made == wanted:
        return None
    shapes = [f"{n} is {info.shape}" for n, info in zip(source.names, found, strict=True)]
    return f"{' and '.join(shapes)} where {name} must be {wanted}"


def _hash(paths: Sequence[Path], progress: Progress | None) -> str:
    """SHA-256 over each file's own, in order: what they are called does not matter."""
    whole, done = hashlib.sha256(), 0
    try:
        total = sum(path.stat().st_size for path in paths)
        for path in paths:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    done += len(block)
                    if progress is not None:
                        progress(done, total)
            whole.update(digest.digest())
    except OSError as problem:
        raise CheckpointError(f"cannot read {problem.filename}: {problem.strerror}") from problem
    return whole.hexdigest()
