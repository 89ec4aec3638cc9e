"""Outliers that change what linears read, and nothing else."""

from __future__ import annotations

import pytest
import torch
from outlier_stress import (
    CHANNELS,
    FACTOR,
    Inject,
    Seen,
    behind_norms,
    error,
    inject_all,
    inside_mlp,
    overlap,
)
from torch import Tensor

from sqap.models.config import DecoderConfig
from sqap.models.decoder import Decoder


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_width": 48}
    return Decoder(DecoderConfig(vocabulary=8, **sizes)).eval().requires_grad_(False)


def read(decoder: Decoder, linear: str, x: Tensor) -> Tensor:
    """The largest magnitude per channel of what a linear of the second layer reads."""
    inputs: list[Tensor] = []
    module = decoder.layers[1].get_submodule(linear)
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    decoder(x)
    handle.remove()
    return inputs[0].abs().amax((0, 1))


@pytest.mark.parametrize(
    ("inject", "linears"),
    [
        (behind_norms, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (behind_norms, ("mlp.gate_proj", "mlp.up_proj")),
        (inside_mlp, ("mlp.down_proj",)),
    ],
)
def test_a_few_channels_grow_and_the_function_stays(
    decoder: Decoder, inject: Inject, linears: tuple[str, ...]
) -> None:
    x = torch.randn(1, 5, 32)
    before, full = {name: read(decoder, name, x) for name in linears}, decoder(x)
    inject_all(decoder, inject)
    torch.testing.assert_close(decoder(x), full, rtol=1e-5, atol=1e-6)
    for name in linears:
        grown = (read(decoder, name, x) / before[name]).round().int()
        assert grown.sort().values.tolist() == [1] * (len(grown) - CHANNELS) + [int(FACTOR)] * CHANNELS


def test_error_is_relative() -> None:
    full, low = (Seen([torch.tensor([[3.0, 4.0 + d]])], []) for d in (0.0, 1.0))
    assert error(full, low) == pytest.approx(0.2)


def test_overlap_looks_at_the_top_tenth() -> None:
    scores = torch.arange(20.0)
    swapped = scores.clone()
    swapped[[0, 19]] = swapped[[19, 0]]  # of the two best, one falls to the end
    full, low = Seen([], [scores, scores]), Seen([], [scores, swapped])
    assert overlap(full, low) == pytest.approx(0.75)
