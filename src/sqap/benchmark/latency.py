"""Candidates side by side: each in a process of its own, in turns, so that noise meets all of them alike."""

from __future__ import annotations

import contextlib
import itertools
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sqap
from sqap.benchmark.candidates import Subject, check
from sqap.benchmark.device import REPLAYS
from sqap.benchmark.timing import Bench, Loaded, Timed
from sqap.errors import InputError, SqapError
from sqap.kernels import cpu, gpu
from sqap.models.storage import Progress
from sqap.process import Worker, available_cores

OURS = "sqap"
PERCENTILES = (50, 90, 99)
STEPS = 30
PAUSE_S = 0.05  # between turns: other tools' threads spin for a while after a step


@dataclass
class _Row:
    """What is known of one candidate; a ``reason`` is why there is no more."""

    loaded: Loaded | None = None
    steps: list[Timed] = field(default_factory=list)
    peak: int = 0
    stages: dict[str, float] | None = None  # on a GPU, where they are timed by themselves
    no_stages: str | None = None
    reason: str | None = None


def bench(
    subject: Subject,
    rivals: Sequence[str],
    *,
    steps: int | None = None,
    warmups: int = 5,
    threads: int | None = None,
    one_at_a_time: bool = False,
    environments: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the policy and its rivals, and compare them step by step. Interrupted, it reports what it has.

    Args:
        subject: what to time.
        rivals: names, as `sqap.benchmark.candidates.candidate` knows them.
        steps: how many are timed of each; by default 30, and `REPLAYS` on a GPU.
        warmups: how many come before and are not.
        threads: of each candidate; as many as there are cores if None.
        one_at_a_time: in memory. Candidates then take turns in thirds of their steps instead of step by step.
        environments: folder of virtual environments that other tools are imported from.
        progress: gets (steps done, steps in all).

    Raises:
        InputError: a rival is not known, or a number is not above zero.
        SqapError: the policy itself cannot be loaded.
    """
    check(subject, rivals)
    names = [OURS, *(name for name in dict.fromkeys(rivals) if name != OURS)]
    threads = threads or available_cores()
    if steps is None:
        steps = REPLAYS if subject.kind == "cuda" else STEPS
    for name, value in (("steps", steps), ("threads", threads)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    rows = {name: _Row() for name in names}
    rounds = min(3, steps) if one_at_a_time else 1
    groups = [[name] for name in names] if one_at_a_time else [names]
    shares = [len(part) for part in np.array_split(np.arange(steps), rounds)]
    total, done = len(names) * (rounds * warmups + steps), itertools.count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(done), total)

    with contextlib.suppress(KeyboardInterrupt):
        for share in shares:
            for group in groups:
                specs = {name: (subject, name, threads, environments) for name in group}
                workers = {name: Worker(name, Bench, spec) for name, spec in specs.items()}
                _take_turns(workers, rows, share, warmups, tick, staged=subject.kind == "cuda")
                if (reason := rows[OURS].reason) is not None:
                    raise SqapError(reason)
    return {
        "subject": subject.source,
        "layers": subject.layers,
        "recipe": subject.recipe.to_json(),
        "steps": steps,
        "warmups": warmups,
        "interleaved": "in thirds" if one_at_a_time else "step by step",
        "threads": threads,
        "device": subject.device,
        "machine": _machine(subject),
        "candidates": {name: _describe(row, rows, subject.kind) for name, row in rows.items()},
        "speedup_over": {
            name: _speedup(rows[OURS], row) for name, row in rows.items() if name != OURS and row.steps
        },
    }


def _take_turns(
    workers: Mapping[str, Worker],
    rows: Mapping[str, _Row],
    steps: int,
    warmups: int,
    tick: Callable[[], None],
    *,
    staged: bool,
) -> None:
    """Load the candidates, and let them step in turn; ``tick`` is called after each step.

    ``staged`` times their stages afterwards, once.
    """
    with contextlib.ExitStack() as stack:
        for worker in workers.values():
            stack.enter_context(contextlib.closing(worker))

        def ask(name: str, request: str) -> Any:
            """The answer, or None from then on if there is none: the candidate's row says why."""
            row = rows[name]
            if row.reason is not None:
                return None
            try:
                workers[name].request(request)
                return workers[name].receive()
            except (SqapError, RuntimeError) as problem:
                row.reason = _last_line(problem)
                return None

        for name in workers:
            rows[name].loaded = ask(name, "load") or rows[name].loaded
        if rows[OURS].reason is not None:
            return  # there is nothing to compare with
        for turn in range(warmups + steps):
            for name in workers:
                time.sleep(PAUSE_S)
                timed = ask(name, "step")
                if timed is not None and turn >= warmups:
                    rows[name].steps.append(timed)
                tick()
        for name in workers:
            rows[name].peak = max(rows[name].peak, ask(name, "peak") or 0)
            if staged and rows[name].stages is None and rows[name].reason is None:
                rows[name].stages, rows[name].no_stages = _time_stages(workers[name])


def _time_stages(worker: Worker) -> tuple[dict[str, float], str | None]:
    """The stages, or why there are none: their steps are timed already, and count."""
    try:
        worker.request("stages")
        return worker.receive(), None
    except (SqapError, RuntimeError) as problem:
        return {}, _last_line(problem)


def _last_line(problem: Exception) -> str:
    return str(problem).strip().splitlines()[-1]


def _describe(row: _Row, rows: dict[str, _Row], kind: str) -> dict[str, Any]:
    if row.reason is not None or row.loaded is None or not row.steps:
        return {"reason": row.reason or "interrupted before it was timed"}
    ms = [step.ms for step in row.steps]
    found: dict[str, Any] = percentiles(ms)
    if kind == "cuda":
        found["device_ms"] = percentiles(_on_device(row))
    exact = rows["torch-fp32"].loaded if "torch-fp32" in rows else None
    return found | {
        "min_ms": min(ms),
        "step_ms": [round(value, 3) for value in ms],
        "peak_device_bytes" if kind == "cuda" else "peak_rss_bytes": row.peak,
        "weight_bytes": row.loaded.weight_bytes,
        "load_s": row.loaded.load_s,
        "stages_ms": _stages(row, found),
        **({} if row.no_stages is None else {"no_stages": row.no_stages}),
        "difference_from_fp32": None if exact is None else _difference(row.loaded.chunk, exact.chunk),
    }


def percentiles(ms: Sequence[float]) -> dict[str, float]:
    """`PERCENTILES` of milliseconds, by their names in a report."""
    values = np.percentile(ms, PERCENTILES)
    return {f"p{q}_ms": float(value) for q, value in zip(PERCENTILES, values, strict=True)}


def _stages(row: _Row, found: dict[str, Any]) -> dict[str, float]:
    """Medians; on a GPU, also what is left of the step beside the device's work, and beside its stages."""
    if not row.stages:
        names = row.steps[0].stages_ms
        return {name: float(np.median([step.stages_ms[name] for step in row.steps])) for name in names}
    whole, called = found["device_ms"]["p50_ms"], found["p50_ms"]
    between = whole - sum(row.stages.values())
    return {"preprocess": called - whole, **row.stages, "between": between}


def _on_device(row: _Row) -> list[float]:
    return [step.device_ms for step in row.steps if step.device_ms is not None]


def _difference(chunk: np.ndarray, exact: np.ndarray) -> float:
    """Relative root-mean-square difference of two action chunks."""
    return float(np.linalg.norm(chunk - exact) / np.linalg.norm(exact))


def _speedup(ours: _Row, rival: _Row) -> dict[str, float]:
    """How many times as long the rival took, over pairs of steps that were taken in turn."""
    ratios = [theirs.ms / mine.ms for mine, theirs in zip(ours.steps, rival.steps, strict=False)]
    found = {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)}
    pairs = zip(_on_device(ours), _on_device(rival), strict=False)
    on_device = [theirs / mine for mine, theirs in pairs]
    return found | ({"device_median": float(np.median(on_device))} if on_device else {})


def _machine(subject: Subject) -> dict[str, Any]:
    cuda = subject.kind == "cuda"
    return {
        "processor": torch.cuda.get_device_name(subject.device) if cuda else cpu.describe()["processor"],
        "cores": available_cores(),
        "kernels": gpu.GpuBackend.name if cuda else cpu.chosen(),
        "system": platform.platform(),
        "versions": {
            "sqap": sqap.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
