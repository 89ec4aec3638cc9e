"""SmolVLA as LeRobot publishes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from published_lerobot import TINY_SMOLVLA, write_smolvla
from safetensors.torch import load_file

from sqap.checkpoints import smolvla
from sqap.checkpoints.choices import Choices
from sqap.errors import CheckpointError
from sqap.models import DecoderConfig, FlowHeadConfig, VisionConfig
from sqap.processing import Normalize, ResizeWithPad, Scale
from tests.checkpoints import lerobot_directories
from tests.checkpoints.lerobot_directories import edit, rewrite

BOTH = "model.vlm_with_expert."
TEXT, EXPERT = f"{BOTH}vlm.model.text_model.", f"{BOTH}lm_expert."
TABLE, OUTPUT = f"{TEXT}embed_tokens.weight", f"{BOTH}vlm.lm_head.weight"


@pytest.fixture
def directory(publish) -> Path:
    """A copy, to be spoilt."""
    found: Path = publish("smolvla")
    return found


def act(directory: Path) -> np.ndarray:
    return lerobot_directories.act(directory, 96, 128)


def test_the_model_is_read_off_the_tensors(written):
    model = smolvla.open(written("smolvla"), Choices()).config.model
    assert model.vision == (VisionConfig(128, 16, 128, 2, 2, 160, activation="gelu_tanh"),)
    assert model.decoder == DecoderConfig(
        480,
        128,
        4,
        2,
        1,
        64,
        192,
        10_000.0,
        1e-5,
        causal=False,
        embed_scale=128**0.5,
        last_layer="keys_values",
    )
    assert model.head == FlowHeadConfig(32, 6, 96, 256)
    assert (model.projector, model.projector_bias, model.pixel_shuffle) == ((128,), False, 4)
    assert (model.proprio_dim, model.proprio_layers, model.image_first, model.cameras) == (32, 1, True, 2)


def test_images_are_padded_above_and_on_the_left(written):
    config = smolvla.open(written("smolvla"), Choices()).config
    assert config.images == ((Scale(), ResizeWithPad(128, "bottom_right"), Normalize()),)


def test_every_tensor_goes_where_it_belongs(written, load):
    published = smolvla.open(written("smolvla"), Choices())
    state, theirs = load(published), load_file(written("smolvla") / "model.safetensors")
    layer = f"{BOTH}vlm.model.vision_model.encoder.layers.1.self_attn."
    qkv = torch.cat([theirs[f"{layer}{kind}_proj.bias"] for kind in "qkv"])
    assert torch.equal(state["vision.0.blocks.1.attn.qkv.bias"], qkv)
    connector = theirs[f"{BOTH}vlm.model.connector.modality_projection.proj.weight"]
    assert torch.equal(state["projector.layers.0.weight"], connector * 128**0.5)
    assert torch.equal(state["proprio.layers.0.weight"], theirs["model.state_proj.weight"])
    assert torch.equal(state["decoder.embed_tokens.weight"], theirs[TABLE])
    assert torch.equal(
        state["head.layers.3.self_attn.k_proj.weight"], theirs[f"{EXPERT}layers.3.self_attn.k_proj.weight"]
    )
    unread = [f"{TEXT}layers.3.self_attn.{which}_proj.weight" for which in "qo"]
    unread += [f"{TEXT}layers.3.mlp.{which}_proj.weight" for which in ("gate", "up", "down")]
    unread += [f"{TEXT}layers.3.post_attention_layernorm.weight", OUTPUT]
    assert sorted(published.weights.unused) == sorted(unread)


def tied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Only the output matrix of the two that are one tensor."""
    tensors[OUTPUT] = tensors.pop(TABLE)
    return tensors


def short(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def compiled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("model.", "model._orig_mod.", 1): tensor for name, tensor in tensors.items()}


def without_output(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != OUTPUT}


def in_halves(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All in the type that most are stored in, in which it is computed."""
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.mark.parametrize("change", [tied, short, compiled, without_output])
def test_other_ways_to_name_the_same_tensors_give_the_same_policy(directory, written, change):
    rewrite(directory, change)
    assert np.array_equal(act(directory), act(written("smolvla")))


def test_a_file_in_bfloat16_acts_much_the_same(directory, written):
    rewrite(directory, in_halves)
    found, expected = act(directory), act(written("smolvla"))
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_no_processor_files_and_a_compiled_model_act_the_same(tmp_path, written):
    write_smolvla(tmp_path / "old", TINY_SMOLVLA, 0, old=True)
    assert np.array_equal(act(tmp_path / "old"), act(written("smolvla")))


def test_two_tensors_of_one_name_are_refused(directory):
    rewrite(directory, lambda tensors: tensors | compiled({n: t.clone() for n, t in tensors.items()}))
    with pytest.raises(CheckpointError, match="which is there already"):
        smolvla.open(directory, Choices())


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ({"num_steps": 5}, ("sample_steps", 5)),
        ({"min_period": 0.01}, ("min_period", 0.01)),
        ({"max_period": 8}, ("max_period", 8.0)),
        ({"self_attn_every_n_layers": 3}, None),
        ({"attention_mode": "self_attn"}, None),
        ({"chunk_size": 9}, ("horizon", 9)),
    ],
)
def test_settings_of_the_expert_are_read(directory, change, read):
    edit(directory, **change)
    if read is None:  # cross layers' keys and values are of the language model's width, not the expert's
        with pytest.raises(CheckpointError, match=r"where head\.layers\..*proj.weight must be"):
            smolvla.open(directory, Choices())
        return
    assert getattr(smolvla.open(directory, Choices()).config.model.head, read[0]) == read[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"resize_imgs_with_padding": [224, 224]},
            r"is \[224, 224\], but the vision encoder reads .* 128 x 128",
        ),
        ({"resize_imgs_with_padding": [128, 96]}, r"is \[128, 96\], but the vision encoder reads"),
        ({"resize_imgs_with_padding": None}, "is None, but the vision encoder reads images of 128 x 128"),
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha is True; supported is False"),
        (
            {"use_delta_joint_actions_aloha": True},
            "use_delta_joint_actions_aloha is True; supported is False",
        ),
        ({"add_image_special_tokens": True}, "add_image_special_tokens is True; supported is False"),
        ({"num_vlm_layers": 16}, "num_vlm_layers is 16, but there are 4 layers of the language model"),
        ({"num_expert_layers": 2}, "num_expert_layers is 2, .* an expert of as many is supported"),
        ({"num_expert_layers": "x"}, "num_expert_layers is 'x'"),
        ({"self_attn_every_n_layers": 0}, "is 0, by which no layer of the expert has self-attention"),
        ({"self_attn_every_n_layers": None}, "self_attn_every_n_layers a number"),
        ({"num_steps": 0}, "num_steps must be a positive int"),
        ({"min_period": 4.0}, "min_period must be positive and less than max_period"),
        (
            {"input_features": {"observation.image": {"type": "VISUAL", "shape": [3, 9, 9]}}},
            r"input_features has no observation\.state, which SmolVLA reads",
        ),
    ],
)
def test_what_is_not_supported_is_said(directory, changes, message):
    edit(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        smolvla.open(directory, Choices())


@pytest.mark.parametrize("layers", [-1, 0, 4])
def test_an_expert_of_as_many_layers_is_supported(directory, layers):
    edit(directory, num_expert_layers=layers, num_vlm_layers=layers)
    smolvla.open(directory, Choices())


def test_half_as_many_expert_layers_are_refused(directory):
    rewrite(
        directory,
        lambda t: {
            k: v for k, v in t.items() if not k.startswith((f"{EXPERT}layers.2", f"{EXPERT}layers.3"))
        },
    )
    with pytest.raises(
        CheckpointError, match="expert has 2 layers, and the language model 4; supported are as many"
    ):
        smolvla.open(directory, Choices())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            f"{TEXT}layers.0.self_attn.k_proj.weight",
            torch.ones(96, 128),
            "no SmolVLM2, whose heads are 64 wide",
        ),
        (
            f"{BOTH}vlm.model.connector.modality_projection.proj.weight",
            torch.ones(128, 100),
            "no square of patches",
        ),
        (
            f"{BOTH}vlm.model.vision_model.embeddings.position_embedding.weight",
            torch.ones(60, 128),
            "a vision encoder of 60 patches and 128 channels is not supported",
        ),
        (
            "model.state_proj.weight",
            torch.ones(128, 31),
            r"where proprio\.layers\.0\.weight must be \(128, 32\)",
        ),
        ("model.extra.weight", torch.ones(1), r"not known: model\.extra\.weight"),
        (f"{EXPERT}norm.weight", None, rf"missing: {EXPERT}norm\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(directory, name, tensor, message):
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors.pop(name, None)
        return tensors if tensor is None else tensors | {name: tensor}

    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=message):
        smolvla.open(directory, Choices())


@pytest.mark.parametrize("choice", [{"chunk": 3}, {"bounds": "q99"}, {"ema": True}, {"film": False}])
def test_choices_of_other_families_are_refused(written, choice):
    (name,) = choice
    with pytest.raises(CheckpointError, match=f"SmolVLA leaves no choice of {name}"):
        smolvla.open(written("smolvla"), Choices(**choice))
