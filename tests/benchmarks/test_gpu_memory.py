"""Memory on a GPU, counted on a device that has none ("meta"): loading holds one copy of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_memory import DEVICE, LiveBytes, count, moved

import sqap
from sqap.benchmark.candidates import weight_bytes
from sqap.benchmark.shapes import random_policy
from sqap.models.stages import stages
from sqap.models.storage import Rounded
from sqap.policy import Policy
from sqap.recipe import Pruning, Recipe
from tests.families import family_config
from tests.test_compress import on_disk
from tests.tiny import tiny_policy


def stored(policy: Policy) -> int:
    """Bytes of its weights as they are stored, but for floats of the head, which computes in 32 bits."""
    packed = sum(buffer.nbytes for buffer in policy.model.buffers())
    return packed + sum(
        parameter.numel() * (4 if name.startswith("head.") else 2)
        for name, parameter in policy.model.named_parameters()
    )


def test_what_lives_at_the_same_time_is_counted() -> None:
    before = torch.zeros(1000, device=DEVICE)
    with LiveBytes() as live:
        x = torch.zeros(100, device=DEVICE)
        views, elsewhere = (before[:10], x.view(10, 10)), torch.zeros(50)
        assert live.now == 400
        y = x + 1
        del x
        assert live.now == 800, "a view keeps it"
        del views
        assert live.now == 400
        assert len(y) + len(elsewhere) == 150
    assert live.peak == 800


def test_a_compressed_policy_moves_without_a_second_copy(tmp_path: Path) -> None:
    random_policy(tiny_policy().config.model, Recipe.w4a8(keep=1)).save(tmp_path / "small")
    small = sqap.load(tmp_path / "small")
    assert moved(small) == weight_bytes(small) == stored(small)


@pytest.mark.parametrize("rounded", [False, True])
def test_weights_on_disk_are_read_without_a_second_copy(policy: Policy, rounded: bool) -> None:
    """Counted on the CPU, since weights that are not read yet are on the meta device.

    What is read at a time, a stage, is the most that is there beside the weights.
    """
    parts = [sum(p.nbytes for p in stage.parameters()) for _, stage in stages(policy.model)]
    around = sum(p.nbytes for p in policy.model.parameters()) - sum(parts)
    lazy = on_disk(policy)
    if rounded:
        lazy.weights = Rounded(lazy.weights)
    with LiveBytes(torch.device("cpu")) as live:
        lazy.load_weights()
    assert weight_bytes(lazy) <= live.peak <= weight_bytes(lazy) + max(*parts, around)


def test_a_second_copy_is_seen(policy: Policy) -> None:
    """The fault that these tests are for: all of the weights in the new type, beside those in the old one."""
    with LiveBytes() as live:
        policy.to(DEVICE)
        copies = {name: tensor.bfloat16() for name, tensor in policy.model.state_dict().items()}
    assert live.peak == 1.5 * weight_bytes(policy)
    assert copies


@pytest.mark.parametrize("family", ["diffusion", "pi0.5"])
def test_a_published_size_is_counted(family: str) -> None:
    pytest.importorskip("triton", reason="Triton is there for Linux alone")
    found = count(family_config(family), Recipe(Recipe.w4a8().quantization, Pruning(0.5, 1)))
    assert found["loading"] == found["weights"] < found["bf16_weights"]
    assert min(found["step"], found["unpruned_step"], found["bf16_step"]) > 0
    assert found["peak"] == found["weights"] + found["step"]
