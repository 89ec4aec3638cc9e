"""pi0 and pi0.5 as LeRobot publishes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sqap.checkpoints import pi0
from sqap.checkpoints.choices import Choices
from sqap.errors import CheckpointError
from sqap.models import DecoderConfig, FlowHeadConfig, VisionConfig
from sqap.processing import (
    EndWith,
    MeanStd,
    Normalize,
    Pad,
    PromptConfig,
    Range,
    ResizeWithPad,
    Scale,
    Spaces,
    Template,
)
from tests.checkpoints import lerobot_directories
from tests.checkpoints.lerobot_directories import edit, rewrite

BOTH = "model.paligemma_with_expert."
PALIGEMMA, EXPERT = f"{BOTH}paligemma.model.", f"{BOTH}gemma_expert.model."
TABLE, OUTPUT = f"{PALIGEMMA}language_model.embed_tokens.weight", f"{BOTH}paligemma.lm_head.weight"
KINDS = ("pi0", "pi05")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def act(directory: Path) -> np.ndarray:
    return lerobot_directories.act(directory, 60, 80)


def test_the_model_is_read_off_the_tensors(written, kind):
    config = pi0.open(written(kind), Choices()).config
    model = config.model
    assert model.vision == (VisionConfig(56, 14, 64, 2, 16, 80, activation="gelu_tanh"),)
    assert model.decoder == DecoderConfig(
        480,
        64,
        3,
        8,
        1,
        16,
        96,
        10_000.0,
        1e-6,
        causal=False,
        embed_scale=8.0,
        activation="gelu_tanh",
        last_layer="keys_values",
    )
    assert model.head == FlowHeadConfig(
        32, 6, 32, 64, self_attention_every=1, causal_actions=False, adaptive_norms=kind == "pi05"
    )
    assert (model.projector, model.projector_bias, model.pixel_shuffle) == ((64,), True, 1)
    assert config.images == ((Scale(), ResizeWithPad(56, "center"), Normalize()),)


def test_pi0_reads_the_state_as_a_token(written):
    config = pi0.open(written("pi0"), Choices()).config
    assert (config.family, config.model.proprio_dim, config.model.state_in) == ("pi0", 32, "expert")
    assert isinstance(config.state[0], MeanStd)
    assert config.state[1] == Pad(32)
    assert config.prompt == PromptConfig((EndWith("\n"),), longest=48)


def test_pi05_is_told_the_state(written):
    config = pi0.open(written("pi05"), Choices()).config
    assert (config.family, config.model.proprio_dim, config.model.state_in) == ("pi05", None, "text")
    assert [type(step) for step in config.state] == [Range]
    assert config.state_dim == 6
    template = Template("Task: {instruction}, State: {state};\nAction: ")
    assert config.prompt == PromptConfig((Spaces(), template), longest=200)


def test_every_tensor_goes_where_it_belongs(written, load, kind):
    published = pi0.open(written(kind), Choices())
    state, theirs = load(published), load_file(written(kind) / "model.safetensors")
    norm = theirs[f"{PALIGEMMA}language_model.layers.1.input_layernorm.weight"]
    assert torch.equal(state["decoder.layers.1.input_layernorm.weight"], 1 + norm)
    assert torch.equal(
        state["projector.layers.0.bias"], theirs[f"{PALIGEMMA}multi_modal_projector.linear.bias"]
    )
    mlp = "mlp.gate_proj.weight"
    assert torch.equal(state[f"head.layers.2.{mlp}"], theirs[f"{EXPERT}layers.2.{mlp}"])
    if kind == "pi0":
        assert torch.equal(state["head.norm.weight"], 1 + theirs[f"{EXPERT}norm.weight"])
    else:
        assert torch.equal(state["head.norm.dense.bias"], theirs[f"{EXPERT}norm.dense.bias"])
    last = f"{PALIGEMMA}language_model.layers.2."
    unread = [f"{last}self_attn.{which}_proj.weight" for which in "qo"]
    unread += [f"{last}mlp.{which}_proj.weight" for which in ("gate", "up", "down")]
    unread += [f"{last}post_attention_layernorm.weight", OUTPUT, f"{BOTH}gemma_expert.lm_head.weight"]
    assert sorted(published.weights.unused) == sorted(unread)


def test_other_ways_to_name_the_same_tensors_give_the_same_policy(publish, written, kind):
    """Without ``model.``, as on the hub, and with the table under the output matrix's name alone."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[OUTPUT] = tensors.pop(TABLE)
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    directory = publish(kind)
    rewrite(directory, change)
    assert np.array_equal(act(directory), act(written(kind)))


def test_tensors_of_the_other_policy_are_refused(publish):
    directory = publish("pi05")
    edit(directory, type="pi0")
    with pytest.raises(CheckpointError, match=r"config\.json says pi0, and its tensors are pi0\.5's"):
        pi0.open(directory, Choices())


def test_names_from_before_are_told_where_newer_ones_are(publish):
    directory = publish("pi0")
    old, new = f"{BOTH}paligemma.language_model.model.", f"{PALIGEMMA}language_model."
    rewrite(directory, lambda tensors: {name.replace(new, old): t for name, t in tensors.items()})
    with pytest.raises(CheckpointError, match=r"named them before 0\.4\.0, .* as lerobot/pi0_base"):
        pi0.open(directory, Choices())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_resolution": [224, 224]}, "but the vision encoder reads images of 56 x 56"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a positive int"),
        ({"min_period": 5.0}, "min_period must be positive and less than max_period"),
        ({"use_peft": True}, "merge it into its base"),
    ],
)
def test_what_is_not_supported_is_said(publish, changes, message):
    directory = publish("pi0")
    edit(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        pi0.open(directory, Choices())


def test_the_state_is_where_the_policy_reads_it(publish):
    """The step that tells it in words is pi0.5's, behind the one that normalises it."""
    names = {"pi0": "must not have the step pi05_prepare", "pi05": "must have the step pi05_prepare"}
    step = {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}}
    for kind, message in names.items():
        path = publish(kind) / "policy_preprocessor.json"
        data = json.loads(path.read_text())
        others = [s for s in data["steps"] if s["registry_name"] != step["registry_name"]]
        path.write_text(json.dumps(data | {"steps": others + [step] * (kind == "pi0")}))
        with pytest.raises(CheckpointError, match=message):
            pi0.open(path.parent, Choices())
    others.insert(0, step)
    path.write_text(json.dumps(data | {"steps": others}))
    with pytest.raises(CheckpointError, match="before normalizer_processor, whose state it tells"):
        pi0.open(path.parent, Choices())


def test_a_directory_without_processor_files_has_its_familys_prompt(publish, kind):
    directory = publish(kind)
    prompt = pi0.open(directory, Choices()).config.prompt
    for path in directory.glob("policy_*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="nor statistics among its weights"):
        pi0.open(directory, Choices())
    config = pi0.open(directory, Choices(unnorm_key="none")).config
    assert config.prompt == prompt
    edit(directory, use_relative_actions=True)
    with pytest.raises(
        CheckpointError, match=r"use_relative_actions is set, and .* has no policy_preprocessor"
    ):
        pi0.open(directory, Choices(unnorm_key="none"))


def test_a_tokenizer_without_its_first_token_is_refused(publish, written):
    with pytest.raises(CheckpointError, match="does not begin a prompt with token 2"):
        pi0.open(written("pi0"), Choices(tokenizer=written("smolvla") / "tokenizer.json"))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{PALIGEMMA}language_model.layers.0.self_attn.k_proj.weight", torch.ones(24, 64), "is no Gemma"),
        (f"{EXPERT}layers.2.mlp.up_proj.weight", None, "missing: .*up_proj"),
        ("model.extra", torch.ones(2), r"not known: model\.extra"),
    ],
)
def test_tensors_that_do_not_fit_are_named(publish, name, tensor, message):
    directory = publish("pi0")

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors.pop(name, None)
        return tensors if tensor is None else tensors | {name: tensor}

    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=message):
        pi0.open(directory, Choices())
