"""OpenVLA-OFT beyond its authors' robots: what no file tells is chosen, and what is missing is missed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import TINY, Platform, write_openvla_oft
from safetensors.torch import save_file
from typer.testing import CliRunner

import sqap
from sqap.checkpoints.choices import Choices
from sqap.cli import app
from sqap.config import PolicyConfig
from sqap.errors import CheckpointError

from .conftest import Publish
from .edits import edit
from .test_compress_published import observation
from .test_openvla_oft import component

CAMERAS = ("front", "wrist")
TOLD: dict[str, Any] = {"chunk": 10, "bounds": "minmax", "cameras": CAMERAS}
Robot = Callable[..., Path]


@pytest.fixture
def robot(tmp_path: Path) -> Robot:
    """``robot(action_dim)``: a directory tuned for a robot of one's own."""

    def write(action_dim: int = 7, key: str = "my_robot") -> Path:
        directory = tmp_path / f"{key}-{action_dim}"
        write_openvla_oft(directory, TINY, platform=Platform(key, action_dim, 10, action_dim, 2, None))
        return directory

    return write


def config(directory: Path, **choices: Any) -> PolicyConfig:
    return sqap.load(directory, **choices).config


@pytest.mark.parametrize("action_dim", [7, 8, 14])
def test_another_robot_is_refused_until_all_that_is_its_own_is_chosen(robot: Robot, action_dim: int) -> None:
    directory = robot(action_dim)
    everything = r"give chunk \(actions of one step\), bounds \(q99 or minmax\), cameras \(names, in order\)$"
    with pytest.raises(
        CheckpointError, match=f"'my_robot' with {action_dim} action dimensions .*{everything}"
    ):
        config(directory)
    for name, text in (("chunk", "chunk .actions of one step."), ("cameras", "cameras .names, in order.")):
        with pytest.raises(CheckpointError, match=f"no file has them: give {text}$"):
            config(directory, **{n: value for n, value in TOLD.items() if n != name})
    policy = sqap.load(directory, **TOLD)
    ((_, statistics),) = json.loads((directory / "dataset_statistics.json").read_text()).items()
    found = policy.config
    assert (found.cameras, found.model.head.horizon) == (CAMERAS, 10)
    assert (found.actions[-1].low, found.actions[-1].high) == tuple(
        tuple(statistics["action"][n]) for n in ("min", "max")
    )
    assert found.state is not None
    assert found.state[0].high == tuple(statistics["proprio"]["max"])
    assert policy.act(observation(policy)).shape == (10, action_dim)
    by_percentiles = config(directory, **TOLD | {"bounds": "q99"})
    assert by_percentiles.actions[-1].low == tuple(statistics["action"]["q01"])


@pytest.mark.parametrize(("key", "action_dim"), [("libero_arm", 8), ("aloha_single", 7), ("bridge_two", 14)])
def test_a_known_name_with_other_dimensions_is_another_robot(robot: Robot, key: str, action_dim: int) -> None:
    with pytest.raises(CheckpointError, match=f"'{key}' with {action_dim} action dimensions is none of"):
        config(robot(action_dim, key))


def test_what_is_chosen_goes_before_what_is_known(written: Publish) -> None:
    known, other = config(written("oft-libero")), config(written("oft-libero"), chunk=10, bounds="minmax")
    assert (known.model.head.horizon, other.model.head.horizon) == (8, 10)
    assert known.actions[-1].low != other.actions[-1].low
    assert known.cameras == other.cameras


def test_the_command_line_takes_the_same_choices(robot: Robot) -> None:
    arguments = ["inspect", str(robot())]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "give chunk (actions of one step), bounds (q99 or minmax)" in result.output
    arguments += ["--chunk", "10", "--cameras", "front,wrist"]
    assert CliRunner().invoke(app, [*arguments, "--bounds", "minmax"]).exit_code == 0
    result = CliRunner().invoke(app, [*arguments, "--bounds", "q98"])
    assert (result.exit_code, "bounds must be q99 or minmax, got 'q98'" in result.output) == (1, True)


@pytest.mark.parametrize(
    ("family", "choices", "message"),
    [
        ("cogact", {"chunk": 8}, "CogACT leaves no choice of chunk"),
        ("cogact", {"bounds": "minmax"}, "CogACT leaves no choice of bounds"),
        ("cogact", {"film": True}, "CogACT leaves no choice of film"),
        ("openvla", {"chunk": 8}, "a step of OpenVLA is one action, and cannot be a chunk of 8"),
        ("native-openvla", {"chunk": 8}, "a step of OpenVLA is one action"),
        ("openvla", {"bounds": "q99"}, "OpenVLA leaves no choice of bounds"),
        ("openvla", {"ema": True}, "OpenVLA leaves no choice of ema"),
        ("oft-libero", {"ema": True}, "OpenVLA-OFT leaves no choice of ema"),
    ],
)
def test_a_choice_that_a_family_has_no_use_for_is_refused(
    written: Publish, family: str, choices: dict[str, Any], message: str
) -> None:
    key = None if family.startswith("oft") else "bridge_orig"
    with pytest.raises(CheckpointError, match=message):
        config(written(family), unnorm_key=key, **choices)


@pytest.mark.parametrize("choices", [{"chunk": 0}, {"bounds": "q98"}])
def test_choices_that_are_none_are_refused(choices: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"one action or more, got 0|must be q99 or minmax, got 'q98'"):
        Choices(**choices)


def test_a_name_that_speaks_of_another_chunk_is_heard(publish: Publish) -> None:
    directory = publish("oft-libero")
    named = directory.rename(directory.with_name("openvla-7b+mine--parallel_dec--16_acts_chunk--5000_chkpt"))
    with pytest.raises(
        CheckpointError, match="after chunks of 16 actions, and libero's have 8: give the chunk"
    ):
        config(named)
    assert config(named, chunk=16).model.head.horizon == 16
    eight = named.rename(named.with_name("run--8_acts_chunk--proprio_state"))
    assert config(eight).model.head.horizon == 8
    component(eight, "proprio_projector").unlink()
    with pytest.raises(CheckpointError, match=r"by its name it has a proprio_projector--\*_checkpoint\.pt"):
        config(eight)


def test_a_policy_that_does_without_the_state_says_so(
    publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    directory = publish("oft-libero")
    component(directory, "proprio_projector").unlink()
    assert config(directory).state is None
    assert "there is no proprio_projector, so that it acts without the robot's state" in caplog.text


def mark_adapter(directory: Path) -> None:
    """As training with FiLM names what it adapts: inside the wrapped encoder."""
    module = "base_model.model.vision_backbone.vision_backbone.featurizer.blocks.0.block.attn.qkv"
    (directory / "lora_adapter").mkdir()
    state = {f"{module}.lora_A.weight": torch.ones(2, 48), f"{module}.lora_B.weight": torch.ones(144, 2)}
    save_file(state, directory / "lora_adapter" / "adapter_model.safetensors")


FILM_MARKS: dict[str, Callable[[Path], object]] = {
    "its configuration": lambda directory: edit(directory / "config.json", use_film=True),
    "its LoRA adapter": mark_adapter,
    "its name": lambda directory: directory.rename(directory.with_name("oft--film--9_chkpt")),
}


@pytest.mark.parametrize("mark", FILM_MARKS)
def test_film_without_its_file_is_refused(publish: Publish, mark: str) -> None:
    directory = publish("oft-libero")
    moved = FILM_MARKS[mark](directory)
    directory = moved if isinstance(moved, Path) else directory
    with pytest.raises(
        CheckpointError, match=rf"by {mark} its vision was tuned with FiLM, and it has no vision"
    ):
        config(directory)
    assert not config(directory, film=False).model.vision[0].film


def test_alohas_recipe_has_film(publish: Publish) -> None:
    directory = publish("oft-aloha")
    with pytest.raises(CheckpointError, match="has vision encoders with FiLM: they are used, or taken away"):
        config(directory, film=False)
    expected = config(directory)
    assert config(directory, film=True) == expected
    component(directory, "vision_backbone").unlink()
    with pytest.raises(CheckpointError, match=r"authors' recipe for aloha .*\(--no-film\) if it was not"):
        config(directory)
    assert not config(directory, film=False).model.vision[0].film
    with pytest.raises(CheckpointError, match="by the choice of film"):
        config(directory, film=True)


DISCRETE_MARKS: dict[str, Callable[[Path], object]] = {
    "modeling_prismatic.py beside it": lambda directory: (directory / "modeling_prismatic.py").write_text(
        "from prismatic.vla.constants import ACTION_DIM, NUM_ACTIONS_CHUNK\n"
    ),
    "its lora_adapter folder": lambda directory: (directory / "lora_adapter").mkdir(),
    "its configuration": lambda directory: edit(directory / "config.json", use_film=True),
    "its name": lambda directory: directory.rename(directory.with_name("parallel_dec--8_acts_chunk")),
}


@pytest.mark.parametrize("mark", DISCRETE_MARKS)
def test_what_may_be_the_discrete_head_is_openvla_only_if_it_is_said(publish: Publish, mark: str) -> None:
    directory = publish("openvla")
    expected = config(directory, unnorm_key="bridge_orig")
    (directory / "modeling_prismatic.py").write_text("class OpenVLAForActionPrediction: ...\n")
    assert config(directory, unnorm_key="bridge_orig") == expected
    moved = DISCRETE_MARKS[mark](directory)
    directory = moved if isinstance(moved, Path) else directory
    with pytest.raises(
        CheckpointError, match=f"by {mark} may be OpenVLA-OFT with the discrete head, which is not"
    ):
        config(directory, unnorm_key="bridge_orig")
    assert config(directory, unnorm_key="bridge_orig", chunk=1) == expected


def test_what_is_chosen_is_part_of_the_compressed_policy(robot: Robot, tmp_path: Path) -> None:
    policy = sqap.load(robot(), **TOLD)
    small = sqap.compress(policy, sqap.Recipe())
    small.save(tmp_path / "small")
    loaded = sqap.load(tmp_path / "small")
    assert loaded.config == policy.config
    assert np.array_equal(loaded.act(observation(loaded)), small.act(observation(loaded)))


def test_film_and_averaged_weights_are_options_too(publish: Publish) -> None:
    directory = publish("oft-aloha")
    component(directory, "vision_backbone").unlink()
    assert CliRunner().invoke(app, ["inspect", str(directory)]).exit_code == 1
    assert CliRunner().invoke(app, ["inspect", str(directory), "--no-film"]).exit_code == 0
    result = CliRunner().invoke(app, ["inspect", str(directory), "--film"])
    assert (result.exit_code, "by the choice of film" in result.output) == (1, True)
    result = CliRunner().invoke(
        app, ["inspect", str(publish("cogact")), "--unnorm-key", "bridge_orig", "--ema"]
    )
    assert (result.exit_code, "has no averaged action model" in result.output) == (1, True)
