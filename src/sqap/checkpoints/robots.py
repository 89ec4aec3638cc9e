"""What OpenVLA-OFT's files leave open: its robot's constants, and which parts of it are missing.

The authors' code takes a chunk's length, the bounds and the cameras from the mention of LIBERO, ALOHA or
Bridge on the command line. Here the data set's name and the action head's dimensions stand for it; what is
another robot's has to be chosen. Marks of a missing part are the configuration, the adapter that
training leaves, and the directory's name, into which the authors' training writes how it was run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqap.checkpoints import adapters
from sqap.checkpoints.choices import Bounds, Choices
from sqap.checkpoints.dataset_statistics import EXTREMES, PERCENTILES
from sqap.errors import CheckpointError

BOUNDS: dict[Bounds, tuple[str, str]] = {"q99": PERCENTILES, "minmax": EXTREMES}
# The class of OpenVLA-OFT beside the weights, and a word that OpenVLA's has not.
CODE, CODE_MARK = "modeling_prismatic.py", "NUM_ACTIONS_CHUNK"
NAME_MARKS = re.compile(r"parallel_dec|acts_chunk|discrete_acts|l1_regression")
logger = logging.getLogger("sqap")


@dataclass(frozen=True)
class Platform:
    """A robot's constants.

    Args:
        name: what names of its data sets contain.
        action_dim: numbers of an action.
        horizon: actions of one step.
        bounds: what -1 and 1 stand for, of actions and states.
        cameras: names of the images, in order.
        film: whether the authors' recipe for it modulates vision by the instruction.
    """

    name: str
    action_dim: int
    horizon: int
    bounds: tuple[str, str]
    cameras: tuple[str, ...]
    film: bool = False


PLATFORMS = (
    Platform("libero", 7, 8, PERCENTILES, ("image", "wrist_image")),
    Platform("aloha", 14, 25, EXTREMES, ("image", "left_wrist_image", "right_wrist_image"), film=True),
    Platform("bridge", 7, 5, PERCENTILES, ("image",)),
)
NEEDED = {
    "chunk": "chunk (actions of one step)",
    "bounds": f"bounds ({' or '.join(BOUNDS)})",
    "cameras": "cameras (names, in order)",
}


def choose_platform(directory: Path, key: str, action_dim: int, choices: Choices) -> Platform:
    """The robot of a data set; what is chosen goes before what is known of it.

    Raises:
        CheckpointError: it is none of the authors', and something was not chosen; or the directory's name
            speaks of another chunk.
    """
    known = [p for p in PLATFORMS if p.name in key.lower() and p.action_dim == action_dim]
    if known:
        platform = known[0]
        said = re.search(r"(\d+)_acts_chunk", _name(directory))
        if choices.chunk is None and said and int(said[1]) != platform.horizon:
            raise CheckpointError(
                f"{directory} is named after chunks of {said[1]} actions, and {platform.name}'s have "
                f"{platform.horizon}: give the chunk"
            )
    else:
        lacking = [text for name, text in NEEDED.items() if getattr(choices, name) is None]
        if lacking:
            robots = ", ".join(f"{p.name} with {p.action_dim}" for p in PLATFORMS)
            raise CheckpointError(
                f"{directory}: {key!r} with {action_dim} action dimensions is none of the robots whose "
                f"constants are known ({robots}), and no file has them: give {', '.join(lacking)}"
            )
        platform = Platform(key, action_dim, 1, PERCENTILES, ())
    return replace(
        platform,
        horizon=choices.chunk or platform.horizon,
        bounds=BOUNDS[choices.bounds] if choices.bounds else platform.bounds,
        cameras=choices.cameras or platform.cameras,
    )


def check_film(
    directory: Path, config: Mapping[str, Any], platform: Platform, film: bool | None, *, found: bool
) -> None:
    """Refuse FiLM whose file is missing.

    Args:
        directory: the checkpoint.
        config: its configuration.
        platform: its robot.
        film: whether it was tuned with FiLM, if that was chosen.
        found: whether it has the vision encoders that were tuned so.

    Raises:
        CheckpointError: it may have been tuned with FiLM, and the file is not there; or it is against choice.
    """
    if found and film is False:
        raise CheckpointError(f"{directory} has vision encoders with FiLM: they are used, or taken away")
    if found or film is False:
        return
    marks = {
        "the choice of film": film is True,
        "its configuration": bool(config.get("use_film")),
        "its LoRA adapter": any("vision_backbone.vision_backbone." in n for n in adapters.names(directory)),
        "its name": re.search(r"(^|[-_+])film([-_+]|$)", _name(directory)) is not None,
        f"the authors' recipe for {platform.name}": platform.film,
    }
    mark = next((text for text, there in marks.items() if there), None)
    if mark is not None:
        raise CheckpointError(
            f"{directory} is incomplete: by {mark} its vision was tuned with FiLM, and it has no "
            "vision_backbone--*_checkpoint.pt; put that there, or choose film=False (--no-film) if it was not"
        )


def check_proprio(directory: Path, *, found: bool) -> None:
    """Say that a policy does without the robot's state, or refuse one by whose name it does not.

    Raises:
        CheckpointError: the directory's name speaks of the state, and the file that reads it is not there.
    """
    if not found and "proprio" in _name(directory):
        raise CheckpointError(
            f"{directory} is incomplete: by its name it has a proprio_projector--*_checkpoint.pt"
        )
    if not found:
        logger.warning(
            "%s: there is no proprio_projector, so that it acts without the robot's state", directory
        )


def refuse_discrete(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse what looks like OpenVLA, but may be OpenVLA-OFT's discrete head, which has no file of its own.

    Raises:
        CheckpointError: something in the directory is OpenVLA-OFT's.
    """
    code = directory / CODE
    marks = {
        f"{CODE} beside it": code.is_file()
        and CODE_MARK in code.read_text(encoding="utf-8", errors="replace"),
        "its lora_adapter folder": (directory / "lora_adapter").is_dir(),
        "its configuration": bool(config.get("use_film")),
        "its name": NAME_MARKS.search(_name(directory)) is not None,
    }
    mark = next((text for text, there in marks.items() if there), None)
    if mark is not None:
        raise CheckpointError(
            f"{directory} has no action_head--*_checkpoint.pt, and by {mark} may be OpenVLA-OFT with the "
            "discrete head, which is not supported: put the L1 head there if it has one, or give a chunk "
            "of 1 (--chunk 1) if it is OpenVLA, whose step is one action"
        )


def _name(directory: Path) -> str:
    return directory.resolve().name.lower()
