import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.layer.padding import RowPadding, round_up

CPU = torch.device("cpu")


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=6))
def test_zeros_go_to_the_end_of_segments_and_come_out_again(segments):
    counts_S = torch.tensor([count for count, _ in segments])
    sizes_S = torch.tensor([count + extra for count, extra in segments])
    padding = RowPadding.of(counts_S, sizes_S, CPU)
    if not sum(extra for _, extra in segments):
        assert padding is None
        return
    rows = torch.arange(1.0, int(counts_S.sum()) + 1)[:, None].requires_grad_()
    padded, expected, row = padding.pad(rows), [], iter(range(1, len(rows) + 1))
    for count, extra in segments:
        expected += [float(next(row)) for _ in range(count)] + [0.0] * extra
    assert padded.flatten().tolist() == expected
    assert torch.equal(padding.strip(padded), rows)


def test_nan_in_the_padding_reaches_neither_rows_nor_gradients():
    padding = RowPadding.of(torch.tensor([1, 2]), torch.tensor([3, 3]), CPU)
    padded = torch.tensor([1, math.nan, math.nan, 2, 3, math.nan])[:, None].requires_grad_()
    rows = padding.strip(padded)
    assert rows.flatten().tolist() == [1, 2, 3]
    (grad,) = torch.autograd.grad(rows, padded, torch.full((3, 1), 5.0))
    assert grad.flatten().tolist() == [5, 0, 0, 5, 5, 0]
    rows = torch.ones(3, 1, requires_grad=True)
    (grad,) = torch.autograd.grad(padding.pad(rows), rows, padded.detach())
    assert grad.flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize(("multiple", "expected"), [(1, [0, 1, 8, 9]), (8, [0, 8, 8, 16]), (3, [0, 3, 9, 9])])
def test_round_up(multiple, expected):
    assert round_up(torch.tensor([0, 1, 8, 9]), multiple).tolist() == expected


def test_indices_by_hand():
    padding = RowPadding.of(torch.tensor([2, 0, 3]), torch.tensor([4, 2, 4]), torch.device("cpu"))
    assert padding.source_P.tolist() == [0, 1, -1, -1, -1, -1, 2, 3, 4, -1]
    assert padding.target_R.tolist() == [0, 1, 6, 7, 8]
