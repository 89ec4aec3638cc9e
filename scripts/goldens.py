"""Goldens for refactorings: python scripts/goldens.py record FILE, and later: ... check FILE

Records the actions of every family from fixed seeds (float, W4A8, W4A4; whole, pruned, in batches) on three
kernel paths, and of the bundled policies the artefact's hash, calibration, actions and closed-loop episodes.
`check` computes them anew and says which differ, and by how much. Numbers hold for one processor and one
build of PyTorch, so the file is not committed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
PATHS = ("", "portable", "reference")  # the fastest first
SEEDS = (1, 2)
POLICIES = ("reference", "reference-smollm", "reference-smolvla")


def families() -> Iterator[tuple[str, Tensor]]:
    """Actions of small policies of every family, with random weights."""
    from sqap.models import VLA
    from sqap.pruning import Selector, StepPruner
    from sqap.pruning.attention import score_queries
    from sqap.quantization import quantize_model
    from sqap.recipe import Cut, Pruning, Quantization, Scheme
    from tests.families import FAMILIES, family_config, random_inputs, random_model

    cuts = {
        "lookahead": Pruning(0.5, 1),
        "steps": Pruning(0.75, 1, later=(Cut(2, 0.25),)),
        "mix": Pruning(0.5, 2, "sqap", score_layers=(0, 1)),
        "attention": Pruning(0.5, 1, "attention", score_queries="last"),
        "divprune": Pruning(0.5, 1, "divprune"),
        "random": Pruning(0.5, 1, "random"),
    }
    for family in FAMILIES:
        config = family_config(family)
        inputs = [random_inputs(config, 1, seed) for seed in SEEDS]
        models: dict[str, VLA] = {"float": random_model(config)}
        for name, bits in (("w4a8", 8), ("w4a4", 4)):
            eight = Scheme(8, 8)
            parts = {"vision": eight, "projector": eight, "head": eight, "sensitive": eight}
            quantization = Quantization(Scheme(4, bits), **parts, rounding="gptq", clip=True, rotation_seed=3)
            models[name] = quantize_model(random_model(config), quantization, inputs)
        for name, model in models.items():
            yield f"{family}.{name}.batch", model(random_inputs(config, 3, 5))
            for seed, given in zip(SEEDS, inputs, strict=True):
                yield f"{family}.{name}.{seed}", model(given)
                for cut, settings in cuts.items():
                    pruning = replace(settings, score_queries=score_queries(settings, config))
                    selector = Selector(pruning, config.grid, layers=(2,))
                    generator = torch.Generator().manual_seed(seed)
                    targets = [(0.4, 0.6)] * config.cameras
                    length = config.layout(5).blocks[0].stop
                    pruner = StepPruner(selector, length, config.visual, targets, generator)
                    yield f"{family}.{name}.{seed}.{cut}", model(given, pruner)


def bundled(name: str, episodes: bool) -> Iterator[tuple[str, Tensor]]:
    """A bundled policy: its artefact, actions and episodes."""
    import hashlib

    import sqap
    from sqap import environments
    from sqap.evaluation.rollout import run_episode
    from sqap.frames import collect_frames

    policy = sqap.load(name)
    frames = collect_frames(policy, "metaworld", environments.default_tasks("metaworld")[:4], 8)
    with TemporaryDirectory() as directory:
        for recipe in ("w4a8", "w4a4"):
            small = sqap.compress(policy, getattr(sqap.Recipe, recipe)(keep=0.6), frames)
            assert small.calibration is not None
            yield f"{name}.{recipe}.top_k", torch.tensor([small.calibration.top_k or 0])
            yield f"{name}.{recipe}.overlap", torch.tensor([small.calibration.overlap or 0.0])
            small.save(Path(directory) / recipe)
            written = (Path(directory) / recipe / "model.safetensors").read_bytes()
            yield (
                f"{name}.{recipe}.artefact",
                torch.frombuffer(bytearray(hashlib.sha256(written).digest()), dtype=torch.uint8),
            )
            for seed, frame in enumerate(frames):
                yield f"{name}.{recipe}.{seed}", torch.from_numpy(small.act(frame, seed=seed))
            if recipe == "w4a8" and episodes:
                for task in environments.default_tasks("metaworld"):
                    for seed in (900_000, 900_001):
                        env = environments.make("metaworld", task)
                        result = run_episode(small, env, seed)
                        env.close()
                        yield (
                            f"{name}.episode.{task}.{seed}",
                            torch.tensor([float(result.success), result.steps]),
                        )


def compute(path: str) -> dict[str, Tensor]:
    """All goldens of one kernel path, in this process."""
    found = {}
    with torch.inference_mode():
        found.update(families())
    for name in POLICIES:
        if path != "reference":  # PyTorch's arithmetic takes minutes for a step of these
            found.update(bundled(name, episodes=path == "" and name == "reference"))
    return {f"{path or 'fastest'}.{name}": tensor.clone().contiguous() for name, tensor in found.items()}


def main() -> None:
    """Record, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("record", "check", "one"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    if options.what == "one":
        sys.path.insert(0, str(ROOT))
        save_file(compute(os.environ.get("SQAP_KERNELS", "")), options.file)
        return
    found: dict[str, Tensor] = {}
    with TemporaryDirectory() as directory:
        for path in PATHS:
            part = Path(directory) / "part.safetensors"
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "SQAP_KERNELS": path}
            subprocess.run([sys.executable, __file__, "one", part], env=environment, check=True, cwd=ROOT)
            found.update(load_file(part))
    if options.what == "record":
        save_file(found, options.file)
        print(f"{len(found)} goldens")
        return
    sys.exit(report(load_file(options.file), found))


def report(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    """Print what differs; the exit status."""
    wrong = 0
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            print(f"{name}: only {'after' if name in after else 'before'}")
            wrong += 1
        elif before[name].shape != after[name].shape or not torch.equal(before[name], after[name]):
            same = before[name].shape == after[name].shape
            by = (before[name].double() - after[name].double()).abs().max() if same else float("nan")
            print(f"{name}: differs by {by:.3g}")
            wrong += 1
    print(f"{len(before)} goldens, {wrong} differ")
    return int(wrong > 0)


if __name__ == "__main__":
    main()
