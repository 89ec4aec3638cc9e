"""OpenVLA-OFT: parts in files of their own, FiLM with its adapters, one to three cameras."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sqap.checkpoints import openvla_oft
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.openvla_oft import merge_lora
from sqap.errors import CheckpointError
from sqap.models import RegressionHeadConfig
from sqap.processing import Clamp, Crop, Range, Scale, Stretch


def component(directory: Path, name: str) -> Path:
    (path,) = directory.glob(f"{name}--*_checkpoint.pt")
    return path


def stored(directory: Path, name: str) -> dict[str, torch.Tensor]:
    """A part's tensors as they were saved."""
    state: dict[str, torch.Tensor] = torch.load(component(directory, name), weights_only=True)
    return state


def edit_statistics(directory: Path, key: str | None = None, **entries: object) -> None:
    path = directory / "dataset_statistics.json"
    ((old, data),) = json.loads(path.read_text()).items()
    path.write_text(json.dumps({key or old: data | entries}))


@pytest.mark.parametrize(
    ("family", "head", "cameras", "proprio", "bounds"),
    [
        ("oft-libero", (7, 8), ("image", "wrist_image"), 8, ("q01", "q99")),
        ("oft-bridge", (7, 5), ("image",), 7, ("q01", "q99")),
        ("oft-aloha", (14, 25), ("image", "left_wrist_image", "right_wrist_image"), 14, ("min", "max")),
    ],
)
def test_the_configuration_is_that_of_the_robot(written, family, head, cameras, proprio, bounds):
    config = openvla_oft.open(written(family), Choices()).config
    assert (config.family, config.cameras) == ("openvla-oft", cameras)
    assert [steps[:3] for steps in config.images] == [(Stretch(56), Crop(0.9), Scale())] * 2
    assert config.prompt.append == (29871, 2)
    assert config.model.head == RegressionHeadConfig(*head, width=128, depth=2)
    assert (config.model.cameras, config.model.proprio_dim) == (len(cameras), proprio)
    assert config.model.decoder.causal is False
    assert config.model.decoder.norm_eps == 1e-6
    assert [vision.film for vision in config.model.vision] == [family == "oft-aloha"] * 2
    ((_, statistics),) = json.loads((written(family) / "dataset_statistics.json").read_text()).items()
    low, high = bounds
    (actions,) = config.actions
    assert actions.low == tuple(statistics["action"][low])
    assert actions.high == tuple(statistics["action"][high])
    state = Range(
        tuple(statistics["proprio"][low]), tuple(statistics["proprio"][high]), (True,) * proprio, 1e-8
    )
    assert config.state == (state, Clamp())


def test_every_tensor_goes_where_it_belongs(written, load):
    directory = written("oft-libero")
    published = openvla_oft.open(directory, Choices())
    state = load(published)
    head, proprio = stored(directory, "action_head"), stored(directory, "proprio_projector")
    pairs = {
        "head.norm1.weight": head["module.model.layer_norm1.weight"],
        "head.fc1.weight": head["module.model.fc1.weight"],
        "head.blocks.1.norm.bias": head["module.model.mlp_resnet_blocks.1.ffn.0.bias"],
        "head.blocks.0.fc.weight": head["module.model.mlp_resnet_blocks.0.ffn.1.weight"],
        "head.norm2.bias": head["module.model.layer_norm2.bias"],
        "head.fc2.bias": head["module.model.fc2.bias"],
        "proprio.layers.0.weight": proprio["module.fc1.weight"],
        "proprio.layers.1.bias": proprio["module.fc2.bias"],
    }
    for ours, tensor in pairs.items():
        assert torch.equal(state[ours], tensor), ours
    base = {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}
    assert torch.equal(
        state["vision.0.blocks.0.attn.qkv.weight"],
        base["vision_backbone.featurizer.blocks.0.attn.qkv.weight"],
    )
    assert len(state) + len(published.weights.unused) == len(base) + len(head) + len(proprio)
    assert "language_model.lm_head.weight" in published.weights.unused


def test_names_need_no_wrapper(publish, load):
    directory = publish("oft-libero")
    state = {name.removeprefix("module."): t for name, t in stored(directory, "action_head").items()}
    torch.save(state, component(directory, "action_head"))
    assert torch.equal(
        load(openvla_oft.open(directory, Choices()))["head.fc1.weight"], state["model.fc1.weight"]
    )


def test_encoders_with_film_replace_the_plain_ones_their_adapters_merged(written, load):
    directory = written("oft-aloha")
    published = openvla_oft.open(directory, Choices())
    state, theirs = load(published), stored(directory, "vision_backbone")
    block = "vision_backbone.fused_featurizer.blocks.1."
    assert torch.equal(state["vision.1.blocks.1.film.scale.weight"], theirs[f"{block}scale.weight"])
    assert torch.equal(state["vision.1.blocks.1.film.shift.bias"], theirs[f"{block}shift.bias"])
    assert torch.equal(state["vision.1.blocks.1.norm2.bias"], theirs[f"{block}block.norm2.bias"])
    qkv = f"{block}block.attn.qkv."
    assert torch.equal(state["vision.1.blocks.1.attn.qkv.bias"], theirs[f"{qkv}base_layer.bias"])
    a, b = (theirs[f"{qkv}lora_{which}.default.weight"].float() for which in "AB")
    weight = theirs[f"{qkv}base_layer.weight"].float() + 0.5 * b @ a  # rank 32, alpha 16
    torch.testing.assert_close(state["vision.1.blocks.1.attn.qkv.weight"], weight)
    assert not torch.allclose(weight, theirs[f"{qkv}base_layer.weight"].float(), atol=1e-3)
    unused = published.weights.unused
    assert "vision_backbone.featurizer.blocks.0.attn.qkv.weight" in unused
    assert "film.vision_backbone.featurizer.blocks.2.scale.weight" in unused
    assert not any(name.startswith(("projector.", "language_model.model.")) for name in unused)


def test_the_adapter_of_the_patch_convolution_is_merged_too(written, load):
    theirs = stored(written("oft-aloha"), "vision_backbone")
    patch = "vision_backbone.featurizer.patch_embed.proj."
    a, b = (theirs[f"{patch}lora_{which}.default.weight"].float() for which in "AB")
    base, pixels = theirs[f"{patch}base_layer.weight"].float(), torch.randn(1, 3, 28, 28)
    convolve = torch.nn.functional.conv2d
    wanted = convolve(pixels, base, stride=14) + 0.5 * convolve(convolve(pixels, a, stride=14), b)
    merged = load(openvla_oft.open(written("oft-aloha"), Choices()))["vision.0.patch_embed.weight"]
    torch.testing.assert_close(convolve(pixels, merged, stride=14), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rank", "scale"), [(4, 1.0), (16, 1.0), (64, 0.25)])
def test_adapters_count_less_the_more_of_them_there_are_beyond_sixteen(rank, scale):
    a, b = torch.ones(rank, 3), torch.ones(5, rank)
    assert torch.equal(merge_lora(torch.zeros(5, 3), a, b), torch.full((5, 3), rank * scale))


def test_a_small_update_is_not_rounded_away():
    weight, a = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 2**-10, dtype=torch.bfloat16)
    assert merge_lora(weight, a, torch.ones(1, 1).bfloat16()).item() == 1 + 2**-10


def test_without_a_projector_there_is_no_proprioception(publish):
    directory = publish("oft-libero")
    component(directory, "proprio_projector").unlink()
    config = openvla_oft.open(directory, Choices()).config
    assert (config.state, config.model.proprio_dim) == (None, None)


@pytest.mark.parametrize("name", ["noisy_action_projector", "noise_predictor"])
def test_the_diffusion_head_is_refused(publish, name):
    directory = publish("oft-libero")
    if name == "noise_predictor":
        head = component(directory, "action_head")
        torch.save({"module.noise_predictor.mlp_resnet.fc1.weight": torch.ones(2, 2)}, head)
    else:
        torch.save({"fc1.weight": torch.ones(2, 2)}, directory / f"{name}--5_checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"diffusion head.* is not supported"):
        openvla_oft.open(directory, Choices())


def test_an_action_head_is_needed_and_one_only(publish):
    directory = publish("oft-libero")
    head = component(directory, "action_head")
    other = directory / "action_head--5_checkpoint.pt"
    other.write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"several of action_head; leave one .*{other.name}"):
        openvla_oft.open(directory, Choices())
    head.unlink()
    other.unlink()
    with pytest.raises(
        CheckpointError, match=r"incomplete: it has no action_head--\*_checkpoint\.pt, which the L1"
    ):
        openvla_oft.open(directory, Choices())


def test_code_in_an_action_head_is_refused_and_does_not_run(publish, payload):
    directory = publish("oft-libero")
    state = stored(directory, "action_head") | {"module.extra": {"deep": [payload]}}
    torch.save(state, component(directory, "action_head"))
    with pytest.raises(
        CheckpointError, match=r"action_head--.* holds posix\.mkdir.* nothing in it was executed"
    ):
        openvla_oft.open(directory, Choices())
    assert not payload.marker.exists()


def test_half_an_action_head_is_named(publish):
    directory = publish("oft-libero")
    path = component(directory, "action_head")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=rf"{path.name} is truncated"):
        openvla_oft.open(directory, Choices())


def test_a_head_of_another_width_does_not_fit(publish):
    directory = publish("oft-libero")
    state = stored(directory, "action_head")
    state["module.model.fc1.weight"] = torch.ones(128, 7 * 64)
    torch.save(state, component(directory, "action_head"))
    with pytest.raises(CheckpointError, match=r"fc1\.weight is \(128, 448\) where head\.fc1\.weight must be"):
        openvla_oft.open(directory, Choices())


def test_statistics_must_be_those_of_the_robot(publish):
    directory = publish("oft-libero")
    edit_statistics(directory, action={"q01": [0] * 6, "q99": [1] * 6})
    with pytest.raises(CheckpointError, match="actions of 6 numbers, but the model's have 7"):
        openvla_oft.open(directory, Choices())
    edit_statistics(directory, action={"q01": [0] * 7, "q99": [1] * 7}, proprio={"q01": [0], "q99": [1]})
    with pytest.raises(CheckpointError, match="states of 1 numbers, but the model's have 8"):
        openvla_oft.open(directory, Choices())
    edit_statistics(directory, proprio=None)
    with pytest.raises(CheckpointError, match="has no proprio statistics"):
        openvla_oft.open(directory, Choices())
    with pytest.raises(CheckpointError, match="unnorm_key must be one of: libero_spatial_no_noops"):
        openvla_oft.open(directory, Choices(unnorm_key="libero"))


def test_without_a_file_of_statistics_the_configurations_are_used(publish):
    directory = publish("oft-bridge")
    (directory / "dataset_statistics.json").unlink()
    with pytest.raises(CheckpointError, match="'fractal20220817_data' with 7 action dimensions is none of"):
        openvla_oft.open(directory, Choices(unnorm_key="fractal20220817_data"))
    assert openvla_oft.open(directory, Choices(unnorm_key="bridge_orig")).config.model.head.horizon == 5


@pytest.mark.parametrize("cameras", [("a",), ("a", "b"), ("a", "b", "c")])
def test_there_are_as_many_cameras_as_are_named(written, cameras):
    config = openvla_oft.open(written("oft-libero"), Choices(cameras=cameras)).config
    assert config.cameras == cameras
    assert config.model.cameras == len(cameras)


@pytest.mark.parametrize("cameras", [(), ("a", "a"), ("a", "b", "c", "d")])
def test_no_camera_a_repeated_one_and_too_many_are_refused(written, cameras):
    with pytest.raises(CheckpointError, match=f"reads 1 or 2 or 3 different cameras, got {len(cameras)}"):
        openvla_oft.open(written("oft-libero"), Choices(cameras=cameras))


def test_the_tokenizer_may_be_missing(publish):
    directory = publish("oft-libero")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer: put Llama 2's tokenizer\.json there"):
        openvla_oft.open(directory, Choices())
