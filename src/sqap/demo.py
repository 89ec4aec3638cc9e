"""The main job from end to end: compress the bundled policy and show that it still does its task."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

import sqap
from sqap.checkpoints import fingerprint, locate
from sqap.checkpoints.card import add_measurement
from sqap.checkpoints.place import check_place
from sqap.evaluation.executors import Run, evaluate
from sqap.evaluation.settings import current_settings
from sqap.evaluation.summary import from_log_line, summarize
from sqap.files import write_json
from sqap.frames.simulator import collect_frames
from sqap.models.storage import stored_bytes
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.recipe import Recipe
from sqap.report import tables
from sqap.report.comparison import label, record_comparison
from sqap.report.evidence import paired_success
from sqap.report.panes import compose
from sqap.report.study import Media, Picture, Video, write_page
from sqap.report.video import write_picture, write_video
from sqap.study.design import plan
from sqap.study.factors import parse
from sqap.study.request import StudyRequest
from sqap.study.result import Ran, Study, describe
from sqap.study.run import RESULT

SOURCE = "reference"
ENV = "metaworld"
# Three pairs that differ only in the instruction.
TASKS = ("drawer-open", "drawer-close", "window-open", "window-close", "faucet-open", "faucet-close")
VIDEO_TASKS = ("drawer-open", "faucet-close", "window-open")
SEED = 1_000_000
FRAMES = 48
PICTURE_SECONDS = 0.6  # into the first episode

ProgressBar = Callable[..., AbstractContextManager[Callable[[int, int], None]]]


def run_demo(out: Path, episodes: int, console: Console, progress: ProgressBar) -> dict[str, Any]:
    """Compress, evaluate in pairs, print the table, write a page, its numbers and a video under ``out``.

    An interrupted demo goes on where it was; a finished one starts afresh.
    """
    small_dir = out / "policy"
    check_place(small_dir)
    original = sqap.load(SOURCE)
    recipe = Recipe.w4a8()
    with progress("calibration frames") as advance:
        frames = collect_frames(original, ENV, TASKS, FRAMES, advance)
    with progress("quantizing", percent=True) as advance:
        small = sqap.compress(original, recipe, frames, progress=advance)
    small.save(small_dir)

    policies = (str(small_dir), SOURCE)
    fingerprints = [fingerprint(locate(policy)) for policy in policies]
    mark = current_settings(ENV).mark
    partial = out / f"episodes-{fingerprints[0][:12]}-{episodes}-{mark}.partial.jsonl"
    with progress("episodes") as advance:
        runs = evaluate(
            policies,
            ENV,
            TASKS,
            episodes,
            SEED,
            fingerprints=fingerprints,
            log=partial,
            progress=lambda _, done, total: advance(done, total),
        )
    report = summarize(*runs)
    add_measurement(small_dir, *paired_success(report))
    report["recipe"] = recipe.to_json()
    for summary, policy in ((report, small), (report["against"], original)):
        summary["weight_bytes"] = stored_bytes(policy.model)
        summary["visual_tokens"] = _tokens(policy)

    columns = ((label(original), report["against"]), (label(small), report))
    summaries = [summary for _, summary in columns]
    extra = {
        "weights as stored": [tables.size(s["weight_bytes"]) for s in summaries],
        "visual tokens after pruning": [str(s["visual_tokens"]) for s in summaries],
    }
    console.print(tables.success_table(columns), tables.cost_table(columns, extra))
    console.print(tables.paired_line(report["against"]), soft_wrap=True)
    if (reused := from_log_line(*runs)) is not None:
        console.print(reused, soft_wrap=True)
    video = out / "comparison.mp4"
    with progress("video") as advance:
        clips = record_comparison([original, small], ENV, VIDEO_TASKS, SEED, advance)
        write_video(video, clips)
    picture = out / "comparison.png"
    write_picture(picture, compose([column[0] for column in clips], PICTURE_SECONDS))
    write_json(out / "report.json", report)
    partial.replace(out / "episodes.jsonl")

    study = describe_study(out, episodes, original, small, frames, runs)
    write_json(out / RESULT, study)
    page = out / "report" / "index.html"
    write_page(study, page, _media(picture, video))
    console.print(
        f"The report is {page}, its numbers {out / 'report.json'}, the video {video}", soft_wrap=True
    )
    return report


def describe_study(
    out: Path,
    episodes: int,
    original: Policy,
    small: Policy,
    frames: Sequence[Observation],
    runs: Sequence[Run],
) -> dict[str, Any]:
    """The demo as a study of two cells, as ``docs/ablate.md`` has it.

    Args:
        out: directory of the demo.
        episodes: per task.
        original: the bundled policy.
        small: the compressed one.
        frames: that it was calibrated on.
        runs: of the compressed policy and of the original.
    """
    command = shlex.join(["sqap", "demo", "--out", str(out), "--episodes", str(episodes)])
    request = StudyRequest(
        SOURCE, out, ENV, TASKS, episodes, SEED, frames=FRAMES, frames_from=ENV, command=command
    )
    pruning = small.recipe.pruning
    assert pruning is not None
    factors = (
        f"bits=16,w4a8 keep=1.0,{pruning.keep_ratio} criteria={pruning.method} after={pruning.after_layer}"
    )
    full = plan(parse(factors), original.config.model)
    cells = (
        dataclasses.replace(full.cells[0], name="original"),
        dataclasses.replace(full.cells[-1], recipe=small.recipe),
    )
    together = "bits and keep change together: what each of them does cannot be told"
    design = dataclasses.replace(
        full,
        kind="comparison",
        runs=2,
        chosen=2,
        cells=cells,
        merged=(),
        aliasing=(together,),
        baseline="original",
    )
    ran = [
        Ran(
            cell,
            None if policy is original else "policy",
            run.records[0].policy,
            "episodes.jsonl",
            {record.key[1:]: record for record in run.records},
            {"replay": None, "attention": None, "weight_bytes": stored_bytes(policy.model)},
        )
        for cell, policy, run in zip(cells, (original, small), reversed(runs), strict=True)
    ]
    estimate = {
        "episodes": len(ran) * request.pairs,
        "from_log": sum(len(run.from_log) for run in runs),
        "compressions": 1,
        "seconds_per_episode": None,
        "measured_from": None,
        "hours": None,
    }
    settings = runs[0].records[0].settings
    found = describe(
        Study(request, design, original, ran[0].fingerprint, settings, frames, (), ran, estimate)
    )
    for cell in found["cells"][1:]:
        cell |= {"recipe_file": None, "commands": [cell["commands"][-1].replace(cell["name"], "policy", 1)]}
    return found | {"notes": []}  # that no contrast can be estimated, `aliasing` says


def _media(picture: Path, video: Path) -> Media:
    """What the demo has recorded: the original on the left, the compressed policy on the right."""
    beside = "the original beside the compressed policy"
    return Media(
        (
            Picture(
                picture.read_bytes(),
                f"{VIDEO_TASKS[0]}, seed {SEED}, {PICTURE_SECONDS:g} s into it: {beside}",
            ),
        ),
        (Video(video.read_bytes(), f"{', '.join(VIDEO_TASKS)}, seed {SEED}: {beside}"),),
    )


def _tokens(policy: Policy) -> int:
    tokens = policy.config.model.visual_tokens
    return tokens if policy.recipe.pruning is None else policy.recipe.pruning.budget(tokens)
