"""``sqap sensitivity``."""

from __future__ import annotations

import dataclasses

from sqap.checkpoints.choices import Choices
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
from sqap.errors import InputError
from sqap.models.storage import stored_bytes
from sqap.report import tables
from sqap.terminal import console, progress_bar, user_errors


@with_choices
def sensitivity(
    source: SourceArgument,
    recipe: RecipeOption = "w4a8",
    keep: KeepOption = None,
    frames: FramesOption = 24,
    frames_from: FramesFromOption = "metaworld",
    camera: CameraOption = None,
    state: StateOption = None,
    choices: Choices = NONE,
    json_path: JsonOption = None,
) -> None:
    """Replay observations through the policy quantized in many ways: which settings and blocks hurt."""
    with user_errors():
        from sqap.sensitivity import Replay, block_sensitivity, compare_options

        settings = read_recipe(recipe, keep)
        if settings.quantization is None:
            raise InputError(f"recipe {recipe} quantizes nothing, so there is nothing to measure")
        policy = load_policy(source, choices)
        observations = calibration_frames(policy, frames_from, frames, camera, state)
        load_weights(policy)
        replay = Replay(policy, observations, settings.pruning)
        with progress_bar("options") as advance:
            options = compare_options(replay, settings.quantization, advance)
        console.print(tables.options_table("The quantizer, one ingredient at a time", options))
        with progress_bar("blocks") as advance:
            blocks = block_sensitivity(replay, settings.quantization, advance)
        console.print(tables.options_table("One block quantized at a time", blocks))
        write_numbers(
            json_path,
            {
                "source": source,
                "recipe": settings.to_json(),
                "frames": frames,
                "weight_bytes": stored_bytes(policy.model),
                "options": [dataclasses.asdict(option) for option in options],
                "blocks": [dataclasses.asdict(block) for block in blocks],
            },
        )
