import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.kernels.order import RADIX, sort_keys


@given(st.lists(st.integers(0, 255), max_size=300), st.sampled_from([*RADIX, torch.int32]), st.booleans())
def test_keys_come_sorted_with_their_places_equal_ones_in_order(keys, dtype, strided):
    keys_N = torch.tensor(keys).to(dtype)
    if strided:
        keys_N = keys_N.repeat_interleave(2)[::2]
    sorted_N, order_N = sort_keys(keys_N)
    expected = sorted(range(len(keys)), key=lambda i: keys[i])
    assert order_N.tolist() == expected
    assert sorted_N.tolist() == [keys[i] for i in expected]
    assert (sorted_N.dtype, order_N.dtype) == (dtype, torch.int64)


@pytest.mark.parametrize("dtype", RADIX)
def test_many_equal_keys_stay_in_order(dtype):
    keys_N = torch.randint(0, 5, (3000,)).to(dtype)
    order_N = sort_keys(keys_N)[1]
    assert order_N.tolist() == sorted(range(3000), key=keys_N.tolist().__getitem__)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_negative_keys_too(dtype):
    keys_N = torch.from_numpy(np.array([3, 0, 2, 0], dtype) - dtype(0 if dtype is np.uint8 else 1))
    assert sort_keys(keys_N)[1].tolist() == [1, 3, 2, 0]


def test_keys_are_left_alone():
    keys_N = torch.tensor([2, 1, 2], dtype=torch.uint8)
    sorted_N, _ = sort_keys(keys_N)
    sorted_N.zero_()
    assert keys_N.tolist() == [2, 1, 2]
