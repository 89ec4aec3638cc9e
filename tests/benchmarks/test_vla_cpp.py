"""vla.cpp as a rival: the file that it reads, and what it is given."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers.vla_cpp import vla_cpp
from typer.testing import CliRunner

from sqap.benchmark import SHAPES, Subject
from sqap.benchmark.candidates import example
from sqap.benchmark.dense import dense
from sqap.benchmark.shapes import random_policy
from sqap.benchmark.timing import Bench
from sqap.cli import app
from sqap.errors import InputError, SqapError
from sqap.models import ModelConfig
from sqap.models.decoder import rope_angles
from sqap.policy import Policy
from sqap.recipe import Recipe

gguf = pytest.importorskip("gguf")


class Fake:
    """vla.cpp's package, which notes what it is given."""

    PIXEL_F32_RGB_01 = 1

    def __init__(self, complaint: str | None = None) -> None:
        self.complaint = complaint
        self.given: dict[str, Any] = {}

    def load(self, path: str) -> Fake:
        if self.complaint is not None:
            raise RuntimeError(self.complaint)
        assert Path(path).read_bytes()[:4] == b"GGUF"
        return self

    def predict(self, images: list[np.ndarray], **given: Any) -> np.ndarray:
        self.given = {"images": images, **given}
        return np.arange(56, dtype=np.float32).reshape(8, 7)


def tiny() -> ModelConfig:
    """OpenVLA-OFT with every part it has, but small; no block of 32 divides the rows of SigLIP's fc2."""
    full = SHAPES["openvla-oft-7b"]
    small = {"image_size": 28, "width": 64, "depth": 3, "heads": 2}
    dino, siglip = (replace(v, **small, mlp_width=w) for v, w in zip(full.vision, (96, 80), strict=True))
    decoder = replace(
        full.decoder, vocabulary=40, width=64, depth=2, heads=2, kv_heads=2, head_dim=32, mlp_width=128
    )
    return replace(full, vision=(dino, siglip), projector=(256, 64, 64), decoder=decoder)


@pytest.fixture
def compressed() -> Policy:
    return random_policy(tiny(), Recipe.w4a8(keep=1))


def write(policy: Policy, path: Path, precision: str) -> int:
    from peers import vla_cpp_gguf, vla_cpp_oft

    return vla_cpp_gguf.write(vla_cpp_oft.contents(policy), path, precision)


def read(path: Path) -> dict[str, np.ndarray]:
    """The file's tensors, as floats, by name."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def test_the_file_holds_the_function_of_the_rotated_decoder(compressed: Policy, tmp_path: Path) -> None:
    nbytes = write(compressed, tmp_path / "p.gguf", "bf16")
    found = read(tmp_path / "p.gguf")
    assert nbytes == sum(t.n_bytes for t in gguf.GGUFReader(tmp_path / "p.gguf").tensors)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.from_numpy(found[f"lm.blk.0.{name}.weight"]).T

    model = dense(compressed, torch.float32).model
    layer, config = model.decoder.layers[0], model.config.decoder
    ids = torch.arange(9)[None]
    x = torch.from_numpy(found["token_embd.weight"])[ids]
    turned = model.decoder.embed(ids).float()
    torch.testing.assert_close(model.decoder.norm.hadamard.inverse(turned), x, rtol=0.02, atol=0.02)
    # The MLP alone: normalise, gate, multiply, and back to the stream, in the basis without a rotation.
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:])
    inner = torch.nn.functional.silu(linear("ffn_gate", normed)) * linear("ffn_up", normed)
    expected = layer.mlp(layer.post_attention_layernorm(turned))
    actual = linear("ffn_down", inner)
    error = model.decoder.norm.hadamard.inverse(expected) - actual
    assert error.norm() < 0.02 * actual.norm()
    assert rope_angles(ids, config, x.dtype)[0].shape[-1] == config.head_dim  # what it is told as lm.head_dim


@pytest.mark.parametrize(("precision", "worst"), [("q8_0", 0.01), ("q4_1", 0.12), ("q4_0", 0.12)])
def test_matrices_are_stored_in_the_type_asked_for(
    compressed: Policy, tmp_path: Path, precision: str, worst: float
) -> None:
    for kind in ("bf16", precision):
        write(compressed, tmp_path / f"{kind}.gguf", kind)
    exact, found = read(tmp_path / "bf16.gguf"), read(tmp_path / f"{precision}.gguf")
    assert exact.keys() == found.keys()
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / f"{precision}.gguf").tensors}
    for name in exact:
        assert np.linalg.norm(found[name] - exact[name]) <= worst * np.linalg.norm(exact[name]), name
    assert kinds["lm.blk.1.ffn_down.weight"] == precision.upper()
    assert kinds["vis.d.blk.0.fc2.weight"] == precision.upper()
    assert kinds["vis.s.blk.0.fc2.weight"] == kinds["token_embd.weight"] == "BF16"
    assert kinds["lm.blk.0.attn_norm.weight"] == kinds["vis.d.cls"] == "F32"


def test_it_is_given_what_the_policy_sees(compressed: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "vla_cpp", fake)
    seen = replace(example(compressed), state=np.linspace(-0.5, 0.5, 8))
    expected = compressed.inputs(seen, torch.Generator())
    chunk = vla_cpp(compressed, "q4_0").act(seen, seed=0)
    np.testing.assert_array_equal(chunk.ravel(), np.arange(56))
    normalize = compressed.config.images[0][-1]
    for image, pixels in zip(fake.given["images"], expected.pixels[0], strict=True):
        assert image.shape == (28, 28, 3)
        assert image.min() >= -1e-6
        assert image.max() <= 1 + 1e-6
        normalised = (image - np.array(normalize.mean)) / np.array(normalize.std)
        np.testing.assert_allclose(normalised.transpose(2, 0, 1), pixels, atol=1e-5)
    assert [*fake.given["tokens"], 1] == expected.token_ids[0].tolist()
    np.testing.assert_array_equal(fake.given["state"], expected.proprio[0])
    assert fake.given["pixel_format"] == Fake.PIXEL_F32_RGB_01


def test_why_it_cannot_run_is_said(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vla_cpp", Fake("could not load"))
    with pytest.raises(SqapError, match=r"vla\.cpp: could not load"):
        vla_cpp(random_policy(tiny(), Recipe()), "bf16")
    with pytest.raises(InputError, match=r"vla\.cpp's OpenVLA-OFT is DINOv2 and SigLIP"):
        vla_cpp(policy, "bf16")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", tiny())
    monkeypatch.setitem(sys.modules, "vla_cpp", None)
    timed = Bench((Subject("tiny", Recipe(), random=True), "peers.vla_cpp:q8_0", 1, None))
    with pytest.raises(SqapError, match=r"vla_cpp.*docs/bench\.md says what to install"):
        timed("load")


def test_layers_are_those_of_a_shape() -> None:
    shortened = Subject("openvla-oft-7b", Recipe(), random=True, layers=2)
    assert shortened.shape().decoder.depth == 2
    result = CliRunner().invoke(app, ["bench", "reference", "--layers", "2"])
    assert result.exit_code == 1
    assert "--layers shortens a --shape" in " ".join(result.output.split())
