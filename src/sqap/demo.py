"""The main job from end to end: compress the bundled policy and show that it still does its task."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

import sqap
from sqap.checkpoints import fingerprint, locate
from sqap.checkpoints.card import add_measurement
from sqap.checkpoints.place import check_place
from sqap.evaluation.executors import evaluate
from sqap.evaluation.settings import current_settings
from sqap.evaluation.summary import from_log_line, summarize
from sqap.files import write_json
from sqap.frames.simulator import collect_frames
from sqap.models.storage import stored_bytes
from sqap.policy import Policy
from sqap.recipe import Recipe
from sqap.report import tables
from sqap.report.comparison import label, record_comparison
from sqap.report.evidence import paired_success
from sqap.report.panes import compose
from sqap.report.video import write_picture, write_video

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
    """Compress, evaluate in pairs, print the table, write ``report.json`` and a video under ``out``.

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
    write_picture(out / "comparison.png", compose([column[0] for column in clips], PICTURE_SECONDS))
    write_json(out / "report.json", report)
    partial.replace(out / "episodes.jsonl")
    console.print(f"The report is {out / 'report.json'}, the video {video}", soft_wrap=True)
    return report


def _tokens(policy: Policy) -> int:
    tokens = policy.config.model.visual_tokens
    return tokens if policy.recipe.pruning is None else policy.recipe.pruning.budget(tokens)
