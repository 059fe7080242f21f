import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.layer.exchange_plan import direct_reason
from moe_lab.layer.placement import Placement
from moe_lab.layer.router import count
from moe_lab.layer.splits import (
    CountMatrix,
    EqualSplits,
    UnequalSplits,
    choose_splits,
    forced_counts,
    padding_overhead,
)


@st.composite
def count_matrices(draw, max_ranks=8, max_slots=6):
    """(R, R*e) counts with empty ranks and experts among them."""
    ranks, slots = draw(st.integers(1, max_ranks)), draw(st.integers(1, max_slots))
    rows = st.lists(st.sampled_from([0, 0, 1, 2, 5, 300]), min_size=ranks * slots, max_size=ranks * slots)
    return CountMatrix(counts_RP=torch.tensor(draw(st.lists(rows, min_size=ranks, max_size=ranks))))


@settings(max_examples=40)
@given(count_matrices())
def test_what_is_sent_is_what_is_received(counts):
    ranks, per_rank = counts.ep, counts.counts_RP.shape[1] // counts.ep
    matrix = counts.counts_RP.tolist()
    for mode in ("off", "adaptive", "force"):
        splits = choose_splits(counts.splits_RR, mode)
        for s in range(ranks):
            by_hand = [sum(matrix[s][r * per_rank : (r + 1) * per_rank]) for r in range(ranks)]
            assert splits.splits_RR[s].tolist() == by_hand
            if isinstance(splits, UnequalSplits):
                assert splits.send(s) == by_hand
                assert splits.receive(s) == [choose_splits(counts.splits_RR).send(r)[s] for r in range(ranks)]
                assert splits.padded_rows(s) == 0
            else:
                assert splits.send(s) is splits.receive(s) is None
                assert splits.size == max(map(max, splits.splits_RR.tolist()))
                assert splits.padded_rows(s) == sum(splits.size - n for n in by_hand)
            assert counts.received_by(s).tolist() == [row[s * per_rank : (s + 1) * per_rank] for row in matrix]


@settings(max_examples=40)
@given(count_matrices(), st.floats(0, 3))
def test_adaptive_pads_exactly_when_the_worst_rank_stays_below_the_threshold(counts, threshold):
    splits_RR = counts.splits_RR
    size, overheads = int(splits_RR.max()), []
    for rank in range(counts.ep):
        real = int(splits_RR[rank].sum() + splits_RR[:, rank].sum())
        padded = sum(size - int(n) for n in (*splits_RR[rank], *splits_RR[:, rank]))
        overheads.append(padded / real if real else math.inf if size else 0)
    assert padding_overhead(splits_RR) == pytest.approx(overheads)
    chosen = choose_splits(splits_RR, "adaptive", threshold)
    assert isinstance(chosen, EqualSplits) is (size > 0 and max(padding_overhead(splits_RR)) <= threshold)


def test_no_rows_in_the_whole_mesh_are_never_padded():
    for mode in ("adaptive", "force"):
        chosen = choose_splits(torch.zeros(3, 3, dtype=torch.int64), mode)
        assert isinstance(chosen, UnequalSplits)
        assert chosen.reason == "no rows in the whole mesh"


def test_reasons_hold_the_numbers():
    splits_RR = torch.tensor([[10, 9], [9, 10]])  # worst rank: 2 zero rows for 38 real ones
    assert choose_splits(splits_RR, "adaptive", 0.10).reason == "adaptive: worst overhead 0.053 <= 0.100"
    assert choose_splits(splits_RR, "adaptive", 0.05).reason == "adaptive: worst overhead 0.053 > 0.050"
    assert choose_splits(splits_RR, "force").reason == "forced: worst overhead 0.053"


@pytest.mark.parametrize("threshold", [math.nan, -0.1, math.inf, "0.1", True])
def test_a_threshold_that_is_no_number_is_refused(threshold):
    with pytest.raises((ValueError, TypeError), match="threshold"):
        choose_splits(torch.ones(2, 2, dtype=torch.int64), "adaptive", threshold)


def test_an_unknown_kind_is_refused():
    with pytest.raises((ValueError, TypeError), match="equal_split"):
        choose_splits(torch.ones(2, 2, dtype=torch.int64), "sometimes")


# Forced balance


def test_known_forced_splits():
    counts = forced_counts(16384, 3, 36, 12)
    splits = UnequalSplits(splits_RR=counts.splits_RR, reason="")
    assert splits.send(4) == [4098] * 4 + [4095] * 8
    assert splits.receive(4) == [4095] * 12
    assert counts.uniform_counts[4] == 1365
    assert counts.uniform_counts[0] == 1366


def test_forced_counts_may_have_no_uniform_segments():
    assert forced_counts(5, 3, 4, 2).uniform_counts is None


@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_forced_counts_are_those_of_round_robin(num_tokens, top_k, per_rank, ep):
    num_experts = per_rank * ep
    ids_TK = (torch.arange(num_tokens * top_k) % num_experts).view(num_tokens, top_k)
    counts = forced_counts(num_tokens, top_k, num_experts, ep)
    assert counts.counts_RP.tolist() == [count(ids_TK, num_experts).tolist()] * ep
    counts_RRe = counts.counts_RP.view(ep, ep, per_rank)
    uniform = all(len(set(counts_RRe[:, rank].flatten().tolist())) == 1 for rank in range(ep))
    assert (counts.uniform_counts is not None) is uniform


def test_the_direct_route_needs_as_many_choices_as_local_experts(layer_config):
    config = layer_config(num_experts=12, top_k=3)
    assert direct_reason(config, Placement.blockwise(12, 4)) == (
        "top_k=3 is the number of local experts: token t goes to rank t mod 4"
    )
    assert direct_reason(config, Placement.blockwise(12, 3)) is None
    assert direct_reason(config.replace(score_before_experts=True), Placement.blockwise(12, 4)) is None
    assert direct_reason(config, Placement(12, 4, tuple(reversed(range(12))))) is None
