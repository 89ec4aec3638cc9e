"""Stages that an interrupted compression has finished, one file each."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from sqap.files import whole_file


class Partial:
    """A directory that belongs to one compression: one policy, one recipe, the same frames."""

    def __init__(self, directory: Path, key: str) -> None:
        """Go on with what is in ``directory`` if it was left under the same ``key``, and clear it if not."""
        self.directory = directory
        mark = directory / "key"
        if not mark.is_file() or mark.read_text() != key:
            self.remove()
            with whole_file(mark) as temporary:
                temporary.write_text(key)

    def has(self, name: str) -> bool:
        """Whether the stage called ``name`` is finished."""
        return self._path(name).is_file()

    def save(self, name: str, stage: nn.Module) -> None:
        """Keep a finished stage.

        Raises:
            InputError: the file cannot be written.
        """
        tensors = {key: tensor.contiguous() for key, tensor in stage.state_dict().items()}
        with whole_file(self._path(name)) as temporary:
            save_file(tensors, temporary)

    def load(self, name: str, stage: nn.Module) -> None:
        """Fill a prepared ``stage`` with what `save` was given."""
        stage.load_state_dict(load_file(self._path(name)))

    def remove(self) -> None:
        """Delete all of it: the compression is finished, or another one begins."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"
