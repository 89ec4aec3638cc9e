"""What all heads have in common: the names of their weights, the pruner and the type they compute in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sqap.models.heads import DiffusionHead
from sqap.models.stream import LayerOutput
from tests.families import FAMILIES, family_config, random_inputs, random_model


def both(*names: str) -> set[str]:
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


def expert(*norms: str) -> set[str]:
    """The expert's first layer, its norms and the projections of actions."""
    linears = {f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}
    linears |= {f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    return both("action_in_proj", "action_out_proj") | linears | set(norms)


NORMS = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
TIME = ("action_time_mlp_in", "action_time_mlp_out")
# As the authors' checkpoints name them: no bias and no gain beside these.
NAMES = {
    "diffusion": both("x_embedder", "t_embedder.0", "t_embedder.2", "z_embedder", "final_layer")
    | both("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")
    | {"uncondition", "positional_embedding"},
    "tokens": {"lm_head.weight"},
    "regression": both("norm1", "fc1", "norm2", "fc2", "blocks.0.norm", "blocks.0.fc"),
    "flow": both(*TIME) | expert(*(f"{norm}.weight" for norm in NORMS)),
    "pi0": both("state_proj", *TIME) | expert(*(f"{norm}.weight" for norm in NORMS)),
    "pi0.5": both("time_mlp_in", "time_mlp_out", *(f"{norm}.dense" for norm in NORMS)) | expert(),
}
SHAPES = {
    "diffusion": {
        "blocks.0.mlp.fc1.weight": (128, 32),
        "positional_embedding": (7, 32),
        "uncondition": (1, 32),
    },
    "tokens": {"lm_head.weight": (20, 32)},
    "regression": {"fc1.weight": (24, 4 * 32), "fc2.weight": (4, 24)},
    "flow": {"layers.0.self_attn.k_proj.weight": (16, 24), "layers.1.self_attn.k_proj.weight": (16, 16)},
    "pi0": {"state_proj.weight": (24, 5), "layers.1.self_attn.q_proj.weight": (64, 24)},
    "pi0.5": {"norm.dense.weight": (72, 24), "layers.1.self_attn.v_proj.weight": (16, 24)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_have_the_published_names_and_shapes(family: str) -> None:
    state = random_model(family_config(family)).head.state_dict()
    later = {name for name in state if any(f".{i}." in name for i in (1, 2)) and "t_embedder" not in name}
    assert set(state) - later == NAMES[family]
    assert {name: tuple(state[name].shape) for name in SHAPES[family]} == SHAPES[family]


class Drop:
    """Keeps four positions and the last five behind the first layer."""

    def __init__(self) -> None:
        self.asked = 0

    def score_rows(self, layer: int) -> Tensor | None:
        return torch.tensor([8]) if layer == 0 else None

    def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
        if layer > 0:
            return None
        self.asked += 1
        batch, length, _ = output.hidden.shape
        return torch.cat([torch.arange(4), torch.arange(8, length)]).expand(batch, -1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_pruner_is_asked_and_minded(family: str) -> None:
    config = family_config(family)
    model, inputs, pruner = random_model(config), random_inputs(config, 1), Drop()
    whole, pruned = model(inputs), model(inputs, pruner)
    assert pruner.asked == 1
    assert pruned.shape == whole.shape
    assert family == "tokens" or not torch.allclose(pruned, whole)


@torch.no_grad()
def test_a_diffusion_head_hears_the_last_token_alone() -> None:
    config = family_config("diffusion")
    model, inputs = random_model(config), random_inputs(config, 2)
    head, sequence = model.head, model.embed(inputs)
    assert isinstance(head, DiffusionHead)
    assert inputs.noise is not None
    expected = head.sample(model.decoder(sequence)[:, -1], inputs.noise)
    assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_a_head_computes_in_its_own_type(family: str, dtype: torch.dtype) -> None:
    """Heads of published policies come in another type than their decoder, and noise in float32."""
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 1)
    exact = model(inputs)
    model.head.to(dtype)
    found = model(inputs)
    assert found.dtype == (torch.float32 if family == "tokens" else dtype)
    tolerance = 1e-4 if dtype == torch.float64 else 0.2
    if family != "tokens":
        assert (found.double() - exact.double()).norm() < tolerance * exact.norm()
