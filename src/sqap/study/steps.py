"""Steps of a study's cells, timed in turns where nothing else runs: latencies that its episodes do not give.

Episodes run several at a time, cell after cell over hours, on a machine that may have other work. Latencies
of cells can be compared if each round takes one step of every cell.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import sqap
from sqap.build import build_and_processor
from sqap.checkpoints.choices import Choices
from sqap.errors import InputError
from sqap.evaluation.statistics import latency_percentiles
from sqap.files import write_json
from sqap.frames import collect_frames
from sqap.policy import Policy
from sqap.serialization import read_object
from sqap.study.request import REPLAY_SEED
from sqap.tune import step_times

FILE = "steps.json"


def load_cells(
    study: Mapping[str, Any], directory: Path, cells: Sequence[Mapping[str, Any]], choices: Choices | None
) -> list[Policy]:
    """The policies of cells of a study in a directory; ``choices`` says how a published original is read."""
    return [
        sqap.load(study["policy"]["source"], **vars(choices or Choices()))
        if cell["artefact"] is None
        else sqap.load(directory / cell["artefact"])
        for cell in cells
    ]


def time_steps(
    study: Mapping[str, Any],
    directory: Path,
    rounds: int,
    *,
    choices: Choices | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Time ``rounds`` steps of every cell in turns, and write ``steps.json`` (docs/ablate.md).

    All policies of the study are in memory meanwhile. The observation is the first of the study's replayed
    frames.

    Raises:
        SqapError: a policy cannot be loaded, or the file not written.
    """
    policies = load_cells(study, directory, study["cells"], choices)
    env, tasks = study["environment"]["name"], study["environment"]["tasks"]
    (observation,) = collect_frames(policies[0], env, tasks[:1], 1, seed=REPLAY_SEED)
    times = step_times(policies, observation, (rounds, rounds), progress)
    write_json(
        directory / FILE,
        {
            "steps": rounds,
            "threads": torch.get_num_threads(),
            "build": build_and_processor(),
            "cells": {
                cell["name"]: {
                    "fingerprint": cell["fingerprint"],
                    "step_latency_ms": latency_percentiles(own),
                }
                for cell, own in zip(study["cells"], times, strict=True)
            },
        },
    )


def with_steps(study: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The study with ``steps``, and its latencies from them, if its steps were timed; else ``steps`` is None.

    Raises:
        InputError: the steps are of other policies than the study's.
    """
    found: dict[str, Any] = copy.deepcopy(dict(study))
    steps = found["steps"] = read_object(directory / FILE, InputError) or None
    if steps is None:
        return found
    for cell in found["cells"]:
        own = steps["cells"].get(cell["name"])
        if own is None or own["fingerprint"] != cell["fingerprint"]:
            raise InputError(
                f"{directory / FILE} has no times of {cell['name']} as it is now; time them again with "
                f"`sqap report {directory} --steps {steps['steps']}`"
            )
        if cell["summary"] is not None:
            cell["summary"]["step_latency_ms"] = own["step_latency_ms"]
    return found
