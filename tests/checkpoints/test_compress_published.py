"""From a published directory to a compressed policy that acts, by the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import sqap
from sqap import Observation
from sqap.cli import app
from sqap.errors import CheckpointError
from sqap.processing import cropped
from sqap.quantization import list_linears
from sqap.recipe import Pruning, Quantization, Scheme

from .conftest import Publish

KEYS = {"openvla": "bridge_orig", "cogact": "bridge_orig", "native-openvla": "bridge_orig"}
FRAMES = 2


def write_frames(root: Path, cameras: tuple[str, ...], state_dim: int | None) -> None:
    """Noise images with an instruction, as calibration frames in a directory."""
    rng, lines = np.random.default_rng(0), []
    root.mkdir()
    for i in range(FRAMES):
        line: dict[str, object] = {"instruction": "pick up the red cube"}
        for camera in cameras:
            name = f"{camera}-{i}.png"
            Image.fromarray(rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(root / name)
            line["file_name" if len(cameras) == 1 else f"{camera}_file_name"] = name
        if state_dim is not None:
            line["state"] = rng.standard_normal(state_dim).tolist()
        lines.append(json.dumps(line))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_recipe(root: Path) -> Path:
    """The preset, but for the small SigLIP's MLP, whose odd width does not pack, and for the cut."""
    preset = dataclasses.replace(sqap.Recipe.w4a8(), pruning=Pruning())
    assert preset.quantization is not None
    quantization = dataclasses.replace(preset.quantization, vision=Scheme(8, 8))
    path = root / "recipe.json"
    path.write_text(json.dumps(dataclasses.replace(preset, quantization=quantization).to_json()))
    return path


def observation(policy: sqap.Policy) -> Observation:
    rng, config = np.random.default_rng(9), policy.config
    images = {camera: rng.integers(0, 256, (64, 80, 3), dtype=np.uint8) for camera in config.cameras}
    state = rng.standard_normal(config.state_dim) if config.state_dim else None
    return Observation(images, "Open the Drawer", state)


@pytest.mark.parametrize("family", ["openvla", "cogact", "oft-libero", "oft-aloha", "smolvla"])
def test_a_published_directory_is_compressed_and_acts(written: Publish, tmp_path: Path, family: str) -> None:
    source, key = written(family), KEYS.get(family)
    original = sqap.load(source, unnorm_key=key)
    write_frames(tmp_path / "frames", original.config.cameras, original.config.state_dim or None)
    arguments = ["compress", str(source), "--out", str(tmp_path / "small"), "--frames", str(FRAMES)]
    arguments += ["--frames-from", str(tmp_path / "frames"), "--recipe", str(write_recipe(tmp_path))]
    arguments += [] if key is None else ["--unnorm-key", key]

    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 0, result.output
    small = sqap.load(tmp_path / "small")
    assert small.config == original.config
    floats = {linear.name for linear in list_linears(small.model) if not linear.quantized}
    assert all(name.startswith(("head.", "proprio.")) for name in floats)
    seen = observation(small)
    step, chunk = small.step(seen, seed=0), original.act(seen, seed=0)
    assert step.chunk.shape == chunk.shape
    assert np.isfinite(step.chunk).all()
    assert np.array_equal(step.chunk, sqap.load(tmp_path / "small").act(seen, seed=0))
    budget = round(0.6 * original.config.model.grid**2)
    assert [len(selection.kept) for selection in step.selections] == [budget] * len(original.config.cameras)


def test_eight_bits_of_a_published_policy_stay_near_it(written: Publish, tmp_path: Path) -> None:
    original = sqap.load(written("oft-libero"))
    seen, small = observation(original), sqap.compress(original, sqap.Recipe(Quantization(Scheme(8, 8))))
    original.load_weights()
    original.model.float()
    full, low = original.act(seen), small.act(seen)
    assert 0 < np.linalg.norm(low - full) < 0.2 * np.linalg.norm(full - full.mean(0))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "bridge_orig"),
        (["--unnorm-key", "nonsense"], "fractal20220817_data"),
        (["--unnorm-key", "bridge_orig", "--cameras", "a,b"], "1 different camera"),
        (["--unnorm-key", "bridge_orig", "--crop", "90"], "up to 1, got 90"),
        (["--unnorm-key", "bridge_orig", "--tokenizer", "/nowhere/tokenizer.json"], "tokenizer"),
    ],
)
def test_a_choice_that_does_not_fit_is_one_sentence(
    written: Publish, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    out = tmp_path / "small"
    result = CliRunner().invoke(app, ["compress", str(written("openvla")), "--out", str(out), *arguments])
    assert result.exit_code == 1
    assert complaint in result.output
    assert "Traceback" not in result.output
    assert not out.exists()


def test_a_published_directory_can_be_inspected_without_reading_its_weights(
    written: Publish, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    arguments = ["inspect", str(written("openvla")), "--unnorm-key", "bridge_orig", "--json", str(report)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert found["family"] == "openvla"
    assert {linear["part"] for linear in found["linears"]} == {"vision", "projector", "decoder", "head"}


def test_images_are_cropped_as_asked(written: Publish) -> None:
    whole, part = (sqap.load(written("openvla"), unnorm_key="bridge_orig", crop=c) for c in (None, 0.9))
    assert part.config.images == tuple(cropped(steps, 0.9) for steps in whole.config.images)
    seen = observation(whole)
    assert not np.array_equal(whole.pixels(seen)[0], part.pixels(seen)[0])


def test_our_own_directories_take_no_choices(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="chosen when it is made"):
        sqap.load(saved, unnorm_key="bridge_orig")
