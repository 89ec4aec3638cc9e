"""Adapters beside weights: merged ones are what training leaves, others would be left out without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sqap
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.published import recognise
from sqap.errors import CheckpointError

from .conftest import Publish

RANK, ALPHA = 32, 16
MODULES = [
    f"language_model.model.layers.{i}.{name}"
    for i in range(3)
    for name in ("self_attn.q_proj", "mlp.down_proj")
]
UNMERGED = r"has a LoRA adapter that is not merged into the weights: merge it into its base"


def write_adapter(
    directory: Path, folder: str, *, gain: float = 0.1, rslora: bool = False
) -> dict[str, torch.Tensor]:
    """peft's files, as training leaves them; returns what is to be added to each weight."""
    generator = torch.Generator().manual_seed(0)
    shapes = {n: t.shape for f in directory.glob("model*.safetensors") for n, t in load_file(f).items()}
    state, updates = {}, {}
    for module in MODULES:
        outputs, inputs = shapes[f"{module}.weight"]
        a = torch.randn(RANK, inputs, generator=generator)
        b = gain * torch.randn(outputs, RANK, generator=generator)
        state[f"base_model.model.{module}.lora_A.weight"] = a
        state[f"base_model.model.{module}.lora_B.weight"] = b
        updates[f"{module}.weight"] = (ALPHA / (RANK**0.5 if rslora else RANK)) * b @ a
    (directory / folder).mkdir(exist_ok=True)
    save_file(state, directory / folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": rslora}
    (directory / folder / "adapter_config.json").write_text(json.dumps(config))
    return updates


def merge(directory: Path, updates: dict[str, torch.Tensor]) -> None:
    for file in directory.glob("model*.safetensors"):
        state = load_file(file)
        changed = {n: (t.float() + updates[n]).to(t.dtype) if n in updates else t for n, t in state.items()}
        save_file(changed, file)


@pytest.mark.parametrize("folder", [".", "lora_adapter"])
@pytest.mark.parametrize("gain", [0.1, 0.003])
def test_an_adapter_beside_its_base_is_refused_and_a_merged_one_is_not(
    publish: Publish, folder: str, gain: float
) -> None:
    directory = publish("oft-libero")
    updates = write_adapter(directory, folder, gain=gain)
    with pytest.raises(CheckpointError, match=UNMERGED):
        sqap.load(directory)
    merge(directory, updates)
    assert sqap.load(directory).config.family == "openvla-oft"


def test_rank_stabilised_ones_too(publish: Publish) -> None:
    directory = publish("openvla")
    updates = write_adapter(directory, ".", rslora=True)
    with pytest.raises(CheckpointError, match=UNMERGED):
        sqap.load(directory, unnorm_key="bridge_orig")
    merge(directory, updates)
    sqap.load(directory, unnorm_key="bridge_orig")


def test_the_older_file_is_read_too(publish: Publish) -> None:
    directory = publish("openvla")
    write_adapter(directory, ".")
    safe = directory / "adapter_model.safetensors"
    torch.save(load_file(safe), directory / "adapter_model.bin")
    safe.unlink()
    with pytest.raises(CheckpointError, match=UNMERGED):
        sqap.load(directory, unnorm_key="bridge_orig")


def test_where_it_cannot_be_told_the_place_decides(
    publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    directory = publish("cogact")
    (directory / "lora_adapter").mkdir()
    (directory / "lora_adapter" / "adapter_config.json").write_text("{}")
    sqap.load(directory, unnorm_key="bridge_orig")
    assert "lora_adapter: cannot tell whether the weights have this adapter merged" in caplog.text
    (directory / "lora_adapter" / "adapter_config.json").rename(directory / "adapter_config.json")
    with pytest.raises(CheckpointError, match=UNMERGED):
        sqap.load(directory, unnorm_key="bridge_orig")


def test_an_adapter_that_changes_nothing_is_merged(publish: Publish) -> None:
    directory = publish("oft-libero")
    write_adapter(directory, "lora_adapter", gain=0.0)
    sqap.load(directory)


@pytest.mark.parametrize("config", [{"r": 0}, {"lora_alpha": "16"}])
def test_a_scale_that_is_none_is_refused(publish: Publish, config: dict[str, object]) -> None:
    directory = publish("openvla")
    write_adapter(directory, ".")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: r and lora_alpha must be positive"):
        sqap.load(directory, unnorm_key="bridge_orig")


@pytest.mark.parametrize("name", ["adapter_config.json", "lora_adapter/adapter_model.safetensors"])
def test_an_adapter_without_a_model_is_told_what_it_lacks(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="a LoRA adapter without the model that it adapts: merge it"):
        recognise(tmp_path)


def test_two_layouts_in_one_configuration_are_refused(publish: Publish) -> None:
    directory = publish("openvla")
    config = json.loads((directory / "config.json").read_text()) | {"vla": {"base_vlm": "prism-siglip+7b"}}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is that of OpenVLA and CogACT and OpenVLA in Prismatic's own"):
        recognise(directory).open(directory, Choices())
