"""What an evaluation has found, in words for a policy's model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqap.checkpoints.card import code
from sqap.report import tables

if TYPE_CHECKING:  # only `sqap tune` needs what it imports
    from sqap.tune import Standing

Entry = tuple[str, str]  # a title and Markdown, for `sqap.checkpoints.card.add_measurement`


def paired_success(summary: Mapping[str, Any]) -> Entry:
    """A policy beside another one, in closed loop.

    Args:
        summary: as `sqap.evaluation.summarize` makes it, with a rival.
    """
    rival, tasks = summary["against"], summary["tasks"]
    episodes = sum(count["episodes"] for count in tasks.values())
    name = rival["policy"]
    if Path(name).expanduser().exists():  # where it was is nobody's business
        name = Path(name).name
    title = f"Success in {code(summary['env'])}, beside {code(name)}"
    ensemble = summary["ensemble"]
    averaged = "" if ensemble is None else f" Each action is the average of up to {ensemble} chunks."
    rows = (
        f"| {label} | {tables.percent(one['success'])} | {tables.interval(one['success_ci95'])} |"
        for label, one in (("this policy", summary), ("the other", rival))
    )
    table = "\n".join(("| | success | 95 % interval |", "|---|---|---|", *rows))
    return title, (
        f"{episodes} pairs of episodes with the same seeds and the same noise, {_tasks(tasks)}, each task "
        f"from seed {summary['seed']} on.{averaged}\n\n{table}\n\n{tables.paired_line(rival)}."
    )


def tuned(standing: Standing, max_drop: float | None, env: str, tasks: Sequence[str], seed: int) -> Entry:
    """What `sqap tune` has confirmed of a setting."""
    title = f"Success in {code(env)}, beside the original"
    allowed = "" if max_drop is None else f"; {max_drop:g} points were allowed"
    return title, (
        f"{tables.confirmed_line(standing, max_drop)}{allowed}. Run were {_tasks(tasks)}, each from seed "
        f"{seed} on."
    )


def _tasks(tasks: Mapping[str, Any] | Sequence[str]) -> str:
    return f"{len(tasks)} task{'s' * (len(tasks) > 1)} ({', '.join(map(code, tasks))})"
