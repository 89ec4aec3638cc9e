"""The written directories against what the authors' own classes say; nothing but the seed decides them."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import published
import published_names
import published_weights
import pytest
import torch
from published import FULL, TINY, write_cogact, write_openvla, write_openvla_oft
from published_weights import ACTION_IDS, Spec, random_tensor, write_pickle, write_safetensors
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

KEYS = json.loads((Path(__file__).parents[1] / "fixtures" / "published-keys.json").read_text())
Shapes = dict[str, list[int]]


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def read_shards(directory: Path) -> dict[str, Tensor]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        part = load_file(directory / file)
        assert set(part) == {name for name, where in index["weight_map"].items() if where == file}
        tensors |= part
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return tensors


@pytest.fixture(scope="module")
def openvla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("openvla")
    write_openvla(directory, TINY, seed=0, shards=3)
    return directory


def test_openvla_holds_every_tensor_that_upstreams_class_has(openvla: Path) -> None:
    tensors = read_shards(openvla)
    assert shapes_of(tensors) == KEYS["openvla"]
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert len(list(openvla.glob("model-*-of-00003.safetensors"))) == 3


def test_shards_change_no_value_and_the_seed_changes_all(openvla: Path, tmp_path: Path) -> None:
    three = read_shards(openvla)
    write_openvla(tmp_path / "one", TINY, seed=0, shards=1)
    one = read_shards(tmp_path / "one")
    assert list((tmp_path / "one").glob("*.safetensors")) == [
        tmp_path / "one/model-00001-of-00001.safetensors"
    ]
    assert all(torch.equal(one[name], tensor) for name, tensor in three.items())
    write_openvla(tmp_path / "other", TINY, seed=1)
    other = read_shards(tmp_path / "other")
    assert not any(torch.equal(other[name], tensor) for name, tensor in three.items())


def test_cogact_holds_upstreams_parts_and_ema_weights_of_their_own(tmp_path: Path) -> None:
    write_cogact(tmp_path, TINY, ema=True)
    (file,) = (tmp_path / "checkpoints").glob("step-*.pt")
    parts = torch.load(file, weights_only=True)["model"]
    ema = parts.pop("ema_diffusion")
    assert {part: shapes_of(tensors) for part, tensors in parts.items()} == KEYS["cogact"]
    assert shapes_of(ema) == KEYS["cogact"]["action_model"]
    assert not any(torch.equal(tensor, parts["action_model"][name]) for name, tensor in ema.items())
    assert (
        json.loads((tmp_path / "config.json").read_text())["vla"]["base_vlm"] == "prism-dinosiglip-224px+7b"
    )
    assert (tmp_path / "dataset_statistics.json").is_file()
    assert (tmp_path / "tokenizer.json").is_file()


def test_native_openvla_has_no_action_model_and_as_published_no_tokenizer(tmp_path: Path) -> None:
    write_cogact(tmp_path, TINY, action_model=False, tokenizer=False)
    (file,) = (tmp_path / "checkpoints").glob("*.pt")
    assert set(torch.load(file, weights_only=True)["model"]) == {
        "vision_backbone",
        "llm_backbone",
        "projector",
    }
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(("platform", "film"), [("libero", False), ("aloha", True)])
def test_oft_holds_upstreams_parts_beside_openvlas(tmp_path: Path, platform: str, film: bool) -> None:
    write_openvla_oft(tmp_path, TINY, platform=platform, film=film)
    expected: dict[str, Shapes] = KEYS[f"oft-{platform}"]
    assert len(list(tmp_path.glob("*_checkpoint.pt"))) == len(expected)
    for part, shapes in expected.items():
        (file,) = tmp_path.glob(f"{part}--*_checkpoint.pt")
        wrap = "" if part == "vision_backbone" else "module."  # as upstream leaves them
        tensors = torch.load(file, weights_only=True)
        assert shapes_of(tensors) == {wrap + name: shape for name, shape in shapes.items()}
    if film:
        name = "vision_backbone.featurizer.pos_embed"
        assert not torch.equal(tensors[name], read_shards(tmp_path)[name])
        assert tensors["vision_backbone.featurizer.blocks.0.scale.weight"].dtype == torch.float32
    (statistics,) = json.loads((tmp_path / "dataset_statistics.json").read_text()).values()
    assert len(statistics["action"]["min"]) == (14 if platform == "aloha" else 7)


def test_a_policy_without_proprioception_has_no_projector_for_it(tmp_path: Path) -> None:
    write_openvla_oft(tmp_path, TINY, platform="bridge", proprio=False)
    assert [p.name for p in tmp_path.glob("*.pt")] == ["action_head--150000_checkpoint.pt"]


def test_full_sizes_are_the_published_models() -> None:
    def count(shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(Spec(shape).count for shape in shapes.values())

    # What the hub counts in openvla-7b, and what runs of OFT's fine-tuning print.
    assert count(published_names.openvla(FULL)) == 7_541_237_184
    assert count(published_names.regression_head(FULL, 14)) == 268_644_366
    assert count(published_names.proprio_projector(FULL, 14)) == 16_842_752
    film = published_names.film_backbone(FULL)
    trained = {"lora_A", "lora_B", "scale", "shift"}
    assert count({n: s for n, s in film.items() if not trained.isdisjoint(n.split("."))}) == 484_939_264
    assert round(count(published_names.action_model(FULL, 7, 16)) / 1e6, 1) == 89.0


def test_values_are_pinned_since_the_parity_fixtures_rest_on_them() -> None:
    tensor = random_tensor("net.blocks.0.attn.qkv.weight", Spec((96, 32)), seed=0)
    digest = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest == "89f3b6307bbc61bec99a45922a54c8a001afa43cdd445624bf919a4729cff3cd"


def test_values_are_centred_scaled_and_the_same_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec((published_names.VOCABULARY, 8), torch.float32)
    whole = random_tensor("lm_head.weight", spec, seed=3)
    first, last = ACTION_IDS
    assert whole[:first].mean().abs() < 0.01
    assert whole[:first].std().item() == pytest.approx(8**-0.5, rel=0.01)
    assert whole[first:last].std().item() == pytest.approx(3 * 8**-0.5, rel=0.1)
    assert whole[last:].std().item() == pytest.approx(8**-0.5, rel=0.1)
    monkeypatch.setattr(published_weights, "_CHUNK", 1 << 12)
    assert torch.equal(random_tensor("lm_head.weight", spec, seed=3), whole)


def test_norms_are_near_one_and_layer_scales_between_a_half_and_one() -> None:
    norm = random_tensor("blocks.0.norm1.weight", Spec((4096,)), seed=0).float()
    assert 0.8 < norm.min() < norm.max() < 1.2
    scale = random_tensor("blocks.0.ls1.gamma", Spec((4096,)), seed=0).float()
    assert 0.5 < scale.min() < scale.max() < 1.0


def test_files_of_mixed_types_read_back(tmp_path: Path) -> None:
    specs: dict[str, Spec] = {"b": Spec((3,)), "a": Spec((5, 2), torch.float32), "c": Spec((1, 7))}
    expected = {name: random_tensor(name, spec, seed=2) for name, spec in specs.items()}
    write_safetensors(tmp_path / "x.safetensors", specs, seed=2)
    write_pickle(tmp_path / "x.pt", specs, seed=2)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        safe = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    pickled = torch.load(tmp_path / "x.pt", weights_only=True)
    for name, tensor in expected.items():
        assert torch.equal(safe[name], tensor)
        assert torch.equal(pickled[name], tensor)
        # Each with storage of its own, as in a file that training saved.
        assert pickled[name].untyped_storage().nbytes() == tensor.nbytes
    header = struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])[0]
    assert header % 8 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt", "x.safetensors"]  # nothing temporary


def test_the_tokenizer_has_llamas_ids_where_policies_rely_on_them(openvla: Path) -> None:
    tokenizer = Tokenizer.from_file(str(openvla / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 32_001
    assert tokenizer.token_to_id("▁") == 29_871
    assert tokenizer.token_to_id("<PAD>") == 32_000
    prompt = "In: What action should the robot take to pick up the red cube?\nOut:"
    ids = tokenizer.encode(prompt).ids
    assert ids[0] == 1
    assert 13 in ids  # the line break, as a byte
    assert 2 not in ids
    assert len(ids) == 19
    assert tokenizer.encode(prompt + " ").ids == [*ids, 29_871]
    assert tokenizer.decode(ids) == prompt
    assert tokenizer.encode("café").tokens[-2:] == ["<0xC3>", "<0xA9>"]


def test_the_configuration_says_only_what_llamas_defaults_do_not(openvla: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((openvla / "config.json").read_text())
    assert config["text_config"]["hidden_size"] == 128
    assert config["image_sizes"] == [56, 56]
    assert set(config["norm_stats"]) == {"bridge_orig", "fractal20220817_data"}
    full = published.text.openvla_config(FULL)
    assert full["text_config"] == {
        "model_type": "llama",
        "pad_token_id": 32_000,
        "torch_dtype": "bfloat16",
        "vocab_size": 32_064,
    }


def test_the_command_line_writes_a_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["published.py", "native-openvla", str(tmp_path), "--seed", "4"])
    published.main()
    assert "GB in" in capsys.readouterr().out
    (file,) = (tmp_path / "checkpoints").glob("*.pt")
    weight = torch.load(file, weights_only=True)["model"]["projector"]["projector.0.weight"]
    assert torch.equal(weight, random_tensor("projector/projector.0.weight", Spec((448, 112)), seed=4))
