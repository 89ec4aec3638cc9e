"""Checkpoints of full size on a small machine: python benchmarks/full_size.py --json docs/full-size.json

Writes policies as they are published, with random weights: CogACT and OpenVLA of 7B, and LeRobot's
``smolvla_base``, ``pi0_base`` and ``pi05_base``. Compresses them to W4A8 with the command line, and lets the
result act: weight bytes, time and peak memory of each, every step in a process of its own.
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
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import published
import published_lerobot
from PIL import Image
from rich.console import Console
from rich.table import Table

import sqap
from sqap.checkpoints import fingerprint
from sqap.files import write_json
from sqap.recipe import Recipe

Rounding = Literal["gptq", "nearest"]
KEY = ("--unnorm-key", "bridge_orig")
INSTRUCTION = "put the carrot on the plate"
# What a process is told to do with a policy; prints how long each step took.
ACT = """
import json, sys, time
import numpy as np, sqap
start = time.perf_counter()
policy = sqap.load(sys.argv[1])
loaded, seconds = time.perf_counter() - start, []
image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
state = np.zeros(policy.config.state_dim, np.float32) if policy.config.state_dim else None
seen = sqap.Observation({camera: image for camera in policy.config.cameras}, sys.argv[2], state)
for _ in range(int(sys.argv[3])):
    start = time.perf_counter()
    chunk = policy.act(seen, seed=0)
    seconds.append(time.perf_counter() - start)
finite = bool(np.isfinite(chunk).all())
print(json.dumps({"load_s": loaded, "step_s": seconds, "chunk": chunk.shape, "finite": finite}))
"""


@dataclass(frozen=True)
class Family:
    """A published policy: how its directory is written, and what `sqap compress` is told of it.

    Args:
        write: its directory.
        options: of the command.
        cameras: of the calibration frames; none for policies with one, whatever it is called.
    """

    write: Callable[[Path], None]
    options: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()


SMOLVLA_CAMERAS = ("camera1", "camera2", "camera3")
PI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def _write_smolvla(directory: Path) -> None:
    seen = published_lerobot.features(SMOLVLA_CAMERAS)
    published_lerobot.write_smolvla(directory, published_lerobot.FULL_SMOLVLA, **seen)


def _write_pi(kind: str, directory: Path) -> None:
    """In float32, with one tensor for both tables, as the hub's files have it."""
    seen = published_lerobot.features(PI_CAMERAS)
    published_lerobot.write_pi(directory, published_lerobot.FULL_PI, kind=kind, tied=True, **seen)


FAMILIES = {
    "cogact": Family(lambda directory: published.write_cogact(directory, published.FULL, 0), KEY),
    "openvla": Family(lambda directory: published.write_openvla(directory, published.FULL, 0), KEY),
    "smolvla_base": Family(_write_smolvla, cameras=SMOLVLA_CAMERAS),
    "pi0_base": Family(partial(_write_pi, "pi0"), cameras=PI_CAMERAS),
    "pi05_base": Family(partial(_write_pi, "pi05"), cameras=PI_CAMERAS),
}


@dataclass(frozen=True)
class Finished:
    """A process that has ended well: what it printed, and what it took."""

    output: str
    seconds: float
    cpu_seconds: float
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
    used = usage.ru_utime + usage.ru_stime
    return Finished(output, time.perf_counter() - start, used, usage.ru_maxrss * 1024)


def write_frames(root: Path, count: int, cameras: tuple[str, ...]) -> None:
    """Noise as calibration frames: the weights are noise too."""
    root.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(1), []
    for i in range(count):
        line: dict[str, Any] = {"instruction": INSTRUCTION}
        for name in [f"{camera}_file_name" for camera in cameras] or ["file_name"]:
            line[name] = f"{i}-{name}.png"
            image = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / f"{i}-{name}.png")
        if cameras:
            line["state"] = rng.uniform(-0.5, 0.5, published_lerobot.STATE_DIM).tolist()
        lines.append(json.dumps(line))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def measure(
    family: str, work: Path, rounding: Rounding, frames: int, steps: int, console: Console
) -> dict[str, Any]:
    """Write, compress and run one family."""
    guest, seen = FAMILIES[family], work / f"{family}-frames"
    source, small, report = work / family, work / f"{family}-w4a8", work / f"{family}.json"
    found: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {}
    if "compress" not in found:
        if not (source / "written").exists():
            console.print(f"{family}: writing {source}")
            shutil.rmtree(source, ignore_errors=True)
            guest.write(source)
            (source / "written").touch()
        write_frames(seen, frames, guest.cameras)
        console.print(f"{family}: compressing")
        write_json(work / "recipe.json", _recipe(rounding).to_json())
        recipe = ["--recipe", work / "recipe.json"]
        options = [*guest.options, "--frames", str(frames), "--frames-from", seen]
        numbers = work / f"{family}-compress.json"
        compressed = run("sqap", "compress", source, "--out", small, *recipe, *options, "--json", numbers)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        found["compress"] = {
            "seconds": compressed.seconds,
            "cpu_seconds": compressed.cpu_seconds,
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
        "processor time to compress": lambda r: f"{r['compress']['cpu_seconds'] / 60:.1f} min",
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
    parser.add_argument("families", nargs="*", default=["cogact", "openvla"], help=", ".join(FAMILIES))
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
