"""``sqap capacity``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqap.checkpoints.choices import Choices
from sqap.cli.options import NONE, SOURCE, JsonOption, load_policy, load_weights, with_choices, write_numbers
from sqap.errors import InputError
from sqap.process import keep_freed_memory
from sqap.report import tables
from sqap.terminal import console, messages, progress_bar, user_errors

if TYPE_CHECKING:  # it needs an extra
    from sqap.capacity import StepTimes


@with_choices
def capacity(
    robots: Annotated[int, typer.Option(help="Robots of all replicas together.", min=1)],
    rate_hz: Annotated[float, typer.Option(help="Observations a second of one robot.")],
    p99_ms: Annotated[float, typer.Option(help="What 99 of 100 answers may take.")],
    source: Annotated[str | None, SOURCE] = None,
    latency: Annotated[
        Path | None, typer.Option(help="Step times from this command's or sqap bench's --json, for a policy.")
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Steps that are timed for 1, 2, 4, 8 and 16 robots.", min=1)
    ] = 30,
    threads: Annotated[
        int | None, typer.Option(help="Threads of these; all cores if not given.", min=1)
    ] = None,
    batch: Annotated[int, typer.Option(help="Robots that a step is computed for at once.", min=1)] = 16,
    deadline_ms: Annotated[
        float | None, typer.Option(help="Observations that wait longer than this are dropped.")
    ] = None,
    network_ms: Annotated[float, typer.Option(help="From a robot to the server and back.")] = 0.0,
    open_loop: Annotated[
        bool, typer.Option("--open-loop", help="Robots keep their rate while they wait for an answer.")
    ] = False,
    poisson: Annotated[
        bool, typer.Option("--poisson", help="Observations come at random times, not in equal periods.")
    ] = False,
    max_replicas: Annotated[
        int | None, typer.Option(help="Replicas that are tried; as many as robots if not given.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the simulation.", min=0)] = 0,
    choices: Choices = NONE,
    json_path: JsonOption = None,
) -> None:
    """Simulate robots and servers, and say how many replicas hold a latency.

    A replica is a machine like the one on which the steps were timed.
    """
    with user_errors():
        try:
            from sqap.capacity import Load, plan, read_times
            from sqap.serving.settings import Limits
        except ModuleNotFoundError as error:
            raise InputError(f'simulating servers needs {error.name}; pip install "sqap[serve]"') from error

        if (source is None) == (latency is None):
            raise InputError("name a policy to time, or a file with step times by --latency; one of the two")
        if latency is not None and (choices != NONE or threads is not None):
            raise InputError("--latency has step times: how a policy is read and timed is no choice there")
        deadline = None if deadline_ms is None else deadline_ms / 1e3
        load = Load(robots, rate_hz, poisson, not open_loop, network_ms / 1e3, deadline)
        if not p99_ms > 0:
            raise InputError(f"--p99-ms must be positive, got {p99_ms}")
        if latency is None:
            times = _measure(str(source), choices, steps, threads)
        else:
            times, note = read_times(latency)
            if note is not None:
                messages.print(note, soft_wrap=True)
        with progress_bar("replications") as advance:
            found = plan(
                load, times, Limits(batch=batch), p99_ms / 1e3, most=max_replicas, seed=seed, progress=advance
            )
        console.print(tables.capacity_table(found))
        console.print(_sentence(found["replicas"], p99_ms, found["rows"][-1]["replicas"]), soft_wrap=True)
        write_numbers(json_path, found)


def _measure(source: str, choices: Choices, steps: int, threads: int | None) -> StepTimes:
    from sqap.capacity import measure

    keep_freed_memory()  # as the server does
    policy = load_policy(source, choices)
    load_weights(policy)
    with progress_bar("steps") as advance:
        return measure(policy, rounds=steps, threads=threads, progress=advance)


def _sentence(replicas: int | None, p99_ms: float, most: int) -> str:
    if replicas is None:
        return f"{most} replicas do not hold a p99 of {p99_ms:g} ms"
    return f"{replicas} {'replica holds' if replicas == 1 else 'replicas hold'} a p99 of {p99_ms:g} ms"
