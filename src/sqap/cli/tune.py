"""``sqap tune``."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import typer

import sqap
from sqap import environments
from sqap.build import build_id
from sqap.checkpoints import fingerprint
from sqap.checkpoints.card import add_measurement
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.place import check_place
from sqap.cli.options import (
    NONE,
    CameraOption,
    FramesFromOption,
    FramesOption,
    JsonOption,
    RecipeOption,
    SourceArgument,
    StateOption,
    calibration_frames,
    load_policy,
    read_recipe,
    with_choices,
    write_numbers,
)
from sqap.compress import reprune
from sqap.errors import InputError
from sqap.quantization import Partial
from sqap.recipe import Pruning
from sqap.report import tables
from sqap.report.evidence import tuned
from sqap.terminal import console, progress_bar, user_errors

DEVELOPMENT, CONFIRMATION = 500_000, 600_000  # first seeds, which no published number uses


@with_choices
def tune(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="Directory for the policy with the setting that is found.")],
    max_drop: Annotated[float, typer.Option(help="Points of success that may be lost.", min=0)] = 3.0,
    recipe: RecipeOption = "w4a8",
    env: Annotated[str, typer.Option(help="Simulator.")] = "metaworld",
    tasks: Annotated[str | None, typer.Option(help="Comma-separated; default: the env's usual.")] = None,
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
    """Find the cheapest pruning setting that loses no more than --max-drop points of success.

    Settings are compared in pairs on development seeds, and the one that is found is confirmed on others.
    The same command, interrupted, goes on where it was.
    """
    with user_errors():
        from sqap.tune import candidates, compare, halve

        place = check_place(out)
        chosen = tuple(tasks.split(",")) if tasks else environments.default_tasks(env)
        environments.check_tasks(env, chosen)
        quantization = dataclasses.replace(read_recipe(recipe, None), pruning=None)
        with Partial(place.with_name(f".{place.name}.partial")) as partial:
            policy = load_policy(source, choices)
            observations = calibration_frames(policy, frames_from, frames, camera, state)
            with progress_bar("quantizing", percent=True) as advance:
                small = sqap.compress(policy, quantization, observations, progress=advance, resume=partial)
            model, saved = policy.config.model, _Saved(work / build_id()["package"][:8], env, chosen, workers)

            @functools.cache  # a setting is calibrated once, however many rungs it runs in
            def pruned(pruning: Pruning | None) -> sqap.Policy:
                return reprune(policy, small, pruning, observations)

            def play(pruning: Pruning | None, episodes: int, seed: int) -> dict[tuple[str, int], bool]:
                return saved.play(pruned(pruning), episodes, seed)

            standings: list[Any] = []
            for standings in halve(
                candidates(model.decoder, model.grid**2),
                model.decoder,
                play,
                max_drop=max_drop / 100,
                seed=DEVELOPMENT,
            ):
                console.print(tables.standings_table(standings))
            good = [standing for standing in standings if standing.difference >= -max_drop / 100]
            if not good:
                raise InputError(
                    f"no setting loses {max_drop:g} points or less; nothing was written to {out}"
                )
            best = good[0]
            confirmed = compare(
                best.pruning,
                model.decoder,
                play(best.pruning, confirm, CONFIRMATION),
                play(None, confirm, CONFIRMATION),
            )
            pruned(best.pruning).save(out)
            add_measurement(out, *tuned(confirmed, max_drop, env, chosen, CONFIRMATION))
            partial.remove()
        console.print(tables.confirmed_line(confirmed, max_drop), soft_wrap=True)
        console.print(f"The policy is in {out}, episodes are in {saved.place}", soft_wrap=True)
        write_numbers(
            json_path,
            {
                "source": source,
                "out": str(out),
                "max_drop": max_drop,
                "seeds": {"development": DEVELOPMENT, "confirmation": CONFIRMATION},
                "standings": [dataclasses.asdict(standing) for standing in standings],
                "confirmed": dataclasses.asdict(confirmed),
            },
        )


class _Saved:
    """Policies and episodes on disk, so that nothing is run twice."""

    def __init__(self, place: Path, env: str, tasks: tuple[str, ...], workers: int) -> None:
        self.place, self._env, self._tasks, self._workers = place, env, tasks, workers

    def play(self, policy: sqap.Policy, episodes: int, seed: int) -> dict[tuple[str, int], bool]:
        """Success by task and seed."""
        from sqap.evaluation import executors
        from sqap.evaluation.log import log_name
        from sqap.evaluation.settings import current_settings

        directory = self.place / "policy"
        policy.save(directory)
        mark = fingerprint(directory)
        settings = current_settings(self._env, workers=self._workers)
        with progress_bar("episodes") as advance:
            (run,) = executors.evaluate(
                [directory],
                self._env,
                self._tasks,
                episodes,
                seed,
                fingerprints=[mark],
                log=self.place / log_name(settings, [mark]),
                workers=self._workers,
                progress=lambda _, done, total: advance(done, total),
            )
        return {(r.episode.task, r.episode.seed): r.episode.success for r in run.records}
