"""Configurations that other tools saved: what changes numbers is read or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from published import TINY
from published_text import preprocessor_config

import sqap
from sqap.config import PolicyConfig
from sqap.errors import CheckpointError

from .conftest import Load, Publish
from .edits import edit, rewrite, stored

KEY = "bridge_orig"
PROCESSOR = "preprocessor_config.json"


def edit_text(directory: Path, **changes: object) -> None:
    text = json.loads((directory / "config.json").read_text())["text_config"]
    edit(directory / "config.json", text_config=text | changes)


def config(directory: Path) -> PolicyConfig:
    return sqap.load(directory, unnorm_key=KEY).config


@pytest.mark.parametrize(
    "said",
    [
        {"rope_theta": 500_000},
        {"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "default"}, "rope_theta": 5e5},
    ],
)
def test_the_base_of_rotary_positions_is_read_wherever_it_is(publish: Publish, said: dict[str, Any]) -> None:
    directory = publish("openvla")
    edit_text(directory, **said)
    assert config(directory).model.decoder.rope_theta == 500_000


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}},
            "rope_type is 'linear'",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            r"rope_scaling: type is 'dynamic'; supported is",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters: full_attention is not supported",
        ),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "has the rope_theta 10000 and 1e.06"),
        ({"rope_parameters": [1e4]}, "text_config.rope_parameters must be an object"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be a positive float"),
        ({"partial_rotary_factor": 0.5}, "text_config: partial_rotary_factor is 0.5; supported is 1.0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu' or 'swish'"),
        ({"attention_bias": True}, "attention_bias is True; supported is False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"sliding_window": 4096}, "sliding_window is 4096; supported is none"),
        ({"quantization_config": {"load_in_4bit": True}}, "text_config: quantization_config is"),
        ({"tie_word_embeddings": True}, "makes one matrix of language_model.lm_head.weight and"),
    ],
)
def test_a_language_model_that_computes_something_else_is_refused(
    publish: Publish, said: dict[str, Any], message: str
) -> None:
    directory = publish("openvla")
    edit_text(directory, **said)
    with pytest.raises(CheckpointError, match=message):
        config(directory)


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("use_sliding_window", True, "False"),
        ("is_encoder_decoder", True, "False"),
        ("attn_logit_softcapping", 50.0, "none"),
        ("final_logit_softcapping", 30.0, "none"),
        ("embedding_multiplier", 12.0, "1.0"),
        ("attention_multiplier", 0.0078125, "none"),
        ("residual_multiplier", 0.22, "1.0"),
        ("logits_scaling", 8.0, "1.0"),
        ("use_qk_norm", True, "False"),
        ("pruned_heads", {"0": [1]}, "{}"),
    ],
)
def test_keys_of_other_language_models_are_refused(
    publish: Publish, key: str, value: object, supported: str
) -> None:
    directory = publish("openvla")
    edit_text(directory, **{key: value})
    sentence = f"text_config: {key} is {value!r}; supported is {supported}"
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        config(directory)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"arch_specifier": "no-align+linear"},
            "arch_specifier is 'no-align.linear'; supported are projectors",
        ),
        (
            {"timm_override_act_layers": ["quick_gelu", None]},
            "timm_override_act_layers is .'quick_gelu', None.",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "config.json: quantization_config is"),
        ({"use_fused_vision_backbone": "no"}, "use_fused_vision_backbone is 'no' with 2"),
        ({"use_fused_vision_backbone": 0}, "use_fused_vision_backbone is 0 with 2"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(
    publish: Publish, said: dict[str, Any], message: str
) -> None:
    directory = publish("openvla")
    edit(directory / "config.json", **said)
    with pytest.raises(CheckpointError, match=message):
        config(directory)


def test_one_matrix_for_both_ends_of_the_language_model(publish: Publish, load: Load) -> None:
    directory = publish("openvla")
    own, table = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    tensors = stored(directory)
    edit_text(directory, tie_word_embeddings=True)
    rewrite(directory, tensors | {own: tensors[table].clone()})
    config(directory)
    rewrite(directory, {name: tensor for name, tensor in tensors.items() if name != own})
    policy = sqap.load(directory, unnorm_key=KEY)
    policy.load_weights()
    weight = policy.model.head.lm_head.weight
    assert torch.equal(weight, tensors[table])
    assert weight.data_ptr() != policy.model.decoder.embed_tokens.weight.data_ptr()
    edit_text(directory, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=f"missing: {own}"):
        config(directory)


def test_what_changes_no_number_is_left_alone_and_what_is_unknown_is_said(
    publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    directory = publish("openvla")
    edit_text(directory, attention_dropout=0.1, pretraining_tp=2, dtype="bfloat16", id2label={"0": "LABEL_0"})
    edit(directory / "config.json", tie_word_embeddings=True, dtype="bfloat16", quantum=None, folds=False)
    expected = config(directory)
    assert not caplog.text
    edit_text(directory, attention_sinks=4)
    edit(directory / "config.json", quantum=1)
    edit(directory / PROCESSOR, do_flip=True)
    assert config(directory) == expected
    for words in (
        "config.json: sqap does not know quantum, and goes on as if it changed nothing",
        "config.json: text_config: sqap does not know attention_sinks,",
        f"{PROCESSOR}: sqap does not know do_flip,",
    ):
        assert words in caplog.text


def changed(key: str, i: int, **entry: object) -> dict[str, Any]:
    """The published processor's ``key``, other in one encoder's entry."""
    entries = list(preprocessor_config(TINY)[key])
    return {key: [*entries[:i], entries[i] | entry, *entries[i + 1 :]]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"image_resize_strategy": "letterbox"},
        "images are resized by 'letterbox'; supported is 'resize-naive'",
    ),
    ({"tvf_do_letterbox": True}, "tvf_do_letterbox is True; supported is False"),
    (
        changed("tvf_resize_params", 0, interpolation=2),
        r"tvf_resize_params.0.: interpolation is 2; supported is 3",
    ),
    (
        changed("tvf_resize_params", 1, interpolation="bilinear"),
        r"tvf_resize_params.1.: interpolation is 'bili",
    ),
    (changed("tvf_resize_params", 0, antialias=False), "antialias is False; supported is True"),
    (changed("tvf_resize_params", 0, max_size=60), "max_size is 60; supported is none"),
    (
        changed("tvf_resize_params", 1, size=[64, 64]),
        r"tvf_resize_params.1..size is .64, 64.; supported is .56, 56.",
    ),
    (changed("tvf_resize_params", 1, size=56), r"size is 56; supported is .56, 56."),  # the shorter side
    (changed("tvf_crop_params", 0, output_size=[48, 48]), r"tvf_crop_params.0..output_size is .48, 48."),
    ({"interpolations": ["bicubic", "bilinear"]}, r"interpolations.1. is 'bilinear'; supported is 'bicubic'"),
    ({"input_sizes": [[3, 56, 56], [3, 64, 64]]}, r"input_sizes.1. is .3, 64, 64.; supported is .3, 56, 56."),
    ({"input_sizes": [[3, 56, 56]]}, "input_sizes must be a list with an entry for every encoder"),
    ({"tvf_resize_params": [[56, 56]] * 2}, "tvf_resize_params must be a list of objects"),
    ({"use_fused_vision_backbone": False}, "use_fused_vision_backbone is False, the model has 2 encoders"),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("said", "message"), REFUSED)
def test_pixels_that_are_prepared_otherwise_are_refused(
    publish: Publish, said: dict[str, Any], message: str, nested: bool
) -> None:
    directory = publish("openvla")
    edit(directory / PROCESSOR, **said)
    if nested:
        nest(directory)
    with pytest.raises(CheckpointError, match=message):
        config(directory)


def nest(directory: Path) -> None:
    """What transformers 5 writes in place of an image processor's own file."""
    processor = json.loads((directory / PROCESSOR).read_text())
    shared = {"image_processor": processor, "processor_class": "PrismaticProcessor"}
    (directory / "processor_config.json").write_text(json.dumps(shared))
    (directory / PROCESSOR).unlink()


def test_a_processor_of_transformers_5_is_read(publish: Publish) -> None:
    directory = publish("openvla")
    expected = config(directory)
    nest(directory)
    assert config(directory) == expected
    shared = json.loads((directory / "processor_config.json").read_text())["image_processor"]
    changes = {"tvf_normalize_params": [{"mean": [0.1] * 3, "std": [0.2] * 3}] * 2}
    edit(directory / "processor_config.json", image_processor=shared | changes)
    assert {(steps[-1].mean, steps[-1].std) for steps in config(directory).images} == {
        ((0.1,) * 3, (0.2,) * 3)
    }
    (directory / PROCESSOR).write_text(json.dumps(shared))
    with pytest.raises(CheckpointError, match=r"differ in tvf_normalize_params; leave one of them"):
        config(directory)


def test_means_are_read_where_what_they_come_to_is_not_said(publish: Publish) -> None:
    directory = publish("openvla")
    changes = {"means": [[0.1] * 3, [0.2] * 3], "stds": [[0.3] * 3, [0.4] * 3]}
    edit(directory / PROCESSOR, tvf_normalize_params=None, **changes)
    assert [(steps[-1].mean[0], steps[-1].std[0]) for steps in config(directory).images] == [
        (0.1, 0.3),
        (0.2, 0.4),
    ]
    edit(directory / PROCESSOR, stds=[[0.0] * 3, [0.4] * 3])
    with pytest.raises(CheckpointError, match="of three numbers for every encoder, the latter above zero"):
        config(directory)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"past_action_window_size": 2},
            "past_action_window_size is 2, and the action model's tensors make it 0",
        ),
        ({"future_action_window_size": 7}, "future_action_window_size is 7, and .* make it 15"),
        ({"action_dim": 14}, "action_dim is 14, and the action model's tensors make it 7"),
    ],
)
def test_a_cogact_whose_configuration_contradicts_its_tensors_is_refused(
    publish: Publish, said: dict[str, Any], message: str
) -> None:
    directory = publish("cogact")
    edit(directory / "config.json", **said)
    with pytest.raises(CheckpointError, match=message):
        config(directory)
