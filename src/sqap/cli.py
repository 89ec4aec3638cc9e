"""The ``sqap`` command line: thin, over the same functions that the library offers."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler

import sqap
from sqap import environments, kernels
from sqap.checkpoints import fingerprint, locate
from sqap.errors import InputError
from sqap.files import write_json
from sqap.models.storage import stored_bytes
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.quantization import count_parameters, list_linears
from sqap.recipe import Recipe
from sqap.report import tables
from sqap.terminal import console, progress_bar, user_errors

app = typer.Typer(
    help="Make vision-language-action policies small and fast, and show that they still work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PRESETS = {"w4a8": Recipe.w4a8, "w4a4": Recipe.w4a4}

SOURCE = typer.Argument(help="Directory of a policy, org/name on the hub, or a bundled one's name.")
SourceArgument = Annotated[str, SOURCE]
UnnormKeyOption = Annotated[
    str | None, typer.Option(help="Data set whose statistics turn actions into robot units.")
]
CamerasOption = Annotated[
    str | None, typer.Option(help="Names for the images that are read, comma-separated, in order.")
]
TokenizerOption = Annotated[
    Path | None, typer.Option(help="tokenizer.json, where it is not beside the weights.")
]
CropOption = Annotated[
    float | None, typer.Option(help="Share of an image's area to look at, from its centre.")
]
RecipeOption = Annotated[str, typer.Option(help="w4a8, w4a4, paper, or a recipe file.")]
KeepOption = Annotated[float | None, typer.Option(help="Share of visual tokens kept, in (0, 1].")]
FramesOption = Annotated[int, typer.Option(help="Calibration frames.", min=1)]
FramesFromOption = Annotated[
    str, typer.Option(help="Where they come from: a simulator, a directory of images, a LeRobotDataset.")
]
CameraOption = Annotated[
    list[str] | None, typer.Option(help="POLICY_CAMERA=DATASET_KEY, for a LeRobotDataset; repeatable.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Write the numbers to PATH.", dir_okay=False)
]


@app.callback()
def _settings() -> None:
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])


@app.command()
def compress(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    recipe: RecipeOption = "w4a8",
    keep: KeepOption = None,
    target_bytes: Annotated[
        int | None,
        typer.Option(help="Spend up to this many bytes on the blocks that 4 bits hurt most.", min=1),
    ] = None,
    target_error: Annotated[
        float | None, typer.Option(help="Spare blocks until the replayed action error, in mm, is below.")
    ] = None,
    frames: FramesOption = 48,
    frames_from: FramesFromOption = "metaworld",
    camera: CameraOption = None,
    unnorm_key: UnnormKeyOption = None,
    cameras: CamerasOption = None,
    tokenizer: TokenizerOption = None,
    crop: CropOption = None,
    json_path: JsonOption = None,
) -> None:
    """Quantize a policy and prune its visual tokens."""
    with user_errors():
        settings = _recipe(recipe, keep)
        policy = _load(source, unnorm_key, cameras, tokenizer, crop)
        observations = _frames(policy, frames_from, frames, camera)
        if target_bytes is not None or target_error is not None:
            settings = _fitted(policy, settings, observations, target_bytes, target_error)
        with progress_bar("quantizing", percent=True) as advance:
            partial = out.with_name(f".{out.name}.partial")
            small = sqap.compress(policy, settings, observations, progress=advance, resume=partial)
        small.save(out)
        before, after = stored_bytes(policy.model), stored_bytes(small.model)
        console.print(
            f"Weights: {tables.size(before)} in {source}, {tables.size(after)} in {out} "
            f"({tables.percent(after / before)})"
        )
        calibration = small.calibration
        if calibration is not None and calibration.top_k is not None and calibration.overlap is not None:
            console.print(
                f"The attention ranking is trusted with {calibration.top_k} tokens: "
                f"quantized and full precision agree on {tables.percent(calibration.overlap)} of them"
            )
        _write_json(
            json_path,
            {
                "source": source,
                "out": str(out),
                "recipe": settings.to_json(),
                "calibration": calibration and dataclasses.asdict(calibration),
                "weight_bytes": {"before": before, "after": after},
            },
        )


@app.command()
def sensitivity(
    source: SourceArgument,
    recipe: RecipeOption = "w4a8",
    keep: KeepOption = None,
    frames: FramesOption = 24,
    frames_from: FramesFromOption = "metaworld",
    camera: CameraOption = None,
    unnorm_key: UnnormKeyOption = None,
    cameras: CamerasOption = None,
    tokenizer: TokenizerOption = None,
    crop: CropOption = None,
    json_path: JsonOption = None,
) -> None:
    """Replay observations through the policy quantized in many ways: which settings and blocks hurt."""
    with user_errors():
        from sqap.sensitivity import Replay, block_sensitivity, compare_options

        settings = _recipe(recipe, keep)
        if settings.quantization is None:
            raise InputError(f"recipe {recipe} quantizes nothing, so there is nothing to measure")
        policy = _load(source, unnorm_key, cameras, tokenizer, crop)
        replay = Replay(policy, _frames(policy, frames_from, frames, camera), settings.pruning)
        with progress_bar("options") as advance:
            options = compare_options(replay, settings.quantization, advance)
        console.print(tables.options_table("The quantizer, one ingredient at a time", options))
        with progress_bar("blocks") as advance:
            blocks = block_sensitivity(replay, settings.quantization, advance)
        console.print(tables.options_table("One block quantized at a time", blocks))
        _write_json(
            json_path,
            {
                "source": source,
                "recipe": settings.to_json(),
                "frames": frames,
                "weight_bytes": stored_bytes(policy.model),
                "options": [dataclasses.asdict(option) for option in options],
                "blocks": [dataclasses.asdict(block) for block in blocks],
            },
        )


@app.command("eval")
def evaluate_command(
    policy: Annotated[str, typer.Argument(help="Directory of a policy, or 'reference'.")],
    env: Annotated[str, typer.Option(help="Simulator.")] = "metaworld",
    tasks: Annotated[str | None, typer.Option(help="Comma-separated; default: the env's usual.")] = None,
    episodes: Annotated[int, typer.Option(help="Episodes per task.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of each task's first episode.", min=0)] = 1_000_000,
    against: Annotated[str | None, typer.Option(help="Policy to compare with, in pairs.")] = None,
    ensemble: Annotated[int | None, typer.Option(help="Look every step, average so many chunks.")] = None,
    video: Annotated[Path | None, typer.Option(help="Directory for one video per task.")] = None,
    log: Annotated[Path | None, typer.Option(help="Episode log; an interrupted run resumes from it.")] = None,
    workers: Annotated[int, typer.Option(help="Episodes at a time; read latency at 1.", min=1)] = 1,
    json_path: JsonOption = None,
) -> None:
    """Run a policy in closed loop and report success with intervals, latency and memory."""
    with user_errors():
        from sqap.evaluation.executors import evaluate
        from sqap.evaluation.summary import summarize

        if ensemble is not None and video is not None:
            raise InputError("videos show whole chunks executed; leave out --video or --ensemble")
        chosen = tuple(tasks.split(",")) if tasks else environments.default_tasks(env)
        policies = [policy] if against is None else [policy, against]
        fingerprints = [fingerprint(locate(p)) for p in policies]
        log = log or _default_log(fingerprints, env, workers, ensemble)
        with progress_bar("episodes") as advance:
            runs = evaluate(
                policies,
                env,
                chosen,
                episodes,
                seed,
                fingerprints=fingerprints,
                ensemble=ensemble,
                log=log,
                workers=workers,
                progress=lambda _, done, total: advance(done, total),
            )
        summary = summarize(*runs)
        shown = [(policy, summary)] + ([(against, summary["against"])] if against else [])
        console.print(tables.success_table(shown), tables.cost_table(shown))
        if against is not None:
            console.print(tables.paired_line(summary["against"]), soft_wrap=True)
        console.print(f"Episodes are in {log}")
        if video is not None:
            from sqap.report.comparison import record_comparison
            from sqap.report.video import write_video

            with progress_bar("videos") as advance:
                columns = record_comparison([sqap.load(p) for p in policies], env, chosen, seed, advance)
            for i, task in enumerate(chosen):
                write_video(video / f"{task}.mp4", [[clips[i]] for clips in columns])
            console.print(f"Videos are in {video}")
        _write_json(json_path, summary)


@app.command()
def inspect(
    source: Annotated[str | None, SOURCE] = None,
    linears: Annotated[bool, typer.Option(help="List every linear.")] = False,
    cpu: Annotated[bool, typer.Option(help="Show which kernels run on this processor.")] = False,
    unnorm_key: UnnormKeyOption = None,
    cameras: CamerasOption = None,
    tokenizer: TokenizerOption = None,
    crop: CropOption = None,
    json_path: JsonOption = None,
) -> None:
    """Show a policy's parts, bytes and bit-widths, and what is quantized and what is not."""
    with user_errors():
        if cpu:
            found = kernels.describe()
            console.print(tables.kernels_table(found))
            if source is None:
                _write_json(json_path, found)
                return
        if source is None:
            raise InputError("there is nothing to inspect; name a policy, or give --cpu")
        loaded = _load(source, unnorm_key, cameras, tokenizer, crop)
        reports = list_linears(loaded.model)
        parts = {
            name: {"parameters": count_parameters(part), "bytes": stored_bytes(part)}
            for name, part in loaded.model.named_children()
        }
        console.print(tables.parts_table(reports, parts))
        if linears:
            console.print(tables.linears_table(reports))
        console.print_json(data=loaded.recipe.to_json())
        _write_json(
            json_path,
            {
                "policy": source,
                "family": loaded.config.family,
                "recipe": loaded.recipe.to_json(),
                "calibration": loaded.calibration and dataclasses.asdict(loaded.calibration),
                "visual_tokens": loaded.config.model.visual_tokens,
                "parts": parts,
                "linears": [dataclasses.asdict(report) for report in reports],
            },
        )


@app.command()
def bench(
    source: Annotated[str | None, SOURCE] = None,
    shape: Annotated[str | None, typer.Option(help="A published size, with random weights.")] = None,
    layers: Annotated[
        int | None, typer.Option(help="Decoder layers of the shape, if not all of them.", min=1)
    ] = None,
    recipe: RecipeOption = "w4a8",
    keep: KeepOption = None,
    vs: Annotated[str, typer.Option(help="Rivals, comma-separated.")] = "torch-fp32,torch-bf16",
    steps: Annotated[int, typer.Option(help="Timed steps of each.", min=1)] = 30,
    warmups: Annotated[int, typer.Option(help="Steps of each that come before.", min=0)] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads of each; all cores if not given.")] = None,
    one_at_a_time: Annotated[
        bool, typer.Option(help="Keep one candidate in memory: they take turns in thirds.")
    ] = False,
    environments: Annotated[
        Path | None, typer.Option(help="Folder of virtual environments of the rivals, see docs/bench.md.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Time a step of a policy beside other forms of it, on this machine."""
    with user_errors():
        from sqap.benchmark import Subject
        from sqap.benchmark import bench as run

        if (source is None) == (shape is None):
            raise InputError("name a policy to time, or a --shape; one of the two")
        subject = Subject(shape or str(source), _recipe(recipe, keep), shape is not None, layers)
        rivals = [name for name in vs.split(",") if name]
        with progress_bar("steps") as advance:
            report = run(
                subject,
                rivals,
                steps=steps,
                warmups=warmups,
                threads=threads,
                one_at_a_time=one_at_a_time,
                environments=environments,
                progress=advance,
            )
        for table in tables.bench_tables(report):
            console.print(table)
        _write_json(json_path, report)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the report and the video.")] = Path("demo"),
    episodes: Annotated[int, typer.Option(help="Episodes per task.", min=1)] = 10,
    json_path: JsonOption = None,
) -> None:
    """Compress the bundled policy, run it beside the original, and show what was gained and lost."""
    with user_errors():
        from sqap.demo import run_demo

        report = run_demo(out, episodes, console, progress_bar)
        _write_json(json_path, report)


def _load(
    source: str, unnorm_key: str | None, cameras: str | None, tokenizer: Path | None, crop: float | None
) -> Policy:
    names = None if cameras is None else tuple(cameras.split(","))
    return sqap.load(source, unnorm_key=unnorm_key, cameras=names, tokenizer=tokenizer, crop=crop)


def _recipe(name: str, keep: float | None) -> Recipe:
    if name in PRESETS:
        return PRESETS[name]() if keep is None else PRESETS[name](keep)
    recipe = Recipe.paper() if name == "paper" else Recipe.read(name)
    if keep is None:
        return recipe
    if recipe.pruning is None:
        raise InputError(f"--keep {keep} has nothing to set: recipe {name} does not prune")
    return dataclasses.replace(recipe, pruning=dataclasses.replace(recipe.pruning, keep_ratio=keep))


def _frames(policy: Policy, source: str, count: int, cameras: list[str] | None) -> list[Observation]:
    from sqap.frames import read_frames

    mapping = dict(_pair(camera) for camera in cameras or ())
    with progress_bar("calibration frames") as advance:
        return read_frames(source, policy, count, cameras=mapping, progress=advance)


def _pair(camera: str) -> tuple[str, str]:
    name, equals, key = camera.partition("=")
    if not (name and equals and key):
        raise InputError(f"--camera {camera} must be POLICY_CAMERA=DATASET_KEY")
    return name, key


def _fitted(
    policy: Policy,
    recipe: Recipe,
    frames: list[Observation],
    target_bytes: int | None,
    target_error: float | None,
) -> Recipe:
    from sqap.sensitivity import Replay, fit

    if recipe.quantization is None:
        raise InputError("a target needs a recipe that quantizes")
    with progress_bar("sensitivity of blocks") as advance:
        quantization = fit(
            Replay(policy, frames),
            recipe.quantization,
            target_bytes=target_bytes,
            target_error=target_error,
            progress=advance,
        )
    for override in quantization.overrides[len(recipe.quantization.overrides) :]:
        bits = "bfloat16" if override.scheme is None else f"{override.scheme.weight_bits}-bit weights"
        console.print(f"{override.pattern} gets {bits}")
    return dataclasses.replace(recipe, quantization=quantization)


def _default_log(fingerprints: list[str], env: str, workers: int, ensemble: int | None) -> Path:
    policies = "-".join(mark[:12] for mark in fingerprints)
    averaged = "" if ensemble is None else f"-ensemble{ensemble}"
    return Path("runs") / f"{env}-{policies}-workers{workers}{averaged}.jsonl"


def _write_json(path: Path | None, data: Any) -> None:
    if path is not None:
        write_json(path, data)


if __name__ == "__main__":
    app()
