"""A study's compressed policies on disk, each made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import sqap
from sqap.checkpoints import is_own
from sqap.checkpoints.manifest import WEIGHTS, read_manifest
from sqap.compress import Repruner, compress, deciding, key, model_inputs
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.recipe import Quantization, Recipe

Progress = Callable[[int, int], None]
LETTERS = 16  # of a key, in the names of directories


@dataclass
class Artefacts:
    """Directories named by all that decides what is in them, see `sqap.compress.key`.

    Policies that are quantized alike share one quantization and one file of weights.

    Args:
        policy: the original.
        frames: to calibrate on.
        place: directory of the directories.
    """

    policy: Policy
    frames: Sequence[Observation]
    place: Path
    _latest: tuple[Quantization | None, Repruner] | None = field(default=None, init=False, repr=False)

    def path(self, recipe: Recipe) -> Path:
        """Where the policy is or will be."""
        return self.place / key(recipe, self._deciding)[:LETTERS]

    def missing(self, recipe: Recipe) -> bool:
        """Whether the policy is still to be made."""
        return not is_own(self.path(recipe))

    def make(self, recipe: Recipe, progress: Progress | None = None) -> Path:
        """The policy's directory; the policy is made if it is not there.

        An interrupted quantization goes on from the stages that it has finished.

        Raises:
            SqapError: as `compress`, `Repruner` and `Policy.save`.
        """
        directory = self.path(recipe)
        if self.missing(recipe):
            unpruned = self._quantized(recipe.quantization, progress)
            if recipe.pruning is not None:
                unpruned.prune(recipe.pruning).save(directory)
                _share_weights(self.path(Recipe(recipe.quantization)), directory)
        return directory

    def _quantized(self, quantization: Quantization | None, progress: Progress | None) -> Repruner:
        """Prunes the quantized policy, which is saved without pruning; the latest stays in memory."""
        if self._latest is None or self._latest[0] != quantization:
            recipe = Recipe(quantization)
            directory = self.path(recipe)
            self._latest = None  # one at a time
            if is_own(directory):
                found = sqap.load(directory)
            else:
                stages = directory.with_name(f".{directory.name}.partial")
                found = compress(self.policy, recipe, self.frames, progress=progress, resume=stages)
                found.save(directory)
            self._latest = quantization, Repruner(self.policy, found, self.frames)
        return self._latest[1]

    @cached_property
    def _deciding(self) -> dict[str, Any]:
        inputs = [model_inputs(self.policy, frame, seed) for seed, frame in enumerate(self.frames)]
        return deciding(self.policy, self.frames, inputs)


def _share_weights(source: Path, other: Path) -> None:
    """Let two policies of equal weights have one file, which processes of both then map once."""
    hashes = [read_manifest(directory)[0]["sha256"][WEIGHTS] for directory in (source, other)]
    if hashes[0] != hashes[1]:
        return
    link = other / f".{WEIGHTS}.{os.getpid()}"
    try:
        os.link(source / WEIGHTS, link)
        os.replace(link, other / WEIGHTS)
    except OSError:
        link.unlink(missing_ok=True)  # a file system without links: each keeps its own
