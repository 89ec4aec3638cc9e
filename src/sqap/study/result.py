"""``study.json``: everything about a study as plain data. Its fields are documented in ``docs/ablate.md``."""

from __future__ import annotations

import dataclasses
import math
import shlex
import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sqap import environments
from sqap.checkpoints.choices import Choices
from sqap.errors import InputError
from sqap.evaluation.clusters import SEED as BOOTSTRAP_SEED
from sqap.evaluation.clusters import holm
from sqap.evaluation.settings import Settings
from sqap.evaluation.statistics import detectable, pairs_needed
from sqap.frames.simulator import CALIBRATION_SEED
from sqap.models.storage import stored_bytes
from sqap.observation import Observation, hash_frames
from sqap.policy import Policy
from sqap.study.contrasts import EFFECT, INTERACTION, cell_interactions, contrasts, estimate
from sqap.study.design import Cell, Design
from sqap.study.request import REPLAY_SEED, StudyRequest, machine
from sqap.study.summary import Records, compare_cell, success_by_task, summarize_cell

FORMAT, VERSION = "sqap-study", 1
ALPHA, POWER = 0.05, 0.8
CHANGES = (0.01, 0.03, 0.05, 0.1)  # of success, which power is told for
ASSUMED_DISCORDANCE = 0.2  # before any pair has run


@dataclass(frozen=True)
class Ran:
    """A cell and what has been run and measured of it.

    Args:
        cell: of the design.
        artefact: directory of the compressed policy, relative to the study's; None for the original itself.
        fingerprint: of the policy.
        log: of its episodes, relative to the study's directory.
        records: those of the design's episodes that have run.
        measures: ``replay``, ``attention`` and ``weight_bytes``.
    """

    cell: Cell
    artefact: str | None
    fingerprint: str
    log: str
    records: Records
    measures: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """What `describe` tells of.

    Args:
        request: what was asked.
        design: of the cells.
        policy: the original.
        fingerprint: of the original.
        settings: of the evaluation.
        frames: that policies were calibrated on.
        replay: that they were measured on.
        ran: all cells, in any order.
        estimate: what was shown before.
        notes: sentences on what was not used or left out.
    """

    request: StudyRequest
    design: Design
    policy: Policy
    fingerprint: str
    settings: Settings
    frames: Sequence[Observation]
    replay: Sequence[Observation]
    ran: Sequence[Ran]
    estimate: Mapping[str, Any]
    notes: Sequence[str] = ()


def describe(study: Study) -> dict[str, Any]:
    """All of ``study.json``."""
    request, design = study.request, study.design
    order = [cell.name for cell in design.cells]
    ran = {each.cell.name: each for each in sorted(study.ran, key=lambda each: order.index(each.cell.name))}
    complete = {name: each for name, each in ran.items() if len(each.records) == request.pairs}
    pairs = _pairs(ran, design.baseline, request.tasks)
    told, lost = _contrasts(complete, design, request.tasks)
    interactions = _cell_interactions(complete, design, request.tasks)
    cells = [_cell(each, study, pairs.get(name), interactions.get(name)) for name, each in ran.items()]
    return {
        "format": FORMAT,
        "version": VERSION,
        "complete": len(complete) == len(ran),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": request.command,
        "policy": _policy(study),
        "environment": {
            "name": request.env,
            "tasks": list(request.tasks),
            "simulator": study.settings.simulator,
        },
        "seeds": {
            "first": request.seed,
            "episodes": request.episodes,
            "calibration": CALIBRATION_SEED,
            "replay": REPLAY_SEED,
            "design": design.seed,
            "bootstrap": BOOTSTRAP_SEED,
        },
        "build": study.settings.build,
        "platform": machine(),
        "execution": {
            "executor": request.executor,
            "workers": request.workers,
            "threads": study.settings.threads,
            "processors": dict(
                Counter(record.processor for each in ran.values() for record in each.records.values())
            ),
        },
        "design": _design(design),
        "calibration": {
            "frames": len(study.frames),
            "source": request.frames_from,
            "frames_hash": hash_frames(study.frames),
        },
        "replay": {"frames": len(study.replay), "frames_hash": hash_frames(study.replay)},
        "cells": cells,
        "contrasts": told,
        "prediction": _prediction(complete),
        "power": power(pairs, request.pairs),
        "estimate": dict(study.estimate),
        "notes": [*study.notes, *lost],
    }


def power(pairs: Mapping[str, Mapping[str, Any]], count: int) -> dict[str, Any]:
    """How small a change so many pairs show, and how many pairs show a change.

    Args:
        pairs: cell -> its comparison with the baseline.
        count: pairs of each comparison.
    """
    shares = [(each["wins"] + each["losses"]) / each["episodes"] for each in pairs.values()]
    discordance = statistics.median(shares) if shares else ASSUMED_DISCORDANCE
    return {
        "alpha": ALPHA,
        "power": POWER,
        "discordance": discordance,
        "assumed": not shares,
        "pairs": count,
        "detectable": detectable(count, discordance, ALPHA, POWER),
        "pairs_needed": {
            str(change): pairs_needed(change, discordance, ALPHA, POWER) if change <= discordance else None
            for change in CHANGES
        },
    }


def _policy(study: Study) -> dict[str, Any]:
    config = study.policy.config
    return {
        "source": study.request.source,
        "fingerprint": study.fingerprint,
        "family": config.family,
        "cameras": list(config.cameras),
        "visual_tokens": config.model.visual_tokens,
        "decoder_layers": config.model.decoder.depth,
        "weight_bytes": stored_bytes(study.policy.model),
    }


def _design(design: Design) -> dict[str, Any]:
    plain = dataclasses.asdict(design)
    del plain["seed"]  # beside the others
    return plain | {"cells": len(design.cells)}


def _pairs(ran: Mapping[str, Ran], baseline: str, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Cell -> its comparison with the baseline, Holm's correction included."""
    found = {
        name: pair
        for name, each in ran.items()
        if name != baseline and (pair := compare_cell(each.records, ran[baseline].records, tasks)) is not None
    }
    corrected = holm([pair["mcnemar_p"] for pair in found.values()])
    return {
        name: pair | {"mcnemar_p_holm": p} for (name, pair), p in zip(found.items(), corrected, strict=True)
    }


def _contrasts(
    complete: Mapping[str, Ran], design: Design, tasks: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Contrasts of cells of which all episodes have run."""
    success = {name: success_by_task(each.records, tasks) for name, each in complete.items()}
    cells = [each.cell for each in complete.values()]
    if len(cells) < 2:
        return [], []
    found, lost = contrasts(cells, design.factors, fraction=design.fraction != "1/1")
    told = []
    for kind in (EFFECT, INTERACTION):
        alike = [contrast for contrast in found if contrast.kind == kind]
        numbers = estimate([contrast.weights for contrast in alike], success)
        told += [dataclasses.asdict(c) | n for c, n in zip(alike, numbers, strict=True)]
    return told, lost


def _cell_interactions(
    complete: Mapping[str, Ran], design: Design, tasks: Sequence[str]
) -> dict[str, dict[str, Any]]:
    if design.baseline not in complete:
        return {}
    success = {name: success_by_task(each.records, tasks) for name, each in complete.items()}
    cells = [each.cell for each in complete.values()]
    weights = cell_interactions(cells, complete[design.baseline].cell)
    return dict(zip(weights, estimate(list(weights.values()), success), strict=True))


def _cell(
    ran: Ran, study: Study, pair: dict[str, Any] | None, interaction: dict[str, Any] | None
) -> dict[str, Any]:
    cell, model = ran.cell, study.policy.config.model
    pruning = cell.recipe.pruning
    kept = model.grid**2 if pruning is None else pruning.budget(model.grid**2)
    recipe_file = None if ran.artefact is None else f"recipes/{cell.name}.json"
    return {
        "name": cell.name,
        "levels": cell.levels,
        "recipe": cell.recipe.to_json(),
        "fingerprint": ran.fingerprint,
        "artefact": ran.artefact,
        "recipe_file": recipe_file,
        "log": ran.log,
        "commands": _commands(cell, study.request, recipe_file),
        "weight_bytes": ran.measures["weight_bytes"],
        "visual_tokens": model.cameras * kept,
        "summary": summarize_cell(ran.records, study.request.tasks),
        "against_baseline": pair,
        "interaction": interaction,
        "replay": ran.measures["replay"],
        "attention": ran.measures["attention"],
    }


def _commands(cell: Cell, request: StudyRequest, recipe_file: str | None) -> list[str]:
    """What makes and runs a cell by itself, in the study's directory."""
    chosen = told_choices(request.choices)
    episodes = [*environments.command_options(request.env), "--tasks", ",".join(request.tasks)]
    episodes += ["--episodes", str(request.episodes)]
    episodes += ["--seed", str(request.seed), "--workers", str(request.workers)]
    if recipe_file is None:
        return [shlex.join(["sqap", "eval", request.source, *episodes, *chosen])]
    frames = ["--frames", str(request.frames), "--frames-from", request.frames_from]
    return [
        shlex.join(
            [
                "sqap",
                "compress",
                request.source,
                "--recipe",
                recipe_file,
                *frames,
                *chosen,
                "--out",
                cell.name,
            ]
        ),
        shlex.join(["sqap", "eval", cell.name, *episodes]),
    ]


def told_choices(choices: Choices) -> list[str]:
    """The options of the command line that choose how a published policy is read."""
    words: list[str] = []
    for name, value in vars(choices).items():
        if value == getattr(Choices(), name):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{name}")
        else:
            words += [option, ",".join(value) if isinstance(value, tuple) else str(value)]
    return words


def _prediction(complete: Mapping[str, Ran]) -> dict[str, Any] | None:
    """Rank correlation of the replayed action error with closed-loop success, over compressed cells."""
    errors, success = [], []
    for each in complete.values():
        if each.measures["replay"] is not None:
            errors.append(each.measures["replay"]["relative"])
            won = [record.episode.success for record in each.records.values()]
            success.append(sum(won) / len(won))
    if len(errors) < 3:
        return None
    rank = statistics_library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input, which gives nan
        pairs = {"spearman": rank.spearmanr(errors, success), "kendall": rank.kendalltau(errors, success)}
    return {"cells": len(errors)} | {
        name: None
        if math.isnan(found.statistic)
        else {"value": float(found.statistic), "p": float(found.pvalue)}
        for name, found in pairs.items()
    }


def statistics_library() -> Any:
    """SciPy's.

    Raises:
        InputError: it is not installed.
    """
    try:
        import scipy.stats
    except ImportError as problem:
        raise InputError(f'a study needs SciPy ({problem}); pip install "sqap[study]"') from problem
    return scipy.stats
