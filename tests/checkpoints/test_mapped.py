"""A loaded policy's weights are the file's own pages, and the file outlives whatever is done to them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sqap
from sqap import Recipe
from sqap.checkpoints import native
from sqap.errors import CheckpointError
from sqap.recipe import Quantization, Scheme

MAPS = Path("/proc/self/maps")
GROUPS = Recipe(Quantization(Scheme(weight_granularity="group", group_size=8)))


@pytest.fixture(params=[Recipe.w4a8(), GROUPS], ids=["w4a8", "groups"])
def small(request, policy, observe, tmp_path) -> Path:
    """A compressed policy's directory."""
    sqap.compress(policy, request.param, [observe()]).save(tmp_path / "small")
    return tmp_path / "small"


def is_mapped(tensor: Tensor, file: Path) -> bool:
    """Whether all of ``tensor`` lies in a mapping of ``file``."""
    lines = [line.split() for line in MAPS.read_text().splitlines() if line.endswith(str(file))]
    spans = [[int(address, 16) for address in line[0].split("-")] for line in lines]
    start = tensor.data_ptr()
    return any(low <= start and start + tensor.nbytes <= high for low, high in spans)


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists what a process has mapped")
def test_what_is_held_as_it_is_stored_stays_in_the_file(small):
    model = sqap.load(small).model
    file = small / "model.safetensors"
    kept = dict(model.named_buffers()) | {"table": model.decoder.embed_tokens.weight}
    assert {tensor.dtype for tensor in kept.values()} == {torch.uint8, torch.float32, torch.bfloat16}
    assert [name for name, tensor in kept.items() if not is_mapped(tensor, file)] == []
    assert [name for name, tensor in kept.items() if tensor.data_ptr() % tensor.element_size()] == []
    assert not is_mapped(model.decoder.norm.weight, file)  # stored in 16 bits, computed with in 32


def test_writing_into_a_loaded_policy_leaves_the_file_as_it_was(small, observe):
    content = (small / "model.safetensors").read_bytes()
    before = sqap.load(small).act(observe(), seed=0)
    loaded = sqap.load(small)
    for tensor in loaded.model.state_dict().values():
        tensor.zero_()
    assert not np.array_equal(loaded.act(observe(), seed=0), before)
    assert (small / "model.safetensors").read_bytes() == content
    assert np.array_equal(sqap.load(small).act(observe(), seed=0), before)


def test_a_loaded_policy_acts_on_after_another_took_its_place(small, policy, observe):
    expected = sqap.load(small).act(observe(), seed=0)
    loaded = sqap.load(small)
    policy.save(small)
    assert not np.array_equal(sqap.load(small).act(observe(), seed=0), expected)
    assert np.array_equal(loaded.act(observe(), seed=0), expected)
    shutil.rmtree(small)
    assert np.array_equal(loaded.act(observe(), seed=0), expected)


def test_a_loaded_policy_can_be_saved_where_it_came_from(small, observe):
    content = (small / "model.safetensors").read_bytes()
    loaded = sqap.load(small)
    loaded.save(small)
    assert (small / "model.safetensors").read_bytes() == content
    assert np.array_equal(loaded.act(observe(), seed=0), sqap.load(small).act(observe(), seed=0))


@pytest.fixture
def replaced(small, monkeypatch):
    """``replaced(*others)``: the policy on disk is replaced by these, one after another, while it is read."""

    def start(*others):
        waiting = list(others)

        def replace(config):
            if waiting:
                waiting.pop(0).save(small)
            return empty_model(config)

        empty_model = native.empty_model
        monkeypatch.setattr(native, "empty_model", replace)

    return start


def zeroed(small, name):
    """A policy that fits the same shapes: only the bytes can tell."""
    other = sqap.load(small)
    other.model.get_parameter(name).zero_()
    return other


def test_a_policy_that_is_replaced_while_it_is_read_is_read_again(small, replaced):
    other = zeroed(small, "decoder.embed_tokens.weight")
    replaced(other)
    found = sqap.load(small)
    assert found.fingerprint == native.fingerprint(small)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


def test_a_policy_that_is_replaced_again_and_again_is_refused(small, replaced):
    others = [zeroed(small, f"decoder.{name}.weight") for name in ("embed_tokens", "norm")]
    replaced(*(others * native.ATTEMPTS))
    with pytest.raises(CheckpointError, match="was replaced while it was being read; load it again"):
        sqap.load(small)
