"""Prismatic's own layout: CogACT, and OpenVLA as it came out of training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published import TINY, write_cogact

from sqap.checkpoints import cogact
from sqap.checkpoints.choices import Choices
from sqap.errors import CheckpointError
from sqap.models import DecoderConfig, DiffusionHeadConfig, TokenHeadConfig
from sqap.processing import Binarize, Clamp, Lower, PromptConfig, Range, Template, stretched

KEY = "bridge_orig"


def checkpoint(directory: Path) -> Path:
    (path,) = (directory / "checkpoints").glob("*.pt")
    return path


def stored(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The parts of the model as they were saved."""
    model: dict[str, dict[str, torch.Tensor]] = torch.load(checkpoint(directory), weights_only=True)["model"]
    return model


def edit_config(directory: Path, base_vlm: object) -> None:
    (directory / "config.json").write_text(json.dumps({"vla": {"base_vlm": base_vlm}}))


def test_the_configuration_is_the_published_one(written):
    config = cogact.open(written("cogact"), Choices(unnorm_key=KEY)).config
    assert (config.family, config.cameras, config.state) == ("cogact", ("image",), None)
    assert config.prompt == PromptConfig(
        (Lower(), Template("In: What action should the robot take to {instruction}?\nOut:")),
        append=(29871, 2),
    )
    assert config.model.head == DiffusionHeadConfig(7, 16, 128, 2, 2)
    assert config.model.decoder == DecoderConfig(32064, 128, 3, 1, 1, 128, 192, 10_000.0, 1e-5)
    assert [(v.width, v.image_size, v.registers, v.layer_scale) for v in config.model.vision] == [
        (48, 56, 4, True),
        (64, 56, 0, False),
    ]
    assert config.images == (stretched(56, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), stretched(56))
    statistics = json.loads((written("cogact") / "dataset_statistics.json").read_text())[KEY]["action"]
    clip, binarize, bounds = config.actions
    assert (clip, binarize) == (Clamp(), Binarize((6,)))
    assert (bounds.low, bounds.high) == (tuple(statistics["q01"]), tuple(statistics["q99"]))


def test_every_tensor_goes_where_it_belongs(written, load):
    published = cogact.open(written("cogact"), Choices(unnorm_key=KEY))
    state, theirs = load(published), stored(written("cogact"))
    pairs = {
        "vision.0.blocks.0.ls1.scale_factor": ("vision_backbone", "dino_featurizer.blocks.0.ls1.gamma"),
        "vision.1.blocks.1.mlp.fc2.bias": ("vision_backbone", "siglip_featurizer.blocks.1.mlp.fc2.bias"),
        "projector.layers.1.weight": ("projector", "projector.2.weight"),
        "decoder.layers.0.self_attn.o_proj.weight": (
            "llm_backbone",
            "llm.model.layers.0.self_attn.o_proj.weight",
        ),
        "head.x_embedder.weight": ("action_model", "net.x_embedder.linear.weight"),
        "head.t_embedder.0.bias": ("action_model", "net.t_embedder.mlp.0.bias"),
        "head.t_embedder.2.weight": ("action_model", "net.t_embedder.mlp.2.weight"),
        "head.z_embedder.weight": ("action_model", "net.z_embedder.linear.weight"),
        "head.uncondition": ("action_model", "net.z_embedder.uncondition"),
        "head.positional_embedding": ("action_model", "net.positional_embedding"),
        "head.blocks.1.mlp.fc1.weight": ("action_model", "net.blocks.1.mlp.fc1.weight"),
        "head.final_layer.bias": ("action_model", "net.final_layer.linear.bias"),
    }
    for ours, (part, name) in pairs.items():
        assert torch.equal(state[ours], theirs[part][name]), ours
    assert torch.equal(
        state["vision.1.pos_embed"], theirs["vision_backbone"]["siglip_featurizer.pos_embed"][0]
    )
    assert len(state) + len(published.weights.unused) == sum(len(part) for part in theirs.values())
    assert "model.llm_backbone.llm.lm_head.weight" in published.weights.unused
    assert "model.action_model.net.history_embedder.linear.weight" in published.weights.unused


def test_averaged_weights_are_used_if_they_are_asked_for(tmp_path, load, caplog):
    write_cogact(tmp_path, TINY, ema=True)
    theirs, name = stored(tmp_path), "net.final_layer.linear.weight"
    assert not torch.equal(theirs["ema_diffusion"][name], theirs["action_model"][name])
    raw = cogact.open(tmp_path, Choices(unnorm_key=KEY))
    assert "the raw action model is read" in caplog.text
    assert torch.equal(load(raw)["head.final_layer.weight"], theirs["action_model"][name])
    assert f"model.ema_diffusion.{name}" in raw.weights.unused
    caplog.clear()
    averaged = cogact.open(tmp_path, Choices(unnorm_key=KEY, ema=True))
    assert not caplog.text
    assert torch.equal(load(averaged)["head.final_layer.weight"], theirs["ema_diffusion"][name])
    assert f"model.action_model.{name}" in averaged.weights.unused
    assert raw.weights.fingerprint != averaged.weights.fingerprint  # the same files, but not the same policy


def test_averaged_weights_that_are_not_there_are_refused(written):
    for family, message in (("cogact", "no averaged action model"), ("native-openvla", "no choice of ema")):
        with pytest.raises(CheckpointError, match=message):
            cogact.open(written(family), Choices(unnorm_key=KEY, ema=True))


def test_without_an_action_model_it_is_openvla(written, load):
    published = cogact.open(written("native-openvla"), Choices(unnorm_key=KEY))
    assert published.config.family == "openvla"
    assert published.config.prompt.append == (29871,)
    assert [type(step) for step in published.config.actions] == [Clamp, Range]
    assert published.config.model.head == TokenHeadConfig(7, 32064, 256, 32000)
    theirs = stored(written("native-openvla"))["llm_backbone"]["llm.lm_head.weight"]
    assert torch.equal(load(published)["head.lm_head.weight"], theirs)


@pytest.mark.parametrize(("width", "heads"), [(384, 4), (768, 12), (1024, 16), (192, 3)])
def test_the_heads_of_the_published_sizes_are_known(tmp_path, width, heads):
    write_cogact(tmp_path, replace(TINY, dit_width=width, dit_depth=1))
    assert cogact.open(tmp_path, Choices(unnorm_key=KEY)).config.model.head.heads == heads


@pytest.mark.parametrize(
    ("base_vlm", "written_size", "size"),
    [
        ("prism-dinosiglip-224px+7b", 224, 224),
        ("prism-dinosiglip+7b", 378, 384),  # 27 patches of 14, and six pixels beyond them
        ("prism-dinosiglip+7b", 28, 28),
        ("runs/prism-dinosiglip+13b", 378, 384),
    ],
)
def test_the_image_is_as_large_as_the_base_model_says(tmp_path, base_vlm, written_size, size):
    write_cogact(tmp_path, replace(TINY, image=written_size))
    edit_config(tmp_path, base_vlm)
    vision = cogact.open(tmp_path, Choices(unnorm_key=KEY)).config.model.vision
    assert [config.image_size for config in vision] == [size, size]


def test_a_base_model_with_one_encoder_needs_but_that(publish, load):
    directory = publish("cogact")
    model = stored(directory)
    model["vision_backbone"] = {
        name.replace("siglip_featurizer", "featurizer"): tensor
        for name, tensor in model["vision_backbone"].items()
        if name.startswith("siglip")
    }
    model["projector"] = {
        "projector.0.weight": torch.ones(128, 64),
        "projector.0.bias": torch.ones(128),
        "projector.2.weight": torch.ones(128, 128),
        "projector.2.bias": torch.full((128,), 2.0),
    }
    torch.save({"model": model}, checkpoint(directory))
    edit_config(directory, "prism-siglip+7b")
    published = cogact.open(directory, Choices(unnorm_key=KEY))
    assert [config.width for config in published.config.model.vision] == [64]
    assert torch.equal(load(published)["projector.layers.1.bias"], torch.full((128,), 2.0))


@pytest.mark.parametrize("name", ["siglip-224px+7b", "phi-2+3b", "prism-clip+7b"])
def test_other_base_models_are_named_with_those_that_are_supported(publish, name):
    directory = publish("cogact")
    edit_config(directory, name)
    with pytest.raises(CheckpointError) as error:
        cogact.open(directory, Choices(unnorm_key=KEY))
    assert f"base_vlm {name} is not supported; supported are prism-dinosiglip-224px+7b, " in str(error.value)


def test_a_language_model_that_is_no_llama_2_is_refused(tmp_path):
    write_cogact(tmp_path, replace(TINY, decoder_width=192, decoder_heads=3))
    with pytest.raises(CheckpointError, match="the language model is no Llama 2, whose heads are 128 wide"):
        cogact.open(tmp_path, Choices(unnorm_key=KEY))


def test_what_training_went_on_from_is_not_needed(publish):
    directory = publish("cogact")
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-5}]}
    torch.save({"model": stored(directory), "optimizer": optimizer}, checkpoint(directory))
    assert "optimizer.state.0.exp_avg" in cogact.open(directory, Choices(unnorm_key=KEY)).weights.unused


def test_too_little_too_much_and_the_wrong_size_are_said_at_once(publish):
    directory = publish("cogact")
    model = stored(directory)
    model["projector"]["projector.6.bias"] = model["projector"].pop("projector.4.bias")
    model["action_model"]["net.final_layer.linear.bias"] = torch.zeros(14)
    torch.save({"model": model}, checkpoint(directory))
    with pytest.raises(CheckpointError) as error:
        cogact.open(directory, Choices(unnorm_key=KEY))
    assert str(error.value) == (
        f"{directory} does not hold the model it describes: missing: model.projector.projector.4.bias; "
        "not known: model.projector.projector.6.bias; of another shape or kind: "
        "model.action_model.net.final_layer.linear.bias is (14,) where head.final_layer.bias must be (7,)"
    )


def test_a_checkpoint_without_vision_is_refused(publish):
    directory = publish("cogact")
    model = stored(directory)
    del model["vision_backbone"]
    torch.save({"model": model}, checkpoint(directory))
    with pytest.raises(CheckpointError, match=r"lacks model\.vision_backbone\.dino_featurizer\.patch_embed"):
        cogact.open(directory, Choices(unnorm_key=KEY))


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(publish, payload):
    directory = publish("cogact")
    torch.save({"model": stored(directory), "note": payload}, checkpoint(directory))
    with pytest.raises(CheckpointError, match=r"holds posix\.mkdir.* nothing in it was executed"):
        cogact.open(directory, Choices(unnorm_key=KEY))
    assert not payload.marker.exists()


def test_half_a_checkpoint_is_named(publish):
    directory = publish("cogact")
    path = checkpoint(directory)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=rf"{path.name} is truncated"):
        cogact.open(directory, Choices(unnorm_key=KEY))


def test_there_must_be_one_checkpoint_or_a_latest_one(publish):
    directory = publish("cogact")
    path = checkpoint(directory)
    (path.parent / "other.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"several checkpoints; leave one .*: other\.pt, {path.name}"):
        cogact.open(directory, Choices(unnorm_key=KEY))
    path.rename(path.parent / "latest-checkpoint.pt")
    cogact.open(directory, Choices(unnorm_key=KEY))
    for file in path.parent.iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: there must be one \.pt file in checkpoints/"):
        cogact.open(directory, Choices(unnorm_key=KEY))


def test_the_tokenizer_that_is_not_published_has_to_be_put_there_or_named(publish, tmp_path):
    directory = publish("cogact")
    (directory / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"has no tokenizer: put Llama 2's tokenizer\.json there"):
        cogact.open(directory, Choices(unnorm_key=KEY))
    assert (
        cogact.open(directory, Choices(unnorm_key=KEY, tokenizer=tmp_path)).tokenizer.token_to_id("<s>") == 1
    )


def test_statistics_must_be_those_of_the_models_actions(publish):
    directory = publish("cogact")
    with pytest.raises(CheckpointError, match="name one as unnorm_key: bridge_orig, fractal20220817_data"):
        cogact.open(directory, Choices())
    mine = {"mine": {"action": {"q01": [0] * 6, "q99": [1] * 6}}}
    (directory / "dataset_statistics.json").write_text(json.dumps(mine))
    with pytest.raises(CheckpointError, match="mine has actions of 6 numbers, but the model's have 7"):
        cogact.open(directory, Choices())
    (directory / "dataset_statistics.json").unlink()
    with pytest.raises(CheckpointError, match=r"dataset_statistics\.json has no statistics"):
        cogact.open(directory, Choices())


def test_there_is_one_camera(written):
    with pytest.raises(CheckpointError, match="CogACT reads 1 different camera, got 2: a, b"):
        cogact.open(written("cogact"), Choices(unnorm_key=KEY, cameras=("a", "b")))
