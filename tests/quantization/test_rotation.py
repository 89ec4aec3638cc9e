"""Rotation: the transform is Sylvester's matrix, and a rotated policy is the same function."""

import copy
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy.linalg import hadamard
from torch import Tensor

from sqap.errors import InputError
from sqap.models import VLA
from sqap.quantization import prepare_rotated, rotate_decoder
from sqap.quantization.linear import quantize_decoder
from sqap.quantization.rotation import HadamardLinear, block_hadamard, is_rotated, largest_block
from sqap.recipe import Quantization

MakeModel = Callable[..., VLA]
Inputs = tuple[list[Tensor], Tensor, Tensor]
blocks = st.sampled_from([2**i for i in range(11)])


@given(blocks, st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_blocks_are_multiplied_by_sylvesters_matrix(block: int, count: int, seed: int) -> None:
    x = torch.randn(2, 3, count * block, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = torch.from_numpy(hadamard(block)).double() / block**0.5
    expected = (x.view(2, 3, count, block) @ matrix).view_as(x)
    torch.testing.assert_close(block_hadamard(x, block), expected, rtol=0, atol=1e-12)


@given(blocks, st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_transform_keeps_lengths_and_undoes_itself(block: int, seed: int) -> None:
    x = torch.randn(4, 3 * block, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotated = block_hadamard(x, block)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(block_hadamard(rotated, block), x, rtol=0, atol=1e-12)


def test_one_outlier_is_spread_evenly() -> None:
    x = torch.zeros(1, 64)
    x[0, 17] = 8
    assert torch.equal(block_hadamard(x, 64).abs(), torch.ones(1, 64))


def test_the_type_is_kept_and_strided_inputs_work() -> None:
    x = torch.randn(32, 6)
    assert block_hadamard(x.T.bfloat16(), 32).dtype == torch.bfloat16
    torch.testing.assert_close(block_hadamard(x.T, 32), block_hadamard(x.T.contiguous(), 32))


def test_a_transform_made_in_inference_mode_serves_training_too() -> None:
    with torch.inference_mode():
        block_hadamard(torch.ones(1, 8, dtype=torch.float16), 8)
    x = torch.ones(1, 8, dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad(block_hadamard(x, 8).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("width", "block"), [(12, 3), (12, 8), (12, 0), (12, -4)])
def test_blocks_that_do_not_fit_are_refused(width: int, block: int) -> None:
    with pytest.raises(InputError, match=f"divides {width}, got {block}"):
        block_hadamard(torch.ones(1, width), block)


@pytest.mark.parametrize(("width", "block"), [(11008, 256), (640, 128), (256, 256), (192, 64), (7, 1)])
def test_largest_block(width: int, block: int) -> None:
    assert largest_block(width) == block


SHAPES = [
    {},
    {"width": 256, "heads": 4, "kv_heads": 2},
    {"width": 192, "heads": 3, "kv_heads": 3, "mlp": 512},
    {"width": 72, "heads": 6, "kv_heads": 2, "head_dim": 12, "mlp": 88},
]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_rotated_policy_is_the_same_function(
    make_model: MakeModel, inputs: Inputs, shape: dict[str, int]
) -> None:
    model, rotated = make_model(**shape), make_model(**shape)
    rotate_decoder(rotated)
    pixels, tokens, _ = inputs
    before = model.decoder(model.sequence(model.see(pixels), tokens))
    after = rotated.decoder(rotated.sequence(rotated.see(pixels), tokens))
    assert (after - before).norm() < 1e-5 * before.norm()
    torch.testing.assert_close(rotated(*inputs), model(*inputs), rtol=0, atol=1e-4)


@torch.no_grad()
def test_everything_inside_is_in_another_basis(make_model: MakeModel, inputs: Inputs) -> None:
    model, rotated = make_model(), make_model()
    rotate_decoder(rotated)
    before, after = model.see(inputs[0]), rotated.see(inputs[0])
    torch.testing.assert_close(after, block_hadamard(before, 128), rtol=0, atol=1e-5)
    for name, weight in model.decoder.layers.named_parameters():
        changed = (rotated.decoder.layers.get_parameter(name) - weight).norm() / weight.norm()
        assert changed > 0.1, name


@torch.no_grad()
def test_attention_is_what_it_was(make_model: MakeModel, inputs: Inputs) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.received: list[Tensor] = []

        def score_rows(self, layer: int) -> Tensor:
            return torch.tensor([17, 20])

        def keep(self, layer: int, received: Tensor) -> None:
            self.received.append(received)

    records = []
    for rotate in (False, True):
        model, recorder = make_model(), Recorder()
        if rotate:
            rotate_decoder(model)
        model.cognition(model.see(inputs[0]), inputs[1], recorder)
        records.append(torch.stack(recorder.received))
    torch.testing.assert_close(records[1], records[0], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_rotated_weights_load_into_a_prepared_model(make_model: MakeModel, inputs: Inputs) -> None:
    rotated, loaded = make_model(), make_model()
    names = set(rotated.state_dict())
    rotate_decoder(rotated)
    assert set(rotated.state_dict()) == names
    weights = copy.deepcopy(loaded.state_dict())
    prepare_rotated(loaded)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, weights[name])
    loaded.load_state_dict(rotated.state_dict())
    assert torch.equal(loaded(*inputs), rotated(*inputs))


@torch.no_grad()
def test_half_precision_weights_are_rounded_once(make_model: MakeModel) -> None:
    exact, half = make_model().bfloat16().double(), make_model().bfloat16()
    rotate_decoder(exact)
    rotate_decoder(half)
    for name, weight in exact.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.bfloat16()), name


def test_rotating_twice_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    rotate_decoder(model)
    assert is_rotated(model)
    for again in (rotate_decoder, prepare_rotated):
        with pytest.raises(InputError, match="already rotated"):
            again(model)


def test_a_quantized_decoder_is_not_rotated(make_model: MakeModel) -> None:
    model = make_model()
    quantize_decoder(model, Quantization(rotate=False))
    with pytest.raises(InputError, match="already quantized"):
        rotate_decoder(model)
    assert not is_rotated(model)


def test_a_hadamard_linear_shares_the_parameters_it_takes_over() -> None:
    linear = torch.nn.Linear(64, 3)
    rotating = HadamardLinear(linear, 64)
    assert rotating.weight is linear.weight
    assert rotating.bias is linear.bias
    x = torch.randn(5, 64)
    torch.testing.assert_close(rotating(block_hadamard(x, 64)), linear(x))
