"""Writing files and directories whole or not at all, and on disk when it is said so."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sqap.errors import InputError

# Of Linux's renameat2(2).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def resolve(path: Path) -> Path:
    """The absolute path, links followed: a link to a file stays one when the file is replaced."""
    return Path(os.path.realpath(path))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write next to ``path``, which takes its place if all goes well and is gone otherwise.

    When this ends without an error, the file is on disk. Of a link it is the target that is replaced.

    Raises:
        InputError: the file cannot be written, or ``path`` is a device such as /dev/null, whose place no file
            should take; what was at ``path`` is still there.
    """
    place = resolve(path)
    if os.path.exists(place) and not os.path.isfile(place):
        raise InputError(f"cannot write {path}: it is not a file; nothing there was changed")
    temporary = place.with_name(f".{place.stem}.{os.getpid()}{place.suffix}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, place)
        sync(place.parent)
    except (OSError, SafetensorError) as problem:
        raise InputError(f"cannot write {path}: {reason(problem)}; nothing there was changed") from problem
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_file(path: Path) -> None:
    """Refuse a place that `whole_file` could not write, before long work is done for it.

    Raises:
        InputError: as `whole_file`.
    """
    place = resolve(path)
    made = [parent for parent in place.parents if not os.path.exists(parent)]
    try:
        with suppress(_NotWritten), whole_file(path) as temporary:
            temporary.touch()
            raise _NotWritten
    finally:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of the file at ``path``, which is made if need be and stays.

    The operating system gives the lock back when the process ends, however it does.

    Raises:
        InputError: another process holds it, which ``refusal`` says, or the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as problem:
        raise InputError(f"cannot write {path}: {reason(problem)}") from problem
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:  # of the lock alone: one from the block is not about it
            raise InputError(refusal) from problem
        yield
    finally:
        os.close(descriptor)


class _NotWritten(Exception):
    """Leaves `whole_file` before anything takes its place."""


def write_json(path: Path, data: Any) -> None:
    """Write plain data as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Return when a file's content, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems know no such thing for directories
            raise
    finally:
        os.close(descriptor)


def reason(problem: Exception) -> str:
    """Why something could not be written, in a few words."""
    if getattr(problem, "errno", None) == errno.ENOSPC or "No space left" in str(problem):
        return "the disk is full"
    if isinstance(problem, FileExistsError):  # where a directory was to be made
        return f"{problem.filename} is not a directory"
    return getattr(problem, "strerror", None) or str(problem).partition("\n")[0]


def exchange(new: Path, place: Path) -> None:
    """Put the directory ``new`` at ``place``; what was there, if anything, is at ``new`` afterwards.

    On Linux, at every instant one of the two is at ``place``. Elsewhere there is an instant without any.

    Raises:
        OSError: it could not be done; both are where they were.
    """
    if not os.path.lexists(place):
        os.rename(new, place)
    elif not _exchange_at_once(new, place):
        aside = new.with_name(f"{new.name}.old")
        os.rename(place, aside)
        try:
            os.rename(new, place)
        except OSError:
            os.rename(aside, place)
            raise
        os.rename(aside, new)


def _exchange_at_once(new: Path, place: Path) -> bool:
    """Whether the system, and the file system, could swap two names."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(new), os.fsencode(place)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), str(place))
