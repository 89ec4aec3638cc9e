"""Success against the policy's delay: python benchmarks/control_delay.py --json results.json --plot delay.png

Meta-World stands still while nobody calls it, so the delay of a step is simulated: a chunk is there so many
periods after its observation (`sqap.control.simulated`). Four ways to control, all on the same seeds:

- ``wait``: the robot holds while the policy computes, and then executes the whole chunk.
- ``switch``: `sqap.control.Loop` computes the next chunk while the last is executed, and switches to it.
- ``switch, 4``: the same, with a new chunk every 4 actions.
- ``blend, 4``: the same, and the new chunk takes over from the rest of the old one over 3 actions.

Every way is compared with ``switch, 4`` on the same tasks, seeds and delays: wins and losses, and the
difference of success with its 95 % interval. Time is simulated, so that a busy machine changes nothing but
how long the benchmark takes. Episodes are kept in the file, and the same command goes on from what is in it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

import sqap
from sqap import environments
from sqap.build import build_id
from sqap.control import ActionLimits, Hold, Loop
from sqap.control.simulated import Delayed, SimulatedClock
from sqap.environments import Environment
from sqap.evaluation.statistics import jerk, paired_difference, wilson
from sqap.files import whole_file, write_json
from sqap.observation import Observation
from sqap.policy import Policy

FIRST_SEED = 1_500_000  # not of training, and of no other benchmark
TASKS = "drawer-open,window-close,door-open,button-press-topdown"
HOLD = Hold(np.zeros(4), keep=(3,))  # the fingers' effort goes on
LIMITS = ActionLimits(np.full(4, -1.0), np.full(4, 1.0))
COLORS = ((90, 98, 110), (47, 111, 179), (217, 138, 31), (0, 124, 90))


@dataclass(frozen=True)
class Way:
    """One way to control a robot; ``wait`` is without `Loop`."""

    name: str
    execute: int | None = None
    blend: int = 0
    wait: bool = False


RIVAL = "switch, 4"
WAYS = (Way("wait", wait=True), Way("switch"), Way(RIVAL, 4), Way("blend, 4", 4, 3))


class Simulated:
    """A simulator as a robot, until success or the end of its time."""

    def __init__(self, env: Environment, seed: int) -> None:
        self._env, self._now = env, env.reset(seed)
        self.ticks, self.success, self.over = 0, False, False
        self.actions: list[np.ndarray] = []

    def observe(self) -> Observation:
        return self._now if self.ticks == 0 else self._env.observe()

    def apply(self, action: np.ndarray) -> None:
        if self.over:
            return
        result = self._env.step(action)
        self.actions.append(action)
        self.ticks += 1
        self.success, self.over = result.success, result.success or result.truncated

    def stop(self) -> None:
        self.over = True


def episode(policy: Policy, env: Environment, way: Way, delay: int, seed: int) -> dict[str, Any]:
    """One episode with a delay in periods."""
    units = environments.action_units("metaworld")
    robot, clock, hz = Simulated(env, seed), SimulatedClock(), units.hz
    loop = Loop(
        policy,
        Waiting(robot, delay) if way.wait else robot,
        hz,
        limits=LIMITS,
        hold=HOLD,
        execute=way.execute,
        blend=way.blend,
        seed=seed,
        clock=clock,
        executor=Delayed(clock, lambda: 0.0 if way.wait else delay / hz),
    )
    report = loop.run(until=lambda: robot.over)
    return {
        "way": way.name,
        "delay": delay,
        "task": env.task,
        "seed": seed,
        "success": robot.success,
        "steps": robot.ticks,
        "jerk": round(jerk(np.stack(robot.actions), units.metres, hz), 1),
        "held": report.held,
        "late": report.counts["late"],
    }


class Waiting:
    """A robot that holds from its observation on until the chunk is there."""

    def __init__(self, robot: Simulated, delay: int) -> None:
        self._robot, self._delay = robot, delay
        self._last: np.ndarray | None = None

    def observe(self) -> Observation:
        observation = self._robot.observe()
        for _ in range(self._delay):
            self._robot.apply(HOLD(self._last))
        return observation

    def apply(self, action: np.ndarray) -> None:
        self._robot.apply(action)
        self._last = action

    def stop(self) -> None:
        self._robot.stop()


def summarize(episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Success with its 95 % interval, by way and delay."""
    rows = []
    for way in WAYS:
        for delay in sorted({e["delay"] for e in episodes}):
            chosen = [e for e in episodes if (e["way"], e["delay"]) == (way.name, delay)]
            if chosen:
                wins = sum(e["success"] for e in chosen)
                low, high = wilson(wins, len(chosen))
                steps = float(np.mean([e["steps"] for e in chosen]))
                rough = float(np.mean([e["jerk"] for e in chosen]))
                rows.append(
                    {"way": way.name, "delay": delay, "episodes": len(chosen), "success": wins / len(chosen),
                     "low": low, "high": high, "steps": round(steps, 1), "jerk": round(rough, 1)}
                )  # fmt: skip
    return rows


def compare(episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every way against `RIVAL` on the same tasks, seeds and delays, all delays together."""
    outcomes = {(e["way"], e["delay"], e["task"], e["seed"]): bool(e["success"]) for e in episodes}
    rows = []
    for way in (way.name for way in WAYS if way.name != RIVAL):
        shared = [key for key in outcomes if key[0] == way and (RIVAL, *key[1:]) in outcomes]
        ours, theirs = [outcomes[key] for key in shared], [outcomes[(RIVAL, *key[1:])] for key in shared]
        if shared:
            wins = sum(a and not b for a, b in zip(ours, theirs, strict=True))
            losses = sum(b and not a for a, b in zip(ours, theirs, strict=True))
            difference, low, high = paired_difference(ours, theirs)
            rows.append(
                {"way": way, "against": RIVAL, "pairs": len(shared), "wins": wins, "losses": losses,
                 "difference": difference, "low": low, "high": high}
            )  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]], hz: float, path: Path) -> None:
    """Success against delay, a line for each way, its interval as a bar."""
    width, height, left, top, right, bottom = 900, 520, 80, 30, 190, 70
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    most = max(max(row["delay"] for row in rows), 1)

    def place(delay: float, success: float) -> tuple[float, float]:
        x = left + delay / most * (width - left - right)
        return x, top + (1 - success) * (height - top - bottom)

    for share in (0, 0.25, 0.5, 0.75, 1):
        draw.line([place(0, share), place(most, share)], fill=(217, 222, 229))
        draw.text((left - 12, place(0, share)[1]), f"{share:.0%}", "black", font, anchor="rm")
    for delay in sorted({row["delay"] for row in rows}):
        draw.text((place(delay, 0)[0], height - bottom + 18), str(delay), "black", font, anchor="mm")
    label = f"delay of a step, in periods of {1e3 / hz:.0f} ms"
    draw.text(((left + width - right) / 2, height - 22), label, "black", font, anchor="mm")
    for i, (way, color) in enumerate(zip(WAYS, COLORS, strict=True)):
        line = [row for row in rows if row["way"] == way.name]
        points = [place(row["delay"] + 0.06 * (i - 1.5), row["success"]) for row in line]
        draw.line(points, fill=color, width=3)
        for (x, y), row in zip(points, line, strict=True):
            draw.line([(x, place(0, row["low"])[1]), (x, place(0, row["high"])[1])], fill=color)
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=color)
        draw.text((width - right + 30, top + 20 + 26 * i), way.name, color, font, anchor="lm")
    with whole_file(path) as temporary:
        picture.save(temporary, "PNG")


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("way", "delay", "success", "95 % interval", "steps", "jerk, m/s³", "episodes")
    for row in rows:
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        success, steps = f"{row['success']:.1%}", f"{row['steps']:.1f}"
        rough, count = f"{row['jerk']:.0f}", str(row["episodes"])
        shown.add_row(row["way"], str(row["delay"]), success, interval, steps, rough, count)
    return shown


def pairs(rows: list[dict[str, Any]]) -> Table:
    shown = Table("way", "against", "wins", "losses", "difference", "95 % interval", "pairs")
    for row in rows:
        interval = f"{row['low']:+.1%} to {row['high']:+.1%}"
        counts = str(row["wins"]), str(row["losses"]), f"{row['difference']:+.1%}"
        shown.add_row(row["way"], row["against"], *counts, interval, str(row["pairs"]))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="reference")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--delays", default="0,1,2,4,6,8,12")
    parser.add_argument("--episodes", type=int, default=20, help="of each task, way and delay")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    console, policy = Console(), sqap.load(options.policy)
    build = {"build": build_id(), "policy": options.policy, "environment": environments.describe("metaworld")}
    episodes: list[dict[str, Any]] = []
    if options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))
        if {key: found[key] for key in build} != build:
            parser.error(f"{options.json} is of another build, policy or simulator; name another file")
        episodes = found["episodes"]
    done = {(e["way"], e["delay"], e["task"], e["seed"]) for e in episodes}
    delays = list(map(int, options.delays.split(",")))
    for task in options.tasks.split(","):
        env = environments.make("metaworld", task)
        for seed in range(FIRST_SEED, FIRST_SEED + options.episodes):
            for delay in delays:
                for way in WAYS:
                    if (way.name, delay, task, seed) not in done:
                        episodes.append(episode(policy, env, way, delay, seed))
            found = {"rows": summarize(episodes), "pairs": compare(episodes), "episodes": episodes}
            write_json(options.json, build | found)
        env.close()
        console.print(f"{task}: done")
    rows = summarize(episodes)
    console.print(table(rows), pairs(compare(episodes)))
    if options.plot is not None:
        plot(rows, environments.action_units("metaworld").hz, options.plot)


if __name__ == "__main__":
    main()
