"""Writing files whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqap.errors import InputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write next to ``path``, which takes its place if all goes well and is gone otherwise.

    Raises:
        InputError: the file cannot be written, or ``path`` is a device such as /dev/null, whose place no file
            should take; what was at ``path`` is still there.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is not a file; nothing there was changed")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise InputError(f"cannot write {path}: {reason}; nothing there was changed") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, data: Any) -> None:
    """Write plain data as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
