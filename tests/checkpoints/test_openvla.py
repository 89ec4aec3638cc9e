"""OpenVLA as it is published for Hugging Face."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sqap.checkpoints import openvla
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.published import recognise
from sqap.errors import CheckpointError
from sqap.models import DecoderConfig, TokenHeadConfig
from sqap.processing import Clamp, Lower, Normalize, PromptConfig, Range, Template, stretched

from .edits import edit, rewrite, stored

KEY = "bridge_orig"


def test_the_configuration_is_the_published_one(written):
    config = openvla.open(written("openvla"), Choices(unnorm_key=KEY)).config
    assert (config.family, config.cameras, config.state) == ("openvla", ("image",), None)
    assert config.images == (stretched(56, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), stretched(56))
    template = Template("In: What action should the robot take to {instruction}?\nOut:")
    assert config.prompt == PromptConfig((Lower(), template), append=(29871,))
    assert config.model.head == TokenHeadConfig(7, 32064, bins=256, last_token=32000)
    assert config.model.projector == (448, 128, 128)
    assert config.model.decoder == DecoderConfig(32064, 128, 3, 4, 4, 32, 192, 10_000.0, 1e-6)
    dino, siglip = config.model.vision
    for vision in (dino, siglip):
        assert (vision.image_size, vision.patch_size, vision.depth, vision.heads) == (56, 14, 3, 16)
        assert (vision.take_block, vision.final_norm, vision.activation, vision.norm_eps) == (
            -2,
            False,
            "gelu",
            1e-6,
        )
    assert (dino.width, dino.mlp_width, dino.class_token, dino.registers, dino.layer_scale) == (
        (48, 192, True, 4, True)
    )
    assert (siglip.width, siglip.mlp_width, siglip.class_token, siglip.registers, siglip.layer_scale) == (
        (64, 239, False, 0, False)
    )


def test_actions_are_unnormalised_by_the_percentiles_of_the_dataset(written):
    statistics = json.loads((written("openvla") / "config.json").read_text())["norm_stats"][KEY]["action"]
    assert openvla.open(written("openvla"), Choices(unnorm_key=KEY)).config.actions == (
        Clamp(),
        Range(tuple(statistics["q01"]), tuple(statistics["q99"]), (True,) * 6 + (False,)),
    )


def test_every_tensor_goes_where_it_belongs(written, load):
    published = openvla.open(written("openvla"), Choices(unnorm_key=KEY))
    state, theirs = load(published), stored(written("openvla"))
    pairs = {
        "vision.0.blocks.1.attn.qkv.weight": "vision_backbone.featurizer.blocks.1.attn.qkv.weight",
        "vision.0.blocks.0.ls2.scale_factor": "vision_backbone.featurizer.blocks.0.ls2.scale_factor",
        "vision.1.patch_embed.weight": "vision_backbone.fused_featurizer.patch_embed.proj.weight",
        "projector.layers.2.bias": "projector.fc3.bias",
        "decoder.layers.2.mlp.down_proj.weight": "language_model.model.layers.2.mlp.down_proj.weight",
        "decoder.norm.weight": "language_model.model.norm.weight",
        "decoder.embed_tokens.weight": "language_model.model.embed_tokens.weight",
        "head.lm_head.weight": "language_model.lm_head.weight",
    }
    for ours, name in pairs.items():
        assert torch.equal(state[ours], theirs[name]), ours
        assert state[ours].dtype == torch.bfloat16
    for token in ("pos_embed", "cls_token", "reg_token"):
        assert torch.equal(state[f"vision.0.{token}"], theirs[f"vision_backbone.featurizer.{token}"][0])
    assert len(state) + len(published.weights.unused) == len(theirs)


def test_what_is_unused_is_what_lies_behind_the_block_that_is_read(written):
    unused = openvla.open(written("openvla"), Choices(unnorm_key=KEY)).weights.unused
    behind = ("blocks.2.", "norm.", "attn_pool.")
    assert {name.partition("featurizer.")[2].startswith(behind) for name in unused} == {True}
    assert "vision_backbone.fused_featurizer.attn_pool.latent" in unused


def test_pixels_are_normalised_as_the_processor_says(publish):
    directory = publish("openvla")
    rounded = {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    edit(directory / "preprocessor_config.json", tvf_normalize_params=[rounded, half])
    dino, siglip = openvla.open(directory, Choices(unnorm_key=KEY)).config.images
    assert dino[-1] == Normalize(tuple(rounded["mean"]), tuple(rounded["std"]))
    assert siglip[-1] == Normalize((0.5,) * 3, (0.5,) * 3)
    (directory / "preprocessor_config.json").unlink()
    dino, siglip = openvla.open(directory, Choices(unnorm_key=KEY)).config.images
    assert dino[-1] == Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert siglip[-1].mean == (0.5,) * 3


NO_NUMBER = {"mean": [0.5, 0.5, False], "std": [0.5] * 3}


@pytest.mark.parametrize(
    "entries", [[], [{"mean": [0.5] * 3, "std": [0.5] * 3}], [{"mean": 3}] * 2, [NO_NUMBER] * 2, 5]
)
def test_a_processor_without_two_normalisations_is_refused(publish, entries):
    directory = publish("openvla")
    edit(directory / "preprocessor_config.json", tvf_normalize_params=entries)
    with pytest.raises(CheckpointError, match=r"tvf_normalize_params must (have a mean and|be a list)"):
        openvla.open(directory, Choices(unnorm_key=KEY))


@pytest.mark.parametrize(
    ("silent", "message"),
    [
        ("num_hidden_layers", r"missing: language_model\.model\.layers\.3\.\S+, .* and 253 more"),
        ("intermediate_size", r"where decoder\.layers\.0\.mlp\.gate_proj\.weight must be \(11008, 128\)"),
        ("hidden_size", r"where decoder\.layers\.0\.input_layernorm\.weight must be \(4096,\)"),
    ],
)
def test_llamas_defaults_stand_where_the_configuration_is_silent(publish, silent, message):
    """The published one says next to nothing, so that its sizes are 7B's."""
    directory = publish("openvla")
    text = json.loads((directory / "config.json").read_text())["text_config"]
    edit(directory / "config.json", text_config={n: v for n, v in text.items() if n != silent})
    with pytest.raises(CheckpointError, match=message):
        openvla.open(directory, Choices(unnorm_key=KEY))


def test_a_directory_with_too_little_too_much_and_the_wrong_size_says_all_three(publish):
    directory = publish("openvla")
    tensors = stored(directory)
    tensors["language_model.extra"] = tensors.pop("projector.fc2.bias")
    tensors["language_model.model.norm.weight"] = torch.ones(64)
    rewrite(directory, tensors)
    with pytest.raises(CheckpointError) as error:
        openvla.open(directory, Choices(unnorm_key=KEY))
    assert "missing: projector.fc2.bias; not known: language_model.extra; " in str(error.value)
    assert "language_model.model.norm.weight is (64,) where decoder.norm.weight must be (128,)" in str(
        error.value
    )


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.embed_tokens.weight",
        "projector.fc1.weight",
        "vision_backbone.featurizer.patch_embed.proj.weight",
        "vision_backbone.featurizer.reg_token",
    ],
)
def test_tensors_that_tell_sizes_are_missed_by_name(publish, name):
    directory = publish("openvla")
    tensors = stored(directory)
    tensor = tensors.pop(name)
    rewrite(directory, tensors)
    with pytest.raises(CheckpointError, match=f"lacks {name}, by which the size of the model is known"):
        openvla.open(directory, Choices(unnorm_key=KEY))
    rewrite(directory, tensors | {name: tensor.flatten()})
    with pytest.raises(CheckpointError, match=f"{name} must have [234] dimensions, not the shape"):
        openvla.open(directory, Choices(unnorm_key=KEY))


def test_a_model_without_an_encoder_is_refused(publish):
    directory = publish("openvla")
    rewrite(directory, {n: t for n, t in stored(directory).items() if ".fused_featurizer.blocks." not in n})
    with pytest.raises(CheckpointError, match=r"lacks vision_backbone\.fused_featurizer\.blocks\.0"):
        openvla.open(directory, Choices(unnorm_key=KEY))


def test_a_single_encoder_has_a_projector_of_two(publish, load):
    directory = publish("openvla")
    theirs = {}
    for name, tensor in stored(directory).items():
        if not name.startswith(("vision_backbone.featurizer.", "projector.")):
            theirs[name.replace("fused_featurizer", "featurizer")] = tensor
    theirs |= {"projector.fc1.weight": torch.ones(128, 64), "projector.fc1.bias": torch.ones(128)}
    theirs |= {"projector.fc2.weight": torch.ones(128, 128), "projector.fc2.bias": torch.ones(128)}
    rewrite(directory, theirs)
    edit(
        directory / "config.json",
        use_fused_vision_backbone=False,
        timm_model_ids=["vit_so400m_patch14_siglip_224"],
        image_sizes=[56],
    )
    (directory / "preprocessor_config.json").unlink()
    published = openvla.open(directory, Choices(unnorm_key=KEY))
    assert [v.width for v in published.config.model.vision] == [64]
    assert published.config.images == (stretched(56),)
    assert published.config.model.projector == (128, 128)
    assert torch.equal(load(published)["projector.layers.1.bias"], torch.ones(128))


def test_encoders_are_known_by_the_backbone_where_nothing_else_names_them(publish):
    directory = publish("openvla")
    edit(directory / "config.json", timm_model_ids=None, image_sizes=None)
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 16, 48\) .* must be \(256, 48\)"):
        openvla.open(directory, Choices(unnorm_key=KEY))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_resize_strategy": "letterbox"}, "resized by 'letterbox'; supported is 'resize-naive'"),
        ({"image_resize_strategy": "resize-crop"}, "resized by 'resize-crop'; supported is 'resize-naive'"),
        ({"image_resize_strategy": None}, "resized by 'letterbox'"),
        (
            {"timm_model_ids": ["vit_large_patch14_clip_336.openai"]},
            "clip_336.* supported are one or two of vit_large_patch14_reg4_dinov2.lvd142m, vit_so400m",
        ),
        (
            {"timm_model_ids": None, "vision_backbone_id": "in1k-vit-l"},
            "the vision encoders are in1k-vit-l; supported",
        ),
        ({"image_sizes": [56]}, r"image_sizes must be 2 positive numbers, got \[56\]"),
        ({"image_sizes": [56, 0]}, r"image_sizes must be 2 positive numbers, got \[56, 0\]"),
        (
            {"text_config": {"model_type": "mistral"}},
            r"\(mistral\); supported are llama2-7b-pure, llama2-13b",
        ),
        ({"llm_backbone_id": "vicuna-v15-7b"}, r"vicuna-v15-7b \(llama\); supported are llama2-7b-pure"),
        ({"text_config": {"rope_scaling": {"factor": 2}}}, "rope_scaling: factor is not supported"),
        ({"text_config": [4096]}, "text_config must be an object"),
        ({"text_config": {"hidden_size": "4096"}}, "hidden_size must be a positive int up to .*, got '4096'"),
        (
            {"text_config": {"num_attention_heads": 0}},
            "num_attention_heads must be a positive int up to .*, got 0",
        ),
        (
            {"text_config": {"num_hidden_layers": 10**30}},
            "num_hidden_layers must be a positive int up to 1024",
        ),
        ({"text_config": {"rope_theta": float("nan")}}, "rope_theta must be a positive float"),
        ({"text_config": {"hidden_size": 10**30}}, "hidden_size must be a positive int"),
        ({"timm_model_ids": [["x"]]}, "the vision encoders are"),
        ({"text_config": {"rms_norm_eps": -1e-6}}, "rms_norm_eps must be a positive float"),
        (
            {"text_config": {"num_attention_heads": 128, "head_dim": 1}},
            "128 attention heads of 1 channels cannot",
        ),
        (
            {"text_config": {"num_key_value_heads": 5}},
            "32 attention heads of 128 channels cannot share 5 of keys",
        ),
        ({"n_action_bins": 1}, "1 n_action_bins do not go into the 32000 tokens before the padding"),
        ({"pad_to_multiple_of": 32_000}, "256 n_action_bins do not go into the 64 tokens"),
        ({"n_action_bins": 256.5}, "n_action_bins must be a positive int"),
    ],
)
def test_what_is_not_supported_is_said_with_what_is(publish, changes, message):
    directory = publish("openvla")
    edit(directory / "preprocessor_config.json", image_resize_strategy=None)
    edit(directory / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        openvla.open(directory, Choices(unnorm_key=KEY))


def test_the_processor_has_the_last_word_on_resizing(publish):
    directory = publish("openvla")
    edit(directory / "preprocessor_config.json", image_resize_strategy="letterbox")
    with pytest.raises(CheckpointError, match="resized by 'letterbox'"):
        openvla.open(directory, Choices(unnorm_key=KEY))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (None, "statistics of several datasets; name one as unnorm_key: bridge_orig, fractal20220817_data$"),
        (
            "bridge",
            "no statistics of 'bridge'; unnorm_key must be one of: bridge_orig, fractal20220817_data$",
        ),
    ],
)
def test_datasets_are_listed_when_none_or_a_wrong_one_is_asked_for(written, key, message):
    with pytest.raises(CheckpointError, match=message):
        openvla.open(written("openvla"), Choices(unnorm_key=key))


def test_one_dataset_needs_no_name_and_fine_tunings_own_goes_first(publish):
    directory = publish("openvla")
    action = {"q01": [-1, -1], "q99": [1.0, 2]}
    (directory / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": action}}))
    published = openvla.open(directory, Choices())
    assert published.config.actions == (Clamp(), Range((-1.0, -1.0), (1.0, 2.0), (True, True)))
    assert published.config.model.head.action_dim == 2


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({}, "no statistics to unnormalise"),
        ({"mine": {}}, "mine has no action statistics"),
        ({"mine": []}, "mine has no action statistics"),
        ({"mine": {"action": {"q01": [0]}}}, "mine.action lacks q99"),
        ({"mine": {"action": {"q01": [0], "q99": [float("nan")]}}}, "q99 must be a list of finite numbers"),
        ({"mine": {"action": {"q01": [-(10**400)], "q99": [1]}}}, "q01 must be a list of finite numbers"),
        ({"mine": {"action": {"q01": [0], "q99": [1e39]}}}, "q99 must be .* numbers, as 32 bits hold them"),
        ({"mine": {"action": {"q01": ["0"], "q99": [1]}}}, "q01 must be a list of finite numbers"),
        ({"mine": {"action": {"q01": [0], "q99": [1, 2]}}}, "must have one length, not 1, 2 and 1"),
        (
            {"mine": {"action": {"q01": [0], "q99": [1], "mask": [1]}}},
            "mask must be a list of true and false",
        ),
    ],
)
def test_statistics_that_are_none_are_refused(publish, statistics, message):
    directory = publish("openvla")
    (directory / "dataset_statistics.json").write_text(json.dumps(statistics))
    with pytest.raises(CheckpointError, match=message):
        openvla.open(directory, Choices())


def test_a_model_without_statistics_is_refused(publish):
    directory = publish("openvla")
    edit(directory / "config.json", norm_stats=None)
    with pytest.raises(CheckpointError, match=r"config\.json has no statistics to unnormalise actions with"):
        openvla.open(directory, Choices())


@pytest.mark.parametrize("name", ["preprocessor_config.json", "dataset_statistics.json", "config.json"])
def test_a_broken_link_is_not_a_file_that_is_left_out(publish, name):
    """A cache of the hub whose blob is gone: the defaults would be another policy's."""
    directory = publish("openvla")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("gone")
    with pytest.raises(CheckpointError, match=rf"cannot read \S+{name}: No such file"):
        recognise(directory).open(directory, Choices(unnorm_key=KEY))


def test_there_is_one_camera_and_it_may_have_any_name(written):
    published = openvla.open(written("openvla"), Choices(unnorm_key=KEY, cameras=("corner2",)))
    assert published.config.cameras == ("corner2",)
    assert published.config.model.cameras == 1
    with pytest.raises(CheckpointError, match=r"OpenVLA reads 1 different camera, got 2: image, wrist$"):
        openvla.open(written("openvla"), Choices(unnorm_key=KEY, cameras=("image", "wrist")))


def test_a_shard_of_another_size_is_noticed(publish):
    """Its names are right, so the index has nothing against it."""
    directory = publish("openvla")
    shard = sorted(directory.glob("*.safetensors"))[-1]
    save_file({name: torch.zeros(2, 2) for name in load_file(shard)}, shard)
    with pytest.raises(
        CheckpointError, match=r"of another shape or kind: language_model\..* is \(2, 2\) where"
    ):
        openvla.open(directory, Choices(unnorm_key=KEY))


def test_half_a_shard_is_named(publish):
    directory = publish("openvla")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated"):
        openvla.open(directory, Choices(unnorm_key=KEY))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"incomplete: of 3 shards it lacks {shard.name}"):
        openvla.open(directory, Choices(unnorm_key=KEY))
