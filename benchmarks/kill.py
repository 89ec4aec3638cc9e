"""Kills `sqap compress` and `sqap eval` at random moments: python benchmarks/kill.py --json results.json

Each command runs once undisturbed. Then it is started, killed with SIGKILL at a random moment of its work and
started again, five times in a row, and left to finish. What it has written must be equal to the undisturbed
run's: byte for byte for a compressed policy, and episode for episode, but for times and memory, for an
evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from published import TINY, write_cogact
from rich.console import Console
from rich.table import Table

from sqap.build import build_id
from sqap.files import write_json
from sqap.recipe import Quantization, Recipe, Scheme

IN_A_ROW = 5
DATASET = "bridge_orig"
TASKS = "drawer-close,window-close"
EPISODES = 2
# Of an episode, what differs from run to run.
VARYING = ("peak_rss_bytes", "finished")


@dataclass
class Command:
    """A command of sqap's that is killed.

    Args:
        name: of the command.
        arguments: what follows ``sqap``.
        begun: exists from the moment on at which there is work to lose.
        clear: removes everything that the command has written.
        result: what the command has written, to be compared.
        progress: how much of its work is on disk.
        whole: what that comes to at the end.
        program: what Python is told to run.
    """

    name: str
    arguments: list[str]
    begun: Path
    clear: Callable[[], None]
    result: Callable[[], Any]
    progress: Callable[[], int]
    whole: int
    program: tuple[str, ...] = ("-m", "sqap")


@dataclass
class Outcome:
    """What became of one command.

    Args:
        kills: how often it was killed before it had finished.
        too_late: how often it had finished before it could be killed.
        kept: work found on disk after each kill: stages or episodes.
        equal: how many of the final results were equal to the undisturbed one.
        finals: how many results there were.
        seconds: from the beginning of the work to its end, undisturbed.
    """

    kills: int = 0
    too_late: int = 0
    kept: list[int] = field(default_factory=list)
    equal: int = 0
    finals: int = 0
    seconds: float = 0.0


def compressing(root: Path) -> Command:
    """A tiny CogACT with random weights, quantized by GPTQ."""
    original, frames, recipe = root / "original", root / "frames", root / "recipe.json"
    if not original.is_dir():
        write_cogact(original, sizes=dataclasses.replace(TINY, siglip_width=96))
    frames.mkdir(exist_ok=True)
    lines = []
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(frames / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "instruction": "open the drawer"}))
    (frames / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rest = Scheme(8, 8)
    quantization = Quantization(Scheme(4, 8), vision=rest, projector=rest, head=rest, rounding="gptq")
    write_json(recipe, Recipe(quantization).to_json())
    out, partial = root / "small", root / ".small.partial"

    def clear() -> None:
        for directory in (out, partial):
            shutil.rmtree(directory, ignore_errors=True)

    given = ["--out", str(out), "--recipe", str(recipe), "--frames-from", str(frames)]
    return Command(
        "compress",
        ["compress", str(original), *given, "--unnorm-key", DATASET],
        begun=partial,
        clear=clear,
        result=lambda: {path.name: path.read_bytes() for path in sorted(out.iterdir())},
        progress=lambda: len(list(partial.glob("*.safetensors"))) if partial.is_dir() else 0,
        whole=9,  # blocks, the projector and the head
    )


def evaluating(root: Path) -> Command:
    """The bundled policy on two tasks."""
    log = root / "log.jsonl"

    def result() -> list[dict[str, Any]]:
        episodes = []
        for line in log.read_text(encoding="utf-8").splitlines():
            record = {k: v for k, v in json.loads(line).items() if k not in VARYING}
            record["episode"] = {k: v for k, v in record["episode"].items() if k != "latencies_ms"}
            episodes.append(record)
        return episodes

    arguments = ["eval", "reference", "--tasks", TASKS, "--episodes", str(EPISODES), "--log", str(log)]
    return Command(
        "eval",
        arguments,
        begun=log,
        clear=lambda: log.unlink(missing_ok=True),
        result=result,
        progress=lambda: log.read_bytes().count(b"\n") if log.exists() else 0,
        whole=EPISODES * len(TASKS.split(",")),
    )


def start(command: Command) -> subprocess.Popen[bytes]:
    """Start the command, and return when there is work to lose."""
    process = subprocess.Popen(
        [sys.executable, *command.program, *command.arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not command.begun.exists() and process.poll() is None:
        time.sleep(0.01)
    return process


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end, which must be a good one."""
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the command ended with {process.returncode}:\n{errors.decode()}")


def torment(command: Command, kills: int, moments: random.Random, console: Console) -> Outcome:
    """Kill the command ``kills`` times, and compare every result that it comes to."""
    outcome = Outcome()
    command.clear()
    process, begun = start(command), time.monotonic()
    finish(process)
    outcome.seconds = seconds = time.monotonic() - begun
    wanted = command.result()
    while outcome.kills < kills:
        command.clear()
        done = 0
        for _ in range(min(IN_A_ROW, kills - outcome.kills)):
            process = start(command)
            # At a random moment of what is left to do.
            left = seconds * (1 - done / command.whole)
            begun = time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, left))
            if process.poll() is not None:
                if done == 0:  # the machine had been busy: no moment is to be so late again
                    seconds = time.monotonic() - begun
                outcome.too_late += 1
                process.communicate()
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            outcome.kills += 1
            done = command.progress()
            outcome.kept.append(done)
        finish(start(command))
        outcome.finals += 1
        outcome.equal += command.result() == wanted
        console.print(
            f"{command.name}: {outcome.kills} of {kills} kills, {outcome.equal} of {outcome.finals} equal"
        )
    command.clear()
    return outcome


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", choices=["compress", "eval"])
    parser.add_argument("--out", type=Path, default=Path("build/kill"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console, outcomes = Console(markup=False), {}
    for make in (compressing, evaluating):
        command = make(options.out.resolve())
        if options.only in (None, command.name):
            outcomes[command.name] = torment(command, options.kills, random.Random(options.seed), console)
    table = Table("command", "kills", "on disk after a kill", "results", "equal to the undisturbed one")
    for name, outcome in outcomes.items():
        kept = f"{min(outcome.kept)} to {max(outcome.kept)}"
        table.add_row(name, str(outcome.kills), kept, str(outcome.finals), str(outcome.equal))
    console.print(table)
    if options.json is not None:
        settings = {"build": build_id(), "seed": options.seed}
        numbers = {name: {**settings, **dataclasses.asdict(outcome)} for name, outcome in outcomes.items()}
        write_json(options.json, numbers)
    if any(outcome.equal < outcome.finals for outcome in outcomes.values()):
        sys.exit("a result differs from the undisturbed one")


if __name__ == "__main__":
    main()
