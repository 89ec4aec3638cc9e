"""Checkpoints of full size on a small machine: python benchmarks/full_size.py --json docs/full-size.json

Writes CogACT and OpenVLA as they are published, 7B with random weights, compresses them to W4A8 with the
command line, and lets the result act: weight bytes, time and peak memory of each, every step in a process of
its own.
Interrupted, it goes on: with a finished directory, a half-compressed policy, or a finished one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import published
from PIL import Image
from rich.console import Console
from rich.table import Table

import sqap
from sqap.checkpoints import fingerprint
from sqap.files import write_json
from sqap.recipe import Recipe

WRITERS = {"cogact": published.write_cogact, "openvla": published.write_openvla}
Rounding = Literal["gptq", "nearest"]
KEY = "bridge_orig"
INSTRUCTION = "put the carrot on the plate"
# What a process is told to do with a policy; prints how long each step took.
ACT = """
import json, sys, time
import numpy as np, sqap
start = time.perf_counter()
policy = sqap.load(sys.argv[1])
loaded, seconds = time.perf_counter() - start, []
image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
seen = sqap.Observation({policy.config.cameras[0]: image}, sys.argv[2])
for _ in range(int(sys.argv[3])):
    start = time.perf_counter()
    chunk = policy.act(seen, seed=0)
    seconds.append(time.perf_counter() - start)
finite = bool(np.isfinite(chunk).all())
print(json.dumps({"load_s": loaded, "step_s": seconds, "chunk": chunk.shape, "finite": finite}))
"""


@dataclass(frozen=True)
class Finished:
    """A process that has ended well: what it printed, and what it took."""

    output: str
    seconds: float
    peak_bytes: int


def run(*command: str | Path) -> Finished:
    """Run a process to its end.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with status {process.returncode}: {output[-500:]}")
    return Finished(output, time.perf_counter() - start, usage.ru_maxrss * 1024)


def write_frames(root: Path, count: int) -> None:
    """Noise as calibration frames: the weights are noise too."""
    root.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(1), []
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(root / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "instruction": INSTRUCTION}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def measure(
    family: str, work: Path, rounding: Rounding, frames: int, steps: int, console: Console
) -> dict[str, Any]:
    """Write, compress and run one family."""
    source, small, report = work / family, work / f"{family}-w4a8", work / f"{family}.json"
    found: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {}
    if "compress" not in found:
        if not (source / "written").exists():
            console.print(f"{family}: writing {source}")
            shutil.rmtree(source, ignore_errors=True)
            WRITERS[family](source, published.FULL, 0)
            (source / "written").touch()
        write_frames(work / "frames", frames)
        console.print(f"{family}: compressing")
        write_json(work / "recipe.json", _recipe(rounding).to_json())
        recipe = ["--recipe", work / "recipe.json"]
        options = ["--unnorm-key", KEY, "--frames", str(frames), "--frames-from", work / "frames"]
        numbers = work / "compress.json"
        compressed = run("sqap", "compress", source, "--out", small, *recipe, *options, "--json", numbers)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        found["compress"] = {
            "seconds": compressed.seconds,
            "peak_bytes": compressed.peak_bytes,
            "directory_bytes": size,
            "weight_bytes": json.loads(numbers.read_text())["weight_bytes"],
            "frames": frames,
            "rounding": rounding,
        }
        write_json(report, found)
    if "act" not in found:
        console.print(f"{family}: acting")
        acted = run(sys.executable, "-c", ACT, small, INSTRUCTION, str(steps))
        found["act"] = {**json.loads(acted.output.splitlines()[-1]), "peak_bytes": acted.peak_bytes}
        found["fingerprint"] = fingerprint(small)
        write_json(report, found)
    return found


def _recipe(rounding: Rounding) -> Recipe:
    recipe = Recipe.w4a8()
    assert recipe.quantization is not None
    return replace(recipe, quantization=replace(recipe.quantization, rounding=rounding))


def show(results: dict[str, Any]) -> Table:
    """Bytes, times and peaks."""
    table = Table("", *results)
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "directory": lambda r: f"{r['compress']['directory_bytes'] / 1e9:.2f} GB",
        "weights used, bfloat16": lambda r: f"{r['compress']['weight_bytes']['before'] / 1e9:.2f} GB",
        "weights, compressed": lambda r: f"{r['compress']['weight_bytes']['after'] / 1e9:.2f} GB",
        "rounding": lambda r: str(r["compress"]["rounding"]),
        "time to compress": lambda r: f"{r['compress']['seconds'] / 60:.0f} min",
        "peak memory, compressing": lambda r: f"{r['compress']['peak_bytes'] / 1e9:.2f} GB",
        "time to load": lambda r: f"{r['act']['load_s']:.0f} s",
        "time of a step": lambda r: f"{min(r['act']['step_s']):.1f} s",
        "peak memory, acting": lambda r: f"{r['act']['peak_bytes'] / 1e9:.2f} GB",
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(result) for result in results.values()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", default=list(WRITERS))
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--work", type=Path, default=Path("build/full-size"), help="40 GB for each family")
    parser.add_argument("--rounding", choices=get_args(Rounding), default="gptq")
    parser.add_argument("--frames", type=int, default=8, help="calibration frames")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    console = Console()
    results = {
        f: measure(f, args.work, args.rounding, args.frames, args.steps, console) for f in args.families
    }
    console.print(show(results))
    if args.json is not None:
        write_json(args.json, {"sqap": sqap.__version__, **results})


if __name__ == "__main__":
    main()
