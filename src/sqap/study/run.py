"""From a design to a finished study: compress, measure, run the episodes, and write down what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqap import environments
from sqap.checkpoints import fingerprint, locate
from sqap.checkpoints.choices import Choices
from sqap.errors import SqapError
from sqap.evaluation import executors
from sqap.evaluation.log import EpisodeLog, Record
from sqap.evaluation.settings import Settings
from sqap.files import locked, write_json
from sqap.frames import collect_frames, read_frames
from sqap.models.storage import stored_bytes
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.recipe import Recipe
from sqap.study.artefacts import Artefacts
from sqap.study.design import Cell, Design
from sqap.study.measures import Measures
from sqap.study.request import REPLAY_FRAMES, REPLAY_SEED, StudyRequest, executor
from sqap.study.result import Ran, Study, describe
from sqap.study.summary import Records

RESULT = "study.json"

ProgressBar = Callable[..., AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Prepared:
    """A cell whose policy is on disk.

    Args:
        cell: of the design.
        policy: what `sqap.load` takes.
        artefact: directory of a compressed policy; None for the original itself.
        fingerprint: of the policy.
        log: of its episodes.
    """

    cell: Cell
    policy: str | Path
    artefact: Path | None
    fingerprint: str
    log: Path


def run_study(
    request: StudyRequest, design: Design, policy: Policy, estimate: dict[str, Any], progress: ProgressBar
) -> dict[str, Any]:
    """Run what is missing of a study, and write ``study.json``, also if an error or Ctrl-C ends this.

    Args:
        request: what is asked.
        design: for the policy.
        policy: the original.
        estimate: what was shown before, for the record.
        progress: shows how far it is.

    Returns:
        What was written.

    Raises:
        InputError: another process has the directory, or it cannot be written.
        SqapError: whatever compressing or loading a policy refuses.
    """
    refusal = f"another process runs a study in {request.out}; wait until it has ended, or name another --out"
    with locked(request.out / "study.lock", refusal):
        with progress("calibration frames") as advance:
            frames = read_frames(request.frames_from, policy, request.frames, progress=advance)
        replay = collect_frames(policy, request.env, request.tasks, REPLAY_FRAMES, seed=REPLAY_SEED)
        settings = request.settings()
        original = fingerprint(locate(request.source), request.choices)
        artefacts = Artefacts(policy, frames, request.out / "policies")
        prepared = list(_prepare(request, design, artefacts, original, settings, progress))
        measures = _measure(policy, replay, prepared, request.out, progress)

        def result() -> dict[str, Any]:
            ran = [_ran(each, measures[each.cell.name], settings, request) for each in prepared]
            notes = environments.unmeasured(request.env) + _unused(request.out, prepared)
            study = Study(request, design, policy, original, settings, frames, replay, ran, estimate, notes)
            return describe(study)

        with _written_anyway(request.out / RESULT, result):
            _run_episodes(request, prepared, progress)
        found = result()
        write_json(request.out / RESULT, found)
        return found


@contextmanager
def _written_anyway(path: Path, result: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Write what there is, where the work behind it is not finished; the error goes on."""
    try:
        yield
    except (SqapError, KeyboardInterrupt):
        with suppress(SqapError):  # as on a full disk, which the first error says
            write_json(path, result())
        raise


def _prepare(
    request: StudyRequest,
    design: Design,
    artefacts: Artefacts,
    original: str,
    settings: Settings,
    progress: ProgressBar,
) -> Iterator[Prepared]:
    """Compress what is not on disk, quantization by quantization."""
    cells = sorted(design.cells, key=lambda cell: _order(design, cell))
    for number, cell in enumerate(cells, 1):
        source: str | Path = request.source
        directory: Path | None = None
        mark = original
        if cell.recipe != Recipe():
            write_json(request.out / "recipes" / f"{cell.name}.json", cell.recipe.to_json())
            directory = source = artefacts.path(cell.recipe)
            if artefacts.missing(cell.recipe):
                with progress(f"compressing {cell.name} ({number} of {len(cells)})", percent=True) as advance:
                    artefacts.make(cell.recipe, advance)
            mark = fingerprint(directory)
        log = request.out / "episodes" / f"{cell.name}-{mark[:12]}-{settings.mark}.jsonl"
        yield Prepared(cell, source, directory, mark, log)


def _order(design: Design, cell: Cell) -> tuple[int, int]:
    """Cells that are quantized alike follow each other; among them those of the design's order."""
    first = next(i for i, c in enumerate(design.cells) if c.recipe.quantization == cell.recipe.quantization)
    return first, design.cells.index(cell)


def _measure(
    policy: Policy,
    replay: Sequence[Observation],
    prepared: Sequence[Prepared],
    out: Path,
    progress: ProgressBar,
) -> dict[str, dict[str, Any]]:
    """Cell -> its measures on replayed frames."""
    measures = Measures(policy, replay, out / "measures")
    found: dict[str, dict[str, Any]] = {}
    with progress("replayed frames") as advance:
        for number, each in enumerate(prepared, 1):
            if each.artefact is None:
                own = {"replay": None, "attention": None, "weight_bytes": stored_bytes(policy.model)}
                found[each.cell.name] = own
            else:
                found[each.cell.name] = measures.measure(each.artefact, each.fingerprint)
            advance(number, len(prepared))
    return found


def _run_episodes(request: StudyRequest, prepared: Sequence[Prepared], progress: ProgressBar) -> None:
    total = request.pairs * len(prepared)
    with executor(request) as where, progress("episodes") as advance:
        for number, each in enumerate(prepared):
            before = number * request.pairs

            def count(_: Record, done: int, __: int, before: int = before) -> None:
                advance(before + done, total)

            executors.evaluate(
                [each.policy],
                request.env,
                request.tasks,
                request.episodes,
                request.seed,
                fingerprints=[each.fingerprint],
                choices=[request.choices if each.artefact is None else Choices()],
                log=each.log,
                workers=request.workers,
                progress=count,
                executor=where,
                keep_going=True,
            )
            advance(before + request.pairs, total)


def _ran(prepared: Prepared, measures: dict[str, Any], settings: Settings, request: StudyRequest) -> Ran:
    """A cell with those of its episodes that are in the log."""
    records: Records = {}
    if prepared.log.exists():
        with EpisodeLog(prepared.log, settings, [prepared.fingerprint]) as log:
            asked = {(task, request.seed + e) for task in request.tasks for e in range(request.episodes)}
            records = {key[1:]: record for key, record in log.finished.items() if key[1:] in asked}
    artefact = None if prepared.artefact is None else str(prepared.artefact.relative_to(request.out))
    where = str(prepared.log.relative_to(request.out))
    return Ran(prepared.cell, artefact, prepared.fingerprint, where, records, measures)


def _unused(out: Path, prepared: Sequence[Prepared]) -> list[str]:
    """A sentence on logs that are in the directory and not in the result."""
    used = {each.log for each in prepared}
    others = [path.name for path in sorted(out.glob("episodes/*.jsonl")) if path not in used]
    if not others:
        return []
    return [
        "not used, as they are of other cells, settings, builds, simulators or processors: "
        f"{len(others)} logs, as {others[0]}"
    ]
