"""SmolVLA in vla.cpp: the file that it reads, and what it is given."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers.vla_cpp import vla_cpp

from sqap.benchmark import SHAPES
from sqap.benchmark.candidates import example
from sqap.benchmark.dense import dense
from sqap.benchmark.shapes import random_policy
from sqap.errors import InputError
from sqap.models import ModelConfig
from sqap.recipe import Recipe

gguf = pytest.importorskip("gguf")


class Fake:
    """vla.cpp's package, which notes what it is given."""

    PIXEL_F32_RGB_01 = 1

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}

    def load(self, path: str) -> Fake:
        self.kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
        return self

    def predict(self, images: list[np.ndarray], **given: Any) -> np.ndarray:
        self.given = {"images": images, **given}
        return np.arange(50 * 32, dtype=np.float32).reshape(50, 32) / 1600


def tiny() -> ModelConfig:
    """SmolVLA with every part it has, but small."""
    full = SHAPES["smolvla"]
    vision = replace(full.vision[0], image_size=64, width=64, depth=2, heads=2, mlp_width=96)
    decoder = replace(
        full.decoder, width=64, depth=4, heads=4, kv_heads=2, head_dim=32, mlp_width=96, embed_scale=8.0
    )
    head = replace(full.head, width=48, mlp_width=64)
    return replace(full, vision=(vision,), projector=(64,), decoder=decoder, head=head)


@dataclass(frozen=True)
class Written:
    """A policy's file, its tensors as floats by name, and the model that they are of."""

    path: Path
    tensors: dict[str, torch.Tensor]
    model: Any


@pytest.fixture(scope="module", params=["original", "compressed"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    from peers import vla_cpp_gguf, vla_cpp_smolvla

    path = tmp_path_factory.mktemp("gguf") / "p.gguf"
    policy = random_policy(tiny(), Recipe() if request.param == "original" else Recipe.w4a8(keep=1))
    nbytes = vla_cpp_gguf.write(vla_cpp_smolvla.contents(policy), path, "bf16")
    found = gguf.GGUFReader(path).tensors
    assert nbytes == sum(t.n_bytes for t in found)
    floats = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in found}
    return Written(path, floats, dense(policy, torch.float32).model)


def close(actual: torch.Tensor, expected: torch.Tensor, within: float = 0.01) -> None:
    assert (actual - expected).norm() < within * expected.norm()


def test_the_file_has_what_vla_cpp_asks_for(written: Written) -> None:
    reader = gguf.GGUFReader(written.path)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    layer = [f"{n}.weight" for n in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_o", "ffn_norm")]
    layer += [f"{n}.weight" for n in ("ffn_gate", "ffn_up", "ffn_down")]
    assert {f"{p}.blk.{i}.{n}" for p in ("vlm", "aex") for i in range(4) for n in layer} <= kinds.keys()
    block = ("ln1", "ln2", "attn_q", "attn_k", "attn_v", "attn_o", "fc1", "fc2")
    found = {n.removeprefix("vit.blk.1.") for n in kinds if n.startswith("vit.blk.1.")}
    assert found == {f"{n}.{kind}" for n in block for kind in ("weight", "bias")}
    assert kinds["token_embd.weight"] == kinds["mm.fc.weight"] == kinds["aex.blk.3.attn_k.weight"] == "BF16"
    assert (
        kinds["state_proj.weight"] == kinds["vit.patch_embd.weight"] == kinds["vit.blk.0.ln1.weight"] == "F32"
    )
    assert not written.tensors[
        "vlm.blk.3.ffn_up.weight"
    ].any()  # of the last layer only keys and values are read
    fields = reader.fields
    assert fields["smolvla.min_period"].types == [gguf.GGUFValueType.FLOAT64]
    assert fields["smolvla.n_img_tokens"].contents() == 1


def test_the_encoder_and_the_expert_are_the_policys(written: Written) -> None:
    found, model = written.tensors, written.model
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    qkv = [x @ found[f"vit.blk.1.attn_{n}.weight"].T + found[f"vit.blk.1.attn_{n}.bias"] for n in "qkv"]
    close(torch.cat(qkv, 1), model.vision[0].blocks[1].attn.qkv(x))
    shuffled = torch.randn(2, 64 * 16, generator=torch.Generator().manual_seed(1))
    # vla.cpp multiplies what comes from images by the square root of the width.
    stream = shuffled @ found["mm.fc.weight"].T * 8
    close(_plain(model, model.projector.layers[0](shuffled)), stream)
    head = model.head
    actions = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    for time, condition in zip(head.times, head.conditions(head.times), strict=True):
        a = actions @ found["action_in_proj.weight"].T + found["action_in_proj.bias"]
        sines = head.embedded_times([time], torch.device("cpu")).expand(1, 5, 48)
        a = (
            torch.cat([a, sines], -1) @ found["action_time_mlp_in.weight"].T
            + found["action_time_mlp_in.bias"]
        )
        a = torch.nn.functional.silu(a) @ found["action_time_mlp_out.weight"].T
        close(a + found["action_time_mlp_out.bias"], head.embed(actions, condition), 1e-3)


def test_the_decoder_is_in_the_basis_without_a_rotation(written: Written) -> None:
    found, model = written.tensors, written.model
    ids = torch.arange(9)[None]
    x = found["token_embd.weight"][ids] * 8
    turned = model.decoder.embed(ids).float()
    close(_plain(model, turned), x)
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:]) * found["vlm.blk.1.ffn_norm.weight"]
    gate, up, down = (found[f"vlm.blk.1.ffn_{n}.weight"].T for n in ("gate", "up", "down"))
    layer = model.decoder.layers[1]
    expected = layer.mlp(layer.post_attention_layernorm(turned))
    close((torch.nn.functional.silu(normed @ gate) * (normed @ up)) @ down, _plain(model, expected), 0.02)


@pytest.mark.parametrize("precision", ["bf16", "f32"])
def test_it_is_given_what_the_policy_sees(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "vla_cpp", fake)
    policy = random_policy(tiny(), Recipe.w4a8(keep=1))
    seen = example(policy)
    expected = policy.inputs(seen, torch.Generator().manual_seed(3))
    monkeypatch.setenv("VLA_LIBRARY", "one")
    monkeypatch.setenv("VLA_LIBRARY_F32", "another")
    chunk = vla_cpp(policy, precision).act(seen, seed=3)
    assert os.environ["VLA_LIBRARY"] == ("another" if precision == "f32" else "one")
    np.testing.assert_allclose(chunk.ravel(), np.arange(1600) / 1600, atol=1e-6)
    assert fake.kinds["token_embd.weight"] == "BF16"
    assert fake.kinds["mm.fc.weight"] == precision.upper()
    assert fake.given["tokens"] == expected.token_ids[0].tolist()
    np.testing.assert_array_equal(fake.given["noise"], expected.noise.flatten())
    np.testing.assert_array_equal(fake.given["state"], expected.proprio[0])
    for image, pixels in zip(fake.given["images"], expected.pixels[0], strict=True):
        np.testing.assert_allclose((image * 2 - 1).transpose(2, 0, 1), pixels, atol=1e-5)


def test_other_types_and_other_decoders_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vla_cpp", Fake())
    with pytest.raises(InputError, match=r"SmolVLA's weights in bf16, f32, not in q4_0"):
        vla_cpp(random_policy(tiny(), Recipe()), "q4_0")
    monkeypatch.delenv("VLA_LIBRARY_F32", raising=False)
    with pytest.raises(InputError, match="VLA_LIBRARY_F32 must be set"):
        vla_cpp(random_policy(tiny(), Recipe()), "f32")
    config = tiny()
    other = replace(config, decoder=replace(config.decoder, vocabulary=40))
    with pytest.raises(InputError, match=r"SmolVLM2's decoder, with 49280 tokens"):
        vla_cpp(random_policy(other, Recipe()), "bf16")


def _plain(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Rows of the residual stream in the basis that it has without a rotation."""
    norm = model.decoder.norm
    return norm.hadamard.inverse(rows) if hasattr(norm, "hadamard") else rows
