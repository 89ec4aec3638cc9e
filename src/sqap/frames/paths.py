"""Paths that other people's files name, and directories that may not be readable."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from sqap.errors import InputError


def inside(root: Path, name: Any, where: str) -> Path:
    """``root / name``, for a ``name`` that a stranger's file gives.

    Raises:
        InputError: it leads out of ``root``; the message says ``where`` it was named.
    """
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{where}: {name!r} is not the path of a file inside {root}")
    return root / name


def is_directory(path: Path) -> bool:
    """Whether ``path`` is a directory. One that cannot be looked at is an `InputError`, not a "no"."""
    return stat.S_ISDIR(_mode(path))


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file. One that cannot be looked at is an `InputError`, not a "no"."""
    return stat.S_ISREG(_mode(path))


def listed(directory: Path) -> list[Path]:
    """What is in ``directory``, in the order of the names; nothing, if it is none or missing.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"cannot read {directory}: {error.strerror}") from error


def _mode(path: Path) -> int:
    """The type bits of ``path``; 0 if it is missing."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a null byte
        raise InputError(f"{str(path)!r} is not a path") from error
