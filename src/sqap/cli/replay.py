"""``sqap replay``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqap.checkpoints import locate
from sqap.checkpoints.card import add_measurement
from sqap.checkpoints.choices import Choices
from sqap.cli.options import (
    NONE,
    CameraOption,
    JsonOption,
    SourceArgument,
    StateOption,
    camera_mapping,
    check_card,
    choices_of_each,
    load_policy,
    load_weights,
    with_choices,
    write_numbers,
)
from sqap.errors import InputError
from sqap.policy import Policy
from sqap.report import tables
from sqap.report.evidence import replayed
from sqap.terminal import console, progress_bar, user_errors

if TYPE_CHECKING:  # what only this command needs is imported when it runs
    from sqap.frames.recordings import Demonstrations
    from sqap.replay import Replayed


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
    card: Annotated[
        bool, typer.Option("--card", help="Write the comparison into POLICY's model card, README.md.")
    ] = False,
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
        from sqap.frames.recordings import Demonstrations
        from sqap.replay import Comparison, act, executed
        from sqap.report.trajectories import check_plots

        if plot is not None:
            check_plots()
        numbers = None if episodes is None else _numbers(episodes)
        sources = [policy] if against is None else [policy, against]
        directories = [locate(source) for source in sources]
        if card:
            check_card(directories)
        each = choices_of_each(directories, choices)
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
        every = min(map(executed, loaded))
        acted = {}
        for label in _labels(sources):
            one = loaded.pop(0)  # and let go of it, before the next one's weights are read
            load_weights(one)
            with progress_bar(f"steps of {label}") as advance:
                acted[label] = act(one, demonstrations, every, advance)
        compared = Comparison.of(acted, demonstrations.names)
        said = tables.replay_lines(compared, every)
        console.print(tables.replay_table(compared))
        console.print(said, soft_wrap=True)
        if plot is not None:
            _plot(plot, acted, demonstrations)
            console.print(f"Plots are in {plot}", soft_wrap=True)
        if card and against is not None:
            add_measurement(directories[0], *replayed(str(dataset), against, said, compared))
        named = {"policy": policy, "against": against, "dataset": str(dataset), "executed": every}
        write_numbers(json_path, named | compared.to_json())


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
    taken = "recorded", "difference"  # other lines and columns are called so
    if len({*short, *taken}) == len(short) + len(taken):
        return short
    return [sources[0], *(f"{source} (against)" for source in sources[1:])]


def _plot(directory: Path, acted: Mapping[str, Sequence[Replayed]], demonstrations: Demonstrations) -> None:
    """A picture of each episode: what was recorded, and what each policy would do."""
    from sqap.report.trajectories import plot_actions

    seconds = 1 / demonstrations.view.info.fps
    for together in zip(*acted.values(), strict=True):
        first = together[0]
        lines = {"recorded": first.recorded}
        lines |= {label: one.actions for label, one in zip(acted, together, strict=True)}
        path, title = directory / f"episode-{first.episode}.png", f"episode {first.episode}"
        plot_actions(path, title, demonstrations.names, lines, first.looks, seconds)
