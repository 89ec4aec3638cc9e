"""Hadamard matrices: of all the widths that decoders have, orthonormal, and multiplied by fast."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy.linalg import hadamard
from torch import Tensor

from sqap.errors import InputError
from sqap.kernels.hadamard import Hadamard, block_hadamard, largest_block, random_signs

# What real decoders are made of, and the core that makes one matrix of it; 43 * 256 has none.
CORES = {
    192: 12,
    576: 36,
    896: 28,
    960: 60,
    1152: 36,
    1536: 12,
    2048: 1,
    2560: 20,
    3072: 12,
    4096: 1,
    4864: 76,
    5120: 20,
    5632: 44,
    8960: 140,
    9728: 76,
    12288: 12,
    13824: 108,
    14336: 28,
    18944: 148,
}
powers = st.sampled_from([2**i for i in range(11)])
widths = st.one_of(st.sampled_from(sorted(CORES)), st.sampled_from([2**i for i in range(15)]))
seeds = st.integers(0, 2**31)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(h: Hadamard) -> Tensor:
    return h.apply(torch.eye(h.block, dtype=torch.float64))


@pytest.mark.parametrize("width", CORES)
def test_widths_of_real_decoders_have_one_matrix(width: int) -> None:
    assert Hadamard.of(width) == Hadamard(width, CORES[width])


@pytest.mark.parametrize(("width", "block"), [(11008, 256), (43 * 4, 4), (92, 4), (10, 2), (7, 1), (1, 1)])
def test_other_widths_are_cut_into_blocks(width: int, block: int) -> None:
    assert Hadamard.of(width) == Hadamard(block)


@pytest.mark.parametrize("order", sorted({*CORES.values(), 4, 8, 84, 124, 132}))
def test_every_core_is_a_hadamard_matrix(order: int) -> None:
    signs = dense(Hadamard.of(order)) * order**0.5
    torch.testing.assert_close(signs.abs(), torch.ones(order, order, dtype=torch.float64), rtol=0, atol=1e-12)
    signs = signs.round()
    assert torch.equal(signs @ signs.T, order * torch.eye(order, dtype=torch.float64))


@given(widths, seeds)
@settings(max_examples=40, deadline=None)
def test_it_keeps_angles_and_spreads_every_channel_evenly(width: int, seed: int) -> None:
    h, x = Hadamard.of(width), random_rows(seed, 3, width)
    torch.testing.assert_close(h.apply(x) @ h.apply(x).T, x @ x.T, rtol=1e-12, atol=1e-9)
    one = torch.zeros(1, width, dtype=torch.float64)
    one[0, seed % width] = 1
    even = torch.full_like(one, h.block**-0.5)
    torch.testing.assert_close(h.apply(one).abs(), even, rtol=1e-12, atol=0)
    torch.testing.assert_close(h.inverse(one).abs(), even, rtol=1e-12, atol=0)


@given(st.one_of(widths, st.integers(1, 400)), seeds)
@settings(max_examples=60, deadline=None)
def test_the_inverse_undoes_it(width: int, seed: int) -> None:
    h, x = Hadamard.of(width), random_rows(seed, 2, width)
    torch.testing.assert_close(h.inverse(h.apply(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(h.apply(h.inverse(x)), x, rtol=0, atol=1e-12)


@given(st.sampled_from([12, 24, 28, 80, 96, 144, 192, 576, 7, 10]), st.integers(1, 3), seeds)
@settings(max_examples=30, deadline=None)
def test_it_is_the_product_of_core_and_sylvester(width: int, count: int, seed: int) -> None:
    h = Hadamard.of(width)
    core = dense(Hadamard(h.core, h.core))
    rest = h.block // h.core
    matrix = torch.kron(core, torch.from_numpy(hadamard(rest)).double() / rest**0.5)
    x = random_rows(seed, 2, count, width)
    blocks = x.reshape(2, -1, h.block)
    torch.testing.assert_close(h.apply(x), (blocks @ matrix).view_as(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(h.inverse(x), (blocks @ matrix.T).view_as(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("order", "first"),
    [
        (12, "++++++++++++ -+-+---+++-+ -++-+---+++- --++-+---+++"),
        (36, "+-++++++++++++++++++++++++++++++++++ --+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-"),
    ],
)
def test_cores_are_the_same_in_every_release(order: int, first: str) -> None:
    """Rotated weights are saved: another matrix would not undo what theirs has done."""
    signs = dense(Hadamard(order, order))
    rows = " ".join("".join("+-"[s < 0] for s in row) for row in signs.tolist())
    assert rows.startswith(first)


def test_a_core_need_not_be_symmetric() -> None:
    matrix = dense(Hadamard.of(12))
    assert not torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("width", [96, 64, 1024])
def test_the_type_is_kept_and_strided_rows_work(width: int) -> None:
    h, x = Hadamard.of(width), torch.randn(width, 6)
    assert h.apply(x.T.bfloat16()).dtype == h.inverse(x.T.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(h.apply(x.T), h.apply(x.T.contiguous()))


def test_a_matrix_made_in_inference_mode_serves_training_too() -> None:
    h = Hadamard.of(24)
    with torch.inference_mode():
        h.apply(torch.ones(1, 24, dtype=torch.float16))
    x = torch.ones(1, 24, dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad(h.apply(x).sum(), x)
    assert gradient.isfinite().all()


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="size 12 does not divide rows of 16"):
        Hadamard.of(12).apply(torch.ones(1, 16))


@given(powers, st.integers(1, 3), seeds)
@settings(max_examples=40, deadline=None)
def test_blocks_are_multiplied_by_sylvesters_matrix(block: int, count: int, seed: int) -> None:
    x = random_rows(seed, 2, 3, count * block)
    matrix = torch.from_numpy(hadamard(block)).double() / block**0.5
    expected = (x.view(2, 3, count, block) @ matrix).view_as(x)
    torch.testing.assert_close(block_hadamard(x, block), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("width", "block"), [(12, 3), (12, 8), (12, 0), (12, -4)])
def test_blocks_that_do_not_fit_are_refused(width: int, block: int) -> None:
    with pytest.raises(InputError, match=f"divides {width}, got {block}"):
        block_hadamard(torch.ones(1, width), block)


@pytest.mark.parametrize(("width", "block"), [(11008, 256), (640, 128), (256, 256), (192, 64), (7, 1)])
def test_largest_block(width: int, block: int) -> None:
    assert largest_block(width) == block


def test_signs_are_the_same_everywhere() -> None:
    """Written down once; another generator, release or machine must find the same."""
    assert "".join("+-"[s < 0] for s in random_signs(24, 0).tolist()) == "+++--+--++-+-+--++-++++-"
    assert "".join("+-"[s < 0] for s in random_signs(24, 7).tolist()) == "-++++-+-+---+---+--+++++"


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_signs_are_fair(seed: int) -> None:
    signs = random_signs(4096, seed)
    assert signs.dtype == torch.int8
    assert torch.equal(signs.abs(), torch.ones(4096, dtype=torch.int8))
    assert abs(signs.sum(dtype=torch.int64)) < 6 * 4096**0.5
    assert not torch.equal(signs, random_signs(4096, seed + 1))
