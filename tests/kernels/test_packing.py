"""Two levels to a byte, in the order other tools expect."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sqap.errors import InputError
from sqap.kernels.packing import pack_int4, unpack_int4

matrices = st.integers(1, 5).flatmap(
    lambda pairs: st.lists(
        st.lists(st.integers(-8, 7), min_size=2 * pairs, max_size=2 * pairs), min_size=1, max_size=4
    )
)


@given(matrices)
@settings(deadline=None)
def test_unpacking_undoes_packing(rows: list[list[int]]) -> None:
    q = torch.tensor(rows, dtype=torch.int8)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(q), q.shape[1] // 2)
    assert torch.equal(unpack_int4(packed), q)


def test_every_byte_unpacks_to_its_two_halves() -> None:
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    expected = [[byte % 16 - 8, byte // 16 - 8] for byte in range(256)]
    assert unpack_int4(packed).tolist() == expected


def test_four_bytes_are_one_int32_of_compressed_tensors() -> None:
    q = np.random.default_rng(0).integers(-8, 8, (3, 16))
    expected = np.zeros((3, 2), dtype=np.int64)
    for i in range(8):  # level i of each eight stands i nibbles from the lowest bit
        expected += (q[:, i::8] + 8) << (4 * i)
    packed = pack_int4(torch.from_numpy(q).to(torch.int8)).numpy()
    assert np.array_equal(packed.view("<u4"), expected)


def test_an_odd_number_of_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="in_features 5 is odd"):
        pack_int4(torch.zeros(2, 5, dtype=torch.int8))
