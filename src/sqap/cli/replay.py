"""``sqap replay``."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from sqap.checkpoints import locate
from sqap.checkpoints.choices import Choices
from sqap.cli.options import (
    NONE,
    CameraOption,
    JsonOption,
    SourceArgument,
    StateOption,
    camera_mapping,
    choices_of_each,
    load_policy,
    load_weights,
    with_choices,
    write_numbers,
)
from sqap.errors import InputError
from sqap.policy import Policy
from sqap.report import tables
from sqap.terminal import console, progress_bar, user_errors

if TYPE_CHECKING:  # what only this command needs is imported when it runs
    from sqap.frames.recordings import Demonstrations


@with_choices
def replay(
    policy: SourceArgument,
    dataset: Annotated[Path, typer.Argument(help="Directory of a LeRobotDataset v3.")],
    against: Annotated[str | None, typer.Option(help="Policy to compare with, on the same noise.")] = None,
    episodes: Annotated[
        str | None, typer.Option(help="Their numbers, comma-separated; by default five, evenly spread.")
    ] = None,
    camera: CameraOption = None,
    state: StateOption = None,
    action: Annotated[str | None, typer.Option(help="DATASET_KEY of the actions.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Directory for a picture of each episode.")] = None,
    choices: Choices = NONE,
    json_path: JsonOption = None,
) -> None:
    """Replay recorded episodes: how far a policy's actions are from those recorded, and from another's.

    The policy looks as often as it would on the robot, and its chunks are compared with the actions recorded
    from there on, dimension by dimension, in robot units. Nothing moves: whether the task is done, only
    `sqap eval` or the robot tells. Options that say how a policy is read (--unnorm-key and those after it)
    are for published ones, POLICY or --against.
    """
    with user_errors():
        from sqap import replay as replays
        from sqap.frames.recordings import Demonstrations
        from sqap.report.trajectories import check_plots, plot_actions

        if plot is not None:
            check_plots()
        numbers = None if episodes is None else _numbers(episodes)
        sources = [policy] if against is None else [policy, against]
        each = choices_of_each([locate(source) for source in sources], choices)
        loaded = [load_policy(source, its) for source, its in zip(sources, each, strict=True)]
        _check_alike(sources, loaded)
        demonstrations = Demonstrations.of(
            dataset,
            list(dict.fromkeys(name for one in loaded for name in one.config.cameras)),
            loaded[0].config.action_dim,
            numbers,
            mapping=camera_mapping(camera),
            state=state,
            reads_state=any(one.config.state is not None for one in loaded),
            action=action,
        )
        every = min(map(replays.executed, loaded))
        acted: dict[str, list[np.ndarray]] = {}
        for label in _labels(sources):
            one = loaded.pop(0)  # and let go of it, before the next one's weights are read
            load_weights(one)
            recorded, looks, acted[label] = _act(one, demonstrations, every, f"steps of {label}")
        spread = replays.spread_of(recorded)
        errors = {label: replays.deviation(found, recorded) for label, found in acted.items()}
        if against is not None:
            errors["difference"] = replays.deviation(*acted.values())
        shares = {name: replays.relative(error, spread) for name, error in errors.items()}
        chosen = [episode.index for episode in demonstrations.episodes]
        console.print(tables.replay_table(demonstrations.names, spread, errors))
        console.print(tables.replay_lines(chosen, sum(map(len, recorded)), every, shares), soft_wrap=True)
        if plot is not None:
            for i, number in enumerate(chosen):
                lines = {"recorded": recorded[i], **{label: found[i] for label, found in acted.items()}}
                path, fps = plot / f"episode-{number}.png", demonstrations.view.info.fps
                plot_actions(path, f"episode {number}", demonstrations.names, lines, looks[i], 1 / fps)
            console.print(f"Plots are in {plot}", soft_wrap=True)
        write_numbers(
            json_path,
            {
                "policy": policy,
                "against": against,
                "dataset": str(dataset),
                "executed": every,
                "names": demonstrations.names,
                "spread": spread,
                "errors": {name: dataclasses.asdict(error) for name, error in errors.items()},
                "relative": shares,
                "episodes": [
                    {
                        "episode": number,
                        "frames": len(recorded[i]),
                        "steps": len(looks[i]),
                        "errors": {
                            label: dataclasses.asdict(replays.deviation([found[i]], [recorded[i]]))
                            for label, found in acted.items()
                        },
                    }
                    for i, number in enumerate(chosen)
                ],
            },
        )


def _numbers(episodes: str) -> list[int]:
    """The episodes that ``--episodes`` names."""
    parts = [part.strip() for part in episodes.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"--episodes {episodes} must be numbers from 0 on, separated by commas")
    return [int(part) for part in parts]


def _check_alike(sources: list[str], policies: list[Policy]) -> None:
    """Refuse two policies whose actions cannot be compared."""
    widths = [policy.config.action_dim for policy in policies]
    if len({*widths}) > 1:
        raise InputError(
            f"the actions of {sources[0]} have {widths[0]} numbers and those of {sources[1]} {widths[1]}: "
            "compare policies of one robot"
        )


def _labels(sources: list[str]) -> list[str]:
    """Short names for columns and lines, all different."""
    short = [Path(source).name or source for source in sources]
    return short if len({*short}) == len(short) else [*sources[:1], f"{sources[-1]} (against)"]


def _act(
    policy: Policy, demonstrations: Demonstrations, every: int, what: str
) -> tuple[list[np.ndarray], list[tuple[int, ...]], list[np.ndarray]]:
    """Of each episode what was recorded, where the policy looks, and what it would do."""
    from sqap.replay import replay

    recorded, looks, found = [], [], []
    total = sum(-(-episode.length // every) for episode in demonstrations.episodes)
    steps = itertools.count(1)
    with progress_bar(what) as advance:
        for episode in demonstrations.episodes:
            recording = demonstrations.read(episode, every)
            recorded.append(recording.actions)
            looks.append(recording.looks)
            found.append(replay(policy, recording, lambda: advance(next(steps), total)))
    return recorded, looks, found
