"""Stages that an interrupted compression has finished, one file each."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.files import reason, resolve, sync, whole_file
from sqap.models.storage import hash_tensors

logger = logging.getLogger("sqap")

MARK = "sqap.lock"  # tells a directory of ours, and is locked by the process that works in it
OWNER = "sqap compression, process "  # what the mark holds, before the process's number
SUFFIX = ".stage.safetensors"
ATTEMPTS = 100  # at a directory that other processes make and remove


class Partial:
    """A directory of finished stages, which one process has at a time. Use as a context manager.

    The operating system gives the directory back when the process ends, however it does. A directory that has
    no stages is removed at the end of the block.

    Args:
        directory: a new or an empty one, or one that an interrupted compression left.

    Raises:
        InputError: another process has the directory, it holds something else, or it cannot be written.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = resolve(Path(directory))
        self._key = ""
        self._lock: int | None = _take(self.directory)

    def begin(self, key: str) -> None:
        """Go on with stages that were saved under ``key``, and delete all others, saying so.

        Args:
            key: a hash of everything that decides what stages hold.
        """
        self._key = key
        names = _written(self.directory)
        unfinished = [name for name in names if not name.endswith(SUFFIX)]  # the process was killed meanwhile
        finished = {name: _metadata(self.directory / name).get("key") for name in names}
        others = [name for name, other in finished.items() if other not in (key, None)]
        self._delete([*unfinished, *others])
        if others:
            logger.warning(
                "stages of another compression in %s are discarded: its weights, frames, settings or code "
                "were others",
                self.directory,
            )

    def save(self, name: str, stage: nn.Module) -> None:
        """Keep a finished stage; it is on disk when this returns.

        Raises:
            InputError: the file cannot be written.
        """
        self._check_held()
        tensors = {key: tensor.contiguous() for key, tensor in stage.state_dict().items()}
        metadata = {"key": self._key, "sha256": hash_tensors(tensors)}
        try:
            with whole_file(self._path(name)) as temporary:
                save_file(tensors, temporary, metadata)
        except InputError as problem:
            raise InputError(f"{problem}; finished stages are kept, and the same call goes on") from problem

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a stage, as `save` was given them; None if it is not there, or damaged."""
        path = self._path(name)
        if not path.exists():
            return None
        found = _metadata(path)
        with suppress(SafetensorError, OSError):
            tensors = load_file(path)
            if found.get("key") == self._key and found.get("sha256") == hash_tensors(tensors):
                return tensors
        logger.warning("%s is damaged; the stage is made anew", path)
        return None

    def remove(self) -> None:
        """Delete the stages and, unless it holds something else, the directory."""
        self._check_held()
        self._delete([*_written(self.directory), MARK])
        with suppress(OSError):
            self.directory.rmdir()
        self._release()

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None and self._held() and not _written(self.directory):
            self.remove()
        self._release()

    def _delete(self, names: Iterable[str]) -> None:
        try:
            for name in names:
                (self.directory / name).unlink(missing_ok=True)
        except OSError as problem:
            raise InputError(f"cannot delete {self.directory / name}: {reason(problem)}") from problem

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _held(self) -> bool:
        return self._lock is not None and _is_at(self._lock, self.directory / MARK)

    def _check_held(self) -> None:
        if not self._held():
            raise InputError(f"{self.directory} was removed while stages were kept in it; start again")

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}{SUFFIX}"


def _take(directory: Path) -> int:
    """Lock a directory's mark, made if need be: the descriptor that holds the lock."""
    mark = directory / MARK
    for _ in range(ATTEMPTS):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not mark.exists() and any(directory.iterdir()):
                raise InputError(
                    f"{directory} is not empty, and no compression has left it; name a directory of its own "
                    "for finished stages"
                )
            lock = os.open(mark, os.O_RDWR | os.O_CREAT, 0o644)
            if _lock(lock, directory, mark):
                return lock
        except FileNotFoundError as problem:
            gone = problem  # removed by a process that has just finished
        except OSError as problem:
            raise InputError(f"cannot keep stages in {directory}: {reason(problem)}") from problem
    raise InputError(f"cannot keep stages in {directory}: {reason(gone)}")


def _lock(lock: int, directory: Path, mark: Path) -> bool:
    """Lock an open mark and sign it; False, and closed, if the mark was removed meanwhile."""
    try:
        owner = os.pread(lock, 100, 0).decode(errors="replace")
        if owner and not owner.startswith(OWNER):
            raise InputError(f"{mark} is not sqap's; name a directory of its own for finished stages")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            process = owner.removeprefix(OWNER).strip() or "of another user"
            raise InputError(
                f"process {process} is compressing to the same place and has {directory}; wait until it has "
                "finished, or choose another place"
            ) from problem
        if _is_at(lock, mark):
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{OWNER}{os.getpid()}\n".encode(), 0)
            sync(directory)
            return True
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _written(directory: Path) -> list[str]:
    """The names of stage files, finished and unfinished ones."""
    finished, unfinished = SUFFIX, SUFFIX.partition(".safetensors")[0] + "."
    return [
        name
        for name in sorted(os.listdir(directory))
        if name.endswith(finished) or (name.startswith(".") and unfinished in name)
    ]


def _metadata(path: Path) -> dict[str, str]:
    """What a stage file says about itself; nothing if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}
