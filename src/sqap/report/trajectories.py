"""Actions over time as a picture: one panel for each dimension, a line for each who says what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sqap.errors import InputError
from sqap.files import whole_file

# Of Okabe and Ito, told apart by everybody; the recorded actions come first, and stay behind.
COLOURS = ("#999999", "#0072B2", "#D55E00")
COLUMNS = 2


def check_plots() -> None:
    """Refuse to draw where nothing can be drawn with.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(f'a plot needs matplotlib ({error}); pip install "sqap[lerobot]"') from error


def plot_actions(
    path: Path,
    title: str,
    names: Sequence[str],
    lines: Mapping[str, np.ndarray],
    looks: Sequence[int],
    seconds: float,
) -> None:
    """Write a picture of one episode; the suffix of ``path`` says of which kind.

    Args:
        path: where to.
        title: above all panels.
        names: of the dimensions.
        lines: label -> actions ``(frames, dimensions)``; at most as many as there are `COLOURS`.
        looks: frames at which the policy looked, which are marked.
        seconds: of a frame.

    Raises:
        InputError: the file cannot be written, or matplotlib is not installed.
    """
    check_plots()
    from matplotlib.figure import Figure  # without pyplot, which would choose a window system

    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(6 * columns, 0.9 + 1.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for i, (axis, name) in enumerate(zip(axes, names, strict=False)):
        for look in looks:
            axis.axvline(look * seconds, color="0.9", linewidth=0.8, zorder=0)
        for colour, (label, actions) in zip(COLOURS, lines.items(), strict=False):
            wide = 2.4 if colour == COLOURS[0] else 1.2
            times = np.arange(len(actions)) * seconds
            axis.plot(times, actions[:, i], color=colour, linewidth=wide, label=label)
        axis.set_title(name, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    for axis in axes[len(names) :]:
        axis.remove()
    for axis in axes[max(len(names) - columns, 0) : len(names)]:
        axis.set_xlabel("seconds", fontsize=8)
        axis.tick_params(labelbottom=True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(lines), fontsize=9)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=100)
