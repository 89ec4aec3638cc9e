"""Pictures and videos for a study's page: its own policies on one of its own episodes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from sqap.checkpoints.choices import Choices
from sqap.report.comparison import record_comparison
from sqap.report.panes import compose
from sqap.report.study.chart import Cell, frontier, ran
from sqap.report.video import write_video
from sqap.study.steps import load_cells

PANE = 224  # pixels of an episode's side
FPS = 10.0
MOMENT = 0.6  # seconds into the episode that a picture shows


@dataclass(frozen=True)
class Picture:
    """A PNG file's bytes, and what they show."""

    png: bytes
    caption: str


@dataclass(frozen=True)
class Video:
    """An MP4 file's bytes, and what they show."""

    mp4: bytes
    caption: str


@dataclass(frozen=True)
class Media:
    """What a page shows beside numbers."""

    pictures: tuple[Picture, ...] = ()
    videos: tuple[Video, ...] = ()


def shown_cells(study: Mapping[str, Any]) -> list[Cell]:
    """The baseline, and of the cells that no faster one beats the most successful and the fastest."""
    cells = ran(study)
    baseline = [cell for cell in cells if cell["name"] == study["design"]["baseline"]]
    others = [cell for cell in frontier(cells) if cell not in baseline]
    return [*baseline, *others[-1:], *others[:-1][:1]]


def record(
    study: Mapping[str, Any],
    directory: Path,
    tasks: Sequence[str],
    *,
    choices: Choices | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Media:
    """A picture and a video for each task: the study's first episode of it, by `shown_cells` side by side.

    Args:
        study: what study.json holds.
        directory: the study's, in which the compressed policies are.
        tasks: of the study.
        choices: how a published original is read.
        progress: gets (tasks done, tasks in all).
    """
    cells, seed = shown_cells(study), study["seeds"]["first"]
    policies = load_cells(study, directory, cells, choices)
    columns = record_comparison(policies, study["environment"]["name"], tasks, seed, progress)
    columns = [
        [replace(clip, label=cell["name"]) for clip in column]
        for cell, column in zip(cells, columns, strict=True)
    ]
    pictures, videos = [], []
    for i, task in enumerate(tasks):
        row = [column[i] for column in columns]
        caption = f"{task}, seed {seed}: {', '.join(cell['name'] for cell in cells)}"
        pictures.append(Picture(_png(row), f"{caption}; {MOMENT:g} s into the episode"))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "episode.mp4"
            write_video(path, [[clip] for clip in row], fps=FPS, pane=PANE)
            videos.append(Video(path.read_bytes(), caption))
    return Media(tuple(pictures), tuple(videos))


def _png(row: Sequence[Any]) -> bytes:
    out = BytesIO()
    Image.fromarray(compose(row, MOMENT, pane=PANE)).save(out, "PNG", optimize=True)
    return out.getvalue()
