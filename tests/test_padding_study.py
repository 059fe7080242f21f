import math

import pytest
import torch
from hypothesis import given, settings

import moe_lab
from moe_lab import MoE, RouterConfig
from moe_lab.layer.placement import Placement
from moe_lab.layer.splits import CountMatrix
from moe_lab.parallel import VirtualRanks
from moe_lab.study.batches import count_matrix, micro_batches
from moe_lab.study.forced import forced_view
from moe_lab.study.padding import POLICIES, overhead, worst_overhead
from moe_lab.study.threshold import sweep_threshold
from moe_lab.study.traffic import traffic
from test_splits import count_matrices

# Two ranks, two experts each. Rank 0 sends [4 | 1, 1 ...]: by hand below.
COUNTS = CountMatrix(counts_RP=torch.tensor([[3, 1, 2, 0], [1, 1, 4, 0]]))


def test_known_rows_by_policy():
    none = overhead(COUNTS)
    assert (none.rows_R, none.sent_R) == ((6, 6), (6, 6))
    assert none.exchange_zeros_R == none.expert_zeros_R == none.dropped_R == (0, 0)
    # Splits [[4, 2], [2, 4]] padded to 4: each rank sends 2 zero rows to dispatch and 2 to combine.
    even = overhead(COUNTS, "equal_split")
    assert even.exchange_zeros_R == (4, 4)
    assert even.expert_zeros_R == (0, 0)
    assert even.exchange_overhead == even.worst_exchange_overhead == worst_overhead(COUNTS) == pytest.approx(4 / 12)
    assert overhead(COUNTS, "adaptive", threshold=0.34).exchange_zeros_R == (4, 4)
    assert overhead(COUNTS, "adaptive", threshold=0.33).exchange_zeros_R == (0, 0)
    # Experts have 4, 2 | 6, 0 rows.
    assert overhead(COUNTS, "multiple", multiple=4).expert_zeros_R == (2, 2)
    assert overhead(COUNTS, "padded_bmm").expert_zeros_R == (2, 6)
    # Six assignments a rank over four experts: 2, 2, 1, 1.
    forced = overhead(COUNTS, "forced_balance")
    assert (forced.rows_R, forced.straggler_factor) == ((8, 4), 8 / 6)


def test_known_capacity():
    # Mean 1.5 rows an expert and source, factor 1: two rows each, eight a source rank.
    capacity = overhead(COUNTS, "capacity", capacity_factor=1.0)
    assert capacity.dropped_R == (1, 2)  # 3 -> 2; 4 -> 2
    assert capacity.sent_R == (5, 4)
    assert capacity.rows_R == (5, 4)
    assert capacity.expert_zeros_R == (8 - 5, 8 - 4)
    assert capacity.exchange_zeros_R == ((8 - 5) + (8 - 5), (8 - 4) + (8 - 4))


def test_flops_and_bytes():
    assert overhead(COUNTS, "padded_bmm").wasted_flops(10, 7) == 8 * 3 * 2 * 10 * 7
    assert overhead(COUNTS, "equal_split").wasted_bytes(10, 4) == 8 * 10 * 4


@settings(max_examples=30)
@given(count_matrices())
def test_what_every_policy_keeps(counts):
    total = int(counts.counts_RP.sum())
    for policy in POLICIES:
        one = overhead(counts, policy, multiple=8)
        assert sum(one.rows_R) == sum(one.sent_R) == total - sum(one.dropped_R)
        assert min(*one.exchange_zeros_R, *one.expert_zeros_R, *one.dropped_R, 0) == 0
        assert one.expert_overhead <= one.worst_expert_overhead or total == 0
        assert one.exchange_overhead <= one.worst_exchange_overhead or total == 0
    assert overhead(counts, "multiple", multiple=1).expert_zeros_R == (0,) * counts.ep
    assert sum(overhead(counts, "capacity", capacity_factor=1e6).dropped_R) == 0


@pytest.mark.parametrize("equal_split", ["off", "force"])
@pytest.mark.parametrize("forced", [None, "round_robin"])
def test_prediction_equals_what_the_exchange_counts(layer_config, equal_split, forced):
    config = layer_config(equal_split=equal_split, pad_multiple=8, router=RouterConfig(force_load_balance=forced))
    ranks, row_bytes = VirtualRanks(MoE(config), 4), 16 * 4
    logs = [exchange.log for exchange in ranks.mesh.exchanges]
    with logs[0].watch() as a, logs[1].watch() as b, logs[2].watch() as c, logs[3].watch() as d:
        ranks([torch.randn(tokens, 16) for tokens in (9, 0, 12, 5)])
    counts = count_matrix([routing.expert_ids_TK for routing in ranks.routings], ranks.placement)
    predicted = overhead(counts, "equal_split" if equal_split == "force" else "none")
    for rank, (dispatch, combine) in enumerate((a, b, c, d)):
        rows = predicted.sent_R[rank] + predicted.rows_R[rank] + predicted.exchange_zeros_R[rank]
        assert dispatch.num_bytes + combine.num_bytes == rows * row_bytes
    padded = overhead(counts, "multiple", multiple=8)
    for rank, plan in enumerate(ranks.plans):
        assert int(plan.ends_E[-1]) == padded.rows_R[rank] + padded.expert_zeros_R[rank]


def test_known_traffic():
    ids = [torch.tensor([[0, 1], [2, 3], [4, 7], [6, 7]]), *(torch.tensor([[0, 1]] * 4) for _ in range(3))]
    placement = Placement.blockwise(8, 4)
    found = traffic(ids, placement, ranks_per_node=2)
    # Rank 0: its own; twice rank 1; ranks 2 and 3, one node; twice rank 3.
    assert [t[0] for t in found] == [6, 4, 2]
    assert [t[1] for t in found] == [8, 4, 0]
    assert [t[3] for t in found] == [8, 4, 4]
    assert traffic(count_matrix(ids, placement), placement, distinct=False).per_assignment_R == (6, 8, 8, 8)


def test_dropped_assignments_do_not_travel():
    found = traffic([torch.tensor([[1, -1], [-1, -1]]), torch.tensor([[-1, 1]])], Placement.blockwise(2, 2))
    assert found == ((1, 0), (1, 0), (0, 0))


def test_counts_alone_cannot_be_deduplicated():
    with pytest.raises(ValueError, match="distinct=True needs expert ids"):
        traffic(COUNTS, Placement.blockwise(4, 2))


def test_micro_batches_of_a_trace():
    trace = moe_lab.data.open("balanced")
    layer = trace.info.layers[0]
    batches = list(micro_batches(trace, layer, 4, 256))
    assert len(batches) == int(trace.valid_T.sum()) // 1024
    assert all(len(ids) == 4 and {t.shape for t in ids} == {(256, trace.top_k)} for ids in batches)
    (first, *_) = micro_batches(trace, layer, 4, 256, shuffle=False)
    recorded = trace.expert_ids_LTK[0][trace.valid_T]
    assert torch.equal(torch.cat(first), recorded[:1024].long())
    with pytest.raises(ValueError, match="layer=99 is not known"):
        next(micro_batches(trace, 99, 4, 256))
    with pytest.raises(ValueError, match="tokens_per_rank=1000000 on ep=4 ranks is 4,000,000 tokens"):
        next(micro_batches(trace, layer, 4, 1_000_000))


def test_a_higher_threshold_pads_more_often():
    trace = moe_lab.data.open("balanced")
    placement = Placement.blockwise(trace.num_experts, 4)
    matrices = [count_matrix(ids, placement) for ids in micro_batches(trace, trace.info.layers[0], 4, 128)]
    points = sweep_threshold(matrices, [0.0, 0.1, 0.3, 10.0])
    assert [p.padded for p in points] == sorted(p.padded for p in points)
    assert points[0].share_padded == 0.0
    assert points[-1].share_padded == 1.0
    by_hand = [worst_overhead(counts) for counts in matrices]
    assert points[1].padded == sum(worst <= 0.1 for worst in by_hand)
    assert points[0].overhead == 0.0 < points[-1].overhead
    with pytest.raises(ValueError, match="matrices is empty"):
        sweep_threshold([], [0.1])


def test_forced_balance_understates_traffic_and_idles_ranks():
    placement = Placement.blockwise(8, 4)
    ids = [torch.tensor([[0, 2], [4, 6]]), *(torch.tensor([[1, 7]]) for _ in range(3))]
    view = forced_view(ids, placement)
    assert view.ranks_per_token == 2.0
    assert view.forced_ranks_per_token == 1.0  # both choices are neighbours on one rank
    assert view.idle_ranks == 2  # two choices a rank fill experts 0 and 1, four 0 to 3
    assert math.isclose(view.forced_straggler_factor, 8 / (10 / 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "sometimes"}, "policy"),
        ({"policy": "adaptive", "threshold": math.nan}, "threshold=nan must be a finite number >= 0"),
        ({"policy": "multiple", "multiple": 0}, "multiple=0 must be an integer >= 1"),
        ({"policy": "capacity", "capacity_factor": -1.0}, "capacity_factor=-1.0 must be a finite number >= 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        overhead(COUNTS, **settings)


def test_another_number_of_ranks_is_refused():
    with pytest.raises(ValueError, match="expert_ids of 1 ranks: must be of ep=2"):
        count_matrix([torch.zeros(1, 1, dtype=torch.int64)], Placement.blockwise(2, 2))
