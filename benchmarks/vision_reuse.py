"""Reuse of vision features between steps: python benchmarks/vision_reuse.py --json docs/vision-reuse.json

Patches that have not changed since the step before, and that look-ahead ranked low then, keep the features
that they had (`reuse.py`). Both bundled policies in the preset W4A8, in three parts:

- ``offline``: frames of the policy's own episodes, one after the other; how far features and actions are from
  those of the policy that computes every patch, for two ways to attend and several thresholds.
- ``closed-loop``: the setting that offline frames chose, paired with the policy that computes every patch, 30
  episodes of each of twelve tasks on seeds that chose nothing, a number fixed beforehand.
- ``speed``: an encoder with a share of its patches changed, in turns with one that computes all; of the
  bundled policy, SmolVLA's shape and CogACT-7B's.

Interrupted, the closed loop goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reuse import NONE, Kept, Reuse, Reusing, ReusingEncoder, load
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from variants import ENV, FRAMES, compare, describe

import sqap
from sqap import environments
from sqap.benchmark.shapes import SHAPES, random_policy
from sqap.build import build_id
from sqap.checkpoints import fingerprint
from sqap.evaluation.executors import evaluate
from sqap.evaluation.rollout import noise_seed
from sqap.evaluation.settings import current_settings
from sqap.files import write_json
from sqap.frames import collect_frames
from sqap.kernels import cpu
from sqap.models.vision import VisionEncoder
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.recipe import Recipe

POLICIES = ("reference", "reference-smollm")
KEEP = 0.4  # of the visual tokens behind the third decoder layer: the preset
SEED, EPISODES = 5_000_000, 30  # of the closed loop, for each task
RECORDED_SEED = 4_200_000  # of the frames that settings were chosen on
NOISE = 2.0  # levels of 8 bits
CHOSEN = Reuse(threshold=4.0)
SHARES = (0.25, 0.5, 0.75)
UNPRUNED, NOISY = "every patch, unpruned", "every patch, noisy"

Look = tuple[Observation, int]  # and the seed of its diffusion noise


def settings() -> dict[str, tuple[Reuse, float]]:
    """Name -> setting and noise of the pixels, in the order they are measured in offline."""
    table = {"every patch": (NONE, 0.0), UNPRUNED: (NONE, 0.0), NOISY: (NONE, NOISE), "chosen": (CHOSEN, 0.0)}
    for name, changes in {
        "attending to stale ones": {"attend": "all"},
        "by change alone": {"ranked": 0.0},
        "twice as many ranked ones": {"ranked": 0.6},
        "by change alone, attending to stale ones": {"ranked": 0.0, "attend": "all"},
        "threshold 2": {"threshold": 2.0},
        "threshold 8": {"threshold": 8.0},
        "refreshed every 8th step": {"refresh": 8},
        "never refreshed": {"refresh": 1000},
    }.items():
        table[name] = dataclasses.replace(CHOSEN, **changes), 0
    table["chosen, noisy"] = CHOSEN, NOISE
    table["attending to stale ones, noisy"] = dataclasses.replace(CHOSEN, attend="all"), NOISE
    return table


def compressed(source: str, out: Path) -> Path:
    """Where the policy is in the preset; it is compressed if it is not there."""
    directory = out / "policies" / source
    if not directory.exists():
        policy = sqap.load(source)
        frames = collect_frames(policy, ENV, environments.default_tasks(ENV), FRAMES)
        sqap.compress(policy, Recipe.w4a8(keep=KEEP), frames).save(directory)
    return directory


def record(policy: Policy, tasks: Sequence[str]) -> list[list[Look]]:
    """What the policy sees in an episode of each task."""
    found = []
    for task in tasks:
        with closing(environments.make(ENV, task)) as world:
            looks, observation, over = [], world.reset(RECORDED_SEED), False
            while not over:
                looks.append((observation, noise_seed(RECORDED_SEED, len(looks))))
                for action in policy.act(observation, seed=looks[-1][1]):
                    result = world.step(np.clip(action, -1, 1))
                    over = result.success or result.truncated
                    if over:
                        break
                observation = world.observe()
            found.append(looks)
    return found


def offline(directory: Path, console: Console) -> dict[str, Any]:
    """Share of patches computed and errors by setting.

    Errors are against every patch computed of the same pixels, those of `UNPRUNED` and `NOISY` against every
    patch of the clean ones.
    """
    episodes = record(sqap.load(directory), environments.default_tasks(ENV))
    exact: dict[float, list[tuple[np.ndarray, np.ndarray]]] = {}
    result: dict[str, Any] = {}
    for name, (setting, noise) in settings().items():
        actor = Reusing(sqap.load(directory), setting, noise)
        if name == UNPRUNED:
            actor.policy.selector = None
        shares, found = replay(actor, episodes)
        if name == NOISY:
            exact[noise] = found
        meant = exact.setdefault(0.0, found) if setting == NONE else exact[noise]
        errors = {
            part: relative([f[i] for f in found], [m[i] for m in meant])
            for i, part in enumerate(("features", "actions"))
        }
        result[name] = {**dataclasses.asdict(setting), "noise": noise, "computed": shares, **errors}
        console.print(f"{name}: {shares:.1%} computed, {errors}")
    return {"frames": sum(map(len, episodes)), "settings": result}


def replay(actor: Reusing, episodes: list[list[Look]]) -> tuple[float, list[tuple[np.ndarray, np.ndarray]]]:
    """Mean share of patches computed, and features and actions of every look."""
    shares, found = [], []
    for looks in episodes:
        memory: Any = None
        for observation, seed in looks:
            step = actor.step(observation, seed=seed, memory=memory)
            memory = step.memory
            assert isinstance(memory, Kept)
            shares.append(actor.encoder.computed / memory.features.shape[1])
            found.append((memory.features.numpy(), step.chunk))
    return float(np.mean(shares)), found


def relative(found: Sequence[np.ndarray], meant: Sequence[np.ndarray]) -> float:
    """Root mean square difference, over the spread of what is meant."""
    a, b = np.concatenate(found).astype(np.float64), np.concatenate(meant).astype(np.float64)
    axes = tuple(range(b.ndim - 1))
    return float(np.sqrt(((a - b) ** 2).mean() / b.var(axes).mean()))


def closed_loop(
    directory: Path, out: Path, workers: int, episodes: int, noise: float, console: Console
) -> dict[str, Any]:
    """Both ways in turns on the same episodes."""
    mark, tasks = fingerprint(directory), environments.default_tasks(ENV)
    stamp = current_settings(ENV, workers=workers, threads=1).mark
    stem = out / "episodes" / f"{directory.name}-{mark[:12]}-{stamp}-noise-{noise:g}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    ways = {"every": NONE, "reuse": CHOSEN}
    with Progress(console=console) as progress:
        bar = progress.add_task(directory.name, total=2 * episodes * len(tasks))
        every, reuse = evaluate(
            [directory, directory],
            ENV,
            tasks,
            episodes,
            SEED,
            fingerprints=[f"{mark}-{name}" for name in ways],
            log=stem.with_name(f"{stem.name}.jsonl"),
            workers=workers,
            threads=1,
            progress=lambda _, done, total: progress.update(bar, completed=done),
            load=partial(load, ways, noise, stem),
        )
    shared = {"setting": dataclasses.asdict(CHOSEN), "noise": noise}
    share = computed(stem.with_name(f"{stem.name}-reuse"))
    return {
        **shared,
        "every": describe(every),
        "reuse": {**describe(reuse), "computed": share, "against_every": compare(reuse, every)},
    }


def computed(counts: Path) -> float:
    """Mean share of patches computed in a step; a step that was run twice counts once."""
    lines = [json.loads(line) for line in counts.read_text().splitlines()]
    return statistics.fmean({(x["task"], x["seed"]): x["computed"] for x in lines}.values())


def encoders(shape: str) -> tuple[list[VisionEncoder], int]:
    """A policy's encoders, quantized, and how many patches make a side of a visual token."""
    quantized = Recipe(quantization=Recipe.w4a8().quantization)
    if shape in SHAPES:  # of the decoder no more than a layer
        config = dataclasses.replace(
            SHAPES[shape], decoder=dataclasses.replace(SHAPES[shape].decoder, depth=1)
        )
        policy = random_policy(config, quantized)
    else:
        policy = random_policy(sqap.load(shape).config.model, quantized)
    return [e for e in policy.model.vision if isinstance(e, VisionEncoder)], policy.config.model.pixel_shuffle


def speed(shape: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of the encoders for one image, in turns, by the share of patches that have changed."""
    found, shuffle = encoders(shape)
    with torch.inference_mode():
        return {"machine": describe_kernels(), "shares": timed(found, shuffle, repeats)}


def describe_kernels() -> dict[str, Any]:
    """What multiplies, and with how many threads."""
    told = cpu.describe()
    return {"processor": told["processor"], "threads": told["threads"], "kernels": cpu.chosen()}


def timed(found: list[VisionEncoder], shuffle: int, repeats: int) -> dict[str, Any]:
    """By the share of patches that have changed and what they attend to; the first of a kind is left out."""
    calls: dict[str, Callable[[], None]] = {"every patch": lambda: _all(found)}
    kept = {"every patch": 0}
    for attend in ("fresh", "all"):
        for share in SHARES:
            changed = [_changed(encoder, shuffle, attend, share) for encoder in found]
            name = f"{share:.0%}, attend {attend}"
            calls[name] = partial(_each, changed)
            kept[name] = sum(each.before.nbytes for each, _ in changed if each.before is not None)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    whole = times["every patch"][1:]
    result: dict[str, Any] = {}
    for name, ms in times.items():
        ratios = sorted(a / b for a, b in zip(whole, ms[1:], strict=True))
        result[name] = {"p50_ms": statistics.median(ms[1:]), "min_ms": min(ms[1:])}
        result[name] |= {
            "kept_bytes": kept[name],
            "faster_by": statistics.median(ratios),
            "from": ratios[0],
            "to": ratios[-1],
        }
    return result


def _all(found: list[VisionEncoder]) -> None:
    for encoder in found:
        size = encoder.config.image_size
        encoder(torch.zeros(1, 3, size, size))


def _changed(
    encoder: VisionEncoder, shuffle: int, attend: Any, share: float
) -> tuple[ReusingEncoder, Tensor]:
    """An encoder that remembers a grey image, and one in which so many patches are white."""
    reusing = ReusingEncoder(encoder, Reuse(CHOSEN.threshold, 0, 1000, attend, cut=1.0), shuffle)
    size, grid = encoder.config.image_size, encoder.config.grid
    reusing(torch.zeros(1, 3, size, size))
    reusing.before = reusing.after
    order = torch.randperm(grid**2, generator=torch.Generator().manual_seed(0))
    white = (order < round(share * grid**2)).float().view(1, 1, grid, grid)
    pixels = torch.nn.functional.interpolate(white, scale_factor=encoder.config.patch_size)
    return reusing, pixels.expand(1, 3, -1, -1).contiguous()


def _each(changed: list[tuple[ReusingEncoder, Tensor]]) -> None:
    for encoder, pixels in changed:
        encoder(pixels)


def table(part: str, found: dict[str, Any]) -> str:
    """One policy's or shape's numbers as a Markdown table."""
    if part == "offline":
        lines = ["| setting | patches computed | features off by | actions off by |", "|---|---|---|---|"]
        for name, row in found["settings"].items():
            numbers = (f"{100 * row[key]:.1f} %" for key in ("computed", "features", "actions"))
            lines.append(f"| {name} | {' | '.join(numbers)} |")
    elif part == "speed":
        lines = ["| changed patches | p50 | least | faster by | kept |", "|---|---|---|---|---|"]
        for name, row in found["shares"].items():
            ratio = f"{row['faster_by']:.2f} ({row['from']:.2f} to {row['to']:.2f})"
            kept = f"{row['kept_bytes'] / 1e6:.1f} MB"
            lines.append(f"| {name} | {row['p50_ms']:.1f} ms | {row['min_ms']:.1f} ms | {ratio} | {kept} |")
    else:
        every, reuse = found["every"], found["reuse"]
        pair = reuse["against_every"]
        low, high = (f"{100 * bound:+.1f}" for bound in pair["difference_ci95"])
        lines = [
            "| episodes | every patch | reuse | patches computed | difference | wins : losses |",
            "|---|---|---|---|---|---|",
            f"| {pair['episodes']} | {100 * every['success']:.1f} % | {100 * reuse['success']:.1f} % "
            f"| {100 * reuse['computed']:.1f} % | {100 * pair['difference']:+.1f} ({low} to {high}) "
            f"| {pair['wins']}:{pair['losses']}, p = {pair['mcnemar_p']:.2g} |",
        ]
    return "\n".join(lines)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part", action="append", choices=("offline", "closed-loop", "speed"), help="all by default"
    )
    parser.add_argument("--policy", action="append", help="one of the bundled ones; both by default")
    parser.add_argument(
        "--shape", action="append", help="for speed; reference, smolvla and cogact-7b by default"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here, beside those of other parts")
    parser.add_argument("--out", type=Path, default=Path("runs/vision-reuse"), help="logs and policies")
    parser.add_argument("--workers", type=int, default=2, help="episodes at a time")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of each task and way")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="of every pixel in the closed loop, in levels"
    )
    parser.add_argument("--repeats", type=int, default=20, help="of each timing")
    options = parser.parse_args()
    console, parts = Console(), options.part or ["offline", "closed-loop", "speed"]
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        results = json.loads(options.json.read_text())

    def keep(part: str, name: str, found: dict[str, Any]) -> None:
        console.print(f"\n{part}: {name}\n\n{table(part, found)}\n", markup=False, soft_wrap=True)
        results.setdefault(part, {})[name] = {"build": build_id(), **found}
        if options.json is not None:
            write_json(options.json, results)

    for source in options.policy or POLICIES:
        if "offline" in parts:
            keep("offline", source, offline(compressed(source, options.out), console))
        if "closed-loop" in parts:
            directory = compressed(source, options.out)
            loop = directory, options.out, options.workers, options.episodes, options.noise, console
            found = closed_loop(*loop)
            keep(f"closed-loop, noise {options.noise:g}", source, found)
    if "speed" in parts:
        for shape in options.shape or ("reference", "smolvla", "cogact-7b"):
            keep("speed", shape, speed(shape, options.repeats))


if __name__ == "__main__":
    main()
