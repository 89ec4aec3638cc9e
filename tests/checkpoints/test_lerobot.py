"""What LeRobot's policies on disk have in common, by the example of SmolVLA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sqap
from sqap import Observation
from sqap.checkpoints import hub, smolvla
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.published import recognise
from sqap.errors import CheckpointError, InputError
from sqap.observation import Camera
from sqap.prepare import find_effector
from sqap.processing import AddState, EndWith, MeanStd, Pad, PromptConfig, Range, Take
from sqap.pruning.geometry import project

CONFIG, BEFORE, AFTER = "config.json", "policy_preprocessor.json", "policy_postprocessor.json"
IN = "policy_preprocessor_step_5_normalizer_processor.safetensors"
OUT = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
TOP, WRIST = "observation.images.top", "observation.images.wrist"


@pytest.fixture
def directory(publish) -> Path:
    """A copy of SmolVLA's directory, to be spoilt."""
    found: Path = publish("smolvla")
    return found


def edit(path: Path, **changes: Any) -> None:
    """Change top-level entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_step(path: Path, name: str, **settings: Any) -> None:
    """Change settings of a processor's step."""
    data = json.loads(path.read_text())
    (step,) = (step for step in data["steps"] if step["registry_name"] == name)
    step["config"] |= settings
    path.write_text(json.dumps(data))


def add_step(path: Path, step: dict[str, Any]) -> None:
    data = json.loads(path.read_text())
    data["steps"].append(step)
    path.write_text(json.dumps(data))


def rename_statistics(path: Path, prefix: str) -> None:
    """Give all statistics of a file to a data set."""
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)


def keep_statistics(path: Path, start: str) -> None:
    save_file({name: t for name, t in load_file(path).items() if name.startswith(start)}, path)


def open_it(directory: Path, **choices: Any) -> Any:
    return smolvla.open(directory, Choices(**choices)).config


def observe(**images: np.ndarray) -> Observation:
    state = np.random.default_rng(1).standard_normal(6)
    return Observation(images, "Open the Drawer", state)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_everything_around_the_model_is_in_the_files(written):
    config, values = open_it(written("smolvla")), load_file(written("smolvla") / IN)

    def of(name: str) -> tuple[float, ...]:
        return tuple(map(float, values[name]))

    assert (config.family, config.cameras, config.n_action_steps) == ("smolvla", (TOP, WRIST), 4)
    assert config.prompt == PromptConfig((EndWith("\n"),), longest=48)
    state = MeanStd(of("observation.state.mean"), of("observation.state.std"), 1e-8)
    assert config.state == (state, Pad(32))
    assert config.actions == (Take(7), MeanStd(of("action.mean"), of("action.std"), 1e-8))


def test_a_camera_answers_to_its_short_name_too(written):
    policy = sqap.load(written("smolvla"))
    long = policy.act(observe(**{TOP: noise(96, 128), WRIST: noise(128, 96)}), seed=0)
    assert np.array_equal(policy.act(observe(top=noise(96, 128), wrist=noise(128, 96)), seed=0), long)
    with pytest.raises(
        InputError, match=rf"reads camera '{WRIST}'; .* has \['hand', 'top'\], .* {TOP}, {WRIST}"
    ):
        policy.act(observe(top=noise(96, 128), hand=noise(128, 96)))


def test_cameras_are_called_as_the_data_set_has_them(directory):
    names = {"observation.images.front": TOP, "observation.images.hand": WRIST, "observation.x": "other"}
    edit_step(directory / BEFORE, "rename_observations_processor", rename_map=names)
    assert open_it(directory).cameras == ("observation.images.front", "observation.images.hand")
    edit_step(directory / BEFORE, "rename_observations_processor", rename_map=[TOP])
    with pytest.raises(CheckpointError, match="rename_map must be an object of names"):
        open_it(directory)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (("a", "b"), ("a", "b")),
        (("wrist",), ("wrist",)),
        ((TOP,), (TOP,)),
        (("top", WRIST), ("top", WRIST)),
        (("wrist", "top"), ("top", "wrist")),
        (("top", "hand"), ("top", "hand")),
    ],
)
def test_cameras_are_chosen_or_named_anew(written, given, read):
    config = open_it(written("smolvla"), cameras=given)
    assert (config.cameras, config.model.cameras) == (read, len(read))


@pytest.mark.parametrize("given", [("front",), ("a", "b", "c"), ("a", "a"), ("top", TOP), ("hand", "top")])
def test_cameras_that_differ_are_listed(written, given):
    message = f"cameras are {TOP}, {WRIST}, and cameras .--cameras. must name some.* got {', '.join(given)}"
    with pytest.raises(CheckpointError, match=message):
        open_it(written("smolvla"), cameras=given)


def test_an_absent_camera_is_as_an_empty_one(directory):
    """Pictures that LeRobot masks take no position and are seen by nobody."""
    features = json.loads((directory / CONFIG).read_text())["input_features"]
    features["observation.images.empty_camera_0"] = {"type": "VISUAL", "shape": [3, 480, 640]}
    edit(directory / CONFIG, input_features=features, empty_cameras=1)
    assert open_it(directory).cameras == (TOP, WRIST)


def test_a_camera_that_is_not_chosen_is_not_computed(written):
    policy = sqap.load(written("smolvla"), cameras=("top",))
    pictures: list[int] = []
    stem = policy.model.vision[0].patch_embed
    stem.register_forward_pre_hook(lambda _, given: pictures.append(len(given[0])))
    policy.act(observe(top=noise(96, 128)), seed=0)
    assert pictures == [1]
    assert policy.config.model.visual_tokens * 2 == sqap.load(written("smolvla")).config.model.visual_tokens


def test_padding_changes_nothing(directory):
    seen = observe(top=noise(96, 128), wrist=noise(128, 96))
    before = sqap.load(directory).act(seen, seed=0)
    edit(directory / CONFIG, pad_language_to="max_length", prefix_length=200, empty_cameras=1)
    assert np.array_equal(sqap.load(directory).act(seen, seed=0), before)


MODES = {
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}


@pytest.mark.parametrize("mode", ["IDENTITY", "MEAN_STD", *MODES])
def test_every_mode_is_lerobots(directory, mode):
    """LeRobot's formulas, with a dimension that never varied; nothing is clipped."""
    for name in (IN, OUT):
        values = load_file(directory / name)
        for low, high in MODES.values():
            for feature in ("observation.state", "action"):
                values[f"{feature}.{high}"][2] = values[f"{feature}.{low}"][2]
        values["observation.state.std"][2] = 0
        save_file(values, directory / name)
    for file, step in ((BEFORE, "normalizer_processor"), (AFTER, "unnormalizer_processor")):
        edit_step(directory / file, step, norm_map={"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode})
    values = {name: t.double().numpy() for name, t in load_file(directory / IN).items()}
    policy = sqap.load(directory)
    state, given = (
        np.array([4.0, -0.3, values["observation.state.q01"][2], 0.1, -5, 2]),
        np.linspace(-3, 3, 42),
    )
    given = given.reshape(6, 7)
    given[0, 2] = -1

    def of(feature: str, name: str) -> np.ndarray:
        found: np.ndarray = values[f"{feature}.{name}"]
        return found

    if mode == "IDENTITY":
        expected, robot = state, given
    elif mode == "MEAN_STD":
        expected = (state - of("observation.state", "mean")) / (of("observation.state", "std") + 1e-8)
        robot = given * of("action", "std") + of("action", "mean")
    else:
        low, high = (of("observation.state", name) for name in MODES[mode])
        expected = 2 * (state - low) / np.where(high == low, 1e-8, high - low) - 1
        low, high = (of("action", name) for name in MODES[mode])
        robot = (given + 1) / 2 * np.where(high == low, 1e-8, high - low) + low
    found = policy.proprio(Observation({"top": noise(8, 8)}, "go", state))
    np.testing.assert_allclose(found[0, :6], expected, rtol=1e-5)
    assert (found[0, 6:] == 0).all()
    padded = np.concatenate([given, np.ones((6, 25))], 1)
    np.testing.assert_allclose(sqap.processing.unnormalize(padded, policy.config.actions), robot, rtol=1e-5)


def test_a_robot_state_of_another_length_is_refused(written):
    policy = sqap.load(written("smolvla"))
    with pytest.raises(InputError, match="reads a state of 6 numbers, got 7"):
        policy.proprio(Observation({"top": noise(8, 8)}, "go", np.zeros(7)))


def test_epsilon_and_the_keys_that_are_normalised_are_read(directory):
    edit_step(directory / BEFORE, "normalizer_processor", eps=1e-3)
    assert open_it(directory).state[0].epsilon == 1e-3
    edit_step(directory / BEFORE, "normalizer_processor", normalize_observation_keys=["observation.x"])
    assert open_it(directory).state[0] == MeanStd((0.0,) * 6, (1.0,) * 6, 0.0)


@pytest.fixture
def grouped(directory: Path) -> Path:
    """Two data sets' statistics, as a policy that was migrated from several has them."""
    for name in (IN, OUT):
        values = load_file(directory / name)
        red = {f"so100-red.buffer.{key}": t + 1 for key, t in values.items()}
        save_file({f"so100.buffer.{key}": t for key, t in values.items()} | red, directory / name)
    return directory


def test_statistics_of_several_datasets_are_chosen_by_name(written, grouped):
    alone = open_it(written("smolvla"))
    assert open_it(grouped, unnorm_key="so100").actions == alone.actions
    red = open_it(grouped, unnorm_key="so100-red")
    assert red.actions[1].mean[0] == pytest.approx(alone.actions[1].mean[0] + 1)
    assert red.state[0].mean[0] == pytest.approx(alone.state[0].mean[0] + 1)
    with pytest.raises(
        CheckpointError, match="several datasets; name one as unnorm_key: so100, so100-red, or none"
    ):
        open_it(grouped)
    with pytest.raises(CheckpointError, match="'so101'; unnorm_key must be one of: so100, so100-red, none"):
        open_it(grouped, unnorm_key="so101")


def test_one_set_of_statistics_has_no_name(written):
    with pytest.raises(
        CheckpointError, match="no statistics of 'so100'; unnorm_key must be left out, or none"
    ):
        open_it(written("smolvla"), unnorm_key="so100")


def test_a_missing_state_normalization_is_told(grouped):
    """smolvla_base has statistics of actions alone."""
    for name in (IN, OUT):
        save_file({k: t for k, t in load_file(grouped / name).items() if ".action." in k}, grouped / name)
    message = (
        r"has no statistics of observation\.state, by which it is normalised \(MEAN_STD\); it has those of "
        "so100, so100-red; unnorm_key none .* leaves"
    )
    with pytest.raises(CheckpointError, match=message):
        open_it(grouped, unnorm_key="so100")


def test_nothing_is_normalised_only_where_that_is_chosen(directory):
    """Base models have no state files."""
    for file in (BEFORE, AFTER):
        data = json.loads((directory / file).read_text())
        for step in data["steps"]:
            step.pop("state_file", None)
        (directory / file).write_text(json.dumps(data))
    with pytest.raises(
        CheckpointError, match=r"normalizer_processor has no statistics of observation\.state"
    ):
        open_it(directory)
    config = open_it(directory, unnorm_key="none")
    assert config.actions == (Take(7),)
    assert config.state == (MeanStd((0.0,) * 6, (1.0,) * 6, 0.0), Pad(32))


@pytest.mark.parametrize(
    ("file", "name", "tensor", "message"),
    [
        (
            OUT,
            "action.mean",
            None,
            "action lacks mean, by which it is normalised .MEAN_STD.; it has count, max, min,",
        ),
        (IN, "observation.state.std", torch.ones(5), "std has 5 numbers, but the policy's have 6"),
        (OUT, "action.mean", torch.full((7,), torch.inf), r"action\.mean has numbers that are not finite"),
        (OUT, "action.mean", torch.full((7,), torch.nan), r"action\.mean has numbers that are not finite"),
    ],
)
def test_statistics_that_are_none_are_refused(directory, file, name, tensor, message):
    values = load_file(directory / file)
    values.pop(name)
    values |= {} if tensor is None else {name: tensor}
    save_file(values, directory / file)
    with pytest.raises(CheckpointError, match=message):
        open_it(directory)


def test_a_state_file_that_is_missing_is_told(directory):
    (directory / OUT).unlink()
    with pytest.raises(CheckpointError, match=f"cannot read .*{OUT}: No such file"):
        open_it(directory)


def test_state_files_are_found_by_what_names_them(directory):
    (directory / OUT).rename(directory / "stats.safetensors")
    data = json.loads((directory / AFTER).read_text())
    data["steps"][0]["state_file"] = "stats.safetensors"
    (directory / AFTER).write_text(json.dumps(data))
    open_it(directory)
    data["steps"][0]["state_file"] = "../stats.safetensors"
    (directory / AFTER).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"'\.\./stats\.safetensors', which is not a file beside it"):
        open_it(directory)


def test_steps_may_be_named_by_their_classes(directory):
    data = json.loads((directory / BEFORE).read_text())
    data["steps"][3] = {
        "class": "lerobot.processor.tokenizer_processor.TokenizerProcessorStep",
        "config": data["steps"][3]["config"] | {"max_length": 9},
    }
    (directory / BEFORE).write_text(json.dumps(data))
    assert open_it(directory).prompt.longest == 9


def test_tokens_are_cut_only_where_the_file_says(directory):
    edit_step(directory / BEFORE, "tokenizer_processor", truncation=False)
    assert open_it(directory).prompt.longest is None


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"registry_name": "clip_actions", "config": {}},
            "the step clip_actions, which sqap does not know; known",
        ),
        ({"class": "my.module.Blur", "config": {}}, r"the step my\.module\.Blur, which sqap does not know"),
        ({"registry_name": "device_processor", "config": {}}, "has two steps device_processor"),
        ({"config": {}}, r"steps\[2\] must have a registry_name or a class, and a config"),
        ("normalizer_processor", r"steps\[2\] must have a registry_name or a class"),
    ],
)
def test_unknown_steps_are_refused(directory, step, message):
    add_step(directory / AFTER, step)
    with pytest.raises(CheckpointError, match=message):
        open_it(directory)


@pytest.mark.parametrize(
    ("file", "name", "settings", "message"),
    [
        (BEFORE, "tokenizer_processor", {"max_length": 0}, "max_length must be a positive number"),
        (BEFORE, "normalizer_processor", {"eps": "x"}, "eps a number from 0 to 1"),
        (
            BEFORE,
            "normalizer_processor",
            {"norm_map": {"STATE": "LOG"}},
            "by 'LOG'; supported are IDENTITY, MEAN",
        ),
        (
            BEFORE,
            "normalizer_processor",
            {"norm_map": {"VISUAL": "MEAN_STD"}},
            "images are normalised by MEAN_STD",
        ),
    ],
)
def test_settings_that_are_not_supported_are_refused(directory, file, name, settings, message):
    edit_step(directory / file, name, **settings)
    with pytest.raises(CheckpointError, match=message):
        open_it(directory)


@pytest.mark.parametrize("name", ["tokenizer_processor", "normalizer_processor"])
def test_steps_that_are_needed_are_missed(directory, name):
    data = json.loads((directory / BEFORE).read_text())
    data["steps"] = [step for step in data["steps"] if step["registry_name"] != name]
    (directory / BEFORE).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        open_it(directory)


def test_half_of_the_processors_is_not_enough(directory):
    (directory / AFTER).unlink()
    with pytest.raises(CheckpointError, match=f"incomplete: it has {BEFORE} and no {AFTER}"):
        open_it(directory)


def relative(directory: Path, **settings: Any) -> None:
    step = {"registry_name": "relative_actions_processor", "config": {"enabled": True} | settings}
    add_step(directory / BEFORE, step)
    add_step(directory / AFTER, {"registry_name": "absolute_actions_processor", "config": {"enabled": True}})


@pytest.mark.parametrize(
    ("settings", "dimensions"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        (
            {"exclude_joints": ["Gripper"], "action_names": ["a", "left_gripper", "c", "d", "e", "f"]},
            (0, 2, 3, 4, 5),
        ),
        ({"exclude_joints": ["gripper"], "action_names": None}, (0, 1, 2, 3, 4, 5)),
        ({"exclude_joints": ["c"], "action_names": ["a", "b", "c"]}, (0, 1, 3, 4, 5)),
    ],
)
def test_relative_actions_are_added_to_the_state(directory, settings, dimensions):
    features = {"action": {"type": "ACTION", "shape": [6]}}
    edit(directory / CONFIG, output_features=features)
    for name in (IN, OUT):
        values = load_file(directory / name)
        cut = {k: t[:6].clone() if k.startswith("action") and t.numel() > 1 else t for k, t in values.items()}
        save_file(cut, directory / name)
    relative(directory, **settings)
    assert open_it(directory).actions[-1] == AddState(dimensions)


def test_relative_actions_need_both_steps_and_a_state_for_each(directory):
    relative(directory)
    with pytest.raises(CheckpointError, match="a state of 6 numbers, and action 6 has none in it"):
        open_it(directory)
    edit_step(directory / AFTER, "absolute_actions_processor", enabled=False)
    with pytest.raises(CheckpointError, match="must both be enabled or both not"):
        open_it(directory)
    edit_step(directory / BEFORE, "relative_actions_processor", enabled=False)
    open_it(directory)


def test_the_tokenizer_may_be_elsewhere_or_on_the_hub(directory, tmp_path, monkeypatch):
    asked = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options["allow_patterns"]))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "hub").mkdir()
    moved = (directory / "tokenizer.json").rename(tmp_path / "mine.json")
    open_it(directory, tokenizer=moved)
    assert asked == []
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer\.json: put SmolVLM2's there.*on the hub has none"
    ):
        open_it(directory)
    moved.rename(tmp_path / "hub" / "tokenizer.json")
    open_it(directory)
    assert asked[-1] == ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", ["tokenizer.json"])
    edit_step(directory / BEFORE, "tokenizer_processor", tokenizer_name=str(tmp_path / "hub"))
    open_it(directory)
    assert len(asked) == 2
    edit_step(directory / BEFORE, "tokenizer_processor", tokenizer_name="/home/somebody/tokenizer")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json: .* say where it is \(--tokenizer\)$"):
        open_it(directory)


def test_a_gated_tokenizer_is_told(directory, monkeypatch):
    def download(repository: str, **options: Any) -> hub.Snapshot:
        raise CheckpointError(f"{repository} is gated: accept its terms")

    monkeypatch.setattr(hub, "download", download)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"--tokenizer.; HuggingFaceTB/.* is gated: accept its terms"):
        open_it(directory)


def test_a_tokenizer_of_another_vocabulary_is_refused(directory, written):
    """Llama 2's has many more tokens; one that has far fewer is another's, too."""
    other = written("openvla") / "tokenizer.json"
    with pytest.raises(
        CheckpointError, match="has token 32000, but the model embeds tokens up to 479: it is not Smol"
    ):
        open_it(directory, tokenizer=other)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="puts tokens around a prompt, which SmolVLM2's does not"):
        open_it(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_peft": True},
            "use_peft is set, and the directory holds a LoRA adapter: merge it into its base",
        ),
        ({"n_action_steps": 7}, "n_action_steps is 7, more than the chunk of 6"),
        ({"n_action_steps": 0}, "n_action_steps must be a positive int"),
        ({"chunk_size": "x"}, "chunk_size must be a positive int"),
        ({"n_obs_steps": 2}, "n_obs_steps is 2; supported is 1"),
        ({"input_features": {}}, "input_features has no camera"),
        ({"input_features": [1]}, "input_features must be an object of features"),
        ({"input_features": {"x": {"type": "VISUAL"}}}, r"input_features\.x must have a type and a shape"),
        ({"max_state_dim": 5}, r"observation\.state has the shape \[6\]; supported are vectors of up to 5"),
        (
            {"output_features": {"action": {"type": "ACTION", "shape": [7, 1]}}},
            r"action has the shape \[7, 1\]; supported are vectors of up to 32",
        ),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused(directory, changes, message):
    edit(directory / CONFIG, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_it(directory)


def test_a_key_that_is_not_known_is_logged(directory, caplog):
    edit(directory / CONFIG, blur=3)
    open_it(directory)
    assert "sqap does not know blur" in caplog.text


def test_an_adapter_alone_is_told_to_be_merged(directory):
    """As peft saves it: LeRobot's configuration without its weights."""
    edit(directory / CONFIG, use_peft=True)
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it into its base"):
        recognise(directory).open(directory, Choices())


def inside(directory: Path, names: dict[str, torch.Tensor]) -> None:
    """Statistics as versions before 0.4.0 have them, in place of processor files."""
    for path in directory.glob("policy_*"):
        path.unlink()
    path = directory / "model.safetensors"
    save_file(load_file(path) | names, path)


def test_statistics_inside_the_weights_are_of_the_features_that_are_named(directory):
    mean, std = torch.arange(6.0), torch.ones(6)
    actions = {f"unnormalize_outputs.buffer_action.{k}": torch.ones(7) for k in ("mean", "std")}
    state = {"normalize_inputs.buffer_observation_state.mean": mean}
    inside(directory, state | actions | {"normalize_inputs.buffer_observation_state.std": std})
    assert open_it(directory).state[0] == MeanStd(tuple(map(float, mean)), (1.0,) * 6, 1e-8)
    inside(directory, {"normalize_inputs.buffer_other.mean": mean})
    with pytest.raises(
        CheckpointError, match=r"statistics of no feature of its own: normalize_inputs\.buffer_oth"
    ):
        open_it(directory)


def test_statistics_inside_the_weights_may_be_of_several_datasets(directory):
    names = {}
    for i, key in enumerate(("so100", "so100-blue_2")):
        for kind in ("mean", "std"):
            names[f"normalize_inputs.{key}_buffer_observation_state.{kind}"] = torch.full((6,), i + 1.0)
            names[f"unnormalize_outputs.{key}_buffer_action.{kind}"] = torch.full((7,), i + 3.0)
            names[f"normalize_targets.{key}_buffer_action.{kind}"] = torch.full((7,), i + 3.0)
    inside(directory, names)
    config = open_it(directory, unnorm_key="so100-blue_2")
    assert (config.state[0].mean[0], config.actions[1].std[0]) == (2, 4)
    with pytest.raises(CheckpointError, match="name one as unnorm_key: so100, so100-blue_2"):
        open_it(directory)


def test_old_extremes_have_an_epsilon_going_in_alone(directory):
    names = {}
    for name, width in (
        ("normalize_inputs.buffer_observation_state", 6),
        ("unnormalize_outputs.buffer_action", 7),
    ):
        names |= {f"{name}.min": torch.zeros(width), f"{name}.max": torch.zeros(width)}
    edit(directory / CONFIG, normalization_mapping={"STATE": "MIN_MAX", "ACTION": "MIN_MAX"})
    inside(directory, names)
    config = open_it(directory)
    assert config.state[0] == Range((0.0,) * 6, (0.0,) * 6, (True,) * 6, 1e-8)
    assert config.actions[1] == Range((0.0,) * 7, (0.0,) * 7, (True,) * 7, 0.0)


def test_a_directory_without_any_statistics_is_refused(directory):
    inside(directory, {})
    message = f"has neither {BEFORE} nor statistics among its weights.*unnorm_key none"
    with pytest.raises(CheckpointError, match=message):
        open_it(directory)
    assert open_it(directory, unnorm_key="none").actions == (Take(7),)


def test_the_ring_is_where_the_padded_picture_has_the_gripper(written):
    """A 4:3 picture is a quarter lower in its square."""
    config = sqap.load(written("smolvla")).config
    intrinsics = np.array([[100.0, 0, 64], [0, 100, 48], [0, 0, 1]])
    camera, gripper = Camera(intrinsics, np.eye(4)), np.array([0.2, -0.1, 1.0])
    images = {"top": noise(96, 128), WRIST: noise(128, 96)}
    seen = Observation(images, "go", np.zeros(6), {"top": camera}, gripper)
    u, v = project(camera, gripper, (96, 128))
    assert find_effector(seen, TOP, config) == pytest.approx((u, 0.25 + 0.75 * v))
    assert find_effector(seen, WRIST, config) is None
