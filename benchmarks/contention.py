"""Competition for the cores of a step: python benchmarks/contention.py --policy DIR --json FILE

A step has hundreds of parallel loops, at whose ends OpenMP's threads wait for each other. Times of a step,
each way in a process of its own, in turns:

- ``spin``: how long a thread that waits spins before it sleeps (``GOMP_SPINCOUNT``): as sqap sets it, as
  libgomp does by itself, less, and not at all; and one thread, which waits for nobody.
- ``pause``: seconds between two steps. After half a second the threads sleep, and caches are cold.
- ``beside``: nothing, or as many programs as there are cores that compute all the time.
- ``in``: the thread that loaded the policy, or another one, while the first still has a team of threads
  (``idle team``) or has released it (``released``, as `sqap.serving` and `sqap.control` do).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import sqap
from sqap.build import build_id
from sqap.files import write_json
from sqap.kernels.cpu import release_threads
from sqap.openmp import SPIN_COUNT
from sqap.process import available_cores
from sqap.serving.engine import noise, warm_up

LIBGOMP = "300000"
PAUSE = 0.5
WHERE = ("itself", "idle team", "released")
BUSY = "while True: pass"


def ways(cores: int) -> list[dict[str, Any]]:
    """The ways to compute a step that are compared, each as a row of the results."""
    spins = [(SPIN_COUNT, cores), (LIBGOMP, cores), ("10000", cores), ("0", cores), (SPIN_COUNT, 1)]
    surroundings = [(0.0, 0), (PAUSE, 0), (0.0, cores)]
    found = [
        {"spin": spin, "threads": threads, "pause": pause, "beside": beside, "in": WHERE[0]}
        for pause, beside in surroundings
        for spin, threads in spins
    ]
    return found + [found[0] | {"in": where} for where in WHERE[1:]]


def steps(source: str, where: str, pause: float, seconds: float) -> list[float]:
    """Milliseconds of a step, over and over, in this process."""
    policy = sqap.load(source)
    policy.load_weights()
    observation = noise(policy)

    def act() -> list[float]:
        warm_up(policy)
        taken, until = [], time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(pause)
            begin = time.monotonic()
            policy.step(observation, seed=0)
            taken.append(1e3 * (time.monotonic() - begin))
        return taken

    if where == "itself":
        return act()
    torch.ones(2**20).mul_(2)  # a loop of all threads
    if where == "released":
        release_threads()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(act).result()


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """Other programs, each in a session of its own, as those of a robot's computer are."""
    running = [
        subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True) for _ in range(programs)
    ]
    try:
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def measure(source: str, way: dict[str, Any], seconds: float) -> list[float]:
    """Milliseconds of a step in one way, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"GOMP_SPINCOUNT": way["spin"], "OMP_NUM_THREADS": str(way["threads"])}
    how = ["--in", way["in"], "--pause", str(way["pause"]), "--seconds", str(seconds)]
    command = [sys.executable, __file__, "--policy", source, *how]
    with busy(way["beside"]):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    taken: list[float] = json.loads(done.stdout)
    return taken


def summary(rounds: list[list[float]]) -> dict[str, Any]:
    """Numbers of one way, from the milliseconds of its steps in every round."""
    every = np.concatenate(rounds)
    return {
        "p50_ms": round(float(np.median(every)), 2),
        "rounds_p50_ms": [round(float(np.median(taken)), 2) for taken in rounds],
        "p99_ms": round(float(np.percentile(every, 99)), 2),
        "slowest_ms": round(float(every.max()), 2),
        "steps": len(every),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each way."""
    shown = Table("threads", "spin", "pause", "beside", "in", "p50 ms", "by round", "p99", "slowest")
    for row in rows:
        rounds = row["rounds_p50_ms"]
        shown.add_row(
            str(row["threads"]),
            row["spin"],
            f"{row['pause']:g}",
            str(row["beside"]),
            row["in"],
            f"{row['p50_ms']:.1f}",
            f"{min(rounds):.1f} to {max(rounds):.1f}",
            f"{row['p99_ms']:.1f}",
            f"{row['slowest_ms']:.0f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="reference")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of steps, for each way and round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in", dest="where", choices=WHERE, help=argparse.SUPPRESS)
    parser.add_argument("--pause", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.where is not None:  # a process of `measure`
        print(json.dumps(steps(options.policy, options.where, options.pause, options.seconds)))
        return
    compared = ways(available_cores())
    taken: list[list[list[float]]] = [[] for _ in compared]
    for _ in range(options.rounds):
        for way, rounds in zip(compared, taken, strict=True):
            rounds.append(measure(options.policy, way, options.seconds))
    rows = [way | summary(rounds) for way, rounds in zip(compared, taken, strict=True)]
    Console(width=max(Console().width, 100)).print(table(rows))  # columns need room in a file too
    if options.json is not None:
        settings = {key: getattr(options, key) for key in ("policy", "rounds", "seconds")}
        write_json(options.json, {"build": build_id(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
