"""Attention maps of quantized policies beside full precision: python benchmarks/attention_maps.py

SQAP-VLA draws the attention of a quantized policy as scattered and moved away from what matters. Here are
maps of real frames, of the policy in full precision and quantized in three ways: the attention that the
text pays in the last layer before the cut (which FastV ranks by), and what looking ahead sees behind it.
Each is measured by the overlap of its best quarter with full precision's, by its entropy (1 is an even
map), and by how far its mass is from the object that the task is about, as a share of the image's side. A
picture shows some side by side.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interaction import AFTER, QUANTIZATIONS
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from variants import ENV, FRAMES

import sqap
from sqap import environments
from sqap.build import build_id
from sqap.compress import model_inputs
from sqap.environments.metaworld import MetaWorld
from sqap.files import write_json
from sqap.frames import collect_frames
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.pruning.calibration import overlap_curve
from sqap.pruning.geometry import project
from sqap.pruning.ranking import Ranker
from sqap.recipe import Pruning, Recipe
from sqap.report.overlay import heat_map
from sqap.report.video import write_picture

SEED = 410_000
LOOKS = 4  # of each task's episode
SHOWN = (1, 14, 29, 41)  # frames in the picture
PANE = 192  # pixels
OBJECT = slice(4, 7)  # of Meta-World's state vector
CRITERIA = {
    "attention": Pruning(0.25, AFTER, "attention"),
    "look-ahead": Pruning(0.25, AFTER, "lookahead"),
}


def frames_with_objects(policy: Policy) -> tuple[list[Observation], np.ndarray]:
    """Observations of the policy's own episodes, and where the object is in each picture ``(frames, 2)``."""
    frames, places = [], []
    for task in environments.default_tasks(ENV):
        with closing(MetaWorld(task)) as world:
            observation = world.reset(SEED)
            for look in range(LOOKS):
                (camera,) = observation.cameras.values()
                (image,) = observation.images.values()
                place = project(camera, world.state_vector[OBJECT], image.shape[:2])
                frames.append(observation)
                places.append((np.nan, np.nan) if place is None else place)
                for action in policy.act(observation, seed=look):
                    world.step(action)
                observation = world.observe()
    return frames, np.array(places)


def entropy(scores: Tensor) -> float:
    """Mean entropy of maps ``(frames, N)`` whose rows sum to one, as a share of an even map's."""
    terms = -(scores * scores.clamp_min(1e-30).log()).sum(1)
    return float(terms.mean() / np.log(scores.shape[1]))


def distance(scores: Tensor, places: np.ndarray) -> float:
    """Mean distance of the maps' mass from the object, in shares of the image's side."""
    grid = round(scores.shape[1] ** 0.5)
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    centres = (np.stack([columns, rows], 1) + 0.5) / grid
    apart = np.linalg.norm(centres[None] - places[:, None], axis=2)
    return float(np.nanmean((scores.numpy() * apart).sum(1)))


def maps(policy: Policy, frames: list[Observation]) -> dict[str, dict[str, Tensor]]:
    """Criterion -> quantization -> ``(frames, N)``, each row's sum one."""
    calibration = collect_frames(policy, ENV, environments.default_tasks(ENV), FRAMES)
    inputs = [model_inputs(policy, frame, seed) for seed, frame in enumerate(frames)]
    found: dict[str, dict[str, Tensor]] = {name: {} for name in CRITERIA}
    for quantization, settings in QUANTIZATIONS.items():
        small = policy if settings is None else sqap.compress(policy, Recipe(settings), calibration)
        rank = Ranker(small.model, inputs)
        for name, pruning in CRITERIA.items():
            scores = rank(pruning).scores
            found[name][quantization] = scores / scores.sum(1, keepdim=True)
    return found


def picture(frames: list[Observation], found: dict[str, dict[str, Tensor]]) -> np.ndarray:
    """A row for each shown frame: the image, then every criterion's maps."""
    rows = []
    for i in SHOWN:
        (image,) = frames[i].images.values()
        panes = [np.array(Image.fromarray(image).resize((PANE, PANE), Image.Resampling.LANCZOS))]
        for by_quantization in found.values():
            panes += [heat_map(image, scores[i].numpy(), PANE) for scores in by_quantization.values()]
        rows.append(np.concatenate([np.pad(pane, ((4, 4), (4, 4), (0, 0))) for pane in panes], axis=1))
    return np.concatenate(rows)


def run(source: str, out: Path, console: Console) -> dict[str, Any]:
    """One policy's numbers; its picture is written."""
    policy = sqap.load(source)
    frames, places = frames_with_objects(policy)
    with torch.inference_mode():
        found = maps(policy, frames)
    table = Table("map", "quantization", "overlap", "entropy", "from the object", title=source)
    result: dict[str, Any] = {}
    for name, by_quantization in found.items():
        k = CRITERIA[name].budget(policy.config.model.grid**2)
        for quantization, scores in by_quantization.items():
            overlap = float(overlap_curve(by_quantization["full"], scores)[k - 1])
            numbers = {"overlap": overlap, "entropy": entropy(scores), "distance": distance(scores, places)}
            result.setdefault(name, {})[quantization] = numbers
            table.add_row(name, quantization, *(f"{value:.3f}" for value in numbers.values()))
    console.print(table)
    write_picture(out / f"attention-maps-{source}.png", picture(frames, found))
    return result


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", action="append", help="one of the bundled ones; both by default")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the pictures go")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    policies = options.policy or ["reference", "reference-smollm"]
    results = {source: run(source, options.out, console) for source in policies}
    if options.json is not None:
        write_json(options.json, {"build": build_id(), "after_layer": AFTER, "policies": results})


if __name__ == "__main__":
    main()
