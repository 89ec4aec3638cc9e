"""A policy on another device. "meta" stands for a GPU: it computes nothing, and nothing can be read back."""

import numpy as np
import pytest
import torch

import sqap
from sqap.errors import InputError
from sqap.policy import Policy, Step
from sqap.recipe import Pruning, Recipe
from tests.test_compress import on_disk

META = torch.device("meta")


@pytest.fixture
def small(policy, observe):
    return sqap.compress(policy, Recipe.w4a8(keep=0.5), [observe(seed) for seed in range(2)])


@pytest.fixture
def seen(monkeypatch):
    """What steps end with on the device, instead of being copied back."""
    found = []

    def keep(self, actions, pruner, state):
        found.append((actions, pruner))
        return Step(np.zeros(0))

    monkeypatch.setattr(Policy, "_step", keep)
    return found


def test_a_policy_moves_in_place_and_acts_there(policy, observe, seen):
    pruned = Policy(policy.model, policy.config, policy.tokenizer, Recipe(pruning=Pruning(0.5, 1)))
    assert pruned.device.type == "cpu"
    assert pruned.to("meta") is pruned
    assert pruned.device == META
    pruned.step(observe(), seed=0)
    ((actions, pruner),) = seen
    assert actions.is_meta
    assert pruner.selections[0].top.is_meta


def test_a_compressed_policy_moves_with_its_packed_weights(small, observe, seen):
    pruning = Pruning(0.5, 1, "sqap", rest="random")
    moved = Policy(small.model, small.config, small.tokenizer, Recipe(small.recipe.quantization, pruning))
    moved.to(META).act(observe(), seed=0)
    assert all(tensor.is_meta for tensor in moved.model.state_dict().values())
    assert seen[0][0].is_meta


def test_inputs_and_noise_are_made_on_the_cpu(policy, observe):
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    here = policy.inputs(observe(), generators[0])
    there = policy.to("meta").inputs(observe(), generators[1])
    assert torch.equal(here.noise, there.noise)
    assert torch.equal(here.pixels[0], there.pixels[0])
    moved = there.to(lambda x: x.to(META))
    tensors = [*moved.pixels, moved.token_ids, moved.noise]
    assert all(tensor.is_meta for tensor in tensors)


def test_weights_on_disk_go_straight_to_the_device(policy, observe, seen):
    lazy = on_disk(policy).to("meta")
    assert not lazy.weights.reads

    def part(done, total):
        assert all(tensor.is_meta for tensor in lazy.model.state_dict().values())

    lazy.load_weights(part)
    read = {name for names in lazy.weights.reads for name in names}
    assert read == set(lazy.weights.tensors)
    lazy.act(observe(), seed=0)
    assert seen[0][0].is_meta


def test_a_policy_may_change_its_mind_before_it_is_loaded(policy, observe):
    lazy = on_disk(policy).to("meta").to("cpu")
    assert np.array_equal(lazy.act(observe(), seed=0), policy.act(observe(), seed=0))
    assert lazy.to("cpu").device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_acts_as_the_cpu_does(small, observe):
    expected = small.step(observe(), seed=0)
    found = small.to("cuda").step(observe(), seed=0)
    np.testing.assert_allclose(found.chunk, expected.chunk, atol=0.02)
    assert found.selection.kept.tolist() == expected.selection.kept.tolist()


def test_compressing_needs_the_cpu(policy, observe):
    frames = [observe(seed) for seed in range(2)]
    with pytest.raises(
        InputError, match=r"the policy is on meta; calibrate it on the CPU: policy.to\('cpu'\)"
    ):
        sqap.compress(on_disk(policy).to("meta"), Recipe.w4a8(), frames)
