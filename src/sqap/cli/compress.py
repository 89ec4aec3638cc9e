"""``sqap compress``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

import sqap
from sqap.checkpoints import locate
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.place import check_place
from sqap.cli.options import (
    NONE,
    CameraOption,
    FramesFromOption,
    FramesOption,
    JsonOption,
    KeepOption,
    RecipeOption,
    SourceArgument,
    StateOption,
    calibration_frames,
    load_policy,
    load_weights,
    read_recipe,
    with_choices,
    write_numbers,
)
from sqap.config import Calibration
from sqap.errors import InputError
from sqap.files import resolve
from sqap.models.storage import stored_bytes
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.quantization import Partial
from sqap.recipe import Recipe
from sqap.report import tables
from sqap.terminal import console, progress_bar, user_errors


@with_choices
def compress(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    recipe: RecipeOption = "w4a8",
    keep: KeepOption = None,
    target_bytes: Annotated[
        int | None,
        typer.Option(help="Spend up to this many bytes on the blocks that 4 bits hurt most.", min=1),
    ] = None,
    target_error: Annotated[
        float | None, typer.Option(help="Spare blocks until the replayed action error, in mm, is below.")
    ] = None,
    frames: FramesOption = 48,
    frames_from: FramesFromOption = "metaworld",
    camera: CameraOption = None,
    state: StateOption = None,
    choices: Choices = NONE,
    json_path: JsonOption = None,
) -> None:
    """Quantize a policy and prune its visual tokens."""
    with user_errors():
        settings = read_recipe(recipe, keep)
        place = _check_out(out, source, json_path)
        with Partial(place.with_name(f".{place.name}.partial")) as partial:
            policy = load_policy(source, choices)
            observations = calibration_frames(policy, frames_from, frames, camera, state)
            if target_bytes is not None or target_error is not None:
                settings = _fitted(policy, settings, observations, target_bytes, target_error)
            with progress_bar("quantizing", percent=True) as advance:
                small = sqap.compress(policy, settings, observations, progress=advance, resume=partial)
            small.save(out)
            partial.remove()
        before, after = stored_bytes(policy.model), stored_bytes(small.model)
        console.print(
            f"Weights: {tables.size(before)} in {source}, {tables.size(after)} in {out} "
            f"({tables.percent(after / before)})",
            soft_wrap=True,
        )
        calibration = small.calibration
        for sentence in _ranking(calibration):
            console.print(sentence, soft_wrap=True)
        write_numbers(
            json_path,
            {
                "source": source,
                "out": str(out),
                "recipe": settings.to_json(),
                "calibration": calibration and dataclasses.asdict(calibration),
                "weight_bytes": {"before": before, "after": after},
            },
        )


def _ranking(calibration: Calibration | None) -> Iterator[str]:
    """What calibration has found about the pruner's ranking."""
    if calibration is None:
        return
    if calibration.layers is not None and calibration.recall is not None:
        layers = ", ".join(str(layer + 1) for layer in calibration.layers)
        yield (
            f"Looking ahead at layers {layers} finds {tables.percent(calibration.recall)} of the tokens that "
            "later layers attend to most"
        )
    if calibration.top_k is not None and calibration.overlap is not None:
        yield (
            f"The ranking is trusted with {calibration.top_k} tokens: quantized and full precision agree on "
            f"{tables.percent(calibration.overlap)} of them"
        )


def _check_out(out: Path, source: str, json_path: Path | None) -> Path:
    """Refuse what cannot be written in the end before anything is begun; the directory, links followed."""
    place = check_place(out)
    original = resolve(locate(source))
    if place == original or place in original.parents or original in place.parents:
        raise InputError(f"{out} and the policy at {source} are one directory, or one is in the other")
    if json_path is not None and place in (resolve(json_path), *resolve(json_path).parents):
        raise InputError(
            f"--json {json_path} is in {out}, which is replaced as a whole; choose another place"
        )
    return place


def _fitted(
    policy: Policy,
    recipe: Recipe,
    frames: list[Observation],
    target_bytes: int | None,
    target_error: float | None,
) -> Recipe:
    from sqap.budget import fit
    from sqap.sensitivity import Replay

    if recipe.quantization is None:
        raise InputError("a target needs a recipe that quantizes")
    load_weights(policy)
    with progress_bar("sensitivity of blocks") as advance:
        quantization = fit(
            Replay(policy, frames),
            recipe.quantization,
            target_bytes=target_bytes,
            target_error=target_error,
            progress=advance,
        )
    for override in quantization.overrides[len(recipe.quantization.overrides) :]:
        bits = "bfloat16" if override.scheme is None else f"{override.scheme.weight_bits}-bit weights"
        console.print(f"{override.pattern} gets {bits}", soft_wrap=True)
    return dataclasses.replace(recipe, quantization=quantization)
