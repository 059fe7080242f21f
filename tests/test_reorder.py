import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab import fastpaths
from moe_lab.layer.reorder import (
    EqualCountReorder,
    IndexReorder,
    SegmentCatReorder,
    choose_reorder,
    expert_major_index,
)
from moe_lab.layer.splits import CountMatrix
from test_splits import count_matrices


def test_known_order():
    counts_Re = torch.tensor([[2, 3], [1, 4]])
    assert expert_major_index(counts_Re, torch.device("cpu")).tolist() == [0, 1, 5, 2, 3, 4, 6, 7, 8, 9]
    assert counts_Re.sum(dim=0).tolist() == [3, 7]


def labels(counts_Re, major):
    """(slot, rank, number) of every row in rank-major or expert-major order, in plain Python."""
    rows = [(e, r, i) for r, row in enumerate(counts_Re.tolist()) for e, n in enumerate(row) for i in range(n)]
    return sorted(rows, key=(lambda row: (row[1], row[0])) if major == "rank" else (lambda row: row[:2]))


def check_both_ways(reorder, counts_Re):
    rank_major = torch.tensor(labels(counts_Re, "rank"), dtype=torch.float64).view(-1, 3)
    expert_major = torch.tensor(labels(counts_Re, "expert"), dtype=torch.float64).view(-1, 3)
    there = rank_major.clone().requires_grad_()
    got = reorder.to_expert_major(there)
    assert torch.equal(got, expert_major)
    (grad,) = torch.autograd.grad(got, there, expert_major)
    assert torch.equal(grad, rank_major)
    back = expert_major.clone().requires_grad_()
    got = reorder.to_rank_major(back)
    assert torch.equal(got, rank_major)
    (grad,) = torch.autograd.grad(got, back, rank_major)
    assert torch.equal(grad, expert_major)


@settings(max_examples=40)
@given(count_matrices(max_ranks=4, max_slots=4), st.sampled_from(["auto", "index", "segment_cat"]))
def test_each_way_sorts_any_counts_there_and_back(counts, name):
    counts = CountMatrix(counts_RP=counts.counts_RP.clamp(max=6))
    for rank in range(counts.ep):
        check_both_ways(choose_reorder(counts, rank, name), counts.received_by(rank))


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_equal_segments_are_transposed(ranks, slots, size):
    counts = CountMatrix(counts_RP=torch.full((ranks, ranks * slots), size))
    for name in ("auto", "equal_count"):
        reorder = choose_reorder(counts, ranks - 1, name)
        assert isinstance(reorder, EqualCountReorder)
        check_both_ways(reorder, counts.received_by(ranks - 1))


def test_the_way_is_chosen_by_name_or_by_the_counts():
    counts = CountMatrix(counts_RP=torch.tensor([[1, 2], [1, 3]]))  # rank 0 has equal segments, rank 1 has not
    assert isinstance(choose_reorder(counts, 0, "auto"), EqualCountReorder)
    assert isinstance(choose_reorder(counts, 1, "auto"), SegmentCatReorder)
    assert isinstance(choose_reorder(counts, 0, "index"), IndexReorder)
    assert isinstance(choose_reorder(counts, 0, "segment_cat"), SegmentCatReorder)


@pytest.mark.parametrize("rank", [0, 1])
def test_equal_count_is_refused_on_every_rank_if_any_has_unequal_segments(rank):
    counts = CountMatrix(counts_RP=torch.tensor([[1, 2], [1, 3]]))
    with pytest.raises(ValueError, match=r"reorder='equal_count' needs equal segments on every rank, .* 1 to 3 rows"):
        choose_reorder(counts, rank, "equal_count")


def test_the_ways_are_on_the_record():
    counts = CountMatrix(counts_RP=torch.tensor([[1, 2], [1, 3]]))
    with fastpaths.record() as record:
        for rank, rows in ((0, 2), (1, 5)):
            reorder = choose_reorder(counts, rank)
            reorder.to_rank_major(reorder.to_expert_major(torch.zeros(rows, 2)))
    assert {name: entry.reasons for name, entry in record.entries.items()} == {
        "equal_count_permute": {"all segments have 1 rows": 1},
        "equal_count_unpermute": {"all segments have 1 rows": 1},
        "segment_cat_permute": {"segments of 2 to 3 rows": 1},
        "segment_cat_unpermute": {"segments of 2 to 3 rows": 1},
    }
