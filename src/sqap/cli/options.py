"""What several commands share: their options, and what these mean."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

import sqap
from sqap import environments
from sqap.checkpoints import is_own
from sqap.checkpoints.card import measured
from sqap.checkpoints.choices import Choices
from sqap.environments.vla_eval import INTERPRETER
from sqap.errors import InputError
from sqap.files import check_file, write_json
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.recipe import Recipe
from sqap.terminal import logger, progress_bar, user_errors

NONE = Choices()
PRESETS = {"w4a8": Recipe.w4a8, "w8a8": Recipe.w8a8, "w4a4": Recipe.w4a4}

SOURCE = typer.Argument(help="Directory of a policy, org/name on the hub, or a bundled one's name.")
SourceArgument = Annotated[str, SOURCE]
EnvOption = Annotated[str, typer.Option(help="Simulator: metaworld, or vla-eval:CONFIG (docs/ablate.md).")]
TasksOption = Annotated[str | None, typer.Option(help="Comma-separated; default: the env's usual.")]
RecipeOption = Annotated[str, typer.Option(help="w4a8, w8a8, w4a4, paper, or a recipe file.")]
KeepOption = Annotated[float | None, typer.Option(help="Share of visual tokens kept, in (0, 1].")]
FramesOption = Annotated[int, typer.Option(help="Calibration frames.", min=1)]
FramesFromOption = Annotated[
    str, typer.Option(help="Where they come from: a simulator, a directory of images, a LeRobotDataset.")
]
CameraOption = Annotated[
    list[str] | None, typer.Option(help="POLICY_CAMERA=DATASET_KEY, for a LeRobotDataset; repeatable.")
]
StateOption = Annotated[
    str | None, typer.Option(help="DATASET_KEY of the robot's state, for a LeRobotDataset.")
]


def _writable(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before the work of which it would get the numbers."""
    if path is not None:
        with user_errors():
            check_file(path)
    return path


def _outside(command: str | None) -> None:
    """Name the simulator's interpreter to the processes that this one will start."""
    if command is not None:
        os.environ[INTERPRETER] = command


SimPythonOption = Annotated[
    str | None,
    typer.Option(
        metavar="COMMAND",
        envvar=INTERPRETER,
        help="Starts a Python with vla-eval and the simulator of vla-eval:CONFIG.",
        callback=_outside,
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="PATH", help="Write the numbers to PATH.", dir_okay=False, callback=_writable
    ),
]


# How a published policy is read: a field of `Choices` and the option that sets it.
CHOICES: dict[str, Any] = {
    "unnorm_key": Annotated[
        str | None, typer.Option(help="Data set whose statistics turn actions into robot units.")
    ],
    "cameras": Annotated[
        str | None, typer.Option(help="Names for the images that are read, comma-separated, in order.")
    ],
    "tokenizer": Annotated[
        Path | None, typer.Option(help="tokenizer.json, where it is not beside the weights.")
    ],
    "crop": Annotated[
        float | None, typer.Option(help="Share of an image's area to look at, from its centre.")
    ],
    "chunk": Annotated[
        int | None,
        typer.Option(help="Actions of one step, for OpenVLA-OFT on a robot of your own.", min=1),
    ],
    "bounds": Annotated[
        str | None, typer.Option(help="What that robot's actions were scaled by: q99 or minmax.")
    ],
    "ema": Annotated[
        bool, typer.Option("--ema", help="Take CogACT's averaged action model in place of the raw one.")
    ],
    "film": Annotated[
        bool | None, typer.Option("--film/--no-film", help="Whether an OpenVLA-OFT was tuned with FiLM.")
    ],
}


def with_choices(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options of `CHOICES`, which it receives as one `Choices` named ``choices``."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        with user_errors():
            chosen = {name: given.pop(name) for name in CHOICES}
            chosen = {name: value for name, value in chosen.items() if value is not None}
            if "cameras" in chosen:
                chosen["cameras"] = tuple(chosen["cameras"].split(","))
            command(choices=Choices(**chosen), **given)

    hints = get_type_hints(command, include_extras=True) | CHOICES
    names = [name for name in signature(command).parameters if name != "choices"]
    defaults = {name: parameter.default for name, parameter in signature(command).parameters.items()}
    # Typer reads the signature. --json stays the last in the help.
    run.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(name, Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=hints[name])
            for name in (*names[:-1], *CHOICES, names[-1])
        ]
    )
    run.__annotations__ = hints
    return run


def chosen_tasks(env: str, tasks: str | None) -> tuple[str, ...]:
    """The tasks that ``--tasks`` names, else the environment's usual ones."""
    return tuple(tasks.split(",")) if tasks else environments.default_tasks(env)


def load_policy(source: str, choices: Choices) -> Policy:
    """The policy at ``source``, with what the options choose."""
    policy = sqap.load(source, **vars(choices))
    config = policy.config
    logger.info("%s is a %s policy; it reads %s", source, config.family, ", ".join(config.cameras))
    return policy


def load_weights(policy: Policy) -> None:
    """Read a published policy into memory, before it acts as a whole."""
    if policy.weights is not None:
        with progress_bar("reading weights", percent=True) as advance:
            policy.load_weights(advance)


def choices_of_each(directories: Sequence[Path], choices: Choices) -> list[Choices]:
    """The choices for each policy of a comparison: those given for published ones, none for sqap's own."""
    own = [is_own(directory) for directory in directories]
    if choices != NONE and all(own):
        given = [name for name, value in vars(choices).items() if value != getattr(NONE, name)]
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(
            f"{options}: a choice of how published policies are read, but "
            f"{' and '.join(map(str, directories))} {'are' if len(own) > 1 else 'is'} sqap's own, "
            "for which it was made when they were compressed"
        )
    return [NONE if mine else choices for mine in own]


def check_card(directories: Sequence[Path]) -> None:
    """Refuse ``--card`` before the work is done, where nothing could be written into a card."""
    if len(directories) < 2:
        raise InputError("--card writes down a comparison; give --against, too")
    if not is_own(directories[0]):
        raise InputError(
            f"--card writes into the model card of sqap's own policies, which {directories[0]} is not"
        )
    measured(directories[0])


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
    policy: Policy, source: str, count: int, cameras: list[str] | None, state: str | None
) -> list[Observation]:
    """The frames that ``--frames-from`` names."""
    from sqap.frames import read_frames

    mapping = camera_mapping(cameras)
    with progress_bar("calibration frames") as advance:
        frames = read_frames(source, policy, count, cameras=mapping, state=state, progress=advance)
    logger.info("%d calibration frames from %s", len(frames), source)
    return frames


def camera_mapping(cameras: list[str] | None) -> dict[str, str]:
    """Camera of the policy -> key of the dataset, as ``--camera`` says."""
    mapping: dict[str, str] = {}
    for name, key in map(_pair, cameras or ()):
        if name in mapping:
            raise InputError(f"--camera {name} is given twice: {mapping[name]} and {key}")
        mapping[name] = key
    return mapping


def _pair(camera: str) -> tuple[str, str]:
    name, equals, key = camera.partition("=")
    if not (name and equals and key):
        raise InputError(f"--camera {camera} must be POLICY_CAMERA=DATASET_KEY")
    return name, key


def write_numbers(path: Path | None, data: Any) -> None:
    """Write ``--json``, if it was asked for."""
    if path is not None:
        write_json(path, data)
