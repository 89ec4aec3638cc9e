"""Small changes to a written directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def edit(path: Path, **changes: object) -> None:
    """Change top-level entries of a JSON file; None takes one out."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors."""
    return {
        name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()
    }


def rewrite(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One file in place of the shards."""
    for file in directory.glob("model*"):
        file.unlink()
    save_file(tensors, directory / "model.safetensors")
