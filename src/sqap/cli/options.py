"""What several commands share: their options, and what these mean."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

import sqap
from sqap.errors import InputError
from sqap.files import write_json
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.recipe import Recipe
from sqap.terminal import progress_bar

PRESETS = {"w4a8": Recipe.w4a8, "w4a4": Recipe.w4a4}

SOURCE = typer.Argument(help="Directory of a policy, org/name on the hub, or a bundled one's name.")
SourceArgument = Annotated[str, SOURCE]
UnnormKeyOption = Annotated[
    str | None, typer.Option(help="Data set whose statistics turn actions into robot units.")
]
CamerasOption = Annotated[
    str | None, typer.Option(help="Names for the images that are read, comma-separated, in order.")
]
TokenizerOption = Annotated[
    Path | None, typer.Option(help="tokenizer.json, where it is not beside the weights.")
]
CropOption = Annotated[
    float | None, typer.Option(help="Share of an image's area to look at, from its centre.")
]
RecipeOption = Annotated[str, typer.Option(help="w4a8, w4a4, paper, or a recipe file.")]
KeepOption = Annotated[float | None, typer.Option(help="Share of visual tokens kept, in (0, 1].")]
FramesOption = Annotated[int, typer.Option(help="Calibration frames.", min=1)]
FramesFromOption = Annotated[
    str, typer.Option(help="Where they come from: a simulator, a directory of images, a LeRobotDataset.")
]
CameraOption = Annotated[
    list[str] | None, typer.Option(help="POLICY_CAMERA=DATASET_KEY, for a LeRobotDataset; repeatable.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Write the numbers to PATH.", dir_okay=False)
]


def load_policy(
    source: str, unnorm_key: str | None, cameras: str | None, tokenizer: Path | None, crop: float | None
) -> Policy:
    """The policy at ``source``, with what the options choose."""
    names = None if cameras is None else tuple(cameras.split(","))
    return sqap.load(source, unnorm_key=unnorm_key, cameras=names, tokenizer=tokenizer, crop=crop)


def read_recipe(name: str, keep: float | None) -> Recipe:
    """A preset's or a file's recipe, with ``--keep`` in it."""
    if name in PRESETS:
        return PRESETS[name]() if keep is None else PRESETS[name](keep)
    recipe = Recipe.paper() if name == "paper" else Recipe.read(name)
    if keep is None:
        return recipe
    if recipe.pruning is None:
        raise InputError(f"--keep {keep} has nothing to set: recipe {name} does not prune")
    return dataclasses.replace(recipe, pruning=dataclasses.replace(recipe.pruning, keep_ratio=keep))


def calibration_frames(
    policy: Policy, source: str, count: int, cameras: list[str] | None
) -> list[Observation]:
    """The frames that ``--frames-from`` names."""
    from sqap.frames import read_frames

    mapping = dict(_pair(camera) for camera in cameras or ())
    with progress_bar("calibration frames") as advance:
        return read_frames(source, policy, count, cameras=mapping, progress=advance)


def _pair(camera: str) -> tuple[str, str]:
    name, equals, key = camera.partition("=")
    if not (name and equals and key):
        raise InputError(f"--camera {camera} must be POLICY_CAMERA=DATASET_KEY")
    return name, key


def write_numbers(path: Path | None, data: Any) -> None:
    """Write ``--json``, if it was asked for."""
    if path is not None:
        write_json(path, data)
