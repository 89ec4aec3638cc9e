"""Predictions of `sqap capacity` beside a real server: python benchmarks/capacity_check.py --json check.json

In turns, so that whatever disturbs this machine meets both: steps for 1, 2, 4, 8 and 16 robots are timed in
this process, and then a server in a process of its own answers robots (those of robots.py). Each sends
``--rate-hz`` observations a second, or one as soon as it has its answer where that comes later. Then
`sqap.capacity` simulates the same runs, as long as what was measured, many times:

- ``apart``: from the steps that were timed beside the server, as `sqap capacity` does.
- ``inside``: from the times that the server itself gave for its steps under that load. Where this agrees
  with what was measured and ``apart`` does not, the model is right and steps take longer beside robots.

The simulation's network is the median of the round trip without waiting and policy, as measured. Printed are
p50 and p99 of the round trip: measured, and predicted with the range of 95 of 100 simulated runs.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from robots import Candidate, Seen, Server, load

import sqap
from sqap.build import build_id
from sqap.capacity import Load, StepTimes, measure, simulate
from sqap.files import write_json
from sqap.process import available_cores, keep_freed_memory
from sqap.serving import Limits
from sqap.serving.engine import noise

QUANTILES = (50, 99)
RUNS = 100  # that are simulated
ROUNDS = 5  # of each size's steps between two loads


def steps_of(seen: Seen) -> StepTimes:
    """Durations that the server reported, one for each step, however many robots it answered."""
    found: dict[int, list[float]] = defaultdict(list)
    for robots, ms in sorted(set(zip(seen.batches, seen.infer, strict=True))):
        found[robots].append(ms / 1e3)
    if 1 not in found:  # the smallest there was, in proportion
        least = min(found)
        found[1] = [seconds / least for seconds in found[least]]
    return StepTimes(found)


def predict(
    times: StepTimes, load: Load, batch: int, seconds: float, slices: int, runs: int = RUNS
) -> dict[str, dict[str, float]]:
    """Median and range of the quantiles, in milliseconds, over runs of as many slices as were measured."""
    found = []
    for run in range(runs):
        latencies: list[float] = []
        for part in range(slices):
            drawn = np.random.SeedSequence([run, part])
            seen = simulate(load, times, Limits(batch=batch), 1, seconds, 0.0, drawn)
            latencies += seen.latencies
        found.append(1e3 * np.percentile(latencies, QUANTILES))
    low, middle, high = np.percentile(found, [2.5, 50, 97.5], axis=0)
    return {
        f"p{q}_ms": {"low": float(low[i]), "median": float(middle[i]), "high": float(high[i])}
        for i, q in enumerate(QUANTILES)
    }


def merged(parts: list[StepTimes]) -> StepTimes:
    """All that was timed."""
    return StepTimes({n: [s for part in parts for s in part.seconds[n]] for n in parts[0].seconds})


def check(server: Server, policy: Any, robots: int, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one number of robots."""
    observations = [noise(policy, seed) for seed in range(robots)]
    seen, timed = Seen(), []
    for _ in range(options.slices):
        timed.append(measure(policy, rounds=ROUNDS, warmups=1))
        part = asyncio.run(load(server, observations, options.seconds, 1 / options.rate_hz))
        for name, values in vars(part).items():
            setattr(seen, name, getattr(seen, name) + values)
    apart, inside = merged(timed), steps_of(seen)
    asked = Load(robots, options.rate_hz, network_s=float(np.median(seen.beyond)) / 1e3)
    return {
        "robots": robots,
        "observations": len(seen.round_trips),
        "refusals": seen.refusals,
        "beyond_p50_ms": 1e3 * asked.network_s,
        "robots_a_step": float(np.mean(seen.batches)),
        "measured": {
            f"p{q}_ms": float(v)
            for q, v in zip(QUANTILES, np.percentile(seen.round_trips, QUANTILES), strict=True)
        },
        "step_ms": apart.to_json(),
        "step_ms_inside": inside.to_json(),
        "apart": predict(apart, asked, options.batch, options.seconds, options.slices),
        "inside": predict(inside, asked, options.batch, options.seconds, options.slices),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("robots", "", "measured, ms", "apart", "95 of 100", "inside", "95 of 100")
    for row in rows:
        for q in QUANTILES:
            cells = []
            for name in ("apart", "inside"):
                found = row[name][f"p{q}_ms"]
                cells += [f"{found['median']:.1f}", f"{found['low']:.1f} to {found['high']:.1f}"]
            shown.add_row(str(row["robots"]), f"p{q}", f"{row['measured'][f'p{q}_ms']:.1f}", *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="reference")
    parser.add_argument("--robots", default="1,4,16")
    parser.add_argument("--rate-hz", type=float, default=2.0, help="of each robot")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each slice of load")
    parser.add_argument("--slices", type=int, default=4, help="of load, and of timed steps before each")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of the policy")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the server and `sqap capacity` do
    policy = sqap.load(options.policy)
    counts = [int(count) for count in options.robots.split(",")]
    rows: list[dict[str, Any]] = []
    candidate = Candidate(f"batch={options.batch}", options.batch)
    with Server(options.policy, candidate, max(counts), options.threads) as server:
        for robots in counts:
            rows.append(check(server, policy, robots, options))
            console.print(table(rows[-1:]))
    console.print(table(rows))
    if options.json is not None:
        settings = {
            name: getattr(options, name)
            for name in ("policy", "rate_hz", "batch", "seconds", "slices", "threads")
        }
        write_json(options.json, {"build": build_id(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
