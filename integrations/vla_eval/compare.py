"""Evaluate policies by vla-eval on the same episodes, and compare each with the first:

    python compare.py ORIGINAL COMPRESSED --server configs/cogact_widowx.yaml \
        --benchmark configs/simpler_widowx.yaml --json results.json

Every policy is served from this process by `model_server.py`, one after the other, to the same benchmark: the
same tasks, the same initial states, and the same noise for the policy. Results are kept in the file, and the
same command goes on with the policies that are not in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vla_eval
import yaml
from model_server import SqapModelServer, load
from rich.console import Console
from rich.table import Table

from sqap import Policy
from sqap.errors import InputError, SqapError
from sqap.evaluation.statistics import mcnemar_exact, paired_difference, wilson
from sqap.files import write_json

EpisodeKey = tuple[str, str, int]  # benchmark, task, number
Outcomes = dict[EpisodeKey, bool]


def evaluate(
    policy: str, server: Mapping[str, Any], benchmark: Path, records: Path, **options: Any
) -> dict[str, Any]:
    """One policy's episodes, as the file of results has them.

    Args:
        policy: as of `SqapModelServer`.
        server: its other settings.
        benchmark: configuration of vla-eval.
        records: directory for what vla-eval itself writes.
        options: of `vla_eval.evaluate`.
    """
    model = SqapModelServer(**{**server, "policy": policy})
    directory = records / f"{Path(policy).name}-{(model.policy.fingerprint or 'unnamed')[:12]}"
    results = vla_eval.evaluate(model, benchmark, output_dir=directory, **options)
    episodes = [
        {
            "benchmark": result["benchmark"],
            "task": task["task"],
            "episode": episode["episode_id"],
            "success": bool(episode["metrics"].get("success")),
            "steps": episode.get("steps"),
            "error": episode.get("failure_reason"),
        }
        for result in results
        for task in result["tasks"]
        for episode in task["episodes"]
    ]
    found = {
        "policy": policy,
        "fingerprint": model.policy.fingerprint,
        "recipe": model.policy.recipe.to_json(),
        "harness": sorted({result["harness_version"] for result in results}),
        "episodes": episodes,
    }
    del model
    gc.collect()  # before the next policy's weights are read
    return found


def outcomes(run: Mapping[str, Any]) -> Outcomes:
    """Success by episode, without the episodes that ended in an error of the harness or the server."""
    return {
        (e["benchmark"], e["task"], e["episode"]): e["success"] for e in run["episodes"] if not e["error"]
    }


def compare(run: Mapping[str, Any], against: Mapping[str, Any]) -> dict[str, Any]:
    """Wins and losses of one policy against another on the episodes of both.

    Raises:
        InputError: they have no episode in common.
    """
    ours, theirs = outcomes(run), outcomes(against)
    shared = [episode for episode in ours if episode in theirs]
    if not shared:
        raise InputError(f"no episode was run to its end with both {run['policy']} and {against['policy']}")
    a, b = [ours[episode] for episode in shared], [theirs[episode] for episode in shared]
    wins = sum(x and not y for x, y in zip(a, b, strict=True))
    losses = sum(y and not x for x, y in zip(a, b, strict=True))
    difference, low, high = paired_difference(a, b)
    return {
        "policy": run["policy"],
        "against": against["policy"],
        "pairs": len(shared),
        "left_out": max(len(run["episodes"]), len(against["episodes"])) - len(shared),
        "wins": wins,
        "losses": losses,
        "difference": difference,
        "difference_ci95": [low, high],
        "mcnemar_p": mcnemar_exact(wins, losses),
    }


def table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Success of every policy in every task."""
    tasks = sorted({(e["benchmark"], e["task"]) for run in runs for e in run["episodes"]})
    shown = Table("benchmark", "task", *(run["policy"] for run in runs))
    for name, task in tasks:
        found = [[s for (b, t, _), s in outcomes(run).items() if (b, t) == (name, task)] for run in runs]
        shown.add_row(name, task, *map(_share, found))
    shown.add_section()
    shown.add_row("all", "", *(_share(list(outcomes(run).values())) for run in runs))
    return shown


def _share(successes: Sequence[bool]) -> str:
    if not successes:
        return "-"
    low, high = wilson(sum(successes), len(successes))
    return f"{sum(successes)}/{len(successes)} ({low:.0%} to {high:.0%})"


def sentence(pair: Mapping[str, Any]) -> str:
    """A comparison in words."""
    low, high = pair["difference_ci95"]
    told = (
        f"{pair['policy']} against {pair['against']}: {pair['wins']} wins, {pair['losses']} losses in "
        f"{pair['pairs']} episodes, {pair['difference']:+.1%} ({low:+.1%} to {high:+.1%}), "
        f"p = {pair['mcnemar_p']:.3f}"
    )
    return told + (f"; {pair['left_out']} episodes had errors and are left out" if pair["left_out"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policies", nargs="+", help="the original first")
    parser.add_argument("--server", type=Path, required=True, help="settings of the model server")
    parser.add_argument("--benchmark", type=Path, required=True, help="configuration of vla-eval")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--episodes", type=int, help="of each task; as the benchmark says if left out")
    parser.add_argument("--tasks", type=int, help="so many first tasks; all if left out")
    parser.add_argument("--steps", type=int, help="at most, of an episode; as the benchmark says if left out")
    parser.add_argument("--no-docker", action="store_true", help="the benchmark is installed here")
    options = parser.parse_args()
    console = Console()
    given = {
        "episodes_per_task": options.episodes,
        "max_tasks": options.tasks,
        "max_steps": options.steps,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    server, benchmark = (
        yaml.safe_load(path.read_text(encoding="utf-8")) for path in (options.server, options.benchmark)
    )
    server = server["args"]
    settings = {"server": server, "benchmark": benchmark, "overrides": overrides}
    runs = kept(options.json, settings)
    for policy in options.policies:
        if policy in runs:
            check_same(runs[policy], load(policy, server.get("choices") or {}))
        else:
            runs[policy] = evaluate(
                policy,
                server,
                options.benchmark,
                options.json.with_suffix(".records"),
                docker=False if options.no_docker else None,
                benchmark_overrides=overrides,
            )
        chosen = [runs[p] for p in options.policies if p in runs]
        pairs = [compare(run, chosen[0]) for run in chosen[1:]]
        write_json(options.json, settings | {"runs": list(runs.values()), "pairs": pairs})
    console.print(table(chosen))
    for pair in pairs:
        console.print(sentence(pair), soft_wrap=True)


def kept(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs that a file holds, by policy.

    Raises:
        InputError: it holds runs of other settings.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if {key: found.get(key) for key in settings} != settings:
        raise InputError(f"{path} is of another server, benchmark or number of episodes; name another file")
    return {run["policy"]: run for run in found["runs"]}


def check_same(run: Mapping[str, Any], policy: Policy) -> None:
    """Refuse a run of what was in a directory before.

    Raises:
        InputError: the directory holds another policy now.
    """
    if policy.fingerprint != run["fingerprint"]:
        raise InputError(f"{run['policy']} was another policy when it was evaluated; name another file")


if __name__ == "__main__":
    try:
        main()
    except SqapError as error:
        sys.exit(f"error: {error}")
