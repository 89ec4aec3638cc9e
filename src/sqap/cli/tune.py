"""``sqap tune``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import sqap
from sqap import environments
from sqap import tune as search
from sqap.build import build_id
from sqap.checkpoints import fingerprint, locate
from sqap.checkpoints.card import add_measurement
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.place import check_place
from sqap.cli.options import (
    NONE,
    CameraOption,
    EnvOption,
    FramesFromOption,
    FramesOption,
    JsonOption,
    SourceArgument,
    StateOption,
    TasksOption,
    calibration_frames,
    choices_of_each,
    chosen_tasks,
    load_policy,
    read_recipe,
    with_choices,
    write_numbers,
)
from sqap.compress import Repruner
from sqap.errors import InputError
from sqap.models.storage import stored_bytes
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.quantization import Partial
from sqap.recipe import Recipe
from sqap.report import tables
from sqap.report.evidence import tuned
from sqap.terminal import console, messages, progress_bar, user_errors
from sqap.tune import Cost, CostLimits, Setting, candidates, compare, cost_of

DEVELOPMENT, CONFIRMATION = 500_000, 600_000  # first seeds, which no published number uses
DROP = 3.0  # points, where no limit is given


@with_choices
def tune(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="Directory for the policy with the setting that is found.")],
    max_drop: Annotated[
        float | None, typer.Option(help="Points of success that may be lost; 3 where no limit is given.")
    ] = None,
    max_latency: Annotated[float | None, typer.Option(help="Milliseconds of a step on this machine.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Bytes of the weights.")] = None,
    recipe: Annotated[
        str, typer.Option(help="Recipes to quantize by, comma-separated: presets or files.")
    ] = "w4a8,w8a8",
    env: EnvOption = "metaworld",
    tasks: TasksOption = None,
    confirm: Annotated[int, typer.Option(help="Episodes per task that confirm it.", min=1)] = 20,
    workers: Annotated[int, typer.Option(help="Episodes at a time.", min=1)] = 1,
    work: Annotated[Path, typer.Option(help="Directory for episode logs and policies.")] = Path("runs/tune"),
    frames: FramesOption = 48,
    frames_from: FramesFromOption = "metaworld",
    camera: CameraOption = None,
    state: StateOption = None,
    choices: Choices = NONE,
    json_path: JsonOption = None,
) -> None:
    """Find the recipe and the pruning that suit your limits best, and confirm them on other seeds.

    With --max-drop it is the fastest setting that loses no more success beside the original; else the one of
    most success within --max-latency and --max-bytes. Settings are compared in pairs on development seeds.
    The same command, interrupted, goes on where it was.
    """
    with user_errors():
        if max_drop is None and max_latency is None and max_bytes is None:
            max_drop = DROP
        limits = CostLimits(None if max_drop is None else max_drop / 100, max_latency, max_bytes)
        place = check_place(out)
        chosen = chosen_tasks(env, tasks)
        environments.check_tasks(env, chosen)
        recipes = _recipes(recipe)
        with contextlib.ExitStack() as stack:
            partials = [
                stack.enter_context(Partial(place.with_name(f".{place.name}.{i}.partial")))
                for i in range(len(recipes))
            ]
            policy = load_policy(source, choices)
            observations = calibration_frames(policy, frames_from, frames, camera, state)
            policies = _compressed(policy, recipes, observations, partials, limits.weight_bytes)
            costs = _measured(policies, observations[0], limits)
            saved = _Saved(work / build_id()["package"][:8], env, chosen, workers, source, choices)

            def play(setting: Setting | None, episodes: int, seed: int) -> dict[tuple[str, int], bool]:
                return saved.play(None if setting is None else policies[setting], episodes, seed)

            standings: list[Any] = []
            for standings in search.halve(costs, play, max_drop=limits.drop, seed=DEVELOPMENT):
                console.print(tables.standings_table(standings))
            if limits.drop is not None:
                standings = [standing for standing in standings if standing.difference >= -limits.drop]
            if not standings:
                raise InputError(
                    f"no setting loses {max_drop:g} points or less; nothing was written to {out}"
                )
            best = standings[0].setting
            confirmed = compare(
                best, costs[best], play(best, confirm, CONFIRMATION), play(None, confirm, CONFIRMATION)
            )
            policies[best].save(out)
            add_measurement(out, *tuned(confirmed, max_drop, env, chosen, CONFIRMATION))
            for partial in partials:
                partial.remove()
        console.print(tables.confirmed_line(confirmed, max_drop), soft_wrap=True)
        console.print(f"The policy is in {out}, episodes are in {saved.place}", soft_wrap=True)
        write_numbers(
            json_path,
            {
                "source": source,
                "out": str(out),
                "limits": {"drop": max_drop, "latency_ms": max_latency, "weight_bytes": max_bytes},
                "seeds": {"development": DEVELOPMENT, "confirmation": CONFIRMATION},
                "standings": [dataclasses.asdict(standing) for standing in standings],
                "confirmed": dataclasses.asdict(confirmed),
            },
        )


def _recipes(names: str) -> dict[str, Recipe]:
    """The recipes that ``--recipe`` names, their pruning left out: that is what is looked for."""
    listed = names.split(",")
    if len(set(listed)) < len(listed):
        raise InputError(f"--recipe {names} names one recipe twice")
    return {name: dataclasses.replace(read_recipe(name, None), pruning=None) for name in listed}


def _compressed(
    policy: Policy,
    recipes: Mapping[str, Recipe],
    frames: Sequence[Observation],
    partials: Sequence[Partial],
    most_bytes: int | None,
) -> dict[Setting, Policy]:
    """The policy quantized by each recipe and pruned by each candidate.

    A recipe of more than ``most_bytes`` is not pruned.
    """
    model, found = policy.config.model, dict[Setting, Policy]()
    prunings = candidates(model.decoder, model.grid**2)
    for (name, recipe), partial in zip(recipes.items(), partials, strict=True):
        with progress_bar(f"quantizing by {name}", percent=True) as advance:
            small = sqap.compress(policy, recipe, frames, progress=advance, resume=partial)
        if most_bytes is not None and stored_bytes(small.model) > most_bytes:
            messages.print(f"{name} takes {stored_bytes(small.model)} bytes: no pruning of it is tried")
            found[Setting(name, None)] = small
            continue
        repruner = Repruner(policy, small, frames)
        with progress_bar("calibrating pruners") as advance:
            for done, pruning in enumerate(prunings, start=1):
                found[Setting(name, pruning)] = repruner.prune(pruning)
                advance(done, len(prunings))
    return found


def _measured(
    policies: Mapping[Setting, Policy], observation: Observation, limits: CostLimits
) -> dict[Setting, Cost]:
    """What the settings cost that are within the limits; how many are not is said."""
    messages.print(f"timing steps of {len(policies)} settings in turns")
    times = search.step_times(list(policies.values()), observation)
    costs = {
        setting: cost_of(own, stored_bytes(policy.model))
        for (setting, policy), own in zip(policies.items(), times, strict=True)
    }
    left = limits.within(costs)
    if len(left) < len(costs):
        messages.print(f"{len(costs) - len(left)} of {len(costs)} settings are beyond the limits")
    return left


class _Saved:
    """Policies and episodes on disk, so that nothing is run twice."""

    def __init__(
        self, place: Path, env: str, tasks: tuple[str, ...], workers: int, source: str, choices: Choices
    ) -> None:
        self.place, self._env, self._tasks, self._workers = place, env, tasks, workers
        directory = locate(source)
        self._choices = choices_of_each([directory], choices)
        with progress_bar("reading weights", percent=True) as advance:
            self._original = source, fingerprint(directory, self._choices[0], advance)

    def play(self, policy: Policy | None, episodes: int, seed: int) -> dict[tuple[str, int], bool]:
        """Success by task and seed; None is the original."""
        from sqap.evaluation import executors
        from sqap.evaluation.log import log_name
        from sqap.evaluation.settings import current_settings

        named: str | Path
        if policy is None:
            (named, mark), choices = self._original, self._choices
        else:
            named, choices = self.place / "policy", [NONE]
            policy.save(named)
            mark = fingerprint(named)
        settings = current_settings(self._env, workers=self._workers, choices=choices)
        with progress_bar("episodes") as advance:
            (run,) = executors.evaluate(
                [named],
                self._env,
                self._tasks,
                episodes,
                seed,
                fingerprints=[mark],
                choices=choices,
                log=self.place / log_name(settings, [mark]),
                workers=self._workers,
                progress=lambda _, done, total: advance(done, total),
            )
        return {(r.episode.task, r.episode.seed): r.episode.success for r in run.records}
